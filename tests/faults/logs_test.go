package faults

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

func reopen(c *harness.Container, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, err := c.N.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: c.ID})
	return err
}

// wantGapless fails unless the lines of a log follow each other, from whichever on.
func wantGapless(t *testing.T, d *harness.Tally, c *harness.Container) (lines int) {
	t.Helper()
	all, err := harness.ReadLog(c.LogPath())
	if err != nil || len(all) == 0 {
		d.Lost(harness.Lines, "the log of %s has %d lines, %v", c.Config.Metadata.Name, len(all), err)
		return 0
	}
	first := numberOf(all[0])
	for i, l := range all {
		if numberOf(l) != first+i {
			d.Lost(harness.Lines, "%s: line %d is %.60q, the first one %.60q", c.Config.Metadata.Name, i, l.Text,
				all[0].Text)
			break
		}
	}
	return len(all)
}

// The directory of the logs is removed, and comes back. The container does not notice.
// A log that is opened again goes on without a gap or half a line.
func TestLogDirectoryVanishes(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "vanished logs")
	n := harness.New(t)
	pod := n.RunPod("vanish", hostNetwork)
	c := pod.Run("c", []string{"testbox", "print", "-every", "1ms"})
	quiet := pod.Run("quiet", waiter(5))
	quiet.WaitLog(patience, "waits")
	pid, quietPID := c.Info().PID, quiet.Info().PID
	for round := range 3 {
		d.Kill()
		check(t, os.RemoveAll(pod.Config.LogDirectory))
		if err := reopen(c, time.Minute); err == nil {
			t.Error("a log was opened in a directory that is not there")
		}
		if round == 1 {
			n.Restart()
		}
		wantRunning(t, d, c, pid)
		if made, err := tryRun(pod, "meanwhile"); err == nil {
			made.WaitExited(patience)
			made.Remove()
		}
		check(t, os.MkdirAll(pod.Config.LogDirectory, 0o755))
		check(t, reopen(c, time.Minute))
		harness.Eventually(t, patience, "the new log grows", func() bool {
			lines, err := harness.ReadLog(c.LogPath())
			return err == nil && len(lines) > 10
		})
	}
	check(t, os.RemoveAll(pod.Config.LogDirectory))
	leave(t, quietPID)
	wantExit(t, d, quiet, 5)
	check(t, os.MkdirAll(pod.Config.LogDirectory, 0o755))
	check(t, reopen(c, time.Minute))
	c.Stop(60)
	wantExit(t, d, c, 0)
	wantGapless(t, d, c)
	n.RemoveAllPods()
	wantClean(t, d, n)
}

// The disk of the logs does not answer. Its containers stand still when their pipes are
// full, and can be looked at, be entered, and be killed at their deadline, one whose start
// waits for the disk too. Nobody else notices. What was not killed goes on when the disk
// does, and no line is missing.
func TestFrozenLogs(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "frozen logs")
	disk := newDisk(t, "ext4", 64)
	freeze, thaw := disk.freezer(t)
	n := harness.New(t)
	other := n.RunPod("other", hostNetwork)
	pod := n.RunPod("frozen", hostNetwork, func(c *cri.PodSandboxConfig) { c.LogDirectory = disk.dir })
	goesOn := pod.Run("goes-on", []string{"testbox", "flood", "-rate", "4000000"})
	ends := pod.Run("ends", []string{"sh", "-c", "trap '' TERM; mkfifo /go; echo waits; read x </go; exec yes"})
	ends.WaitLog(patience, "waits")
	fine := other.Run("fine", []string{"testbox", "print", "-every", "1ms"})
	pid, endsPID := goesOn.Info().PID, ends.Info().PID
	late := pod.Create("late", []string{"true"})

	freeze()
	d.Kill()
	leave(t, endsPID)
	started := make(chan error, 1)
	go func() { // it waits for the disk, and is answered in the end
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: late.ID})
		started <- err
	}()
	shim := late.ShimPID()
	harness.Eventually(t, patience, "the start waits for the disk", func() bool {
		return waitsIn(shim, fmt.Sprintf("%d ", unix.SYS_OPENAT2))
	})
	late.Stop(0)
	wantExit(t, d, late, 137)
	harness.Eventually(t, patience, "the containers stand still", func() bool {
		return waitsForPipe(pid) && waitsForPipe(endsPID)
	})
	if out := goesOn.Output("echo", "fine"); out != "fine\n" {
		t.Errorf("a command beside a full pipe says %q", out)
	}
	if err := reopen(goesOn, 2*time.Second); err == nil {
		t.Error("a log was opened on a disk that does not answer")
	}
	ends.Stop(1)
	wantExit(t, d, ends, 137)
	if harness.IsProcess(endsPID) {
		t.Error("a container outlives its deadline because the disk of its log does not answer")
	}
	n.Restart()
	wantRunning(t, d, goesOn, pid)
	wantExit(t, d, ends, 137)
	wantExit(t, d, late, 137)
	if out := fine.Output("echo", "fine"); out != "fine\n" {
		t.Errorf("a command of another container says %q", out)
	}
	if _, err := tryRun(other, "new"); err != nil {
		t.Errorf("beside it no container can be made: %v", err)
	}
	fine.Stop(60)
	wantExit(t, d, fine, 0)
	wantGapless(t, d, fine)

	thaw()
	<-started // its daemon was killed
	goesOn.Stop(60)
	wantExit(t, d, goesOn, 0)
	if lines := wantGapless(t, d, goesOn); lines < 1000 {
		d.Lost(harness.Lines, "the log has %d lines", lines)
	}
	n.RemoveAllPods()
	wantClean(t, d, n)
}

// Ioctls of linux/fs.h, see fsfreeze(8).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezer lets a disk stand still, and go on.
func (d disk) freezer(t *testing.T) (freeze, thaw func()) {
	t.Helper()
	f, err := os.Open(d.dir)
	check(t, err)
	set := func(request uint) error { return unix.IoctlSetInt(int(f.Fd()), request, 0) }
	thaw = func() { set(fiThaw) } // a second time is an error, and no more
	t.Cleanup(func() {
		thaw()
		f.Close()
	})
	return func() { check(t, set(fiFreeze)) }, thaw
}
