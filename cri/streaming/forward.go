package streaming

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream/wsstream"

	"github.com/holdfast-cri/holdfast/proto/stream"
)

const (
	// maxStreams is how many streams one client may have open: two for each connection
	// to a port.
	maxStreams = 2048
	// maxForwarded is how many connections to ports there may be, of all clients. Those of
	// one pod may be half as many as are left: nobody takes all of them.
	maxForwarded = 4096
	// maxRefused is how many streams of one client wait to be told that there is no place for
	// them. One more, and the client is cut off: it does not read.
	maxRefused = 32
	// dialLimit bounds the making of one.
	dialLimit = 30 * time.Second
	// drainLimit is how long a pod may take to read what a client has sent that is gone.
	drainLimit = 10 * time.Second
	// quietLimit is how long a client may be silent whose pod has closed its side.
	quietLimit = 10 * time.Second
	// waitLimit is the same of a client that waits for the end of both to know of that.
	waitLimit = time.Second
	// copySize is how much is read of a port at a time.
	copySize = 64 << 10
)

// Dialer connects to an address in a network namespace; "" is the node's.
type Dialer func(ctx context.Context, netns, address string) (net.Conn, error)

// forward serves port-forward over SPDY, over SPDY in a WebSocket, and over the older
// WebSocket protocols.
func (s *Server) forward(u *upgrade, req *http.Request, r stream.Request) {
	f := &forwarder{
		server:  s,
		request: r,
		ctx:     req.Context(),
		pairs:   map[string]*pair{},
	}
	switch {
	case !websocket.IsWebSocketUpgrade(req):
		if _, err := upgradeSPDY(u, req, portforward.SupportedProtocols); err == nil {
			f.serve(newSPDY(u.link, u.link, u.link.write, u.link.answer, maxStreams, f.opened))
		}
	case slices.Contains(websocket.Subprotocols(req), portforward.WebsocketsSPDYTunnelingPortForwardV1):
		web, err := upgradeTo(u, req, []string{portforward.WebsocketsSPDYTunnelingPortForwardV1})
		if err != nil {
			return
		}
		t := &tunnel{webSocket: web}
		f.serve(newSPDY(u.link, t, t.write, t.answer, maxStreams, f.opened))
		web.bye()
	default:
		s.forwardChannels(u, req, f)
	}
}

// forwarder joins the streams of a client with ports of the pod of one request.
type forwarder struct {
	server  *Server
	request stream.Request
	ctx     context.Context // ends with the client
	running sync.WaitGroup

	refused atomic.Int32 // pairs that are there, without a place

	mu    sync.Mutex
	pairs map[string]*pair // of which one stream is missing
}

// pair is the streams of a connection to a port: bytes go over data, and why it failed
// over errs. It has its place, or what stands for one, from its first stream on.
type pair struct {
	port       int32
	data, errs *spdyStream
	refused    error       // why nothing is forwarded
	leave      func()      // gives the place back
	timer      *time.Timer // until both streams are there
}

// serve serves a connection until its end.
func (f *forwarder) serve(c *spdyConn) {
	c.serve()
	f.running.Wait()
	f.mu.Lock()
	for _, p := range f.pairs {
		if p.timer.Stop() {
			p.leave()
		}
	}
	f.mu.Unlock()
	c.end()
}

// opened takes a stream. It is called by one goroutine.
func (f *forwarder) opened(s *spdyStream) error {
	port, err := strconv.ParseUint(s.headers.Get(portforward.PortHeader), 10, 16)
	kind := s.headers.Get(typeHeader)
	isError := kind == typeError
	if err != nil || port == 0 || !isError && kind != portforward.StreamTypeData {
		return fmt.Errorf("%w: a stream %q for the port %q", errProtocol, kind, s.headers.Get(portforward.PortHeader))
	}
	id := s.headers.Get(portforward.PortForwardRequestIDHeader)
	switch {
	case id == "" && isError: // an old client opens them one after the other
		id = strconv.Itoa(int(s.id))
	case id == "":
		id = strconv.Itoa(int(s.id) - 2)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.pairs[id]
	if p == nil {
		if p, err = f.newPair(int32(port)); err != nil {
			return err
		}
		p.timer = time.AfterFunc(f.server.CreationTimeout, func() { f.expire(id, p) })
		f.pairs[id] = p
	}
	to := &p.data
	if isError {
		to = &p.errs
	}
	if *to != nil {
		return fmt.Errorf("%w: two streams of a kind have the same request", errProtocol)
	}
	*to = s
	if p.data == nil || p.errs == nil {
		s.early = !isError
		f.running.Go(s.accept)
		return nil
	}
	p.timer.Stop()
	delete(f.pairs, id)
	f.begin(p)
	return nil
}

// newPair makes a pair without streams.
func (f *forwarder) newPair(port int32) (*pair, error) {
	leave, err := f.enter(port)
	if err != nil {
		leave = func() { f.refused.Add(-1) }
		if f.refused.Add(1) > maxRefused {
			leave()
			return nil, fmt.Errorf("%w: it opens streams and does not read: %w", errProtocol, err)
		}
	}
	return &pair{port: port, refused: err, leave: leave}, nil
}

// expire forgets half a pair whose other half has not come.
func (f *forwarder) expire(id string, p *pair) {
	f.mu.Lock()
	if f.pairs[id] != p {
		f.mu.Unlock()
		return
	}
	delete(f.pairs, id)
	f.mu.Unlock()
	for _, s := range []*spdyStream{p.errs, p.data} {
		if s != nil {
			s.Reset()
		}
	}
	p.leave()
}

// begin has the streams joined with a port.
func (f *forwarder) begin(p *pair) {
	var in *queue
	if p.refused == nil {
		in = p.data.take(forwardQueue)
	}
	f.running.Go(func() {
		defer p.leave()
		defer p.errs.end()
		defer p.data.end()
		p.errs.accept()
		p.data.accept()
		err := p.refused
		if err == nil {
			err = f.connect(p.port, p.data, in, quietLimit)
		}
		if err != nil {
			p.data.Reset()
			fmt.Fprintf(p.errs, "error forwarding port %d to pod %s: %v", p.port, f.request.ID, err)
		}
	})
}

// enter takes one of the places for connections to ports. leave gives it back.
func (f *forwarder) enter(port int32) (leave func(), err error) {
	if len(f.request.Ports) > 0 && !slices.Contains(f.request.Ports, port) {
		return nil, fmt.Errorf("port %d is none of %v, which were asked for", port, f.request.Ports)
	}
	if !f.server.forwards.enter(f.request.ID) {
		return nil, errors.New("too many connections to ports are open, of this pod or of all")
	}
	return func() { f.server.forwards.leave(f.request.ID) }, nil
}

// forwards counts connections to ports.
type forwards struct {
	mu   sync.Mutex
	all  int
	pods map[string]int // by their ids
}

func (f *forwards) enter(pod string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pods[pod] >= (maxForwarded-f.all+1)/2 {
		return false
	}
	f.all++
	f.pods[pod]++
	return true
}

func (f *forwards) leave(pod string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all--
	if f.pods[pod]--; f.pods[pod] == 0 {
		delete(f.pods, pod)
	}
}

// connect joins a client with a port, until both directions have ended. quiet: see join.
func (f *forwarder) connect(port int32, client io.WriteCloser, from io.Reader, quiet time.Duration) error {
	// A client that has sent something and gone is no reason not to deliver it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(f.ctx), dialLimit)
	defer cancel()
	pod, err := f.server.Dial(ctx, f.request.Netns, net.JoinHostPort("localhost", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	defer pod.Close()
	return join(f.ctx, pod, client, from, quiet)
}

// join copies both ways. The end of one direction is passed on, and the other one goes
// on: after that of the client for as long as it takes, after that of the pod while the
// client sends. Some clients send nothing more and wait for this to end. ctx is the
// client's presence: without it the pod gets what came, and no more. A client that was
// silent for the time limit sends nothing more.
func join(ctx context.Context, pod net.Conn, client io.WriteCloser, from io.Reader, limit time.Duration) error {
	in, out := make(chan struct{}), make(chan error, 1)
	to := &countingWriter{w: pod}
	go func() {
		defer close(in)
		copyIn(pod, to, from)
	}()
	go func() { out <- copyOut(client, pod) }()

	select {
	case err := <-out:
		if err != nil {
			return err
		}
		client.Close()
		for last, quiet := to.n.Load(), false; !quiet && ctx.Err() == nil; {
			select {
			case <-in:
				return nil
			case <-ctx.Done():
			case <-time.After(limit):
				n := to.n.Load()
				last, quiet = n, n == last
			}
		}
	case <-ctx.Done():
		select {
		case <-in:
		case <-time.After(drainLimit):
		}
	case <-in:
		select {
		case err := <-out:
			return err
		case <-ctx.Done():
		}
	}
	if stream, ok := client.(interface{ Reset() error }); ok {
		stream.Reset() // nobody reads it any more
	}
	return nil
}

// countingWriter counts the bytes that were written.
type countingWriter struct {
	w io.Writer
	n atomic.Int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// copyIn copies what a client sends, with its end. When the pod takes no more the rest
// is read all the same: other streams of the client come behind it.
func copyIn(pod net.Conn, to io.Writer, from io.Reader) {
	if _, err := io.Copy(to, from); err != nil {
		io.Copy(io.Discard, from)
		return
	}
	if tcp, ok := pod.(interface{ CloseWrite() error }); ok {
		tcp.CloseWrite()
	}
}

// buffers are those of connections to ports, of copySize bytes.
var buffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// copyOut copies what a pod sends. A client that resets its stream wants no more of it, which
// is no failure: kubectl ends all its connections when it is told of one.
func copyOut(client io.Writer, pod net.Conn) error {
	b := buffers.Get().(*[copySize]byte)
	defer buffers.Put(b)
	for {
		n, err := pod.Read(b[:])
		if n > 0 {
			_, werr := client.Write(b[:n])
			if errors.Is(werr, errReset) {
				return nil
			}
			if werr != nil {
				return fmt.Errorf("cannot write to the client: %w", werr)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read from the port: %w", err)
		}
	}
}

// answer sends the answer to a ping of SPDY, as link.answer does.
func (t *tunnel) answer(pong []byte) error {
	return t.link.answer(append(messageHead(nil, websocket.BinaryMessage, len(pong)), pong...))
}

// tunnel is a WebSocket as a connection for SPDY.
type tunnel struct {
	*webSocket
	message io.Reader // the rest of one
}

// Read reads what messages have in them.
func (t *tunnel) Read(p []byte) (int, error) {
	for {
		if t.message == nil {
			kind, message, err := t.NextReader()
			if err != nil {
				t.link.conn.cancel(fmt.Errorf("%w: %w", errGone, err))
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, fmt.Errorf("%w: a message of text", errProtocol)
			}
			t.message = message
		}
		n, err := t.message.Read(p)
		if errors.Is(err, io.EOF) {
			t.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// write sends two pieces as one message.
func (t *tunnel) write(a, b []byte) error { return t.send(websocket.BinaryMessage, a, b) }

// The older protocols have two channels for each port, for bytes and for why it failed.
// Both begin with its number, and they end with the connection.
var oldForwards = []string{"v4." + wsstream.ChannelWebSocketProtocol, "v4." + wsstream.Base64ChannelWebSocketProtocol}

// maxChannels is how many ports have a channel number.
const maxChannels = 127

func (s *Server) forwardChannels(u *upgrade, req *http.Request, f *forwarder) {
	ports := f.request.Ports
	if len(ports) == 0 || len(ports) > maxChannels {
		http.Error(u, fmt.Sprintf("this protocol is for 1 to %d ports", maxChannels), http.StatusBadRequest)
		return
	}
	web, err := upgradeTo(u, req, oldForwards)
	if err != nil {
		return
	}
	defer web.bye()
	if len(websocket.Subprotocols(req)) > 0 && web.Subprotocol() == "" {
		return // none of them is known
	}
	text := web.Subprotocol() == oldForwards[1]
	in := make([]*queue, len(ports))
	for i, port := range ports {
		in[i] = newQueue(forwardQueue)
		f.running.Go(func() { f.joinChannels(web, text, byte(2*i), port, in[i]) })
	}
	go func() {
		err := readChannels(web, text, in)
		for _, q := range in {
			q.end(errGone)
		}
		web.link.conn.cancel(fmt.Errorf("%w: %w", errGone, err))
	}()
	f.running.Wait()
}

// joinChannels joins the channels number and number+1 with a port.
func (f *forwarder) joinChannels(web *webSocket, text bool, number byte, port int32, in *queue) {
	defer in.abandon()
	data, errs := channel{web, text, number}, channel{web, text, number + 1}
	first := binary.LittleEndian.AppendUint16(nil, uint16(port))
	data.Write(first)
	errs.Write(first)
	leave, err := f.enter(port)
	if err == nil {
		defer leave()
		err = f.connect(port, bothWays{data}, in, f.server.waitLimit)
	}
	if err != nil {
		fmt.Fprintf(errs, "error forwarding port %d to pod %s: %v", port, f.request.ID, err)
	}
}

// bothWays is a client that cannot be told that the pod has closed its side: these protocols
// have no end of one direction. So both end, as soon as the client is silent.
type bothWays struct{ channel }

func (bothWays) Close() error { return nil }

// readChannels takes messages until the connection ends.
func readChannels(web *webSocket, text bool, in []*queue) error {
	for {
		_, message, err := web.NextReader()
		if err != nil {
			return err
		}
		number, payload, err := parse(message, text)
		if errors.Is(err, io.EOF) {
			continue
		}
		if err == nil && number%2 == 0 && int(number/2) < len(in) {
			_, err = in[number/2].ReadFrom(payload)
		}
		if err != nil {
			return err
		}
	}
}
