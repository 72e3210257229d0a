package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/moby/spdystream/spdy"
)

// The client of a session is as cheap as can be, as it takes processor time from both
// sides: it reads much at a time and looks at headers of frames alone, and it sends
// what it made before. Its pieces are those of the usual clients.
const (
	pieceSize  = 32 << 10
	clientRead = 512 << 10
	batch      = 32 // pieces that are written at a time
)

// Channels of a session, as WebSocket numbers them.
const (
	stdin = iota
	stdout
	stderr
	verdict // JSON, the end of the session
	other
)

// wire is a protocol of sessions.
type wire interface {
	// request gives the header of the request.
	request() http.Header
	// open opens the channels that are wanted.
	open(c *client, wanted []int) error
	// next reads the header of the next frame, which n bytes follow.
	next(c *client) (channel, n int, err error)
	// piece appends a frame of stdin with n zeros. last: it is the last one.
	piece(b []byte, n int, last bool) []byte
}

var wires = []struct {
	name string
	make func() wire
}{
	{"SPDY", func() wire { return &spdyWire{ids: map[uint32]int{}} }},
	{"WebSocket", func() wire { return webWire{} }},
}

// client is one session, from outside.
type client struct {
	wire
	net.Conn
	r        *bufio.Reader
	received int64 // of stdout
}

// connect opens a session at the address that a runtime gave out.
func connect(w wire, address string, wanted ...int) (*client, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	c := &client{wire: w}
	if c.Conn, err = net.Dial("tcp", u.Host); err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(sessionTimeout))
	c.r = bufio.NewReaderSize(c.Conn, clientRead)
	req := &http.Request{Method: http.MethodGet, URL: u, Host: u.Host, Header: w.request()}
	req.Header.Set("Connection", "Upgrade")
	err = req.Write(c)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(c.r, req)
	}
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("%s: %s", u, resp.Status)
	}
	if err == nil {
		err = c.open(c, wanted)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// await reads until the first byte of stdout.
func (c *client) await() error {
	for c.received == 0 {
		if end, err := c.step(); err != nil || end {
			return fmt.Errorf("the session has ended too early: %w", err)
		}
	}
	return nil
}

// finish reads until the session ends, with success.
func (c *client) finish() error {
	for {
		if end, err := c.step(); err != nil || end {
			return err
		}
	}
}

// exchange sends bytes and receives others until the session ends.
func (c *client) exchange(send, receive int64) error {
	sent := make(chan error, 1)
	go func() { sent <- c.send(send) }()
	before := c.received
	if err := c.finish(); err != nil {
		c.Close()
		<-sent // that nothing can be sent any more says less
		return err
	}
	if n := c.received - before; n != receive {
		return fmt.Errorf("a session has sent %d bytes, not %d", n, receive)
	}
	return <-sent
}

// step reads a frame.
func (c *client) step() (end bool, err error) {
	channel, n, err := c.next(c)
	if err != nil {
		return false, err
	}
	switch {
	case channel == verdict && n > 0:
		b := make([]byte, n)
		if _, err := io.ReadFull(c.r, b); err != nil {
			return false, err
		}
		if !bytes.Contains(b, []byte(`"status":"Success"`)) {
			return false, fmt.Errorf("the session has ended with %s", b)
		}
		return true, nil
	case channel == stdout:
		c.received += int64(n)
	}
	_, err = c.r.Discard(n)
	return false, err
}

// send sends so many zeros, in whole pieces, and the end of stdin where there is one.
func (c *client) send(bytes int64) error {
	size := int(min(bytes, pieceSize))
	var b []byte
	for range batch {
		b = c.piece(b, size, false)
	}
	pieces := max(1, bytes/pieceSize)
	for ; pieces > batch; pieces -= batch {
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
	b = b[:0]
	for ; pieces > 0; pieces-- {
		b = c.piece(b, size, pieces == 1)
	}
	_, err := c.Write(b)
	return err
}

// spdyWire is SPDY/3.1 with remote command v4.
type spdyWire struct {
	ids   map[uint32]int // channels
	stdin uint32
}

func (*spdyWire) request() http.Header {
	return http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {"v4.channel.k8s.io"}}
}

// open opens streams and waits for the answers: what is sent before may be lost.
func (w *spdyWire) open(c *client, wanted []int) error {
	names := []string{"stdin", "stdout", "stderr", "error"}
	var b bytes.Buffer
	framer, err := spdy.NewFramer(&b, &b)
	if err != nil {
		return err
	}
	id := uint32(1)
	for _, channel := range append([]int{verdict}, wanted...) {
		syn := &spdy.SynStreamFrame{
			StreamId: spdy.StreamId(id),
			Headers:  http.Header{"Streamtype": {names[channel]}},
		}
		if err := framer.WriteFrame(syn); err != nil {
			return err
		}
		w.ids[id] = channel
		if channel == stdin {
			w.stdin = id
		}
		id += 2
	}
	if _, err := c.Write(b.Bytes()); err != nil {
		return err
	}
	const reply = 1<<31 | 3<<16 | 2
	for range w.ids {
		head, err := c.r.Peek(8)
		if err != nil {
			return err
		}
		if kind := binary.BigEndian.Uint32(head); kind != reply {
			return fmt.Errorf("a stream is answered with a frame %x", kind)
		}
		if _, n, err := w.next(c); err != nil {
			return err
		} else if _, err = c.r.Discard(n); err != nil {
			return err
		}
	}
	return nil
}

func (w *spdyWire) next(c *client) (channel, n int, err error) {
	head, err := c.r.Peek(8)
	if err != nil {
		return 0, 0, err
	}
	id, size := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:])
	c.r.Discard(8)
	channel, ok := w.ids[id]
	if !ok {
		channel = other // a control frame
	}
	return channel, int(size & (1<<24 - 1)), nil
}

func (w *spdyWire) piece(b []byte, n int, last bool) []byte {
	size := uint32(n)
	if last {
		size |= 1 << 24 // FIN
	}
	b = binary.BigEndian.AppendUint32(b, w.stdin)
	b = binary.BigEndian.AppendUint32(b, size)
	return append(b, make([]byte, n)...)
}

// webWire is WebSocket with remote command v4, the newest one that both sides have.
type webWire struct{}

func (webWire) request() http.Header {
	return http.Header{
		"Upgrade":                {"websocket"},
		"Origin":                 {"http://localhost"},
		"Sec-Websocket-Version":  {"13"},
		"Sec-Websocket-Key":      {"AAAAAAAAAAAAAAAAAAAAAA=="},
		"Sec-Websocket-Protocol": {"v4.channel.k8s.io"},
	}
}

func (webWire) open(*client, []int) error { return nil } // the address has them

func (webWire) next(c *client) (channel, n int, err error) {
	head, err := c.r.Peek(2)
	if err != nil {
		return 0, 0, err
	}
	kind := head[0] & 0xf
	n = int(head[1] & 0x7f)
	c.r.Discard(2)
	if extra := map[int]int{126: 2, 127: 8}[n]; extra > 0 {
		var b [8]byte
		if _, err := io.ReadFull(c.r, b[8-extra:]); err != nil {
			return 0, 0, err
		}
		n = int(binary.BigEndian.Uint64(b[:]))
	}
	switch {
	case kind == 8:
		return 0, 0, errors.New("the WebSocket is closed")
	case kind > 2 || n == 0:
		return other, n, nil
	}
	b, err := c.r.ReadByte()
	return int(b), n - 1, err
}

// piece masks with zeros, which costs the client nothing, and the server the same.
func (webWire) piece(b []byte, n int, _ bool) []byte {
	b = append(b, 0x82)
	if n+1 < 126 {
		b = append(b, 0x80|byte(n+1))
	} else {
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n+1))
	}
	return append(b, make([]byte, 4+1+n)...) // the mask, the channel, the bytes
}
