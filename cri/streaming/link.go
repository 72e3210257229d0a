package streaming

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// upgrade is a response that a library turns into a connection of its own, by Hijack. It must
// not have an Unwrap, which would lead past the link.
type upgrade struct {
	http.ResponseWriter
	conn *conn
	link *link // after Hijack
}

// Hijack gives the connection away. The upgrade's owner closes it with finish.
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, buffers, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, _ := buffers.Reader.Peek(buffers.Reader.Buffered())
	u.link = &link{
		Conn: nc,
		conn: u.conn,
		r:    io.MultiReader(bytes.NewReader(bytes.Clone(early)), nc),
	}
	return u.link, bufio.NewReadWriter(bufio.NewReaderSize(u.link, 4096), bufio.NewWriterSize(u.link, 1024)), nil
}

// finish ends the connection if it was given away. Else the HTTP server has it.
func (u *upgrade) finish() {
	if u.link == nil {
		return
	}
	if t, ok := u.link.Conn.(*tls.Conn); ok {
		u.conn.tcp.SetWriteDeadline(time.Now().Add(lingerLimit))
		t.CloseWrite()
	}
	u.conn.finish()
}

// link is a connection that no longer speaks HTTP. What is written goes out whole: one
// goroutine after the other. Its owner is the handler of the request; a library's
// Close and deadlines change nothing.
type link struct {
	net.Conn // TLS, or conn
	conn     *conn
	r        io.Reader

	mu sync.Mutex // of writing

	pongs sync.Mutex
	pong  []byte // the answer to a ping that waits to be sent
}

func (l *link) Read(p []byte) (int, error) { return l.r.Read(p) }

func (l *link) Write(p []byte) (int, error) {
	if err := l.write(p, nil); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close does nothing: a library's Close could throw away bytes that it has sent.
func (l *link) Close() error { return nil }

// SetDeadline does nothing: a deadline that one library needs would end what another
// goroutine writes to a slow client.
func (l *link) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (l *link) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (l *link) SetWriteDeadline(time.Time) error { return nil }

// write sends a and b, with nothing in between.
func (l *link) write(a, b []byte) error {
	l.mu.Lock()
	err := l.writeLocked(a, b)
	l.mu.Unlock()
	if err == nil {
		err = l.sendPong()
	}
	return err
}

func (l *link) writeLocked(a, b []byte) error {
	if c, ok := l.Conn.(*conn); ok && len(b) > 0 {
		return c.writeTwo(a, b)
	}
	_, err := l.Conn.Write(a)
	if err == nil && len(b) > 0 {
		_, err = l.Conn.Write(b)
	}
	return err
}

// answer sends the answer to a ping, or leaves it to whoever writes right now: the
// reader of a connection does not wait for a client that does not read. Of several
// that wait the last one is enough.
func (l *link) answer(pong []byte) error {
	l.pongs.Lock()
	l.pong = pong
	l.pongs.Unlock()
	return l.sendPong()
}

// sendPong sends the pong that waits. If another goroutine writes it does nothing: that
// one calls it afterwards.
func (l *link) sendPong() error {
	// Looked at again without the lock: one that came before the unlocking was left to
	// this goroutine.
	for l.pongWaits() && l.mu.TryLock() {
		l.pongs.Lock()
		pong := l.pong
		l.pong = nil
		l.pongs.Unlock()
		var err error
		if pong != nil {
			err = l.writeLocked(pong, nil)
		}
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *link) pongWaits() bool {
	l.pongs.Lock()
	defer l.pongs.Unlock()
	return l.pong != nil
}
