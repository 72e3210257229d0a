package streaming

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/moby/spdystream/spdy"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

// Bounds on what a client may ask of spdystream, which has none of its own that hold.
const (
	// maxFrame is the size of the pieces that larger data frames are cut into. The usual
	// clients send no larger ones; a frame may say 16 MiB, for which spdystream makes
	// room at once.
	maxFrame = 32 << 10
	// maxControl is the size of a frame that opens a stream; its headers have three
	// short fields.
	maxControl     = 4 << 10
	maxHeaderField = 256
	maxHeaders     = 16
	// unreadLimit is how many bytes of clients may wait in the queues of spdystream, of
	// all connections together. One more, and the connection with the most is closed.
	unreadLimit = 128 << 20
)

// Parts of a SPDY/3.1 frame: eight bytes of header, and what follows.
const (
	headSize    = 8
	controlBit  = 1 << 31
	lengthMask  = 1<<24 - 1
	finFlag     = 1 << 24 // of the word that has flags and length
	kindSyn     = 1
	kindReply   = 2
	kindReset   = 3
	kindPing    = 6
	kindGoAway  = 7
	headerBytes = 12 // with the id of a stream, in those that have one

	typeHeader = "streamType"
	typeError  = "error"
)

var errProtocol = errors.New("the client breaks the rules of SPDY")

// budget is the bytes that wait in the queues of spdystream, of all connections.
type budget struct {
	mu     sync.Mutex
	total  int
	guards map[*guard]struct{}
}

// guard stands between a connection and spdystream. It hands on what a decent client
// sends, in small pieces, and counts what waits there; it ends the connection of any
// other one. What spdystream writes in many small pieces goes out as whole frames.
//
// Without it a client could have spdystream keep any amount of memory and goroutines:
// large frames and headers, goroutines that refuse streams, and workers that wait for
// ever for a reader of a stream.
type guard struct {
	net.Conn // addresses
	conn     *conn
	r        *bufio.Reader
	write    func(head, payload []byte) error
	budget   *budget
	limit    int  // of streams that are open
	ports    bool // streams come in pairs, for a port

	// Of the one goroutine that reads.
	ready   []byte // comes next
	payload int    // bytes of r that come after it
	rest    frame  // of a data frame that was cut
	last    uint32 // stream that was opened
	headers *spdy.Framer
	block   bytes.Reader // what headers reads

	out []byte // the beginning of a frame; of the one goroutine that writes

	// Under the lock of the budget.
	open       int // streams
	streams    map[uint32]*inflow
	unanswered map[uint32]chan struct{} // closed with the answer
	settled    chan struct{}            // closed when all are answered; nil: nobody waits
}

// frame is what is left of a data frame.
type frame struct {
	stream, flags uint32
	left          int
}

// inflow is a stream with bytes of the client.
type inflow struct {
	waiting int  // bytes in spdystream
	wanted  bool // somebody reads them
}

// newGuard makes a guard, for at most limit streams at a time. Release it.
func newGuard(l *link, r io.Reader, write func(head, payload []byte) error, b *budget, limit int) *guard {
	g := &guard{
		Conn:       l,
		conn:       l.conn,
		r:          bufio.NewReaderSize(r, 2*maxFrame),
		write:      write,
		budget:     b,
		limit:      limit,
		streams:    map[uint32]*inflow{},
		unanswered: map[uint32]chan struct{}{},
	}
	g.headers, _ = spdy.NewFramerWithOptions(io.Discard, &g.block, // fails for writers alone
		spdy.WithMaxHeaderCount(maxHeaders), spdy.WithMaxHeaderFieldSize(maxHeaderField))
	b.mu.Lock()
	b.guards[g] = struct{}{}
	b.mu.Unlock()
	return g
}

// release gives back what the guard has of the budget.
func (g *guard) release() {
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	delete(g.budget.guards, g)
	for id := range g.streams {
		g.forgetLocked(id)
	}
}

// Read gives spdystream the client's frames.
func (g *guard) Read(p []byte) (int, error) {
	for {
		switch {
		case len(g.ready) > 0:
			n := copy(p, g.ready)
			g.ready = g.ready[n:]
			return n, nil
		case g.payload > 0:
			n, err := g.r.Read(p[:min(len(p), g.payload)])
			g.payload -= n
			if n > 0 {
				return n, nil
			}
			return 0, g.end(err)
		}
		if err := g.next(); err != nil {
			return 0, g.end(err)
		}
	}
}

// next prepares the next frame, or the next piece of one.
func (g *guard) next() error {
	if g.rest.left > 0 {
		return g.piece()
	}
	head, err := g.r.Peek(headSize)
	if err != nil {
		return err
	}
	first, second := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:])
	if first&controlBit != 0 {
		return g.control(first&0xffff, second)
	}
	g.r.Discard(headSize)
	g.rest = frame{stream: first, flags: second & finFlag, left: int(second & lengthMask)}
	return g.piece()
}

// piece prepares a piece of a data frame. What is for a stream that nobody reads is
// thrown away: spdystream would wait for a reader.
func (g *guard) piece() error {
	n := min(g.rest.left, maxFrame)
	if !g.deliver(g.rest.stream, n) {
		if _, err := g.r.Discard(g.rest.left); err != nil {
			return err
		}
		g.rest.left, n = 0, 0
		if g.rest.flags == 0 {
			return nil
		}
	}
	g.rest.left -= n
	flags := uint32(0)
	if g.rest.left == 0 {
		flags = g.rest.flags
	}
	g.ready = binary.BigEndian.AppendUint32(g.ready[:0], g.rest.stream)
	g.ready = binary.BigEndian.AppendUint32(g.ready, flags|uint32(n))
	g.payload = n
	return nil
}

// control prepares a control frame.
func (g *guard) control(kind, second uint32) error {
	size := headSize + int(second&lengthMask)
	if size > maxControl {
		return fmt.Errorf("%w: a control frame of %d bytes", errProtocol, size)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(g.r, b); err != nil {
		return err
	}
	var err error
	switch kind {
	case kindSyn:
		err = g.opened(b)
	case kindReset:
		err = g.reset(b)
	case kindGoAway: // the last word of a client
		g.conn.cancel(errGone)
		return io.EOF
	case kindPing:
	default: // settings and windows, of which spdystream makes nothing
		b = nil
	}
	g.ready = b
	return err
}

// opened takes note of a stream that the client opens.
func (g *guard) opened(b []byte) error {
	g.block.Reset(b)
	f, err := g.headers.ReadFrame()
	if err != nil {
		return fmt.Errorf("%w: a frame that opens a stream: %w", errProtocol, err)
	}
	syn := f.(*spdy.SynStreamFrame)
	id := uint32(syn.StreamId)
	// spdystream answers each other number in a goroutine of its own.
	if id%2 == 0 || id <= g.last || id > 1<<31-1 || syn.CFHeader.Flags != 0 {
		return fmt.Errorf("%w: it opens stream %d with flags %x", errProtocol, id, syn.CFHeader.Flags)
	}
	if g.ports && !forPort(syn.Headers) { // the library would never answer
		return fmt.Errorf("%w: a stream for no port", errProtocol)
	}
	g.last = id
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	if g.open++; g.open > g.limit {
		return fmt.Errorf("%w: more than %d streams are open", errProtocol, g.limit)
	}
	g.streams[id] = &inflow{wanted: syn.Headers.Get(typeHeader) != typeError}
	g.unanswered[id] = make(chan struct{})
	return nil
}

// forPort says whether the headers of a stream are those of one for a port.
func forPort(h http.Header) bool {
	port, err := strconv.ParseUint(h.Get(portforward.PortHeader), 10, 16)
	kind := h.Get(typeHeader)
	return err == nil && port > 0 && (kind == typeError || kind == portforward.StreamTypeData)
}

// reset takes note of a stream that the client ends.
func (g *guard) reset(b []byte) error {
	if len(b) < headerBytes {
		return fmt.Errorf("%w: a short frame", errProtocol)
	}
	id := binary.BigEndian.Uint32(b[headSize:])
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	if _, early := g.unanswered[id]; early {
		return fmt.Errorf("%w: it ends stream %d before it is there", errProtocol, id)
	}
	g.forgetLocked(id)
	return nil
}

// deliver says whether n bytes are for a stream that somebody reads, and counts them.
func (g *guard) deliver(id uint32, n int) bool {
	b := g.budget
	b.mu.Lock()
	s := g.streams[id]
	if s == nil || !s.wanted {
		b.mu.Unlock()
		return false
	}
	var worst *guard
	s.waiting += n
	if b.total += n; b.total > unreadLimit {
		worst = b.worstLocked()
	}
	b.mu.Unlock()
	if worst != nil {
		worst.conn.Close()
	}
	return true
}

// worstLocked is the connection with the most bytes.
func (b *budget) worstLocked() (worst *guard) {
	most := -1
	for g := range b.guards {
		sum := 0
		for _, s := range g.streams {
			sum += s.waiting
		}
		if sum > most {
			worst, most = g, sum
		}
	}
	return worst
}

// consumed takes note that n bytes of a stream were read.
func (g *guard) consumed(id uint32, n int) {
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	if s := g.streams[id]; s != nil {
		s.waiting -= n
		g.budget.total -= n
		g.settleLocked()
	}
}

// ended takes note that a pair of streams is over, and that nobody reads this one any
// more.
func (g *guard) ended(id uint32) {
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	g.open -= 2
	g.forgetLocked(id)
}

func (g *guard) forgetLocked(id uint32) {
	if s := g.streams[id]; s != nil {
		g.budget.total -= s.waiting
		delete(g.streams, id)
		g.settleLocked()
	}
}

// end ends what spdystream reads. It waits until the streams that were opened have
// been answered: the library's handler takes no stream after the end, and whoever
// brings one then would wait for ever. Nor does that handler leave the streams of ports
// the time to be read.
func (g *guard) end(err error) error {
	if errors.Is(err, errProtocol) {
		g.conn.cancel(err)
	}
	settled := make(chan struct{})
	g.budget.mu.Lock()
	g.settled = settled
	g.settleLocked()
	g.budget.mu.Unlock()
	select {
	case <-settled:
	case <-time.After(drainLimit):
	}
	return io.EOF
}

// settleLocked tells the end, if it waits, that nothing is under way.
func (g *guard) settleLocked() {
	if g.settled == nil || len(g.unanswered) > 0 {
		return
	}
	for _, s := range g.streams {
		if g.ports && s.waiting > 0 {
			return
		}
	}
	close(g.settled)
	g.settled = nil
}

// Write collects what spdystream writes until it is a whole frame.
func (g *guard) Write(p []byte) (int, error) {
	n := len(p)
	if missing := min(headSize-len(g.out), len(p)); missing > 0 {
		g.out = append(g.out, p[:missing]...)
		p = p[missing:]
	}
	if len(g.out) < headSize {
		return n, nil
	}
	first, second := binary.BigEndian.Uint32(g.out), binary.BigEndian.Uint32(g.out[4:])
	if len(g.out)+len(p) < headSize+int(second&lengthMask) {
		g.out = append(g.out, p...)
		return n, nil
	}
	err := g.write(g.out, p)
	if first&controlBit != 0 && first&0xffff == kindReply {
		g.answered(binary.BigEndian.Uint32(append(g.out, p...)[headSize:]))
		err = nil // else whoever writes to this stream would wait for ever
	}
	g.out = g.out[:0]
	if err != nil {
		return 0, err
	}
	return n, nil
}

// awaitAnswer waits until a stream is answered: a reset that came before would be all
// that the client sees. spdystream answers as soon as it has handed out the stream.
func (g *guard) awaitAnswer(ctx context.Context, id uint32) {
	g.budget.mu.Lock()
	answer := g.unanswered[id]
	g.budget.mu.Unlock()
	if answer == nil {
		return
	}
	select {
	case <-answer:
	case <-ctx.Done():
	}
}

// answered takes note of the answer to a stream that the client has opened.
func (g *guard) answered(id uint32) {
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	if answer, ok := g.unanswered[id]; ok {
		close(answer)
		delete(g.unanswered, id)
	}
	g.settleLocked()
}

// counted is a stream of spdystream, as it is or as the library wraps it.
type counted interface {
	io.Reader
	Identifier() uint32
}

// reader is a stream of spdystream, whose reads are counted.
type reader struct {
	stream counted
	guard  *guard
}

func (r reader) Read(p []byte) (int, error) {
	n, err := r.stream.Read(p)
	r.guard.consumed(r.stream.Identifier(), n)
	return n, err
}

// WriteTo writes what comes until its end.
func (r reader) WriteTo(w io.Writer) (int64, error) {
	frames, ok := r.stream.(interface{ ReadData() ([]byte, error) })
	if !ok {
		return io.Copy(w, struct{ io.Reader }{r})
	}
	var total int64
	for {
		b, err := frames.ReadData() // without a copy
		r.guard.consumed(r.stream.Identifier(), len(b))
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}
