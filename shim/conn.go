package shim

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// What all clients together can make a shim hold. A call takes some 10 kB until its answer
// is written. There may be more calls than connections, so that no client is cut off that
// waits for one answer at a time.
const (
	maxConns = 256 // more wait until one is closed
	maxCalls = 2 * maxConns
	maxBytes = 32 << 20 // of requests without an answer
)

// share is what calls without an answer hold.
type share struct{ calls, bytes int }

// over says that it is more than all connections may hold together.
func (s share) over() bool { return s.calls > maxCalls || s.bytes > maxBytes }

// listener gives connections that are counted.
func (c *calls) listener(l net.Listener) net.Listener { return &countingListener{l, c} }

type countingListener struct {
	net.Listener
	calls *calls
}

func (l *countingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if errors.Is(err, net.ErrClosed) {
		return nil, err
	}
	if err != nil {
		return nil, shortage{err}
	}
	c := &conn{Conn: nc, calls: l.calls}
	select {
	case c.calls.slots <- struct{}{}: // taken out again by Close
	default:
		c.calls.log.Warn("a client waits until a connection is closed", "open", maxConns)
		c.calls.slots <- struct{}{}
	}
	c.calls.change(func() { c.calls.conns[c] = struct{}{} })
	return c, nil
}

// shortage is an error of accept(2). It says what the machine lacks, memory or descriptors,
// and nothing about the socket: who calls waits until it is over. The server tries again, at
// intervals of up to a second, where it is told that an error is temporary. At any other one
// it closes the socket for good, and package net does not count a lack of memory among these.
type shortage struct{ error }

func (shortage) Temporary() bool { return true }

// conn is a connection that knows the calls for which no answer was written yet. The
// server answers as fast as the client reads, and takes requests as fast as they come. So
// where the calls of all connections together are too many or too large, the connection
// that holds the most is cut. To let it wait instead would be no help: the others would
// have to wait for a client that may never read.
//
// A client that gets an end of file takes the shim for unreachable and connects again.
type conn struct {
	net.Conn
	calls *calls
	once  sync.Once   // of Close
	cut   atomic.Bool // nothing is read any more

	in, out frames // in is of the only reader, out of the only writer

	// Guarded by calls.mu.
	held    share
	pending map[uint32]int // bytes of each call without an answer, by stream
}

// Read ends a connection that was cut as if the client had.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.feed(b[:n], func(f frame) {
		if f.kind == kindRequest {
			c.begun(f)
		}
	})
	if c.cut.Load() {
		return 0, io.EOF
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.feed(b[:n], func(f frame) {
		if f.kind == kindResponse || f.flags&flagRemoteClosed != 0 {
			c.answered(f.stream)
		}
	})
	c.calls.change(func() { c.calls.last = time.Now() })
	return n, err
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.calls.change(func() {
			c.forgetLocked()
			delete(c.calls.conns, c)
		})
		<-c.calls.slots
	})
	return c.Conn.Close()
}

// begun notes a request. It may be the one that is too much.
func (c *conn) begun(f frame) {
	a := c.calls
	a.mu.Lock()
	worst, held := c.beginLocked(f), share{}
	if worst != nil {
		held = worst.held
		worst.cutLocked()
	}
	a.mu.Unlock()
	if worst != nil {
		a.log.Warn("a client is cut off: too much waits for an answer", "calls", held.calls, "bytes", held.bytes)
	}
}

// beginLocked gives the connection that has to be cut, if one has to.
func (c *conn) beginLocked(f frame) *conn {
	if f.length > maxMessage {
		f.length = 0 // the server throws it away
	}
	// A number that is used twice is refused by the server.
	if _, twice := c.pending[f.stream]; twice || c.cut.Load() {
		return nil
	}
	if c.pending == nil {
		c.pending = map[uint32]int{}
	}
	c.pending[f.stream] = f.length
	c.addLocked(1, f.length)
	if !c.calls.held.over() {
		return nil
	}
	return c.calls.worstLocked()
}

func (c *conn) answered(stream uint32) {
	c.calls.mu.Lock()
	defer c.calls.mu.Unlock()
	if length, ok := c.pending[stream]; ok {
		delete(c.pending, stream)
		c.addLocked(-1, -length)
	}
}

func (c *conn) addLocked(calls, bytes int) {
	for _, s := range []*share{&c.held, &c.calls.held} {
		s.calls += calls
		s.bytes += bytes
	}
}

func (c *conn) forgetLocked() {
	c.addLocked(-c.held.calls, -c.held.bytes)
	c.pending = nil
}

// cutLocked makes the server end the connection, with the calls that are under way there.
func (c *conn) cutLocked() {
	c.cut.Store(true)
	c.forgetLocked()
	c.SetDeadline(time.Unix(1, 0)) // ends the Read and the Write under way
}

// worstLocked is the connection that holds the most of what is too much.
func (c *calls) worstLocked() (worst *conn) {
	most := -1
	for o := range c.conns {
		n := o.held.bytes
		if c.held.calls > maxCalls {
			n = o.held.calls
		}
		if n > most {
			worst, most = o, n
		}
	}
	return worst
}

// The frames of ttrpc, as its PROTOCOL.md has them. A stream ends with a response, or with
// data that says so.
const (
	headerSize       = 10
	maxMessage       = 4 << 20
	kindRequest      = 1
	kindResponse     = 2
	flagRemoteClosed = 1
)

// frame is the header of a message.
type frame struct {
	length int
	stream uint32
	kind   byte
	flags  byte
}

// frames finds the headers in a stream of bytes.
type frames struct {
	header [headerSize]byte
	have   int // bytes of it
	skip   int // bytes of a message that are still to come
}

// feed calls found with each header that is complete now.
func (s *frames) feed(b []byte, found func(frame)) {
	for len(b) > 0 {
		if n := min(s.skip, len(b)); n > 0 {
			s.skip -= n
			b = b[n:]
			continue
		}
		n := copy(s.header[s.have:], b)
		b = b[n:]
		if s.have += n; s.have < headerSize {
			return
		}
		f := frame{
			length: int(binary.BigEndian.Uint32(s.header[:])),
			stream: binary.BigEndian.Uint32(s.header[4:]),
			kind:   s.header[8],
			flags:  s.header[9],
		}
		s.have, s.skip = 0, f.length
		found(f)
	}
}
