package pods_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// watcher has all events so far.
type watcher struct {
	mu  sync.Mutex
	all []events.Event
}

func (b *bed) watch() *watcher {
	b.t.Helper()
	w := &watcher{}
	subscribed := make(chan struct{})
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.Events.Serve(ctx, func(e events.Event) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.all = append(w.all, e)
			return nil
		})
	}()
	go func() { // nothing tells when it is subscribed but what it gets
		defer close(subscribed)
		for n := 0; n == 0; {
			b.Events.Publish(func() events.Event { return &runtimeapi.ContainerEventResponse{ContainerId: "probe"} })
			w.mu.Lock()
			n = len(w.all)
			w.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
	}()
	<-subscribed
	b.t.Cleanup(func() { cancel(); <-done })
	return w
}

// of are the events of an object, with the states that they tell of it.
func (w *watcher) of(id string) (list []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.all {
		if e.ContainerId != id {
			continue
		}
		state := "gone"
		for _, s := range e.ContainersStatuses {
			if s.Id == id {
				state = fmt.Sprint(s.State, " ", s.ExitCode)
			}
		}
		if p := e.PodSandboxStatus; p.GetId() == id {
			state = p.State.String()
		}
		list = append(list, e.ContainerEventType.String()+" "+state)
	}
	return list
}

// rest are all but those of watch itself.
func (w *watcher) rest() []events.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(w.all), func(e events.Event) bool { return e.ContainerId == "probe" })
}

func (w *watcher) want(t *testing.T, what, id string, want ...string) {
	t.Helper()
	must.Come(t, "events of "+what+fmt.Sprint(w.of(id)), func() bool { return len(w.of(id)) >= len(want) })
	if got := w.of(id); !slices.Equal(got, want) {
		t.Errorf("events of %s: %q, want %q", what, got, want)
	}
}

// Each thing that happens to a pod and its containers is told once, in order, with the
// state that it leads to, and with the pod.
func TestEvents(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	w := b.watch()
	pod := b.RunPod(t, "pod")
	// It ends when its start has been told: an event has the state of the moment at which it is made.
	goOn := filepath.Join(t.TempDir(), "go")
	must.Succeed(t, unix.Mkfifo(goOn, 0o600))
	short := b.Run(t, pod, fake.ContainerConfig("short", "sh", "-c", "read x <"+goOn+"; exit 3"))
	must.Come(t, "the event of a start", func() bool { return len(w.of(short)) >= 2 })
	must.Succeed(t, os.WriteFile(goOn, []byte("go\n"), 0))
	b.Ended(t, short)
	long := b.Run(t, pod, fake.ContainerConfig("long"))
	idle := b.Create(t, pod, fake.ContainerConfig("idle"))
	again := b.Create(t, pod, fake.ContainerConfig("idle")) // the same request
	if again != idle {
		t.Fatal("made twice")
	}
	for _, id := range []string{short, idle} {
		must.Succeed(t, b.Containers.Remove(ctx, id))
	}
	for range 2 {
		must.Succeed(t, b.Pods.Stop(ctx, pod))
	}
	b.remove(pod)
	w.want(t, "one that ends", short,
		"CONTAINER_CREATED_EVENT CONTAINER_CREATED 0", "CONTAINER_STARTED_EVENT CONTAINER_RUNNING 0",
		"CONTAINER_STOPPED_EVENT CONTAINER_EXITED 3", "CONTAINER_DELETED_EVENT gone")
	w.want(t, "one that is stopped", long,
		"CONTAINER_CREATED_EVENT CONTAINER_CREATED 0", "CONTAINER_STARTED_EVENT CONTAINER_RUNNING 0",
		"CONTAINER_STOPPED_EVENT CONTAINER_EXITED 137", "CONTAINER_DELETED_EVENT gone")
	w.want(t, "one that is not started", idle,
		"CONTAINER_CREATED_EVENT CONTAINER_CREATED 0", "CONTAINER_DELETED_EVENT gone")
	w.want(t, "the pod", pod,
		"CONTAINER_CREATED_EVENT SANDBOX_READY", "CONTAINER_STARTED_EVENT SANDBOX_READY",
		"CONTAINER_STOPPED_EVENT SANDBOX_NOTREADY", "CONTAINER_DELETED_EVENT SANDBOX_NOTREADY")
	at := int64(0)
	for _, e := range w.rest() {
		if e.PodSandboxStatus.GetId() != pod || e.CreatedAt < at {
			t.Errorf("after %d: %v", at, e)
		}
		at = e.CreatedAt
	}
}

// Of what fails to be made nothing is told.
func TestEventsOfFailures(t *testing.T) {
	b := newBed(t)
	w := b.watch()
	pod := b.RunPod(t, "pod")
	p, err := b.Pods.Find(pod)
	must.Succeed(t, err)
	b.Roots.Mounting.Fail(context.DeadlineExceeded)
	if _, err := b.Containers.Create(t.Context(), p, fake.ContainerConfig("c"), nil); err == nil {
		t.Error("created")
	}
	b.Network.Adding.Fail(context.DeadlineExceeded)
	if _, err := b.Pods.Run(t.Context(), fake.PodConfig("other"), ""); err == nil {
		t.Error("created")
	}
	b.remove(pod)
	w.want(t, "the pod", pod,
		"CONTAINER_CREATED_EVENT SANDBOX_READY", "CONTAINER_STARTED_EVENT SANDBOX_READY",
		"CONTAINER_STOPPED_EVENT SANDBOX_NOTREADY", "CONTAINER_DELETED_EVENT SANDBOX_NOTREADY")
	for _, e := range w.rest() {
		if e.ContainerId != pod {
			t.Errorf("of another one: %v", e)
		}
	}
}

// The end of its init is the end of a pod, and no event of a container.
func TestEventsOfInit(t *testing.T) {
	b := newBed(t)
	w := b.watch()
	pod := b.RunPod(t, "pod")
	b.Run(t, pod, fake.Shared("c"))
	b.KillShim(t, pod)
	w.want(t, "the pod", pod,
		"CONTAINER_CREATED_EVENT SANDBOX_READY", "CONTAINER_STARTED_EVENT SANDBOX_READY",
		"CONTAINER_STOPPED_EVENT SANDBOX_NOTREADY")
	b.remove(pod)
	w.want(t, "the pod", pod,
		"CONTAINER_CREATED_EVENT SANDBOX_READY", "CONTAINER_STARTED_EVENT SANDBOX_READY",
		"CONTAINER_STOPPED_EVENT SANDBOX_NOTREADY", "CONTAINER_DELETED_EVENT SANDBOX_NOTREADY")
}

// The status of a pod has those of its containers, the newest first, and no time.
func TestStatusHasContainers(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	first := b.Run(t, pod, fake.ContainerConfig("first"))
	second := b.Create(t, pod, fake.ContainerConfig("second"))
	r, err := b.Pods.Status(pod, false)
	must.Succeed(t, err)
	var got []string
	for _, s := range r.ContainersStatuses {
		got = append(got, s.Id)
	}
	if want := []string{second, first}; !slices.Equal(got, want) || r.Timestamp != 0 {
		t.Errorf("statuses of %v at %d, want %v", got, r.Timestamp, want)
	}
}
