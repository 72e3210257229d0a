package state

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxNested is how many directories RemoveTree has open at most. A container
// can nest its directories as deep as it likes, and os.RemoveAll keeps one open
// for each level: the descriptors of the whole daemon.
const maxNested = 64

// RemoveTree removes path and all below it; what is not there is no error. It
// follows no link. A directory that lies too deep is moved up to the top first.
func RemoveTree(path string) error {
	err := unix.Unlink(path)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	top, err := os.OpenFile(path, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	t := tree{top: top}
	for again := true; again && err == nil; {
		moved := t.moved
		err = t.empty(top, 1)
		again = t.moved != moved // into top, which may have been listed before
		if again && err == nil {
			_, err = top.Seek(0, io.SeekStart)
		}
	}
	if err == nil {
		err = os.Remove(path)
	}
	return err
}

// tree is one that is being removed.
type tree struct {
	top   *os.File
	moved int // directories that came up to top
}

func (t *tree) empty(dir *os.File, depth int) error {
	for {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := t.remove(dir, name, depth); err != nil {
				return fmt.Errorf("%s/%s: %w", dir.Name(), name, err)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tree) remove(parent *os.File, name string, depth int) error {
	at := int(parent.Fd())
	err := unix.Unlinkat(at, name, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) { // Linux says the former, POSIX the latter
		err = unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
	}
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST):
		return err
	case depth >= maxNested:
		return t.moveUp(at, name)
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	if err := t.empty(dir, depth+1); err != nil {
		return err
	}
	return unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
}

// moveUp gives a directory a name in top that is free: what a removal that was
// cut short had moved may still be there.
func (t *tree) moveUp(at int, name string) error {
	for {
		t.moved++
		err := unix.Renameat2(at, name, int(t.top.Fd()), ".deep-"+strconv.Itoa(t.moved), unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
}
