package rootfs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

// openDir opens a directory of the layer. The caller closes it.
func (x *extractor) openDir(name string) (int, error) {
	return beneath.At(x.root, name, unix.O_PATH|unix.O_DIRECTORY)
}

// maxLinked is how long the path of a directory may be that was reached by a
// symbolic link, in bytes. A link to a directory below a link makes trees deeper
// than any path can tell, and to delete such a tree takes an fd for each level.
const maxLinked = unix.PathMax / 2

// openShallow is openDir for a directory that something is going to be put in.
func (x *extractor) openShallow(name string) (int, error) {
	fd, err := beneath.DirAt(x.root, name)
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
		if err = beneath.MkdirAll(x.root, name, x.makeDir); err == nil {
			fd, err = x.openShallow(name)
		}
	}
	if err != nil {
		return -1, fmt.Errorf("cannot open its directory: %w", err)
	}
	x.parentName, x.parent = name, fd
	return fd, nil
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
