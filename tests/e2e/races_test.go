package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Calls that meet on one pod or container, and daemons that ended at a bad moment.

func podPID(c *cri.ContainerConfig) {
	c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
}

func podPIDPod(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_POD},
	}
}

// create is Pod.Create for calls that may fail.
func create(ctx context.Context, pod *harness.Pod, name string) (*cri.CreateContainerResponse, error) {
	return pod.N.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
		Config: harness.ContainerConfig(name, []string{"sleep", "1000"}, podPID), SandboxConfig: pod.Config})
}

// A pod is removed while containers are made in it, which wait for its init.
func TestRemovePodDuringCreate(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("removed", podPIDPod)
	ctx, cancel := harness.Deadline()
	defer cancel()
	made := func() int {
		dirs, _ := filepath.Glob(filepath.Join(n.State, "containers", "*"))
		return len(dirs)
	}
	var wg sync.WaitGroup
	wg.Go(func() { create(ctx, pod, "a") }) // these fail or not, as it happens
	harness.Eventually(t, patience, "the init is made", func() bool { return made() > 0 })
	wg.Go(func() {
		if _, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.ID}); err != nil {
			t.Errorf("RemovePodSandbox: %v", err)
		}
	})
	for i := range 5 {
		wg.Go(func() { create(ctx, pod, fmt.Sprintf("b%d", i)) })
	}
	wg.Wait()
	n.CheckClean()
}

// The watcher buries the container of a killed shim at the moment when it is removed.
func TestRemoveAfterKilledShim(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("buried")
	for i := range 8 {
		c := pod.Run(fmt.Sprintf("c%d", i), []string{"sleep", "1000"})
		check(t, unix.Kill(c.ShimPID(), unix.SIGKILL))
		time.Sleep(time.Duration(i) * 5 * time.Millisecond) // the moments differ
		c.Remove()
	}
	pod.Remove()
	n.CheckClean()
}

// The daemon is killed while it makes the init of a pod. The next one removes
// what is there, and is asked for an init, under the same id, at once.
func TestKilledDuringInit(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for i := range 6 {
		pod := n.RunPod(fmt.Sprintf("p%d", i), podPIDPod)
		ctx, cancel := harness.Deadline()
		go create(ctx, pod, "a") // fails: its daemon is killed
		harness.Eventually(t, patience, "the init is made", func() bool {
			_, err := os.Stat(filepath.Join(n.State, "containers", pod.ID))
			return err == nil
		})
		time.Sleep(time.Duration(i) * 10 * time.Millisecond) // the moments differ
		n.Restart()
		if _, err := create(ctx, pod, "a"); err != nil {
			t.Errorf("CreateContainer after the restart: %v", err)
		}
		if s := pod.Status(); s.State != cri.PodSandboxState_SANDBOX_READY {
			t.Errorf("the pod is %s", s.State)
		}
		cancel()
		pod.Remove()
	}
	n.CheckClean()
}

// Both records of a pod are gone. Its init, rebuilt from what the shims kept,
// goes on, and with it all that shares its pid namespace.
func TestRebuiltPodKeepsItsInit(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for i := range 3 { // which shim's copy is taken is chance
		pod := n.RunPod(fmt.Sprintf("p%d", i), podPIDPod)
		first := pod.Run("first", []string{"sleep", "1000"}, podPID)
		n.Kill()
		for _, tree := range []string{n.Root, n.State} {
			check(t, os.Remove(filepath.Join(tree, "pods", pod.ID, "record.json")))
		}
		n.Start()
		pod.Run("second", []string{"sleep", "1000"}, podPID)
		if s := first.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the first container is %s, %s", s.State, s.Reason)
		}
		pod.Remove()
	}
	n.CheckClean()
}
