package faults

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// startAs starts a process of the host that gets a certain pid.
func startAs(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for range 1000 {
		check(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0))
		cmd := exec.Command("sleep", "100000")
		check(t, cmd.Start())
		end := func() { cmd.Process.Kill(); cmd.Wait() }
		if cmd.Process.Pid == pid {
			t.Cleanup(end)
			return cmd
		}
		end() // another process was faster
	}
	t.Skipf("no process gets the pid %d", pid)
	return nil
}

// The shim and its container were killed, and the kernel has given their pids to others.
// The next daemon says what has happened, and touches none of these.
//
// It has the kernel give out pids again that have just become free, so nothing runs beside it.
func TestReusedPIDs(t *testing.T) {
	d := harness.Drill(t, "reused pids")
	n := harness.New(t)
	pod := n.RunPod("reused", hostNetwork)
	c := pod.Run("c", []string{"sleep", "1000"})
	shim, pid := c.ShimPID(), c.Info().PID
	n.Kill()
	for _, victim := range []int{shim, pid} {
		d.Kill()
		check(t, unix.Kill(victim, unix.SIGKILL))
		harness.Eventually(t, patience, "it has ended", func() bool { return !harness.IsProcess(victim) })
	}
	others := []*exec.Cmd{startAs(t, shim), startAs(t, pid)}
	n.Start()
	const unknown = 255 // not 137: nothing of the container was left that the daemon could have killed
	if s := c.WaitExited(patience); s.Reason != "ShimDied" || s.ExitCode != unknown {
		d.Lost(harness.Statuses, "the container has ended with %d, %s: %s", s.ExitCode, s.Reason, s.Message)
	}
	c.Stop(0)
	pod.Remove()
	wantClean(t, d, n)
	for _, cmd := range others {
		if err := cmd.Process.Signal(unix.Signal(0)); err != nil || stateOf(cmd.Process.Pid) == "Z" {
			t.Errorf("process %d of somebody else was killed: %v", cmd.Process.Pid, err)
		}
	}
}

// stateOf is the letter of ps(1) for a process.
func stateOf(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	return rest[:min(1, len(rest))]
}

// An init reaps none of its thousand children. It can be entered, measured and stopped.
func TestManyZombies(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "zombies")
	n := harness.New(t)
	pod := n.RunPod("zombies", hostNetwork)
	const count = 1000
	c := pod.Run("c", []string{"sh", "-c",
		fmt.Sprintf("i=0; while [ $i -lt %d ]; do i=$((i+1)); sleep 100000 & done; exec sleep 200000", count)})
	pid := c.Info().PID
	// The shell would reap its children. The program that it becomes does not.
	harness.Eventually(t, patience, "the shell has become another program", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return strings.HasPrefix(string(b), "sleep\x00200000")
	})
	for _, child := range childrenOf(pid) {
		unix.Kill(child, unix.SIGKILL)
	}
	harness.Eventually(t, patience, "there are zombies", func() bool { return zombiesOf(pid) > count/2 })
	n.Restart()
	wantRunning(t, d, c, pid)
	if out := c.Output("echo", "fine"); out != "fine\n" {
		t.Errorf("a command says %q", out)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	if _, err := n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID}); err != nil {
		t.Errorf("ContainerStats: %v", err)
	}
	c.Stop(1)
	wantExit(t, d, c, 137)
	pod.Remove()
	wantClean(t, d, n)
}

func childrenOf(pid int) (list []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, child := range strings.Fields(string(b)) {
		n, _ := strconv.Atoi(child)
		list = append(list, n)
	}
	return list
}

func zombiesOf(pid int) (count int) {
	for _, child := range childrenOf(pid) {
		if stateOf(child) == "Z" {
			count++
		}
	}
	return count
}

// The cgroup of a shim has no memory left. Whatever the kernel kills there, the container
// is what it is said to be, and nobody else notices.
func TestShimWithoutMemory(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "shim without memory")
	n := harness.New(t)
	pod := n.RunPod("oom", hostNetwork)
	c, other := pod.Run("c", []string{"sleep", "1000"}), pod.Run("other", []string{"sleep", "1000"})
	pid, otherPID, shim := c.Info().PID, other.Info().PID, c.ShimPID()
	limit := memoryLimit(t, shim)
	if !strings.Contains(limit, "shims") {
		t.Skipf("the shim has no cgroup of its own: %s", limit)
	}
	// As little as the kernel takes: it refuses what cannot be had at once.
	set := 0
	for size := 1 << 20; size < 64<<20 && set == 0; size += 256 << 10 {
		if os.WriteFile(limit, []byte(strconv.Itoa(size)), 0) == nil {
			set = size
		}
	}
	d.Kill()
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() { c.Exec(20, "echo", strings.Repeat("x", 100_000)) }) // it may fail
	}
	wg.Wait()
	os.WriteFile(limit, []byte("-1"), 0) // gone with a shim that was killed
	if r, err := c.Exec(60, "echo", "fine"); err == nil {
		wantRunning(t, d, c, pid)
		if string(r.Stdout) != "fine\n" {
			t.Errorf("a command says %q", r.Stdout)
		}
	} else if s := c.WaitExited(patience); s.Reason != "ShimDied" {
		d.Lost(harness.Statuses, "the container has ended with %d, %s: %s", s.ExitCode, s.Reason, s.Message)
	}
	t.Logf("with %d bytes the shim lives: %v", set, harness.IsProcess(shim))
	wantRunning(t, d, other, otherPID)
	pod.Remove()
	wantClean(t, d, n)
}

// memoryLimit is the file with the memory limit of the cgroup of a process.
func memoryLimit(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	check(t, err)
	file := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) == 3 && f[1] == "memory":
			return filepath.Join("/sys/fs/cgroup/memory", f[2], "memory.limit_in_bytes")
		case len(f) == 3 && f[1] == "":
			file = filepath.Join("/sys/fs/cgroup", f[2], "memory.max")
		}
	}
	return file
}
