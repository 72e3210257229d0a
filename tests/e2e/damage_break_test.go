package e2e

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A directory has taken the place of a lock, or of a file that is only derived.
// The daemon starts, and the pod can still be removed without a trace.
func TestDamagedLocks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		path func(*harness.Node, *harness.Container) string
	}{
		{"shim of a running container", func(n *harness.Node, c *harness.Container) string {
			return filepath.Join(n.State, "containers", c.ID, "shim.lock")
		}},
		{"CNI", func(n *harness.Node, c *harness.Container) string {
			return filepath.Join(n.Root, "cni", "running", c.Pod.ID)
		}},
		{"index of the images", func(n *harness.Node, _ *harness.Container) string {
			return filepath.Join(n.Root, "images", "index.json")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := harness.New(t)
			run := n.RunPod("locks").Run("run", []string{"sleep", "1000"})
			pid := run.Info().PID
			n.Kill()
			path := c.path(n, run)
			check(t, os.Remove(path))
			check(t, os.MkdirAll(filepath.Join(path, "in", "the", "way"), 0o700))
			n.Start()
			if s := run.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || !harness.IsProcess(pid) {
				t.Errorf("the container is %s, alive: %v", s.State, harness.IsProcess(pid))
			}
			run.Pod.Remove()
			n.CheckClean()
		})
	}
}

// The file system of the run directories is full. A creation that fails leaves
// nothing behind, though no exit record can be written either.
func TestStateFull(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	n.Stop()
	check(t, syscall.Mount("tmpfs", n.State, "tmpfs", 0, "size=16m,mode=0755"))
	t.Cleanup(func() {
		n.RemoveAllPods()
		n.Stop()
		if err := syscall.Unmount(n.State, 0); err != nil {
			t.Errorf("cannot unmount %s: %v", n.State, err)
		}
	})
	n.Start()
	pod := n.RunPod("full")
	f, err := os.Create(filepath.Join(n.State, "filler"))
	check(t, err)
	defer f.Close()
	n.Mark()
	for b := make([]byte, 64<<10); len(b) > 0; {
		if _, err := f.Write(b); err != nil {
			b = b[:len(b)/2]
		}
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
		Config: harness.ContainerConfig("more", []string{"sleep", "1000"}), SandboxConfig: pod.Config})
	if err == nil {
		t.Errorf("a container was made on a full file system: %s", r.ContainerId)
	}
	n.CheckClean()
}

// A name that no plugin can be told of is refused before anything is made that
// could then not be given back.
func TestNameForPlugins(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for _, name := range []string{"a\x00b", "a\nb", "a;IP=10.0.0.1"} {
		ctx, cancel := harness.Deadline()
		config := n.PodConfig("bad", func(c *cri.PodSandboxConfig) { c.Metadata.Name = name })
		_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
		cancel()
		wantError(t, err, codes.InvalidArgument, "metadata.name")
	}
	n.CheckClean()
}
