package e2e

import (
	"path/filepath"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

var stubborn = []string{"sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"}

// The daemon dies right after it passed on a stop. The deadline holds.
func TestStopOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("stop")
	c := pod.Run("stubborn", stubborn)
	c.WaitLog(patience, "deaf")
	pid := c.Info().PID

	const grace = 3
	asked := time.Now()
	go func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID,
			Timeout: grace}) // fails: its daemon dies
	}()
	run := rundir.Dir(filepath.Join(n.State, "containers", c.ID))
	harness.Eventually(t, patience, "the shim has the stop on record", func() bool {
		s, err := run.ReadStatus()
		return err == nil && s.Stop != nil
	})
	n.Kill()
	harness.Eventually(t, patience, "the container is killed at its deadline, without a daemon",
		func() bool { return !harness.IsProcess(pid) })
	n.Start()
	s := c.WaitExited(patience) // its shim may still be at the log
	if s.ExitCode != 137 {
		t.Errorf("the container has exited with code %d, want 137", s.ExitCode)
	}
	if lived := time.Unix(0, s.FinishedAt).Sub(asked); lived < grace*time.Second {
		t.Errorf("the container was killed after %s, before its grace of %d s was over", lived, grace)
	}
}

func TestStop(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("stop")

	// 0 is no grace at all.
	c := pod.Run("now", stubborn)
	c.WaitLog(patience, "deaf")
	c.Stop(0)
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
		t.Errorf("stopped with 0 s: %s, %d", s.State, s.ExitCode)
	}
	c.Stop(10) // once more is fine

	// A second stop can bring the deadline forward.
	c = pod.Run("sooner", stubborn)
	c.WaitLog(patience, "deaf")
	stopped := make(chan error)
	go func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 3600})
		stopped <- err
	}()
	run := rundir.Dir(filepath.Join(n.State, "containers", c.ID))
	harness.Eventually(t, patience, "the first stop is on record", func() bool {
		s, err := run.ReadStatus()
		return err == nil && s.Stop != nil
	})
	c.Stop(1)
	if err := <-stopped; err != nil {
		t.Errorf("the first stop: %v", err)
	}

	// The signal of the request is the one that is sent.
	c = pod.Run("usr1", []string{"sh", "-c", "trap 'exit 33' USR1; echo ready; while :; do sleep 0.1; done"},
		func(c *cri.ContainerConfig) { c.StopSignal = cri.Signal_SIGNAL_SIGUSR1 })
	c.WaitLog(patience, "ready")
	c.Stop(60)
	if s := c.Status(); s.ExitCode != 33 || s.StopSignal != cri.Signal_SIGNAL_SIGUSR1 {
		t.Errorf("stopped with SIGUSR1: code %d, stop signal %s", s.ExitCode, s.StopSignal)
	}

	// So does an init that has no handler and waits for signals, as tini and dumb-init do.
	c = pod.Run("sigwait", []string{"testbox", "sigwait", "34"})
	c.WaitLog(patience, "waiting")
	c.Stop(60)
	if s := c.Status(); s.ExitCode != 34 {
		t.Errorf("stopped while it waited for signals: code %d, want 34", s.ExitCode)
	}

	// Removing kills; a container that never started can be removed, too.
	c = pod.Run("removed", stubborn)
	pid := c.Info().PID
	c.Remove()
	if harness.IsProcess(pid) {
		t.Error("a removed container still runs")
	}
	pod.Create("never", stubborn).Remove()
	pod.Remove()
	n.CheckClean()
}
