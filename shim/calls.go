package shim

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
)

// calls counts the calls that have come in and the answers that have left, so
// that a shim does not end between a handler's return and its answer. The
// server's own Shutdown is no help: it takes a connection whose only call is a
// long poll for an idle one and cuts it.
type calls struct {
	mu      sync.Mutex
	open    int
	conns   int
	last    time.Time     // when an answer left last
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
	resp, err := m(ctx, u)
	if ctx.Err() == context.Canceled { // the connection has gone: no answer will leave
		c.answered()
	}
	return resp, err
}

func (c *calls) answered() {
	// A malformed request is answered without having been counted.
	c.change(func() { c.open, c.last = max(0, c.open-1), time.Now() })
}

// settle is how long after the last answer a connection stays open, unless the
// client closes it first: one that sees the end of the connection before it has
// taken the answer up may take the call for failed.
const settle = 20 * time.Millisecond

// wait returns when every call has been answered and the clients have had the
// time to take that up, or after the limit.
func (c *calls) wait(limit time.Duration) {
	end := time.Now().Add(limit)
	for {
		c.mu.Lock()
		until := end
		if c.open == 0 {
			until = c.last.Add(settle)
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

// listener gives connections that see answers leave.
func (c *calls) listener(l net.Listener) net.Listener { return &countingListener{l, c} }

type countingListener struct {
	net.Listener
	calls *calls
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.calls.change(func() { l.calls.conns++ })
	c := &countingConn{Conn: conn, calls: l.calls}
	c.closed = sync.OnceFunc(func() { l.calls.change(func() { l.calls.conns-- }) })
	return c, nil
}

// countingConn follows the messages that the server writes, one at a time: a
// header of ten bytes, of which four are the length of the rest.
type countingConn struct {
	net.Conn
	calls  *calls
	left   int // of the message being written
	closed func()
}

func (c *countingConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func (c *countingConn) Write(b []byte) (int, error) {
	const header = 10
	n, err := c.Conn.Write(b)
	if c.left == 0 && n >= header {
		c.left = header + int(binary.BigEndian.Uint32(b))
	}
	if c.left -= n; c.left <= 0 {
		c.left = 0
		c.calls.answered()
	}
	return n, err
}
