package checkpoint

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// tempPrefix begins the names that only an Output makes.
const tempPrefix = ".holdfast-"

// Output is a file that has no name until it is complete: it goes with the process that
// writes it. Then it has two: the one that was asked for, and one that nobody else makes. As
// long as it has the second, it can be told from all that has come to the first. Its mode is
// 0600. It has one user.
type Output struct {
	*os.File
	At records.File

	dir *os.File
}

// Directory opens a directory of the host that a request names. Its own path is resolved as
// the host's administrator has laid it out; nothing in it is ever followed. The caller
// closes the result.
func Directory(path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, kind.Errorf(kind.Invalid, "%.200q is not absolute", path)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "cannot open the directory %.200q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Create begins a file that is to have this path, at which nothing must be. Errors that are
// the request's are of the kind kind.Invalid, kind.Exists or kind.State.
func Create(path string) (*Output, error) {
	name := filepath.Base(path)
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || name == "/" {
		return nil, kind.Errorf(kind.Invalid, "%.200q is no absolute path of a file in its shortest form", path)
	}
	dir, err := Directory(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return CreateIn(dir, name)
}

// CreateIn is Create for a name in an open directory, which stays the caller's.
func CreateIn(dir *os.File, name string) (*Output, error) {
	own, err := descriptor.Dup(dir)
	if err != nil {
		return nil, err
	}
	o, err := createIn(own, name)
	if err != nil {
		own.Close()
		return nil, err
	}
	o.dir = own
	return o, nil
}

func createIn(dir *os.File, name string) (*Output, error) {
	path := filepath.Join(dir.Name(), name)
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil:
		return nil, kind.Errorf(kind.Exists, "%.200q exists", path)
	case errors.Is(err, unix.ENAMETOOLONG):
		return nil, kind.Errorf(kind.Invalid, "%.200q: %w", path, err)
	case !errors.Is(err, unix.ENOENT):
		return nil, kind.As(kind.Unavailable, fmt.Errorf("cannot look at %.200q: %w", path, err))
	}
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EROFS) {
		return nil, kind.Errorf(kind.State, "cannot make a file without a name in %s (O_TMPFILE): %w", dir.Name(), err)
	}
	if err != nil {
		return nil, kind.As(kind.Unavailable, fmt.Errorf("cannot make a file in %s: %w", dir.Name(), err))
	}
	f := os.NewFile(uintptr(fd), path)
	if err := f.Chmod(0o600); err != nil { // whatever the umask
		f.Close()
		return nil, kind.As(kind.Unavailable, fmt.Errorf("cannot make %.200q: %w", path, err))
	}
	return &Output{File: f, At: records.File{Path: path, Own: tempPrefix + rand.Text()}}, nil
}

// Commit gives the file its names, when all of it is on the disk. What has come there
// meanwhile stays, and is kind.Exists. Remove takes away the second name, or both.
func (o *Output) Commit() error {
	err := o.Sync()
	for _, name := range []string{o.At.Own, filepath.Base(o.At.Path)} {
		if err == nil {
			err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", o.Fd()),
				int(o.dir.Fd()), name, unix.AT_SYMLINK_FOLLOW)
		}
	}
	if errors.Is(err, unix.EEXIST) {
		return kind.Errorf(kind.Exists, "%.200q has come into being meanwhile", o.At.Path)
	}
	if err == nil {
		err = o.dir.Sync()
	}
	if err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot write %.200q: %w", o.At.Path, err))
	}
	return nil
}

// Close ends the use of it. Without a Commit nothing is left of it.
func (o *Output) Close() error { return errors.Join(o.File.Close(), o.dir.Close()) }

// Remove removes a file that an Output has made, or was to make; of one that is kept only the
// name that is our own. A file that has come to its path since is not meant. Where there is
// no such directory any more there is nothing to remove.
func Remove(f records.File) error {
	dir, err := Directory(filepath.Dir(f.Path))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	// As long as the file has our name, no other one has its inode number.
	var own, there unix.Stat_t
	err = unix.Fstatat(int(dir.Fd()), f.Own, &own, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	name := filepath.Base(f.Path)
	if err == nil && !f.Kept && unix.Fstatat(int(dir.Fd()), name, &there, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		there.Dev == own.Dev && there.Ino == own.Ino {
		err = unix.Unlinkat(int(dir.Fd()), name, 0)
	}
	if err == nil || errors.Is(err, unix.ENOENT) {
		err = unix.Unlinkat(int(dir.Fd()), f.Own, 0)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot remove %.200q, or its other name %s: %w", f.Path, f.Own, err)
	}
	return nil
}
