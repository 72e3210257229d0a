package streaming

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds on connections, all of them together.
const (
	// maxConns is how many there may be. Each has a few descriptors and some hundred
	// KiB at most, but for those to ports, of which there may be maxForwarded.
	maxConns = 1024
	// maxSilent is how many of them may have shown no token yet. One more, and the
	// oldest of them is closed: whoever has a token shows it at once.
	maxSilent = 128
	// halfClosedLimit is how long a client that has closed its side is taken to be
	// there, while what it sent before is still read.
	halfClosedLimit = 2 * time.Second
	// lingerLimit is how long a client may take to read the last bytes.
	lingerLimit = 5 * time.Second
)

// Why a connection has ended, as the cause of its context.
var (
	errGone = errors.New("the client has closed the connection")
	errIdle = errors.New("nothing was sent or received for the idle timeout")
)

// conns are the connections of a server.
type conns struct {
	watch *watch

	mu     sync.Mutex
	all    map[*conn]struct{}
	silent *list.List // of *conn, the oldest first
	since  time.Time  // of the last end of a connection
}

func newConns() (*conns, error) {
	w, err := newWatch()
	if err != nil {
		return nil, err
	}
	return &conns{watch: w, all: map[*conn]struct{}{}, silent: list.New(), since: time.Now()}, nil
}

// idle says for how long there has been no connection.
func (cs *conns) idle() time.Duration {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(cs.all) > 0 {
		return 0
	}
	return time.Since(cs.since)
}

// listener accepts the connections of a server.
type listener struct {
	net.Listener
	conns *conns
}

// Accept never waits for a client, and never fails because there are too many.
func (l *listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c, err := l.conns.add(nc)
		if err == nil {
			return c, nil
		}
		nc.Close()
	}
}

// add makes a connection one of the server's. On an error it is still the caller's.
func (cs *conns) add(nc net.Conn) (*conn, error) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("a connection of %s is not one of TCP", nc.RemoteAddr().Network())
	}
	c := &conn{Conn: nc, tcp: tcp, owner: cs}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.touch()

	var oldest *conn
	cs.mu.Lock()
	if e := cs.silent.Front(); e != nil && (cs.silent.Len() >= maxSilent || len(cs.all) >= maxConns) {
		oldest = e.Value.(*conn)
		cs.removeLocked(oldest)
	}
	if len(cs.all) >= maxConns {
		cs.mu.Unlock()
		return nil, errors.New("there are too many connections")
	}
	cs.all[c] = struct{}{}
	c.silent = cs.silent.PushBack(c)
	cs.mu.Unlock()

	if oldest != nil {
		oldest.Close()
	}
	if err := cs.watch.add(c); err != nil {
		cs.remove(c)
		return nil, err
	}
	return c, nil
}

func (cs *conns) remove(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.removeLocked(c)
}

func (cs *conns) removeLocked(c *conn) {
	if _, ok := cs.all[c]; !ok {
		return
	}
	delete(cs.all, c)
	cs.since = time.Now()
	if c.silent != nil {
		cs.silent.Remove(c.silent)
		c.silent = nil
	}
}

// conn is a connection of the server, below TLS and HTTP. Its context ends when the
// client has gone, whoever reads or writes at that time; the watch tells it, where
// nobody reads.
type conn struct {
	net.Conn
	tcp    *net.TCPConn
	owner  *conns
	silent *list.Element // while no token was shown; under the owner's lock

	ctx    context.Context
	cancel context.CancelCauseFunc
	active atomic.Int64 // when a byte was sent or received last, in ns of started
	closed sync.Once
}

// started is what times of connections count from: it has a monotonic clock.
var started = time.Now()

func (c *conn) touch() { c.active.Store(int64(time.Since(started))) }

// admit takes note that the client has shown a token.
func (c *conn) admit() {
	c.owner.mu.Lock()
	defer c.owner.mu.Unlock()
	if c.silent != nil {
		c.owner.silent.Remove(c.silent)
		c.silent = nil
	}
}

// Read reads. An error that is no deadline ends the connection's context.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.took(n, err)
	return n, err
}

// Write writes. An error that is no deadline ends the connection's context.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.took(n, err)
	return n, err
}

// writeTwo writes two pieces with one system call.
func (c *conn) writeTwo(a, b []byte) error {
	pieces := net.Buffers{a, b}
	n, err := pieces.WriteTo(c.tcp)
	c.took(int(n), err)
	return err
}

func (c *conn) took(n int, err error) {
	if n > 0 {
		c.touch()
	}
	switch {
	case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
	case errors.Is(err, io.EOF):
		c.cancel(errGone)
	default:
		c.cancel(fmt.Errorf("%w: %w", errGone, err))
	}
}

// Close closes the connection, and ends its context.
func (c *conn) Close() error {
	var err error
	c.closed.Do(func() {
		c.cancel(errGone)
		c.owner.watch.remove(c)
		c.owner.remove(c)
		err = c.Conn.Close()
	})
	return err
}

// finish closes the connection once the client has read what was sent. A close while
// bytes of the client are unread would have the kernel throw away what is under way to
// it, such as the exit code.
func (c *conn) finish() {
	defer c.Close()
	c.tcp.CloseWrite()
	c.tcp.SetReadDeadline(time.Now().Add(lingerLimit))
	io.Copy(io.Discard, struct{ io.Reader }{c.tcp})
}

// endWhenIdle ends the connection when nothing was sent or received for a time, until
// stop is called.
func (c *conn) endWhenIdle(limit time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(c.ctx)
	go func() {
		for left := limit; left > 0; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(left):
				left = limit - (time.Since(started) - time.Duration(c.active.Load()))
			}
		}
		c.cancel(errIdle)
	}()
	return cancel
}
