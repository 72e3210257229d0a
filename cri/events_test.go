package cri

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon"
	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// A client that does not read is told so, however little of what it was sent it has taken,
// and its call does not outlive that. One that comes again is served.
func TestSlowSubscriber(t *testing.T) {
	hub := events.New()
	g := grpc.NewServer(grpc.StreamInterceptor(stream(slog.New(slog.DiscardHandler), nil)))
	runtimeapi.RegisterRuntimeServiceServer(g, &Server{d: &daemon.Daemon{Events: hub}})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	must.Succeed(t, err)
	go g.Serve(l)
	defer g.Stop()
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must.Succeed(t, err)
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)

	published := 0
	publish := func(text string) {
		hub.Publish(func() events.Event {
			published++
			return &runtimeapi.ContainerEventResponse{ContainerId: text}
		})
	}
	// subscribe returns when the call has come to the hub.
	subscribe := func() runtimeapi.RuntimeService_GetContainerEventsClient {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		t.Cleanup(cancel)
		s, err := client.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		must.Succeed(t, err)
		for published = 0; published == 0; time.Sleep(time.Millisecond) {
			publish("first")
		}
		return s
	}
	slow := subscribe()
	const size = 1 << 20
	for last := 0; published > last; {
		last = published
		publish(strings.Repeat("x", size)) // nobody is told when the subscriber has been ended
	}
	got, err := 0, error(nil)
	for ; err == nil; got++ {
		_, err = slow.Recv()
	}
	if status.Code(err) != codes.ResourceExhausted || got > published {
		t.Errorf("after %d of %d events: %v", got, published, err)
	}
	again := subscribe()
	publish("second")
	for {
		e, err := again.Recv()
		must.Succeed(t, err)
		if e.ContainerId == "second" {
			break
		}
	}
	ended := make(chan struct{})
	go func() { // waits for all calls
		defer close(ended)
		g.GracefulStop()
	}()
	hub.Close()
	if _, err := again.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("at the end: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("a call has not ended")
	}
}
