// Package beneath opens what somebody else names: a path in a container's root,
// in an image, in a request or a config.
//
// A path is resolved inside its root, every ".." and symbolic link included, as
// if the root were "/". What it leads to is first held without being opened
// (O_PATH), then its kind is checked on the descriptor, and only what is of the
// right kind is opened: to open a device or a FIFO has effects, or blocks.
package beneath

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind is what a name may stand for.
type Kind uint32

const (
	File            Kind = unix.S_IFREG
	Directory       Kind = unix.S_IFDIR
	FileOrDirectory Kind = 0
)

// maxLinks is how many symbolic links MkdirAll follows: as many as the kernel.
const maxLinks = 40

// At opens name with every ".." and every symbolic link resolved inside the
// directory dir. The flags are those of open(2). The caller closes the result.
func At(dir int, name string, flags uint64) (int, error) {
	return openat2(dir, name, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// DirAt opens a directory (O_PATH) by a path without any link: with one it is
// ELOOP. The caller closes the result.
func DirAt(dir int, name string) (int, error) {
	return openat2(dir, name, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

func openat2(dir int, name string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			// A rename elsewhere raced with a "..": the kernel wants a retry.
		case errors.Is(err, unix.ENOSYS):
			return -1, fmt.Errorf("cannot resolve %.200q: openat2(2) is missing, Linux 5.6 or later is needed", name)
		default:
			return fd, err
		}
	}
}

// Open opens name below the directory root; "/" is the host. A file is opened
// for reading and must not be larger than max bytes. A directory is only held
// (O_PATH), and so is what FileOrDirectory opens; max means nothing for these.
//
// A missing file is fs.ErrNotExist. The error names the path and the root.
func Open(root, name string, kind Kind, max int64) (*os.File, error) {
	f, err := open(root, name, kind, max)
	if err != nil {
		return nil, fmt.Errorf("cannot open %.200q in %s: %w", name, root, err)
	}
	return f, nil
}

func open(root, name string, kind Kind, max int64) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	held, err := At(dir, name, unix.O_PATH)
	if errors.Is(err, unix.ENOTDIR) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	return openHeld(held, name, kind, max)
}

// FileAt opens a regular file of at most max bytes below an open directory, for reading, by a
// path without any link or "..".
func FileAt(dir *os.File, name string, max int64) (*os.File, error) {
	const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
	held, err := openat2(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW, resolve)
	if err == nil {
		f, oerr := openHeld(held, name, File, max)
		if oerr == nil {
			return f, nil
		}
		err = oerr
	}
	return nil, fmt.Errorf("cannot open %.200q in %s: %w", name, dir.Name(), err)
}

// openHeld opens what held (O_PATH) is, if it is of the right kind. It owns held.
func openHeld(held int, name string, kind Kind, max int64) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(held, &st)
	if err == nil {
		err = check(&st, kind, max)
	}
	if err != nil {
		unix.Close(held)
		return nil, err
	}
	if kind != File {
		return os.NewFile(uintptr(held), name), nil
	}
	defer unix.Close(held)
	// Non-blocking, as somebody may hold a lease of the file.
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", held), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// Else it would be polled. A file system in user space is asked for that, and while it does
	// not answer nothing else in this process is polled.
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func check(st *unix.Stat_t, kind Kind, max int64) error {
	is := Kind(st.Mode & unix.S_IFMT)
	switch {
	case kind == File && is != File:
		return errors.New("it is not a regular file")
	case kind == Directory && is != Directory:
		return errors.New("it is not a directory")
	case is != File && is != Directory:
		return errors.New("it is neither a file nor a directory")
	case kind == File && st.Size > max:
		return fmt.Errorf("it is larger than %d bytes", max)
	}
	return nil
}

// ReadFile reads a regular file of at most max bytes; see Open.
func ReadFile(root, name string, max int64) ([]byte, error) {
	f, err := Open(root, name, File, max)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1)) // it may have grown, and in /proc each has the size 0
	if err == nil && int64(len(b)) > max {
		err = fmt.Errorf("it is larger than %d bytes", max)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %.200q in %s: %w", name, root, err)
	}
	return b, nil
}

// HostFile reads a file of the host that a config or the host's administrator names,
// of at most max bytes; see Open.
func HostFile(name string, max int64) ([]byte, error) {
	name, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	return ReadFile("/", name, max)
}

// MkdirAll walks along name, inside the directory dir, and calls mkdir for each
// component that is no symbolic link: with the open directory that it is in, its
// base name there, and its path from dir, in which no link is left. mkdir makes
// the directory, or finds that it is there. Links are followed also to where
// there is nothing yet, as the kernel would if it had mkdir -p.
func MkdirAll(dir int, name string, mkdir func(parent int, base, path string) error) error {
	todo := strings.Split(name, "/")
	var done []string // components of a path without links and ".."
	for links := 0; len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		switch c {
		case "", ".":
			continue
		case "..":
			done = done[:max(0, len(done)-1)]
			continue
		}
		parent, err := At(dir, path.Join(append([]string{"."}, done...)...), unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		target, err := readlinkat(parent, c)
		if err == nil {
			unix.Close(parent)
			if links++; links > maxLinks {
				return unix.ELOOP
			}
			if strings.HasPrefix(target, "/") {
				done = nil
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		done = append(done, c)
		err = mkdir(parent, c, path.Join(done...))
		unix.Close(parent)
		if err != nil {
			return err
		}
	}
	return nil
}

func readlinkat(dir int, base string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, base, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
