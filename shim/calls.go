package shim

import (
	"context"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
)

// calls counts the calls under way and notes when a connection was last written
// to, so that a shim does not end between a handler's return and its answer. The
// server's own Shutdown is no help: it takes a connection whose only call is a
// long poll for an idle one and cuts it.
//
// It also bounds what all clients together can make the shim hold; see conn.
type calls struct {
	slots chan struct{} // full while as many connections as may be are open
	log   *slog.Logger

	mu      sync.Mutex
	open    int                // handlers that run
	served  int                // calls, since the start
	conns   map[*conn]struct{} // connections that are open
	held    share              // what the connections hold, but for those that were cut
	last    time.Time          // when a handler returned last, or an answer was written
	changed chan struct{}      // closed at the next change; nil if nobody waits
}

func newCalls(log *slog.Logger) *calls {
	return &calls{slots: make(chan struct{}, maxConns), log: log, conns: map[*conn]struct{}{}}
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
	defer c.change(func() {
		c.open, c.last = c.open-1, time.Now()
		if c.served++; c.served%freeAfter == 0 {
			go debug.FreeOSMemory()
		}
	})
	return m(ctx, u)
}

// freeAfter is after how many calls their garbage is given back. The long polls of a
// daemon leave some 2 kB a minute, and the collector lets a small heap grow to 4 MiB first.
// Earlier would be worse: what the collector needs for itself takes 400 kB for good.
const freeAfter = 256

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
		over := c.open == 0 && len(c.conns) == 0
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
