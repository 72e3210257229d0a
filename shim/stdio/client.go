package stdio

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-cri/holdfast/shim/logfile"
)

// Conn is a client's end of a session.
type Conn interface {
	// WriteOutput takes bytes of one output. While it blocks the client's queue
	// fills up. It is called from one goroutine.
	WriteOutput(s logfile.Stream, b []byte) error
	// Read gives input for the container, and io.EOF at its end. It is called
	// from one goroutine, and not at all for a client without input.
	io.Reader
	// Close ends a WriteOutput and a Read that are under way. It is called once.
	io.Closer
}

// Options say what a client wants.
type Options struct {
	Output bool // the outputs, from now on
	Input  bool // to give input
	Queue  int  // the most bytes of output that may wait for the client; 0: DefaultQueue
}

// DefaultQueue is what a pipe that was made large holds.
const DefaultQueue = 1 << 20

const (
	// lastTimeout is how long a client may take for the rest of its queue after
	// the end of the outputs.
	lastTimeout = 2 * time.Second
	// inputSize is how much of a client's input is read at once.
	inputSize = 8 << 10
)

// ErrSlow says that a client was cut off: its queue was full, or it did not take the
// rest of it after the end of the outputs.
var ErrSlow = errors.New("the client is too slow for the output")

// Client is one attached client. It ends when the outputs have ended and the client
// has them, when its Conn fails, when it is too slow, or by Detach.
type Client struct {
	hub   *Hub
	conn  Conn
	queue *queue        // nil: no output is wanted
	left  chan struct{} // closed by leave
	done  chan struct{} // closed when its goroutines have ended

	once sync.Once
	err  error // why it left; for others only after left is closed
}

// Attach makes conn, which is the Hub's from now on, a client: from this moment on
// each byte of each output goes to it once, in order, until it ends. If the outputs
// have ended already it ends at once.
func (h *Hub) Attach(conn Conn, o Options) *Client {
	c := &Client{hub: h, conn: conn, left: make(chan struct{}), done: make(chan struct{})}
	if o.Output {
		c.queue = newQueue(o.Queue)
	}
	h.clients.add(c)
	var reading sync.WaitGroup
	if o.Input {
		reading.Go(func() {
			c.read()
			if !o.Output {
				c.leave(nil)
			}
		})
	}
	go func() {
		if o.Output {
			c.leave(c.write())
			c.queue.free()
		} else {
			select {
			case <-h.clients.over():
			case <-c.left:
			}
			c.leave(nil)
		}
		reading.Wait()
		close(c.done)
	}()
	return c
}

// Detach ends the client. What is in its queue is dropped.
func (c *Client) Detach() { c.leave(nil) }

// Done is closed when the client has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Result says, after Done, how many bytes of output the client was given, how many
// it missed until it was cut off or its Conn failed, and why it ended: nil at the
// end of the outputs and after Detach, ErrSlow, or what its Conn said.
func (c *Client) Result() (given, missed uint64, err error) {
	if c.queue != nil {
		given, missed = c.queue.given, c.queue.missed
	}
	return given, missed, c.err
}

// leave ends the client, once. It does not block: a copier calls it, too.
func (c *Client) leave(why error) {
	c.once.Do(func() {
		c.err = why
		close(c.left)
		c.hub.clients.remove(c)
		c.hub.input.interrupt(c)
		if c.queue != nil {
			c.queue.close()
		}
		go c.conn.Close()
	})
}

// write takes the queue to the conn until the end of the outputs, or until leave.
func (c *Client) write() error {
	for {
		s, b := c.queue.next()
		if b == nil {
			return nil
		}
		if err := c.conn.WriteOutput(s, b); err != nil {
			return fmt.Errorf("cannot write to a client: %w", err)
		}
		c.queue.took(len(b))
	}
}

// read takes the client's input to the container until its end. What a container
// that has closed its input does not take is dropped: the client may still want
// the output.
func (c *Client) read() {
	b := make([]byte, inputSize)
	for taken := true; ; {
		n, err := c.conn.Read(b)
		if n > 0 && taken {
			taken = c.hub.input.write(c, b[:n])
		}
		if err == nil {
			continue
		}
		if err != io.EOF {
			c.leave(fmt.Errorf("cannot read from a client: %w", err))
		}
		c.hub.input.clientLeft()
		return
	}
}

// clients is all that are attached.
type clients struct {
	count atomic.Int32 // of all; a copier looks at nothing else while it is 0

	mu    sync.Mutex
	all   map[*Client]struct{}
	ended chan struct{} // closed at the end of the outputs; made by endedLocked
}

func (l *clients) endedLocked() chan struct{} {
	if l.ended == nil {
		l.ended = make(chan struct{})
	}
	return l.ended
}

// over is closed at the end of the outputs.
func (l *clients) over() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.endedLocked()
}

func (l *clients) add(c *Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.endedLocked():
		if c.queue != nil {
			c.queue.end()
		}
	default:
	}
	if l.all == nil {
		l.all = make(map[*Client]struct{})
	}
	l.all[c] = struct{}{}
	l.count.Store(int32(len(l.all)))
}

func (l *clients) remove(c *Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, c)
	l.count.Store(int32(len(l.all)))
}

// push gives bytes of an output to all clients, and cuts off those that have no
// room for them.
func (l *clients) push(s logfile.Stream, b []byte) {
	if l.count.Load() == 0 || len(b) == 0 {
		return
	}
	var slow []*Client
	l.mu.Lock()
	for c := range l.all {
		if c.queue != nil && !c.queue.put(s, b) {
			slow = append(slow, c)
		}
	}
	l.mu.Unlock()
	for _, c := range slow {
		c.leave(ErrSlow)
	}
}

// end tells all clients, and those to come, that no more output follows.
func (l *clients) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	ended := l.endedLocked()
	select {
	case <-ended:
		return
	default:
		close(ended)
	}
	for c := range l.all {
		if c.queue != nil {
			c.queue.end()
		}
	}
}

// close returns when all clients have ended, which those that take longer for the
// rest than limit are made to.
func (l *clients) close(limit time.Duration) {
	l.mu.Lock()
	all := slices.Collect(maps.Keys(l.all))
	l.mu.Unlock()
	late := time.After(limit)
	for _, c := range all {
		select {
		case <-c.done:
		case <-late:
			late = time.After(0)
			c.leave(ErrSlow)
		}
	}
}
