package faults

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// disk is a small file system of its own.
type disk struct{ dir string }

// newDisk mounts one: a tmpfs, or an ext4, of so many MiB.
func newDisk(t *testing.T, kind string, mib int) disk {
	t.Helper()
	if kind == "ext4" {
		return disk{harness.Disk(t, mib, "-N", "4000")}
	}
	d := disk{t.TempDir()}
	check(t, os.Chmod(d.dir, 0o711))
	check(t, unix.Mount("tmpfs", d.dir, "tmpfs", 0, fmt.Sprintf("size=%dm,nr_inodes=4k", mib)))
	t.Cleanup(func() {
		harness.Eventually(t, patience, "nobody uses the disk", func() bool { return unix.Unmount(d.dir, 0) == nil })
	})
	return d
}

// fill takes all bytes, or all inodes. What it gives makes room again.
func (d disk) fill(t *testing.T, what string) (free func()) {
	t.Helper()
	dir := filepath.Join(d.dir, "filler")
	check(t, os.Mkdir(dir, 0o700))
	var err error
	for i := 0; err == nil && what == "inodes"; i++ {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600)
	}
	if what == "bytes" {
		var f *os.File
		f, err = os.Create(filepath.Join(dir, "bytes"))
		check(t, err)
		for b := make([]byte, 1<<20); len(b) > 0; {
			if _, err = f.Write(b); err != nil {
				b = b[:len(b)/2]
			}
		}
		f.Close()
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("cannot fill %s: %v", d.dir, err)
	}
	return func() { check(t, os.RemoveAll(dir)) }
}

// fullNode is a node with root, state and logs on disks of their own.
type fullNode struct {
	*harness.Node
	*harness.Tally
	disks map[string]disk
}

// The disk of root, of state or of the logs is full, or has no inodes any more. What runs
// goes on; what ends meanwhile has its exit code, for this daemon and the next one; what
// was acknowledged is there, and what was refused has left nothing. No line of a log is
// lost but where its own disk is full, and there the log says so.
func TestFullDisks(t *testing.T) {
	d := harness.Drill(t, "full disks")
	disks := map[string]disk{
		"root":  newDisk(t, "ext4", 64),
		"state": newDisk(t, "tmpfs", 48),
		"logs":  newDisk(t, "ext4", 64),
	}
	n := harness.New(t, harness.Options{Root: disks["root"].dir + "/root", State: disks["state"].dir + "/state"})
	f := &fullNode{Node: n, Tally: d, disks: disks}
	for _, full := range []string{"root", "state", "logs"} {
		for _, what := range []string{"bytes", "inodes"} {
			t.Run(full+" "+what, func(t *testing.T) { f.fill(t, full, what) })
		}
	}
	n.RemoveAllPods()
	wantClean(t, d, n)
}

func (f *fullNode) fill(t *testing.T, full, what string) {
	n := f.With(t)
	pod := n.RunPod(full+"-"+what, hostNetwork, func(c *cri.PodSandboxConfig) {
		c.LogDirectory = filepath.Join(f.disks["logs"].dir, full+"-"+what)
	})
	runs := pod.Run("runs", []string{"testbox", "print", "-every", "5ms"})
	ends, later := pod.Run("ends", waiter(7)), pod.Run("later", waiter(8))
	for _, c := range []*harness.Container{ends, later} {
		c.WaitLog(patience, "waits")
	}
	pid, endsPID, laterPID := runs.Info().PID, ends.Info().PID, later.Info().PID

	free := f.disks[full].fill(t, what)
	f.Kills(1)
	leave(t, endsPID)
	wantExit(t, f.Tally, ends, 7)
	wantRunning(t, f.Tally, runs, pid)
	made, err := tryRun(pod, "made")
	t.Logf("a container while it is full: %v", err)
	n.Restart()
	wantExit(t, f.Tally, ends, 7)
	wantRunning(t, f.Tally, runs, pid)
	leave(t, laterPID)
	wantExit(t, f.Tally, later, 8)
	runs.Stop(60)
	wantExit(t, f.Tally, runs, 0)
	free()

	n.Restart()
	for c, code := range map[*harness.Container]int32{ends: 7, later: 8, runs: 0} {
		wantExit(t, f.Tally, c, code)
		f.wantDurable(t, c, code)
		f.wantLog(t, c, full == "logs")
	}
	if made != nil { // it was acknowledged, so it is there
		if s := made.Status(); s.State != cri.ContainerState_CONTAINER_CREATED {
			made.WaitExited(patience)
		}
	}
	pod.Run("again", []string{"true"}).WaitExited(patience)
	pod.Remove()
	wantClean(t, f.Tally, n)
}

// wantDurable looks for the exit record that outlives a reboot.
func (f *fullNode) wantDurable(t *testing.T, c *harness.Container, code int32) {
	t.Helper()
	e, err := rundir.ReadExitIn(filepath.Join(f.Root, "containers", c.ID))
	if err != nil || e.Code != int(code) {
		f.Lost(harness.Statuses, "%s has the durable exit record %+v, %v; want %d", c.Config.Metadata.Name, e, err,
			code)
	}
}

// wantLog reads a log, which is whole, or says what is missing.
func (f *fullNode) wantLog(t *testing.T, c *harness.Container, lossy bool) {
	t.Helper()
	lines, err := harness.ReadLog(c.LogPath())
	if err != nil {
		f.Lost(harness.Lines, "%v", err)
		return
	}
	var own []harness.Line
	said := false
	for _, l := range lines {
		if l.Stream == "stdout" {
			own = append(own, l)
		} else {
			said = said || strings.Contains(l.Text, "bytes of output are missing here")
		}
	}
	if c.Config.Metadata.Name != "runs" {
		if text := fmt.Sprint(own); !strings.Contains(text, "leaves") && !(lossy && said) {
			f.Lost(harness.Lines, "the log of %s is %s", c.Config.Metadata.Name, text)
		}
		return
	}
	if good, err := harness.Numbered("line", own); err != nil && !(lossy && said) {
		f.Lost(harness.Lines, "the log of %s after %d good lines: %v", c.Config.Metadata.Name, good, err)
	}
}
