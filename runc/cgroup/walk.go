package cgroup

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxWalk bounds the cgroups that a walk sees: a process inside can make more
// for as long as it may.
const maxWalk = 1 << 17

// errStop ends a walk early, without an error.
var errStop = errors.New("stop")

// walk visits a cgroup and all below it: enter before those below, leave, if it
// is not nil, after them, with the directory above. It goes by descriptors, one
// at a time, because cgroups can be nested deeper than a path can be long.
// Cgroups that come or go meanwhile may be missed and are no error.
func walk(dir string, enter func(*os.File) error, leave func(above *os.File, name string) error) error {
	type level struct {
		name  string
		below []string // still to be visited
	}
	var stack []level
	var at *os.File
	defer func() {
		if at != nil {
			at.Close()
		}
	}()
	seen := 0
	descend := func(name string) error {
		f, err := openBelow(at, name)
		if err != nil {
			return err
		}
		if at != nil {
			at.Close()
		}
		at = f
		if seen++; seen > maxWalk {
			return fmt.Errorf("more than %d cgroups below %s", maxWalk, dir)
		}
		if err := enter(at); ignoreGone(err) != nil {
			return err
		}
		below, err := names(at)
		stack = append(stack, level{name, below})
		return err
	}
	err := ignoreGone(descend(dir))
	for err == nil && len(stack) > 0 {
		top := &stack[len(stack)-1]
		if n := len(top.below); n > 0 {
			name := top.below[n-1]
			top.below = top.below[:n-1]
			err = ignoreGone(descend(name))
			continue
		}
		name := top.name
		if stack = stack[:len(stack)-1]; len(stack) == 0 {
			break
		}
		var above *os.File
		// A cgroup never moves to another parent, not even a removed one.
		if above, err = openBelow(at, ".."); err != nil {
			return ignoreGone(err)
		}
		at.Close()
		at = above
		if leave != nil {
			err = leave(at, name)
		}
	}
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// openBelow opens a directory, below another one unless that is nil.
func openBelow(at *os.File, name string) (*os.File, error) {
	dirfd := unix.AT_FDCWD
	if at != nil {
		dirfd = int(at.Fd())
	}
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// names are those of the cgroups right below.
func names(dir *os.File) ([]string, error) {
	entries, err := dir.ReadDir(maxWalk)
	if err != nil && err != io.EOF {
		return nil, ignoreGone(err)
	}
	var below []string
	for _, e := range entries {
		if e.IsDir() {
			below = append(below, e.Name())
		}
	}
	return below, nil
}

// read and write are for the small files of a cgroup.
func read(dir *os.File, name string) ([]byte, error) {
	f, err := openFile(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func write(dir *os.File, name, value string) error {
	f, err := openFile(dir, name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

func openFile(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
