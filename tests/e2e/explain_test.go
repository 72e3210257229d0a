package e2e

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// The stories of what was killed for want of memory, never ran, or shares its name with another.
func TestExplainEdges(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("twice")
	oom := pod.Run("oom", []string{"sh", "-c", "x=$(head -c 200m /dev/zero | tr '\\0' x); sleep 1000"},
		func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 20 << 20,
				MemorySwapLimitInBytes: 20 << 20}
		})
	oom.WaitExited(patience)
	never := pod.Create("never", []string{"/does/not/exist"})
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: never.ID})
	wantError(t, err, codes.FailedPrecondition, "/does/not/exist")
	plain := pod.Create("plain", []string{"sleep", "1000"})
	pod.Remove()
	n.RunPod("twice")
	for name, want := range map[string]string{
		"oom":           "the kernel killed it for want of memory",
		"never":         "ended: it never ran (StartError: ",
		"plain":         "created from image " + harness.Image,
		plain.ID[:13]:   "ended: it never ran (ContainerCannotRun: ",
		"twice":         "now: the pod is ready",
		"default/twice": "removed",
	} {
		if got := n.Explain(name); !strings.Contains(got, want) {
			t.Errorf("explain %s: %q is wanted, it is\n%s", name, want, got)
		}
	}
	if got := strings.Count(n.Explain("default/twice"), "pod default/twice"); got != 2 {
		t.Errorf("%d stories of two pods of one name", got)
	}
}
