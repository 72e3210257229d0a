package crash

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A daemon with many shims below it serves from its records: the first answer
// lists all of them, though one in ten of the shims does not answer at all.
func TestManyShims(t *testing.T) {
	count := 20
	if drill {
		count = 100
	}
	n := harness.New(t)
	pod := n.RunPod("many", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}
	})
	started := map[string]int64{}
	for i := range count {
		c := pod.Run(fmt.Sprintf("c%d", i), []string{"sleep", "100000"})
		started[c.ID] = c.Status().StartedAt
	}
	stopped := 0
	for _, pid := range n.ShimPIDs() {
		if stopped < count/10 {
			check(t, unix.Kill(pid, unix.SIGSTOP))
			t.Cleanup(func() { unix.Kill(pid, unix.SIGCONT) }) // runs before the node's end
			stopped++
		}
	}
	n.Kill()
	from := time.Now()
	n.Start()
	served := time.Since(from)
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	check(t, err)
	t.Logf("with %d shims, %d of them stopped: Version answered %s after the start, the full list %s after it",
		count, stopped, served.Round(time.Millisecond), time.Since(from).Round(time.Millisecond))
	if len(list.Containers) != count {
		t.Errorf("%d containers are listed, want %d", len(list.Containers), count)
	}
	for _, c := range list.Containers {
		if c.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%s is listed as %s", c.Metadata.Name, c.State)
		}
	}
	for id, at := range started {
		r, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		if err != nil || r.Status.StartedAt != at || r.Status.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("a container started at %d is now %v (%v)", at, r.GetStatus(), err)
		}
	}
}
