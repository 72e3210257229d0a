package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// gatedCRIU has the programs of this test find a CRIU that waits at a gate whenever it is to
// work on a container.
func gatedCRIU(t *testing.T) gate {
	t.Helper()
	real, err := exec.LookPath("criu")
	check(t, err)
	g := newGate(t, "criu")
	g.touch(t)
	t.Cleanup(func() { os.WriteFile(g.open, nil, 0o600) })
	script := fmt.Sprintf("#!/bin/sh\nif [ \"$1\" = swrk ]; then %s; fi\nexec %s \"$@\"\n", g.hold(), real)
	withCRIU(t, script)
	return g
}

// withCRIU has the programs of this test find a script for CRIU.
func withCRIU(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "criu"), []byte(script), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestStopDuringCheckpoint ends containers while they are saved: they end as if they were
// not, and nothing of the checkpoint is left.
func TestStopDuringCheckpoint(t *testing.T) {
	needCRIU(t)
	g := gatedCRIU(t)
	n := harness.New(t)
	term := []string{"sh", "-c", "trap 'exit 7' TERM; while :; do echo x; sleep 0.05; done"}
	for name, x := range map[string]struct {
		end  func(context.Context, *harness.Container) error
		code int32 // -1: it is not there afterwards
	}{
		"StopContainer": {func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 2})
			return err
		}, 137},
		"StopContainer at once": {func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID})
			return err
		}, 137},
		"StopPodSandbox": {func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: c.Pod.ID})
			return err
		}, 137},
		"RemoveContainer": {func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.ID})
			return err
		}, -1},
		"RemovePodSandbox": {func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: c.Pod.ID})
			return err
		}, -1},
	} {
		c := n.RunPod("stopped").Run("c", term)
		c.WaitLog(patience, "x")
		dir := t.TempDir()
		os.Remove(g.reached)
		os.Remove(g.open)
		saved := make(chan error, 1)
		go func() { saved <- checkpointTo(n, c.ID, filepath.Join(dir, "a.tar")) }()
		harness.Eventually(t, patience, "CRIU is asked to work", func() bool {
			_, err := os.Stat(g.reached)
			return err == nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		began := time.Now()
		err := x.end(ctx, c)
		cancel()
		t.Logf("%s: %v after %s", name, err, time.Since(began))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		began = time.Now()
		g.touch(t)
		err = <-saved
		t.Logf("%s: the checkpoint: %v after %s", name, err, time.Since(began))
		wantError(t, err, codes.FailedPrecondition, "container_id")
		if x.code >= 0 {
			if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != x.code {
				t.Errorf("%s: %v", name, s)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: %v are left, %v", name, left, err)
		}
		c.Pod.Remove()
	}
	n.CheckClean()
}

// TestCRIUThatCannot has a CRIU that cannot work with the kernel, or none: both ways are
// refused, with its words, and the container goes on.
func TestCRIUThatCannot(t *testing.T) {
	withCRIU(t, "#!/bin/sh\n[ $1 = check ] || exec echo Version: 9.9\necho 'Error (x.c:1): no such area'\nexit 1\n")
	n := harness.New(t)
	p := n.RunPod("without")
	c := p.Run("counter", []string{"sh", "-c", counter})
	goesOn(t, c)
	dir := t.TempDir()
	archive := filepath.Join(dir, "there.tar")
	check(t, os.WriteFile(archive, nil, 0o600))
	cfg := harness.ContainerConfig("restored", nil)
	cfg.Image.Image = archive
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.ID, Config: cfg, SandboxConfig: p.Config})
	for _, err := range []error{checkpointTo(n, c.ID, filepath.Join(dir, "a.tar")), err} {
		wantError(t, err, codes.FailedPrecondition, "no such area")
		wantError(t, err, codes.FailedPrecondition, "9.9")
	}
	goesOn(t, c)
	inOrder(t, counts(t, c))
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("something is left: %v, %v", left, err)
	}
}
