package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// openIn opens a path with every ".." and every symbolic link resolved inside
// root, as if root were "/".
func openIn(root int, name string, flags uint64) (int, error) {
	return openat2(root, name, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// openBeneath opens a directory by a path without any link: with one it is ELOOP.
func openBeneath(root int, name string) (int, error) {
	return openat2(root, name, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

func openat2(root int, name string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for {
		fd, err := unix.Openat2(root, name, &how)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			// A rename elsewhere raced with a ".."; the kernel wants a retry.
		case errors.Is(err, unix.ENOSYS):
			return -1, fmt.Errorf("cannot resolve %q: openat2(2) is missing, Linux 5.6 or later is needed", name)
		default:
			return fd, err
		}
	}
}

// ReadIn reads a regular file of at most max bytes in a root that may be
// hostile: path, and every symbolic link on it, is resolved inside root.
// A missing file is fs.ErrNotExist.
func ReadIn(root, name string, max int64) (_ []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot read %s in %s: %w", name, root, err)
		}
	}()
	rootFd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(rootFd)
	// O_PATH first: opening a device or a fifo for reading has effects.
	p, err := openIn(rootFd, name, unix.O_PATH)
	if errors.Is(err, unix.ENOTDIR) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := unix.Fstat(p, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", p))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err == nil && int64(len(b)) > max {
		err = fmt.Errorf("larger than %d bytes", max)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// openDir opens a directory of the layer. The caller closes it.
func (x *extractor) openDir(name string) (int, error) {
	return openIn(x.root, name, unix.O_PATH|unix.O_DIRECTORY)
}

// maxLinked is how long the path of a directory may be that was reached by a
// symbolic link, in bytes. A link to a directory below a link makes trees deeper
// than any path can tell, and to delete such a tree takes an fd for each level.
const maxLinked = unix.PathMax / 2

// openShallow is openDir for a directory that something is going to be put in.
func (x *extractor) openShallow(name string) (int, error) {
	fd, err := openBeneath(x.root, name)
	if !errors.Is(err, unix.ELOOP) {
		return fd, err
	}
	if fd, err = x.openDir(name); err != nil {
		return -1, err
	}
	root, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", x.root))
	if err == nil {
		var at string
		at, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err == nil && len(at)-len(root) > maxLinked {
			err = unix.ENAMETOOLONG
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (x *extractor) forgetParent() {
	if x.parent != x.root {
		unix.Close(x.parent)
	}
	x.parentName, x.parent = ".", x.root
}

// openParent opens the directory that an entry goes into, making it where the
// archive has no entry for it. It stays open until the next call.
func (x *extractor) openParent(name string) (int, error) {
	if name == x.parentName {
		return x.parent, nil
	}
	x.forgetParent()
	if name == "." {
		return x.root, nil
	}
	fd, err := x.openShallow(name)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		if err = x.makeDirs(name); err == nil {
			fd, err = x.openShallow(name)
		}
	}
	if err != nil {
		return -1, fmt.Errorf("cannot open its directory: %w", err)
	}
	x.parentName, x.parent = name, fd
	return fd, nil
}

// makeDirs makes the directories of name that are missing, following symbolic
// links inside the root also to where there is nothing yet, as the kernel
// would if it had mkdir -p. It may only be called without a remembered parent.
func (x *extractor) makeDirs(name string) error {
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
		parent, err := x.openDir(path.Join(append([]string{"."}, done...)...))
		if err != nil {
			return err
		}
		target, err := readlinkat(parent, c)
		if err == nil {
			unix.Close(parent)
			if links++; links > 40 {
				return unix.ELOOP
			}
			if strings.HasPrefix(target, "/") {
				done = nil
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		done = append(done, c)
		err = x.makeDir(parent, c, path.Join(done...))
		unix.Close(parent)
		if err != nil {
			return err
		}
	}
	return nil
}

// makeDir makes one directory without an entry. A file in its place is an
// error; a whiteout is not.
func (x *extractor) makeDir(parent int, base, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	there := err == nil
	if there && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	if there && !isWhiteout(&st) {
		return fmt.Errorf("%w: %.200q is not a directory", ErrBadLayer, name)
	}
	fd, err := x.ensureDir(parent, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Whatever the umask, or a setgid bit of the directory above.
	if err := errors.Join(unix.Fchown(fd, 0, 0), unix.Fchmod(fd, 0o755)); err != nil {
		return err
	}
	if there {
		return nil // hidden by the whiteout, the layers below have no say
	}
	return x.imply(fd, name)
}

func readlinkat(dir int, base string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, base, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
