package daemon

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/client"
)

// told are the first n events that a new subscriber gets.
func (b *bed) told(n int) (got []string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	b.joint.Events.Serve(ctx, func(e events.Event) error {
		code := int32(-1)
		for _, s := range e.ContainersStatuses {
			if s.Id == e.ContainerId {
				code = s.ExitCode
			}
		}
		got = append(got, fmt.Sprint(e.ContainerId, " ", e.ContainerEventType, " ", code, " ",
			e.PodSandboxStatus.GetState()))
		if len(got) == n {
			cancel()
		}
		return nil
	})
	return got
}

// What ended while no daemon ran is told to those who subscribe to the next one, in the
// order of the ends, and after it what has happened since.
func TestRecoverEvents(t *testing.T) {
	b := newBed(t)
	pod, other := b.RunPod(t, "pod"), b.RunPod(t, "other")
	first := b.Run(t, pod, fake.ContainerConfig("first"))
	second := b.Run(t, pod, fake.ContainerConfig("second"))
	later := b.Run(t, pod, fake.ContainerConfig("later"))
	check(t, b.Pods.Stop(t.Context(), other))
	b.close()
	for _, id := range []string{second, first} {
		b.stop(id)
	}
	b.open()
	const stopped = " CONTAINER_STOPPED_EVENT "
	want := []string{
		second + stopped + "143 SANDBOX_READY",
		first + stopped + "143 SANDBOX_READY",
		other + stopped + "-1 SANDBOX_NOTREADY",
	}
	for range 2 {
		if got := b.told(3); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	check(t, b.Containers.Remove(t.Context(), second))
	ended := make(chan struct{})
	go func() { defer close(ended); b.stop(later) }()
	want = append(want[1:], second+" CONTAINER_DELETED_EVENT -1 SANDBOX_READY", later+stopped+"143 SANDBOX_READY")
	if got := b.told(4); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	<-ended // before its directory goes
	check(t, b.Pods.Remove(t.Context(), other))
	b.removeAll(pod)
}

// stop has the shim of a container stop it, and waits for its end, without a daemon.
func (b *bed) stop(id string) {
	c := client.New(b.Dir(id))
	defer c.Close()
	if err := c.Stop(b.t.Context(), 15, time.Minute); err != nil {
		b.t.Error(err)
		return
	}
	for {
		if _, err := b.Dir(id).ReadExit(); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
