package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// subscription has what a subscriber has got so far.
type subscription struct {
	mu  sync.Mutex
	got []*cri.ContainerEventResponse
	end chan error
}

func subscribe(t *testing.T, n *harness.Node) *subscription {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := n.Runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	check(t, err)
	s := &subscription{end: make(chan error, 1)}
	go func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				s.end <- err
				return
			}
			s.mu.Lock()
			s.got = append(s.got, e)
			s.mu.Unlock()
		}
	}()
	t.Cleanup(cancel)
	return s
}

// of are the events of an object: their kinds, the state of the object, and its exit code.
func (s *subscription) of(id string) (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.got {
		if e.ContainerId != id {
			continue
		}
		text := fmt.Sprint(e.ContainerEventType.String()[len("CONTAINER_"):], " ", e.PodSandboxStatus.GetState())
		for _, c := range e.ContainersStatuses {
			if c.Id == id {
				text += fmt.Sprint(" ", c.State, " ", c.ExitCode)
			}
		}
		list = append(list, text)
	}
	return list
}

func (s *subscription) want(t *testing.T, id string, want ...string) {
	t.Helper()
	harness.Eventually(t, patience, fmt.Sprint("events ", want), func() bool { return len(s.of(id)) >= len(want) })
	if got := s.of(id); !slices.Equal(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
}

// A subscriber is told of all that happens, with the states that it leads to. One of the
// next daemon is told what has ended while there was none, and what ends then.
func TestGetContainerEvents(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	s := subscribe(t, n)
	var probe *harness.Pod // until it is subscribed, for which there is no answer
	harness.Eventually(t, patience, "the subscription", func() bool {
		probe = n.RunPod("probe")
		probe.Remove()
		return len(s.of(probe.ID)) > 0
	})
	pod := n.RunPod("events")
	ends := pod.Run("ends", []string{"sh", "-c", "exit 3"})
	stays := pod.Run("stays", []string{"sleep", "1000"})
	dies := pod.Run("dies", []string{"sleep", "1001"})
	const created = "CREATED_EVENT SANDBOX_READY CONTAINER_CREATED 0"
	const started = "STARTED_EVENT SANDBOX_READY CONTAINER_RUNNING 0"
	s.want(t, ends.ID, created, started, "STOPPED_EVENT SANDBOX_READY CONTAINER_EXITED 3")
	s.want(t, pod.ID, "CREATED_EVENT SANDBOX_READY", "STARTED_EVENT SANDBOX_READY")
	pid := dies.Info().PID

	n.Kill()
	if err := <-s.end; err == nil {
		t.Error("the stream of a killed daemon goes on")
	}
	check(t, unix.Kill(pid, unix.SIGKILL))
	run := rundir.Dir(filepath.Join(n.State, "containers", dies.ID))
	harness.Eventually(t, patience, "the end is on record, without a daemon", func() bool {
		_, err := run.ReadExit()
		return err == nil
	})
	n.Start()
	s = subscribe(t, n)
	const killed = "STOPPED_EVENT SANDBOX_READY CONTAINER_EXITED 137"
	s.want(t, dies.ID, killed)
	stays.Stop(0)
	s.want(t, stays.ID, killed)
	stays.Remove()
	s.want(t, stays.ID, killed, "DELETED_EVENT SANDBOX_READY")
	pod.Remove()
	s.want(t, pod.ID, "STOPPED_EVENT SANDBOX_NOTREADY", "DELETED_EVENT SANDBOX_NOTREADY")

	n.Stop() // a subscriber does not hold up the end of the daemon
	if err := <-s.end; err == nil {
		t.Error("the stream of a daemon that ended goes on")
	}
	n.Start()
}
