package streaming

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// patient is how long a test waits for what has to happen.
const patient = 20 * time.Second

// fake is a server in front of processes of this machine.
type fake struct {
	*Server
	t    *testing.T
	addr string
	tls  *tls.Config // of clients; nil: none

	mu       sync.Mutex
	requests map[string]stream.Request
	sizes    []client.Size // that processes have seen, the first at their start
	hungUp   chan error    // why the context of a session ended
	run      sessionFunc
}

// sessionFunc is what a session does.
type sessionFunc func(ctx context.Context, r stream.Request, st client.Streams) (client.SessionExit, error)

// newFake starts a server. run is what a session does; nil: it runs the command.
func newFake(t *testing.T, run sessionFunc) *fake {
	t.Helper()
	f := &fake{t: t, requests: map[string]stream.Request{}, hungUp: make(chan error, 64), run: run}
	if run == nil {
		f.run = runHere
	}
	s, err := New(Config{
		Take:            f.take,
		Open:            f.open,
		Dial:            dialHere,
		IdleTimeout:     time.Hour,
		CreationTimeout: 30 * time.Second,
		Log:             slog.New(slog.DiscardHandler),
	})
	must.Succeed(t, err)
	f.Server = s
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must.Succeed(t, err)
	f.addr = l.Addr().String()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return f
}

func dialHere(ctx context.Context, netns, address string) (net.Conn, error) {
	if netns != "" {
		return nil, fmt.Errorf("the namespace %s is not here", netns)
	}
	return new(net.Dialer).DialContext(ctx, "tcp", strings.Replace(address, "localhost", "127.0.0.1", 1))
}

func (f *fake) take(token string) (stream.Request, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.requests[token]
	if !ok {
		return r, kind.Errorf(kind.NotFound, "no such token")
	}
	delete(f.requests, token)
	return r, nil
}

// put gives the path of a request.
func (f *fake) put(r stream.Request) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	token := fmt.Sprintf("token%d", len(f.requests))
	f.requests[token] = r
	return "/" + string(r.Kind) + "/" + token
}

func (f *fake) open(_ context.Context, r stream.Request, size client.Size) (Session, error) {
	if len(r.Cmd) > 0 && r.Cmd[0] == "/missing" {
		return nil, errors.New("there is no /missing")
	}
	f.sawSize(size)
	return fakeSession{f, r}, nil
}

func (f *fake) sawSize(s client.Size) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sizes = append(f.sizes, s)
}

func (f *fake) seen() []client.Size {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]client.Size(nil), f.sizes...)
}

type fakeSession struct {
	f *fake
	r stream.Request
}

func (s fakeSession) Copy(ctx context.Context, st client.Streams) (client.SessionExit, error) {
	if st.Resize != nil {
		go func() {
			for size := range st.Resize {
				s.f.sawSize(size)
			}
		}()
	}
	stop := context.AfterFunc(ctx, func() { s.f.hungUp <- context.Cause(ctx) })
	defer stop()
	return s.f.run(ctx, s.r, st)
}

// runHere runs the command of a request.
func runHere(ctx context.Context, r stream.Request, st client.Streams) (client.SessionExit, error) {
	cmd := exec.CommandContext(ctx, r.Cmd[0], r.Cmd[1:]...)
	cmd.Stdout, cmd.Stderr = st.Stdout, st.Stderr
	if st.Stdin != nil {
		in, err := cmd.StdinPipe()
		if err != nil {
			return client.SessionExit{}, err
		}
		go func() {
			if _, err := io.Copy(in, st.Stdin); err == nil {
				in.Close()
			}
		}()
	}
	err := cmd.Run()
	if ctx.Err() != nil {
		return client.SessionExit{}, context.Cause(ctx)
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return client.SessionExit{Code: exit.ExitCode()}, nil
	}
	return client.SessionExit{}, err
}

// waitForEnd waits until the context of a session ends, and tells why.
func (f *fake) waitForEnd() error {
	f.t.Helper()
	select {
	case err := <-f.hungUp:
		return err
	case <-time.After(patient):
		f.t.Fatal("the session goes on without its client")
		return nil
	}
}

var eventually = must.Come

// nothingLeft checks, at the end of a test, that the goroutines of its sessions end.
func nothingLeft(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		end := time.Now().Add(2 * patient)
		for runtime.NumGoroutine() > before && time.Now().Before(end) {
			time.Sleep(10 * time.Millisecond)
		}
		if n := runtime.NumGoroutine(); n > before {
			b := make([]byte, 1<<20)
			t.Errorf("%d goroutines, before %d:\n%s", n, before, b[:runtime.Stack(b, true)])
		}
	})
}

// spdyDial upgrades to SPDY.
func (f *fake) spdyDial(path string, protocols ...string) (httpstream.Connection, string, error) {
	rt, err := spdy.NewRoundTripper(f.tls)
	if err != nil {
		return nil, "", err
	}
	req, err := http.NewRequest("POST", "http"+f.secure()+"://"+f.addr+path, nil)
	if err != nil {
		return nil, "", err
	}
	for _, p := range protocols {
		req.Header.Add(httpstream.HeaderProtocolVersion, p)
	}
	resp, err := (&http.Client{Transport: rt}).Do(req)
	if err != nil {
		return nil, "", err
	}
	conn, err := rt.NewConnection(resp)
	return conn, resp.Header.Get(httpstream.HeaderProtocolVersion), err
}

func (f *fake) secure() string {
	if f.tls != nil {
		return "s"
	}
	return ""
}

// withTLS has a server with TLS take the place of the one without.
func (f *fake) withTLS() {
	f.t.Helper()
	lender := httptest.NewTLSServer(nil) // of a certificate
	defer lender.Close()
	config := f.Config
	config.TLS = &tls.Config{Certificates: lender.TLS.Certificates}
	s, err := New(config)
	must.Succeed(f.t, err)
	f.Server, f.tls = s, &tls.Config{InsecureSkipVerify: true}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must.Succeed(f.t, err)
	f.addr = l.Addr().String()
	go s.Serve(l)
	f.t.Cleanup(func() { l.Close() })
}

// webDial upgrades to WebSocket.
func (f *fake) webDial(path string, protocols ...string) (*websocket.Conn, error) {
	d := websocket.Dialer{Subprotocols: protocols, TLSClientConfig: f.tls}
	ws, _, err := d.Dial("ws"+f.secure()+"://"+f.addr+path, nil)
	return ws, err
}
