package logfile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrPath says that a log path is not one below its directory.
	ErrPath = errors.New("not a path below the log directory")
	// ErrNotRegular says that something else than a file has the log's name.
	ErrNotRegular = errors.New("not a regular file")

	errReplaced = errors.New("the new file was removed or replaced meanwhile; try once more")
)

const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// opened is an open log file, not yet in use.
type opened struct {
	fd    int
	inode uint64
}

// check says why nothing may be written to the file, if so: whoever has asked for it has given
// up, or has put another file in its place.
func (o opened) check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(o.fd, &st); err != nil {
		return err
	}
	if st.Nlink == 0 {
		return errReplaced
	}
	return nil
}

// open opens directory/path for appending, and creates it if it is missing. If it
// fails it leaves no file behind that it created.
func open(directory, path string) (o opened, err error) {
	err = inParent(directory, path, false, func(dir int, name string) (err error) {
		o, err = openFile(dir, name)
		return err
	})
	return o, err
}

// prepare makes the directories below directory that path needs, and finds out whether
// a log may have the name. It leaves the file as it is, there or not.
func prepare(directory, path string) error {
	return inParent(directory, path, true, func(dir int, name string) error {
		fd, err := holdRegular(dir, name)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
}

// inParent calls f with the directory that path is in, and the name there.
//
// A pod can have /var/log mounted and put there what it likes while this runs.
// So each name is looked up in the descriptor of the directory before it, and
// nothing that is a symbolic link is followed.
func inParent(directory, path string, mkdirs bool, f func(dir int, name string) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot open the log %s below %s: %w", path, directory, err)
		}
	}()
	names, err := split(path)
	if err != nil {
		return err
	}
	dir, err := retry(func() (int, error) {
		return unix.Open(directory, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	defer func() { unix.Close(dir) }()
	last := len(names) - 1
	for _, name := range names[:last] {
		next, err := openDir(dir, name, mkdirs)
		if err != nil {
			return fmt.Errorf("directory %s: %w", name, err)
		}
		unix.Close(dir)
		dir = next
	}
	return f(dir, names[last])
}

// split gives the names that a path is made of.
func split(path string) ([]string, error) {
	names := strings.Split(path, "/")
	for _, name := range names {
		if !filepath.IsLocal(name) || name == "." || strings.ContainsRune(name, 0) {
			return nil, ErrPath
		}
	}
	return names, nil
}

func openDir(parent int, name string, mkdir bool) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: beneath}
	fd, err := openat(parent, name, how)
	if !mkdir || !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	if err := unix.Mkdirat(parent, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	return openat(parent, name, how)
}

func openFile(dir int, name string) (opened, error) {
	const tries = 10 // for a file that comes and goes between the two opens
	var fd int
	var created bool
	err := error(unix.ENOENT)
	for i := 0; i < tries && errors.Is(err, unix.ENOENT); i++ {
		fd, err = openRegular(dir, name)
		if !errors.Is(err, unix.ENOENT) {
			break
		}
		how := unix.OpenHow{Flags: flags | unix.O_CREAT | unix.O_EXCL, Mode: 0o640, Resolve: beneath}
		fd, err = openat(dir, name, how)
		created = err == nil
		if errors.Is(err, unix.EEXIST) {
			err = unix.ENOENT
		}
	}
	if err != nil {
		return opened{}, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil { // back to blocking: a FUSE file system sees O_NONBLOCK
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND)
	}
	if err != nil {
		unix.Close(fd)
		if created {
			unix.Unlinkat(dir, name, 0)
		}
		return opened{}, err
	}
	return opened{fd: fd, inode: st.Ino}, nil
}

const flags = unix.O_WRONLY | unix.O_APPEND | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY

// openRegular opens a file that is there.
func openRegular(dir int, name string) (int, error) {
	held, err := holdRegular(dir, name)
	if err != nil {
		return -1, err
	}
	defer unix.Close(held)
	return retry(func() (int, error) { return unix.Open(fmt.Sprintf("/proc/self/fd/%d", held), flags, 0) })
}

// holdRegular gives a descriptor (O_PATH) of a file that is there. What it is, is found
// out before it is opened: to open a device has effects, and to open a FIFO blocks.
func holdRegular(dir int, name string) (int, error) {
	held, err := openat(dir, name, unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: beneath})
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(held, &st); err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			return held, nil
		case unix.S_IFDIR:
			err = unix.EISDIR
		default:
			err = ErrNotRegular
		}
	}
	unix.Close(held)
	return -1, err
}

func openat(dir int, name string, how unix.OpenHow) (int, error) {
	return retry(func() (int, error) { return unix.Openat2(dir, name, &how) })
}

// retry repeats what a signal broke off, and openat2's own "try again" of a
// lookup that raced with a rename.
func retry(f func() (int, error)) (int, error) {
	for range 100 {
		n, err := f()
		if err != unix.EINTR && err != unix.EAGAIN {
			return n, err
		}
	}
	return f()
}
