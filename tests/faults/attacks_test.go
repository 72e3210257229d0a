package faults

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// attack is what a container does against the node, and what the test does for it. It is
// stopped afterwards with a grace of one second.
type attack struct {
	command []string
	edit    func(*cri.ContainerConfig)
	// full is called while the container runs, and returns when it is at its worst.
	full func(*testing.T, *harness.Container)
	// code is the one with which it ends; 0: any.
	code int32
}

func shell(script string) []string { return []string{"sh", "-c", script} }

func privileged(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }

// isUp waits for the word of a container that it has come so far.
func isUp(_ *testing.T, c *harness.Container) { c.WaitLog(patience, "up") }

const killed = 137

// attacks have bounds of their own where the machine has none that a test could bear.
var attacks = map[string]attack{
	// A line that never ends, and zeros, fill a disk of their own, as fast as it takes them.
	"endless line":  {command: shell("exec yes | tr -d '\\n'"), full: fillsLog},
	"zeros":         {command: shell("trap '' TERM; exec cat /dev/zero"), full: fillsLog, code: killed},
	"short lines":   {command: shell("trap '' TERM; exec yes ''"), full: fillsLog, code: killed},
	"deaf":          {command: shell(deaf), full: isUp, code: killed},
	"stopped child": {command: shell(stoppedChild), full: isUp, code: killed},
	"stopped init":  {command: shell("echo up; exec sleep 1000"), full: stopInit, code: killed},
	"fork bomb":     {command: shell(forkBomb), full: bomb, code: killed},
	"orphans":       {command: shell(orphans), full: isUp, code: killed},
	"many files":    {command: shell(manyFiles), full: isUp},
	"deep tree":     {command: shell(deepTree), full: isUp},
	"many mounts":   {command: shell(manyMounts), edit: privileged, full: isUp},
	"many cgroups":  {command: shell(manyCgroups), edit: privileged, full: isUp},
	"many execs":    {command: shell("exec sleep 1000"), full: manyExecs},
	"mute clients":  {command: []string{"testbox", "flood", "-rate", "50000", "-line", "100"}, full: muteClients},
	"closed output": {command: shell("exec >&- 2>&-; exec sleep 1000"), full: func(*testing.T, *harness.Container) {}},
}

// What containers run. Each says "up" when it has come so far.
const (
	deaf         = `for i in $(seq 1 64); do trap '' $i 2>/dev/null; done; echo up; while :; do sleep 1; done`
	stoppedChild = `sleep 1000 & kill -STOP $!; trap '' TERM; echo up; wait`
	forkBomb     = `f() { f | f & }; mkfifo /go; echo up; read x </go; (while :; do f; done) 2>/dev/null & exec sleep 1000`
	orphans      = `for i in 1 2 3 4 5 6 7 8; do (setsid sh -c 'trap "" TERM; sleep 1000' &); done
trap '' TERM; echo up; while :; do sleep 1; done`
	manyFiles  = `mkdir /d; cd /d; i=0; while [ $i -lt 5000 ]; do i=$((i+1)); : >$i; done; echo up; exec sleep 1000`
	deepTree   = `i=0; while [ $i -lt 1500 ]; do i=$((i+1)); mkdir dir; cd dir; done 2>/dev/null; echo up; exec sleep 1000`
	manyMounts = `mkdir /m; i=0; while [ $i -lt 400 ]; do i=$((i+1)); mount -t tmpfs x /m; done; echo up; exec sleep 1000`
	// In the first hierarchy that lets it, below the container's own cgroup.
	manyCgroups = `for d in /sys/fs/cgroup /sys/fs/cgroup/pids /sys/fs/cgroup/cpu; do
	own=$d$(sed -n 's/^[0-9]*:\(pids\|\):\(.*\)$/\2/p' /proc/self/cgroup | head -1)
	for top in $own $d; do
		if mkdir $top/x 2>/dev/null; then
			i=0; while [ $i -lt 300 ]; do i=$((i+1)); mkdir -p $top/x/$i/y; done
			break 2
		fi
	done
done
echo up; exec sleep 1000`
)

// fillsLog waits until 8 MiB are in the log, or its disk is full.
func fillsLog(t *testing.T, c *harness.Container) {
	harness.Eventually(t, patience, "the log grows", func() bool {
		st, err := os.Stat(c.LogPath())
		return err == nil && st.Size() > 8<<20
	})
}

func stopInit(t *testing.T, c *harness.Container) {
	c.WaitLog(patience, "up")
	pid := c.Info().PID
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	harness.Eventually(t, patience, "init is stopped", func() bool { return stateOf(pid) == "T" })
}

// bomb gives the container a bound first, which the kubelet has on each pod.
func bomb(t *testing.T, c *harness.Container) {
	c.WaitLog(patience, "up")
	pid := c.Info().PID
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	check(t, err)
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "pids" || f[1] == "") {
			os.WriteFile(filepath.Join("/sys/fs/cgroup", f[1], f[2], "pids.max"), []byte("300"), 0)
		}
	}
	if used, err := harness.CgroupFile(pid, "pids", "pids.max", "pids.max"); err != nil || used != "300" {
		t.Fatalf("the container has no bound: %q, %v", used, err)
	}
	leave(t, pid)
	harness.Eventually(t, patience, "the bound is reached", func() bool {
		used, _ := harness.CgroupFile(pid, "pids", "pids.current", "pids.current")
		n, _ := strconv.Atoi(used)
		return n > 250
	})
}

func manyExecs(t *testing.T, c *harness.Container) {
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() { c.Exec(60, "sh", "-c", "sleep 100 & head -c 300000 /dev/zero") }) // its child stays
	}
	wg.Wait()
}

// muteClients are clients that attach and never read.
func muteClients(t *testing.T, c *harness.Container) {
	for range 40 {
		cmd := exec.Command(filepath.Join(c.N.Bin, "holdfastctl"), "--state", c.N.State, "attach", c.ID)
		r, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		t.Cleanup(func() {
			cmd.Process.Kill()
			r.Close()
			cmd.Wait()
		})
	}
	before, _ := harness.ReadLog(c.LogPath())
	harness.Eventually(t, patience, "the container goes on", func() bool {
		lines, err := harness.ReadLog(c.LogPath())
		return err == nil && len(lines) > len(before)+2000
	})
}

// A container does what it can against the node. Its shim and the daemon stay small and
// answer, others do not notice, it is killed at its deadline, and nothing of it is left.
func TestAttacks(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "attacks from inside")
	n := harness.New(t)
	witness := n.RunPod("witness", hostNetwork).Run("c", []string{"testbox", "print"})
	pid := witness.Info().PID
	t.Run("all", func(t *testing.T) {
		for name, a := range attacks {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				a.run(t, d, n.With(t), strings.ReplaceAll(name, " ", "-"), witness)
			})
		}
	})
	wantRunning(t, d, witness, pid)
	wantSmall(t, n.PID(), 256)
	witness.Stop(60)
	wantExit(t, d, witness, 0)
	wantGapless(t, d, witness)
	n.RemoveAllPods()
	wantClean(t, d, n)
}

func (a attack) run(t *testing.T, d *harness.Tally, n *harness.Node, name string, witness *harness.Container) {
	logs := newDisk(t, "tmpfs", 12)
	pod := n.RunPod(name, hostNetwork, func(c *cri.PodSandboxConfig) {
		c.LogDirectory = logs.dir
		c.Linux.SecurityContext.Privileged = a.edit != nil
	})
	c := pod.Run("c", a.command, func(c *cri.ContainerConfig) {
		if a.edit != nil {
			a.edit(c)
		}
	})
	d.Kill()
	pid, shim := c.Info().PID, c.ShimPID()
	a.full(t, c)
	wantSmall(t, shim, 64)
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", shim)); err != nil || len(fds) > 300 {
		t.Errorf("its shim has %d descriptors, %v", len(fds), err)
	}
	if out := witness.With(t).Output("echo", "fine"); out != "fine\n" {
		t.Errorf("a command of another container says %q", out)
	}
	wantRunning(t, d, c, pid)
	c.Stop(1)
	s := c.WaitExited(patience)
	if a.code != 0 && s.ExitCode != a.code {
		d.Lost(harness.Statuses, "it has ended with %d (%s: %s), want %d", s.ExitCode, s.Reason, s.Message, a.code)
	}
	if _, err := harness.ReadLog(c.LogPath()); err != nil {
		d.Lost(harness.Lines, "%v", err)
	}
	pod.Remove()
}

// wantSmall fails if a process has ever had more memory of its own than so many MiB.
func wantSmall(t *testing.T, pid, most int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	var kb int
	fmt.Sscan(rest, &kb)
	if kb == 0 || kb > most<<10 {
		t.Errorf("process %d has had %d KiB, want at most %d MiB", pid, kb, most)
	}
}
