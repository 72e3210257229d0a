package cgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

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
	w := walker{enter: enter}
	defer w.close()
	err := ignoreGone(w.descend(dir))
	for err == nil && len(w.stack) > 0 {
		top := &w.stack[len(w.stack)-1]
		if n := len(top.below); n > 0 {
			name := top.below[n-1]
			top.below = top.below[:n-1]
			err = ignoreGone(w.descend(name))
			continue
		}
		name := top.name
		if w.stack = w.stack[:len(w.stack)-1]; len(w.stack) == 0 {
			break
		}
		// A cgroup never moves to another parent, not even a removed one.
		above, aerr := openBelow(w.at, "..")
		if aerr != nil {
			return ignoreGone(aerr)
		}
		w.close()
		w.at = above
		if leave != nil {
			err = leave(above, name)
		}
	}
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

type walker struct {
	enter func(*os.File) error
	at    *os.File // the cgroup that is visited; nil before the first
	stack []level  // from the top down to it
	seen  int
}

type level struct {
	name  string
	below []string // still to be visited
}

func (w *walker) close() {
	if w.at != nil {
		w.at.Close()
	}
}

// descend enters a cgroup right below, or the first one.
func (w *walker) descend(name string) error {
	f, err := openBelow(w.at, name)
	if err != nil {
		return err
	}
	w.close()
	w.at = f
	if w.seen++; w.seen > maxWalk {
		return fmt.Errorf("more than %d cgroups", maxWalk)
	}
	// It counts as visited whatever comes: the way back leads through it.
	w.stack = append(w.stack, level{name: name})
	if err := w.enter(f); ignoreGone(err) != nil {
		return err
	}
	below, err := names(f)
	w.stack[len(w.stack)-1].below = below
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
	// Each directory below has a link to it, "..", and the kernel counts them here.
	if st, err := dir.Stat(); err == nil && st.Sys().(*syscall.Stat_t).Nlink == 2 {
		return nil, nil
	}
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
