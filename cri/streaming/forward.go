package streaming

import (
	"bufio"
	"context"
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
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/holdfast-cri/holdfast/proto/stream"
)

const (
	// maxStreams is how many streams one client may have open: two for each connection
	// to a port.
	maxStreams = 2048
	// maxForwarded is how many connections to ports there may be, of all clients.
	maxForwarded = 4096
	// maxDials is how many of them are made at a time. Each takes a thread.
	maxDials = 32
	// dialLimit bounds the making of one.
	dialLimit = 30 * time.Second
	// drainLimit is how long a pod may take to read what a client has sent that is gone.
	drainLimit = 10 * time.Second
	// quietLimit is how long a client may be silent whose pod has closed its side.
	quietLimit = 10 * time.Second
	// copySize is how much is read of a port at a time.
	copySize = 64 << 10
)

// Dialer connects to an address in a network namespace; "" is the node's.
type Dialer func(ctx context.Context, netns, network, address string) (net.Conn, error)

// forward serves port-forward over SPDY, over SPDY in a WebSocket, and over the older
// WebSocket protocols.
func (s *Server) forward(u *upgrade, req *http.Request, r stream.Request) {
	f := &forwarder{server: s, request: r}
	options, _ := portforward.BuildV4Options(r.Ports) // never fails
	serve := func(w http.ResponseWriter, req *http.Request) {
		portforward.ServePortForward(w, req, f, r.ID, "", options, 0, s.CreationTimeout, portforward.SupportedProtocols)
	}
	guarded := func(l *link, from io.Reader, write func(a, b []byte) error) net.Conn {
		f.guard = newGuard(l, from, write, &s.budget, maxStreams)
		f.guard.ports = true
		return f.guard
	}
	f.ctx = req.Context()
	defer func() {
		if f.guard != nil {
			f.guard.release()
		}
	}()
	switch {
	case !websocket.IsWebSocketUpgrade(req):
		u.wrap = func(l *link) net.Conn { return guarded(l, l, l.write) }
		serve(u, req)
	case slices.Contains(websocket.Subprotocols(req), portforward.WebsocketsSPDYTunnelingPortForwardV1):
		web, err := upgradeTo(u, req, []string{portforward.WebsocketsSPDYTunnelingPortForwardV1})
		if err != nil {
			return
		}
		t := &tunnel{webSocket: web}
		inner := req.Clone(req.Context())
		inner.Header = http.Header{}
		inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
		inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
		inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
		serve(tunnelResponse{http.Header{}, guarded(web.link, t, t.write)}, inner)
		web.bye()
	default:
		serve(u, req)
	}
}

// forwarder is the library's way to a port of the pod of one request.
type forwarder struct {
	server  *Server
	request stream.Request
	guard   *guard // nil: a WebSocket without SPDY
	ctx     context.Context
}

// PortForward joins a stream with a port, until both directions have ended. Its ctx is
// the library's, which has no end.
func (f *forwarder) PortForward(_ context.Context, _, _ string, port int32, client io.ReadWriteCloser) error {
	var from io.Reader = client
	if s, ok := client.(counted); ok && f.guard != nil {
		from = reader{s, f.guard}
		defer f.guard.ended(s.Identifier())
		f.guard.awaitAnswer(f.ctx, s.Identifier())
	}
	if len(f.request.Ports) > 0 && !slices.Contains(f.request.Ports, port) {
		return fmt.Errorf("port %d is none of %v, which were asked for", port, f.request.Ports)
	}
	if f.server.forwarded.Add(1) > maxForwarded {
		f.server.forwarded.Add(-1)
		return fmt.Errorf("%d connections to ports are open, and there may be no more", maxForwarded)
	}
	defer f.server.forwarded.Add(-1)
	pod, err := f.dial(port)
	if err != nil {
		return err
	}
	defer pod.Close()
	return join(f.ctx, pod, client, from)
}

func (f *forwarder) dial(port int32) (net.Conn, error) {
	// A client that has sent something and gone is no reason not to deliver it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(f.ctx), dialLimit)
	defer cancel()
	select {
	case f.server.dials <- struct{}{}:
		defer func() { <-f.server.dials }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return f.server.Dial(ctx, f.request.Netns, "tcp", net.JoinHostPort("localhost", strconv.Itoa(int(port))))
}

// join copies both ways. The end of one direction is passed on, and the other one goes
// on: after that of the client for as long as it takes, after that of the pod while the
// client sends. Some clients send nothing more and wait for this to end. ctx is the
// client's presence: without it the pod gets what came, and no more.
func join(ctx context.Context, pod net.Conn, client io.WriteCloser, from io.Reader) error {
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
			case <-time.After(quietLimit):
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

// copyOut copies what a pod sends.
func copyOut(client io.Writer, pod net.Conn) error {
	b := buffers.Get().(*[copySize]byte)
	defer buffers.Put(b)
	for {
		n, err := pod.Read(b[:])
		if n > 0 {
			if _, werr := client.Write(b[:n]); werr != nil {
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

// tunnelResponse is what the library answers to inside a tunnel. The client has got its
// answer, with the WebSocket.
type tunnelResponse struct {
	header http.Header
	conn   net.Conn
}

func (t tunnelResponse) Header() http.Header         { return t.header }
func (t tunnelResponse) WriteHeader(int)             {}
func (t tunnelResponse) Write(p []byte) (int, error) { return len(p), nil }

// Hijack gives the tunnel.
func (t tunnelResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.conn, bufio.NewReadWriter(bufio.NewReader(t.conn), bufio.NewWriterSize(t.conn, 16)), nil
}
