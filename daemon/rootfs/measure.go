package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Bounds of one measurement. A container makes as many files as it likes.
const (
	maxMeasured  = 1 << 22 // files and directories
	maxPending   = 1 << 18 // directories that have been seen and not visited
	maxHardLinks = 1 << 16 // files with several names that are told apart
)

// ErrUnmeasured says that a tree has more than was counted.
var ErrUnmeasured = errors.New("there is more than was counted")

// Measure counts what is in a directory, the directory included, as it is on the disk:
// holes take nothing, and a file with several names is one. It reads the disk, and is
// for the background: what it costs grows with the number of files.
//
// Somebody may be changing the tree. What comes or goes meanwhile may be missed and is
// no error. With ErrUnmeasured, or when ctx ends, the usage is what was counted so far.
func Measure(ctx context.Context, dir string) (Usage, error) {
	m := measurement{linked: map[uint64]bool{}}
	defer m.close()
	var st unix.Stat_t
	if err := m.enter(dir, &st); err != nil {
		return m.usage, fmt.Errorf("cannot measure %s: %w", dir, err)
	}
	m.add(&st)
	for len(m.levels) > 0 {
		if err := ctx.Err(); err != nil {
			return m.usage, err
		}
		if err := m.step(); err != nil {
			return m.usage, fmt.Errorf("cannot measure all of %s: %w", dir, err)
		}
	}
	return m.usage, nil
}

// measurement goes through a tree with one descriptor, as trees can be nested deeper
// than a path can be long.
type measurement struct {
	usage   Usage
	device  uint64
	linked  map[uint64]bool // inodes of files with several names
	at      *os.File        // the directory of the last level
	levels  []measuredDir
	pending int // directories below all levels that are still to be visited
}

type measuredDir struct {
	inode uint64
	below []string // still to be visited
}

func (m *measurement) close() {
	if m.at != nil {
		m.at.Close()
	}
}

// step visits the next directory below, or goes back up.
func (m *measurement) step() error {
	top := &m.levels[len(m.levels)-1]
	if n := len(top.below); n > 0 {
		name := top.below[n-1]
		top.below = top.below[:n-1]
		m.pending--
		var st unix.Stat_t
		switch err := m.enter(name, &st); {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return nil // it has gone, or is no directory any more
		case err != nil:
			return err
		}
		return nil
	}
	if m.levels = m.levels[:len(m.levels)-1]; len(m.levels) == 0 {
		return nil
	}
	var st unix.Stat_t
	above, err := m.open("..", &st)
	if err != nil {
		return err
	}
	if st.Ino != m.levels[len(m.levels)-1].inode {
		above.Close()
		return fmt.Errorf("%w: a directory was moved", ErrUnmeasured)
	}
	m.close()
	m.at = above
	return nil
}

// open opens a directory right below or above the last level, or the first one.
func (m *measurement) open(name string, st *unix.Stat_t) (*os.File, error) {
	at := unix.AT_FDCWD
	if m.at != nil {
		at = int(m.at.Fd())
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	if err := unix.Fstat(fd, st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "fstat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// enter makes a directory the last level, and counts what is right below it.
func (m *measurement) enter(name string, st *unix.Stat_t) error {
	dir, err := m.open(name, st)
	if err != nil {
		return err
	}
	m.close()
	m.at = dir
	if len(m.levels) == 0 {
		m.device = st.Dev
	}
	m.levels = append(m.levels, measuredDir{inode: st.Ino})
	for {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := m.count(name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// count counts what is right below the last level. Another file system is none of it.
func (m *measurement) count(name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(m.at.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return &os.PathError{Op: "fstatat", Path: name, Err: err}
	}
	if st.Dev != m.device {
		return nil
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if !isDir && st.Nlink > 1 {
		if m.linked[st.Ino] {
			return nil
		}
		if len(m.linked) < maxHardLinks {
			m.linked[st.Ino] = true
		}
	}
	m.add(&st)
	if isDir {
		top := &m.levels[len(m.levels)-1]
		top.below = append(top.below, name)
		m.pending++
	}
	if m.usage.Inodes > maxMeasured || m.pending > maxPending {
		return ErrUnmeasured
	}
	return nil
}

func (m *measurement) add(st *unix.Stat_t) {
	m.usage.Inodes++
	m.usage.Bytes += uint64(st.Blocks) * 512
}
