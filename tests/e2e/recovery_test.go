package e2e

import (
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A shim that answers nobody delays nobody else, and its container is what it
// is: running.
func TestWedgedShim(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("wedged")
	wedged := pod.Run("wedged", []string{"testbox", "print"})
	other := pod.Run("other", []string{"testbox", "print"})
	before := wedged.Status()
	shim := wedged.ShimPID()
	check(t, unix.Kill(shim, unix.SIGSTOP))
	t.Cleanup(func() { unix.Kill(shim, unix.SIGCONT) })
	n.Restart()

	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	check(t, err)
	if len(list.Containers) != 2 {
		t.Errorf("%d containers are listed, want 2", len(list.Containers))
	}
	for _, c := range list.Containers {
		if c.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%s is listed as %s", c.Metadata.Name, c.State)
		}
	}
	if s := wedged.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt != before.StartedAt {
		t.Errorf("the wedged container is %s, started at %d, before at %d", s.State, s.StartedAt, before.StartedAt)
	}
	if out := other.Output("echo", "fine"); out != "fine\n" {
		t.Errorf("exec beside the wedged shim says %q", out)
	}
	other.Stop(5)
	pod.Run("new", []string{"true"}).WaitExited(patience)

	// It comes back, and all is well.
	check(t, unix.Kill(shim, unix.SIGCONT))
	wedged.Stop(60)
	if s := wedged.WaitExited(patience); s.ExitCode != 0 {
		t.Errorf("the container exits with %d, want 0", s.ExitCode)
	}
	if count, err := harness.Numbered("line", wedged.Log()); err != nil {
		t.Errorf("the log after %d good lines: %v", count, err)
	}
	pod.Remove()
	n.CheckClean()
}

// A killed shim takes its container along. That is said, not guessed at: no
// exit code is made up.
func TestKilledShim(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("killed")
	for _, when := range []string{"daemon up", "daemon down"} {
		t.Run(when, func(t *testing.T) {
			n := n.With(t)
			c := pod.With(t).Run("victim", []string{"sh", "-c", "sleep 1000 & sleep 1001"})
			pid := c.Info().PID
			if when == "daemon down" {
				n.Kill()
			}
			check(t, unix.Kill(c.ShimPID(), unix.SIGKILL))
			if when == "daemon down" {
				n.Start()
			}
			s := c.WaitExited(patience)
			if s.ExitCode == 0 || s.Reason != "ShimDied" {
				t.Errorf("the container ended with %d, %q: %s", s.ExitCode, s.Reason, s.Message)
			}
			harness.Eventually(t, patience, "the container's process is gone",
				func() bool { return !harness.IsProcess(pid) })
			c.Remove()
		})
	}
	pod.Remove()
	n.CheckClean()
}
