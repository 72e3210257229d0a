package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// fake is a shim that answers from its fields, over a real socket. What it does
// not serve panics, which ttrpc turns into an error.
type fake struct {
	proto.ShimService
	dir      rundir.Dir
	min, max uint32
	hellos   atomic.Int32
	err      error // of State
	events   []*proto.Event

	mu     sync.Mutex
	server *ttrpc.Server
	conns  []net.Conn
}

// listener keeps the connections of a fake: a ttrpc server that is closed lets
// them answer a little longer.
type listener struct {
	net.Listener
	f *fake
}

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if err == nil {
		l.f.conns = append(l.f.conns, conn)
	}
	return conn, err
}

func newFake(t *testing.T) *fake {
	t.Helper()
	dir, err := os.MkdirTemp("", "client")
	must.Succeed(t, err)
	f := &fake{dir: rundir.Dir(filepath.Join(dir, "id")), min: proto.ProtocolMin, max: proto.ProtocolMax}
	must.Succeed(t, os.Mkdir(string(f.dir), 0o700))
	f.serve(t)
	t.Cleanup(func() {
		f.close()
		os.RemoveAll(dir)
	})
	return f
}

func (f *fake) serve(t *testing.T) {
	t.Helper()
	l, err := f.dir.Listen()
	must.Succeed(t, err)
	server, err := ttrpc.NewServer()
	must.Succeed(t, err)
	proto.RegisterShimService(server, f)
	f.mu.Lock()
	f.server = server
	f.mu.Unlock()
	go server.Serve(context.Background(), listener{l, f})
}

func (f *fake) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.server.Close()
	for _, conn := range f.conns {
		conn.Close()
	}
}

func (f *fake) Hello(_ context.Context, req *proto.HelloRequest) (*proto.HelloResponse, error) {
	f.hellos.Add(1)
	return &proto.HelloResponse{
		Id:           req.Id,
		Shim:         &proto.Process{Pid: 7, StartTime: 8},
		ProtocolMin:  f.min,
		ProtocolMax:  f.max,
		Version:      "v0",
		Capabilities: []string{"pty"},
	}, nil
}

func (f *fake) State(context.Context, *proto.StateRequest) (*proto.StateResponse, error) {
	return &proto.StateResponse{Phase: proto.Phase_PHASE_RUNNING, LastEvent: 3}, f.err
}

func (f *fake) Start(ctx context.Context, _ *proto.StartRequest) (*proto.StartResponse, error) {
	<-ctx.Done() // silent
	return nil, ctx.Err()
}

func (f *fake) Events(_ context.Context, req *proto.EventsRequest) (*proto.EventsResponse, error) {
	return &proto.EventsResponse{Events: f.events[req.After:]}, nil
}

func TestHelloOnce(t *testing.T) {
	f := newFake(t)
	f.events = []*proto.Event{{Seq: 1, Type: proto.EventType_EVENT_TYPE_EXITED, Exit: &proto.Exit{Code: 3}}}
	c := New(f.dir)
	defer c.Close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if s, err := c.State(t.Context()); err != nil || s.Phase != rundir.PhaseRunning || s.Seq != 3 {
				t.Errorf("state: %+v, %v", s, err)
			}
		})
	}
	wg.Wait()
	if err := c.Watch(t.Context(), 0, func(Event) {}); err != nil {
		t.Error(err)
	}
	hello, err := c.Hello(t.Context())
	if err != nil || hello.Shim != (rundir.Process{PID: 7, StartTime: 8}) ||
		!slices.Equal(hello.Capabilities, []string{"pty"}) {
		t.Errorf("hello: %+v, %v", hello, err)
	}
	if n := f.hellos.Load(); n != 1 {
		t.Errorf("%d times Hello on one shim", n)
	}
	// Another shim is another negotiation; the call that met the end is repeated.
	f.close()
	f.serve(t)
	if _, err := c.State(t.Context()); err != nil {
		t.Errorf("after the shim was replaced: %v", err)
	}
	if n := f.hellos.Load(); n != 2 {
		t.Errorf("%d times Hello on two shims", n)
	}
}

func TestAnotherProtocol(t *testing.T) {
	for name, r := range map[string]struct{ min, max uint32 }{
		"younger": {proto.ProtocolMax + 1, proto.ProtocolMax + 2},
		"older":   {0, proto.ProtocolMin - 1},
	} {
		f := newFake(t)
		f.min, f.max = r.min, r.max
		c := New(f.dir)
		defer c.Close()
		_, err := c.State(t.Context())
		if !errors.Is(err, kind.Unsupported) || errors.Is(err, ErrUnreachable) ||
			!strings.Contains(err.Error(), "protocol") {
			t.Errorf("a %s shim: %v", name, err)
		}
	}
}

func TestErrors(t *testing.T) {
	f := newFake(t)
	c := New(f.dir)
	defer c.Close()
	for code, want := range map[codes.Code]error{
		codes.InvalidArgument:    kind.Invalid,
		codes.NotFound:           kind.NotFound,
		codes.AlreadyExists:      kind.Exists,
		codes.FailedPrecondition: kind.State,
		codes.Unavailable:        kind.Unavailable,
		codes.Canceled:           context.Canceled,
		codes.DeadlineExceeded:   ErrUnreachable,
	} {
		f.err = status.Error(code, "its own words")
		if _, err := c.State(t.Context()); !errors.Is(err, want) {
			t.Errorf("%s became %v", code, err)
		}
	}
	f.err = status.Error(codes.Internal, "its own words")
	if _, err := c.State(t.Context()); err == nil || err.Error() != "its own words" || errors.Is(err, ErrUnreachable) {
		t.Errorf("an answer became %v", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := c.Start(ctx); !errors.Is(err, ErrUnreachable) || !errors.Is(err, kind.Unavailable) ||
		!errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
	f.close()
	if _, err := c.State(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody listens: %v", err)
	}
}

// A shim that takes connections and says nothing delays nobody for longer than
// he wants to wait.
func TestWaitersHaveTheirOwnDeadline(t *testing.T) {
	dir := rundir.Dir(t.TempDir())
	l, err := dir.Listen()
	must.Succeed(t, err)
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if conn, err := l.Accept(); err == nil {
			accepted <- conn
		}
	}()
	c := New(dir)
	first := make(chan error, 1)
	go func() {
		_, err := c.State(context.Background())
		first <- err
	}()
	conn := <-accepted // the first one is in the middle of Hello
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.State(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("the second one: %v", err)
	}
	c.Close()
	if err := <-first; err == nil {
		t.Error("closing a client lets a call go on")
	}
}

func TestWatch(t *testing.T) {
	f := newFake(t)
	at := time.Unix(1234567890, 0).UTC()
	f.events = []*proto.Event{
		{Seq: 1, Type: proto.EventType_EVENT_TYPE_CREATED, At: proto.TimeOf(at), Init: &proto.Process{Pid: 5,
			StartTime: 6}},
		{Seq: 2, Type: proto.EventType_EVENT_TYPE_STARTED, At: proto.TimeOf(at)},
		{Seq: 3, Type: proto.EventType_EVENT_TYPE_EXITED, At: proto.TimeOf(at), Exit: &proto.Exit{Code: 3}},
	}
	want := []Event{
		{ID: "id", Seq: 1, At: at, Type: Created, Init: rundir.Process{PID: 5, StartTime: 6}},
		{ID: "id", Seq: 2, At: at, Type: Started},
		{ID: "id", Seq: 3, At: at, Type: Exited, Exit: &rundir.Exit{Code: 3}},
	}
	c := New(f.dir)
	defer c.Close()
	for after := range uint64(3) {
		var got []Event
		must.Succeed(t, c.Watch(t.Context(), after, func(e Event) { got = append(got, e) }))
		if !reflect.DeepEqual(got, want[after:]) {
			t.Errorf("after %d: %+v", after, got)
		}
	}
}
