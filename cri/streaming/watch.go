package streaming

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// watch learns from the kernel that a client has gone. Reading alone does not tell it:
// nobody reads while the process does not take its input, and behind bytes that
// nobody takes there is no end to be seen.
type watch struct {
	epoll *os.File

	mu    sync.Mutex
	next  int32
	conns map[int32]*conn
	keys  map[*conn]int32
}

// newWatch starts a watch. It lives as long as the process.
func newWatch() (*watch, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // the runtime waits for it, not a thread
	}
	if err != nil {
		return nil, fmt.Errorf("cannot watch connections: %w", err)
	}
	w := &watch{epoll: os.NewFile(uintptr(fd), "epoll"), conns: map[int32]*conn{}, keys: map[*conn]int32{}}
	go w.run()
	return w, nil
}

func (w *watch) add(c *conn) error {
	w.mu.Lock()
	w.next++
	key := w.next
	w.conns[key], w.keys[c] = c, key
	w.mu.Unlock()
	event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLET, Fd: key}
	err := descriptor.Lend(w.epoll, func(epoll int) error {
		return descriptor.Lend(c.tcp, func(fd int) error {
			return unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &event)
		})
	})
	if err != nil {
		w.remove(c)
		return fmt.Errorf("cannot watch a connection: %w", err)
	}
	return nil
}

// remove forgets a connection. The kernel does so when its descriptor is closed.
func (w *watch) remove(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, w.keys[c])
	delete(w.keys, c)
}

func (w *watch) run() {
	raw, err := w.epoll.SyscallConn()
	if err != nil {
		slog.Error("cannot watch connections", "error", err)
		return
	}
	events := make([]unix.EpollEvent, 64)
	for {
		var n int
		var werr error
		err := raw.Read(func(fd uintptr) bool {
			n, werr = unix.EpollWait(int(fd), events, 0)
			return n > 0 || werr != nil && werr != unix.EINTR
		})
		if err != nil || werr != nil {
			slog.Error("cannot watch connections any more", "error", err, "status", werr)
			return
		}
		for _, e := range events[:n] {
			w.take(e)
		}
	}
}

// take acts on what happened to a connection: it is broken, or the client has closed
// its side, and what it sent before may still be read.
func (w *watch) take(e unix.EpollEvent) {
	w.mu.Lock()
	c := w.conns[e.Fd]
	w.mu.Unlock()
	switch {
	case c == nil:
	case e.Events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
		c.cancel(errGone)
	case e.Events&unix.EPOLLRDHUP != 0:
		time.AfterFunc(halfClosedLimit, func() { c.cancel(errGone) })
	}
}
