package streaming

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/moby/spdystream/spdy"
	"k8s.io/streaming/pkg/httpstream"
	httpspdy "k8s.io/streaming/pkg/httpstream/spdy"
)

// Bounds on what a client may ask for.
const (
	// maxControl is the size of a frame that opens a stream; its headers have three
	// short fields.
	maxControl     = 4 << 10
	maxHeaderField = 256
	maxHeaders     = 16
)

// Parts of a SPDY/3.1 frame: eight bytes of header, and what follows.
const (
	headSize    = 8
	controlBit  = 1 << 31
	version3    = 3 << 16
	lengthMask  = 1<<24 - 1
	finFlag     = 1 << 24 // of the word that has flags and length
	kindSyn     = 1
	kindReply   = 2
	kindReset   = 3
	kindPing    = 6
	kindGoAway  = 7
	resetLength = 8

	typeHeader = "streamType"
	typeError  = "error"
)

var (
	errProtocol = errors.New("the client breaks the rules of SPDY")
	errReset    = errors.New("the client has reset the stream")
)

// spdyConn is the server's side of SPDY/3.1, as far as the clients of Kubernetes speak
// it. One goroutine, serve, reads; what it reads waits in the queues of the streams, and
// while one of these is full nothing more is read. end gives everything back.
type spdyConn struct {
	conn  *conn
	r     *bufio.Reader
	write func(head, payload []byte) error // whole, by any goroutine
	pong  func([]byte) error               // does not wait for the client
	limit int                              // of streams that are open
	// opened is called by serve with each new stream, and does not wait for the client.
	opened func(*spdyStream) error

	// Of serve.
	last  uint32 // stream that was opened
	block bytes.Reader
	heads *spdy.Framer // reads block; it knows the headers before

	replying sync.Mutex // keeps the replies in order
	replied  bool       // to a stream; under replying

	mu      sync.Mutex
	streams map[uint32]*spdyStream // that are open; each is removed by its own end
	err     error                  // why no more comes; what comes to an end, too
}

// newSPDY makes a connection, which serve reads. end it.
func newSPDY(l *link, r io.Reader, write func(head, payload []byte) error, pong func([]byte) error,
	limit int, opened func(*spdyStream) error) *spdyConn {
	c := &spdyConn{
		conn:    l.conn,
		r:       bufio.NewReaderSize(r, readSize),
		write:   write,
		pong:    pong,
		limit:   limit,
		opened:  opened,
		streams: map[uint32]*spdyStream{},
	}
	c.heads, _ = spdy.NewFramerWithOptions(io.Discard, &c.block, // fails for writers alone
		spdy.WithMaxHeaderCount(maxHeaders), spdy.WithMaxHeaderFieldSize(maxHeaderField))
	return c
}

// A reply has no headers. They are compressed as one stream for the whole connection,
// which begins with replyStart: zlib, with the dictionary of SPDY/3. A compressor would
// take a megabyte for that; replyBlock is what one that compresses nothing would write:
// four bytes as they are, the number of headers, and an empty block, which flushes.
const (
	replyStart = "\x78\xbb\xe3\xc6\xa7\xc2"
	replyBlock = "\x00\x04\x00\xfb\xff" + "\x00\x00\x00\x00" + "\x00\x00\x00\xff\xff"
)

// upgradeSPDY agrees on one of the protocols and gives the link to the client. On an
// error the client has its answer.
func upgradeSPDY(u *upgrade, req *http.Request, protocols []string) (protocol string, err error) {
	if !strings.EqualFold(req.Header.Get(httpstream.HeaderUpgrade), httpspdy.HeaderSpdy31) {
		err = errors.New("a session needs a client that speaks SPDY/3.1 or WebSocket")
		http.Error(u, err.Error(), http.StatusBadRequest)
		return "", err
	}
	if protocol, err = httpstream.Handshake(req, u, protocols); err != nil {
		return "", err
	}
	u.Header().Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	u.Header().Set(httpstream.HeaderUpgrade, httpspdy.HeaderSpdy31)
	u.WriteHeader(http.StatusSwitchingProtocols)
	_, _, err = u.Hijack()
	return protocol, err
}

// serve takes the client's frames until the end, and then ends what streams read.
func (c *spdyConn) serve() {
	var err error
	for err == nil {
		err = c.frame()
	}
	if errors.Is(err, errProtocol) {
		c.conn.cancel(err)
	}
	c.conn.cancel(errGone)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errGone
	for _, s := range c.streams {
		s.finishLocked(errGone)
	}
}

func (c *spdyConn) frame() error {
	var head [headSize]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return err
	}
	first, second := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint32(head[4:])
	length := int(second & lengthMask)
	if first&controlBit == 0 {
		return c.data(first, length, second&finFlag != 0)
	}
	if first&^(controlBit|0xffff) != version3 || length > maxControl {
		return fmt.Errorf("%w: a control frame %x of %d bytes", errProtocol, first, length)
	}
	b := append(make([]byte, 0, headSize+length), head[:]...)[:headSize+length]
	if _, err := io.ReadFull(c.r, b[headSize:]); err != nil {
		return err
	}
	switch first & 0xffff {
	case kindSyn:
		return c.open(b)
	case kindReset:
		return c.reset(b[headSize:])
	case kindPing:
		return c.pong(b)
	case kindGoAway: // the last word of a client
		return io.EOF
	}
	return nil // settings and windows: nothing is made of them
}

// data puts n bytes of a stream into its queue. What nobody reads is thrown away.
func (c *spdyConn) data(id uint32, n int, last bool) error {
	c.mu.Lock()
	s := c.streams[id]
	var in *queue
	if s != nil {
		in = s.in
	}
	c.mu.Unlock()
	if s != nil && s.early && n > 0 {
		return fmt.Errorf("%w: bytes for half a pair of streams", errProtocol)
	}
	if in == nil {
		_, err := c.r.Discard(n)
		return err
	}
	if _, err := in.ReadFrom(io.LimitReader(c.r, int64(n))); err != nil {
		return err
	}
	if last {
		in.end(io.EOF)
	}
	return nil
}

// open opens a stream.
func (c *spdyConn) open(b []byte) error {
	c.block.Reset(b)
	f, err := c.heads.ReadFrame()
	if err != nil {
		return fmt.Errorf("%w: a frame that opens a stream: %w", errProtocol, err)
	}
	syn := f.(*spdy.SynStreamFrame)
	s := &spdyStream{conn: c, id: uint32(syn.StreamId), headers: syn.Headers}
	if s.id%2 == 0 || s.id <= c.last || s.id > 1<<31-1 || syn.CFHeader.Flags != 0 {
		return fmt.Errorf("%w: it opens stream %d with flags %x", errProtocol, s.id, syn.CFHeader.Flags)
	}
	c.last = s.id
	c.mu.Lock()
	c.streams[s.id] = s
	open := len(c.streams)
	c.mu.Unlock()
	if open > c.limit {
		return fmt.Errorf("%w: more than %d streams are open", errProtocol, c.limit)
	}
	return c.opened(s)
}

// reset ends a stream that the client does not want any more.
func (c *spdyConn) reset(b []byte) error {
	if len(b) != resetLength {
		return fmt.Errorf("%w: a reset of %d bytes", errProtocol, len(b))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[binary.BigEndian.Uint32(b)]
	switch {
	case s == nil:
	case !s.replied.Load():
		return fmt.Errorf("%w: it ends stream %d before it is there", errProtocol, s.id)
	default:
		s.isReset.Store(true)
		s.finishLocked(io.EOF)
	}
	return nil
}

// end tells the client that all is over, and has serve end. Nobody uses a stream any
// more.
func (c *spdyConn) end() {
	c.mu.Lock()
	var all []*spdyStream
	for _, s := range c.streams {
		all = append(all, s)
	}
	c.mu.Unlock()
	for _, s := range all {
		s.end()
	}
	c.write(controlFrame(kindGoAway, 0, "\x00\x00\x00\x00"), nil) // or the client has gone
}

// controlFrame makes one that has the number of a stream and more.
func controlFrame(kind, id uint32, more string) []byte {
	b := make([]byte, 0, 64)
	b = binary.BigEndian.AppendUint32(b, controlBit|version3|kind)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(more)))
	return append(binary.BigEndian.AppendUint32(b, id), more...)
}

// spdyStream is one stream. Who writes and who closes it is one goroutine.
type spdyStream struct {
	conn    *spdyConn
	id      uint32
	headers http.Header
	early   bool // of serve: nobody reads it yet

	once    sync.Once
	replied atomic.Bool // before the client can know
	isReset atomic.Bool // by the client
	closed  bool

	in *queue // what the client sends; nil: nobody wants it. Under the lock of conn.
}

// take makes room for what the client sends. It is called while serve does not read.
func (s *spdyStream) take(size int) *queue {
	in := newQueue(size)
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	s.early, s.in = false, in
	if s.conn.err != nil {
		in.end(s.conn.err)
	}
	return in
}

func (s *spdyStream) finishLocked(err error) {
	if s.in != nil {
		s.in.end(err)
	}
}

// accept tells the client, once, that the stream is there.
func (s *spdyStream) accept() {
	s.once.Do(func() {
		c := s.conn
		c.replying.Lock()
		defer c.replying.Unlock()
		block := replyBlock
		if !c.replied {
			block = replyStart + replyBlock
		}
		c.replied = true
		s.replied.Store(true)
		c.write(controlFrame(kindReply, s.id, block), nil) // or the client has gone, which others see
	})
}

// Write sends bytes.
func (s *spdyStream) Write(p []byte) (int, error) {
	s.accept()
	for n := 0; n < len(p); {
		if s.isReset.Load() {
			return n, errReset
		}
		piece := p[n:min(len(p), n+lengthMask)]
		if err := s.send(0, piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return len(p), nil
}

func (s *spdyStream) send(flags uint32, p []byte) error {
	head := binary.BigEndian.AppendUint32(make([]byte, 0, headSize), s.id)
	return s.conn.write(binary.BigEndian.AppendUint32(head, flags|uint32(len(p))), p)
}

// Close ends the output. The client may send more.
func (s *spdyStream) Close() error {
	s.accept()
	if s.closed || s.isReset.Load() {
		return nil
	}
	s.closed = true
	return s.send(finFlag, nil)
}

// end is Close, and forgets the stream: what the client still sends is thrown away.
func (s *spdyStream) end() {
	s.Close()
	s.forget()
}

// Reset tells the client that the stream has failed, and forgets it.
func (s *spdyStream) Reset() error {
	var err error
	if !s.closed && !s.isReset.Load() {
		s.closed = true
		err = s.conn.write(controlFrame(kindReset, s.id, "\x00\x00\x00\x05"), nil) // cancelled
	}
	s.forget()
	return err
}

func (s *spdyStream) forget() {
	s.conn.mu.Lock()
	delete(s.conn.streams, s.id)
	in := s.in
	s.in = nil
	s.conn.mu.Unlock()
	if in != nil {
		in.abandon()
	}
}
