package shim

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
)

// calls counts the calls under way and notes when a connection was last written
// to, so that a shim does not end between a handler's return and its answer. The
// server's own Shutdown is no help: it takes a connection whose only call is a
// long poll for an idle one and cuts it.
type calls struct {
	mu      sync.Mutex
	open    int           // handlers that run
	conns   int           // connections that are open
	last    time.Time     // when a handler returned last, or an answer was written
	changed chan struct{} // closed at the next change; nil if nobody waits
}

func (c *calls) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// count is the interceptor that sees calls come in.
func (c *calls) count(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	c.change(func() { c.open++ })
	defer c.change(func() { c.open, c.last = c.open-1, time.Now() })
	return m(ctx, u)
}

// quiet is how long after the last answer a connection stays open, unless the
// client closes it first: a client that sees the end of the connection before it
// has read the answer may take the call for failed.
const quiet = 50 * time.Millisecond

// wait returns when every handler has returned and its answer was written, and
// the clients have closed their connections or had the time to read the answer;
// or after the limit.
func (c *calls) wait(limit time.Duration) {
	end := time.Now().Add(limit)
	for {
		c.mu.Lock()
		until := end
		if c.open == 0 {
			until = c.last.Add(quiet)
		}
		over := c.open == 0 && c.conns == 0
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		if over || !time.Now().Before(until) {
			return
		}
		wait(changed, time.After(time.Until(until)))
	}
}

// listener gives connections that note when they are written to.
func (c *calls) listener(l net.Listener) net.Listener { return &notingListener{l, c} }

type notingListener struct {
	net.Listener
	calls *calls
}

func (l *notingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := l.calls
	c.change(func() { c.conns++ })
	return &notingConn{conn, c, sync.OnceFunc(func() { c.change(func() { c.conns-- }) })}, nil
}

type notingConn struct {
	net.Conn
	calls  *calls
	closed func()
}

func (c *notingConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func (c *notingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.calls.change(func() { c.calls.last = time.Now() })
	return n, err
}
