package e2e

import (
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A kubelet that lost an answer asks again. It gets what the first request made,
// also from the next daemon.
func TestCreateAgain(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("again")
	c := pod.Create("again", []string{"sleep", "1000"})
	for _, when := range []string{"at once", "after a restart"} {
		if id := n.RunPod("again").ID; id != pod.ID {
			t.Errorf("%s: the pod has another id: %s and %s", when, pod.ID, id)
		}
		if id := pod.Create("again", []string{"sleep", "1000"}).ID; id != c.ID {
			t.Errorf("%s: the container has another id: %s and %s", when, c.ID, id)
		}
		n.Restart()
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 1 {
		t.Errorf("there are %d containers (%v), want one", len(list.GetContainers()), err)
	}

	// Requests at the same time join each other.
	pod2 := n.PodConfig("together")
	ids := make(chan string, 8)
	for range cap(ids) {
		go func() {
			ctx, cancel := harness.Deadline()
			defer cancel()
			r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod2})
			if err != nil {
				ids <- err.Error()
				return
			}
			ids <- r.PodSandboxId
		}()
	}
	first := <-ids
	for range cap(ids) - 1 {
		if id := <-ids; id != first {
			t.Errorf("requests at the same time got %s and %s", first, id)
		}
	}

	// A removed name is free again, for anything.
	c.Remove()
	if again := pod.Create("again", []string{"sleep", "2000"}); again.ID == c.ID {
		t.Error("another container got the id of a removed one")
	}
	n.RemoveAllPods()
	n.CheckClean()
}
