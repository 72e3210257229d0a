package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// OOMKills counts the processes that the OOM killer has killed, whichever limit
// made it: v2 memory.events, v1 memory.oom_control. Once the cgroup is removed
// it is an error.
//
// v2 keeps the sum for what is below, v1 does not: there it may fall when a
// cgroup below is removed.
func (c Set) OOMKills() (sum uint64, err error) {
	dir, file, ok := c.oomFile()
	if !ok {
		return 0, fmt.Errorf("cannot count OOM kills: %w", ErrNone)
	}
	if sum, err = oomKills(os.ReadFile(filepath.Join(dir, file))); err != nil {
		return 0, fmt.Errorf("cannot count OOM kills in %s: %w", dir, err)
	}
	if file == eventsName {
		return sum, nil
	}
	sum = 0
	err = walk(dir, func(f *os.File) error {
		n, err := oomKills(read(f, file))
		sum += n
		return err
	}, nil)
	if err != nil {
		return 0, fmt.Errorf("cannot count OOM kills below %s: %w", dir, err)
	}
	return sum, nil
}

func oomKills(file []byte, err error) (uint64, error) {
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(file)) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == "oom_kill" {
			return strconv.ParseUint(v, 10, 64)
		}
	}
	return 0, errors.New("the kernel does not tell oom_kill")
}

func (c Set) oomFile() (dir, file string, ok bool) {
	if dir, ok := c.dir("memory"); ok {
		return dir, "memory.oom_control", true
	}
	dir, ok = c.dir("")
	return dir, eventsName, ok
}

// OOMParent is the cgroup above, if its counter includes this one's: on v2,
// below the root. It tells of a kill in a cgroup that systemd removed before
// its own counter could be read.
func (c Set) OOMParent() (Set, bool) {
	_, file, ok := c.oomFile()
	if !ok || file != eventsName {
		return nil, false
	}
	parent := Set{"": filepath.Dir(c[""])}
	_, _, ok = parent.oomFile()
	return parent, ok
}

const eventsName = "memory.events"

// OOMWatch tells when the OOM counter may have risen. One goroutine waits, another one may close it.
type OOMWatch struct {
	// Early says that it may also be just about to rise when Wait returns: v1 tells that memory is
	// short before it picks a victim.
	Early bool

	ready *os.File // an epoll(7) instance that watches fds, and that the runtime's own one watches
	fds   []int    // owned; they are there to be watched, and nothing reads them
}

// WatchOOM watches the counter and that of OOMParent, or neither.
//
// On v2 an open file of a cgroup is enough, because the kernel wakes whoever polls it at each change. An
// inotify(7) instance is not: by default root may have 128 of them, for all its programs together.
func (c Set) WatchOOM() (*OOMWatch, error) {
	dir, file, ok := c.oomFile()
	if !ok {
		return nil, fmt.Errorf("cannot watch for OOM: %w", ErrNone)
	}
	w, err := newOOMWatch()
	switch {
	case err != nil:
	case file == eventsName:
		err = w.addFile(filepath.Join(dir, file))
		if parent, ok := c.OOMParent(); ok && err == nil {
			dir, file, _ := parent.oomFile()
			err = w.addFile(filepath.Join(dir, file))
		}
	default:
		w.Early = true
		err = w.addEventfd(dir, filepath.Join(dir, file))
	}
	if err != nil {
		w.Close()
		return nil, fmt.Errorf("cannot watch the OOM counter of %s: %w", dir, err)
	}
	return w, nil
}

func newOOMWatch() (*OOMWatch, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	unix.SetNonblock(fd, true)
	w := &OOMWatch{ready: os.NewFile(uintptr(fd), "epoll")}
	// This fails if the runtime could not add it to its own epoll instance: a Wait would have nothing to wake it.
	if err := w.ready.SetReadDeadline(time.Time{}); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// addFile adds a file of a cgroup that the kernel polls for.
func (w *OOMWatch) addFile(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	return w.add(fd)
}

// addEventfd adds an eventfd(2) that v1 writes to.
func (w *OOMWatch) addEventfd(dir, path string) error {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	if err := w.add(fd); err != nil {
		return err
	}
	return registerEventfd(dir, path, fd)
}

// add watches a descriptor, which is the watch's also after an error. It is always readable; edge-triggered, it
// counts as ready once for each change, whether or not anybody reads it.
func (w *OOMWatch) add(fd int) error {
	w.fds = append(w.fds, fd)
	return descriptor.Lend(w.ready, func(epoll int) error {
		event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
		return unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &event)
	})
}

// Wait returns when the counter may have risen since the last Wait; the first one may return at once. The only
// error is os.ErrClosed.
func (w *OOMWatch) Wait() error {
	raw, err := w.ready.SyscallConn()
	if err == nil {
		err = raw.Read(func(epoll uintptr) bool {
			var events [2]unix.EpollEvent
			n, _ := unix.EpollWait(int(epoll), events[:], 0)
			return n > 0
		})
	}
	if err != nil {
		return os.ErrClosed
	}
	return nil
}

// Close ends a Wait. nil is closed.
func (w *OOMWatch) Close() {
	if w == nil {
		return
	}
	w.ready.Close()
	for _, fd := range w.fds {
		unix.Close(fd)
	}
}

// registerEventfd: see "event_control" in the kernel's cgroup-v1/memory.rst.
func registerEventfd(dir, path string, eventfd int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return descriptor.Lend(f, func(fd int) error {
		line := fmt.Appendf(nil, "%d %d", eventfd, fd)
		return os.WriteFile(filepath.Join(dir, "cgroup.event_control"), line, 0)
	})
}
