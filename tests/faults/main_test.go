// Package faults has a node meet the faults of the world, and what a container does to
// get out of its bounds. Each test compares the node with what it has acknowledged, and
// the machine with the node.
package faults

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "8") // more than there are processors: most of them wait
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

const patience = 3 * time.Minute

var check = must.Succeed

func hostNetwork(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}}
}

// waiter is the command of a container that ends with a code once leave is called.
func waiter(code int) []string {
	return []string{"sh", "-c", fmt.Sprintf("mkfifo /go; echo waits; read x </go; echo leaves; exit %d", code)}
}

// leave lets a waiter go. The way is that of the host, which takes no call.
func leave(t *testing.T, pid int) {
	t.Helper()
	check(t, os.WriteFile(fmt.Sprintf("/proc/%d/root/go", pid), []byte("x\n"), 0))
}

// wantExit fails unless a container has ended with a code of its own.
func wantExit(t *testing.T, d *harness.Tally, c *harness.Container, code int32) {
	t.Helper()
	s := c.With(t).WaitExited(patience)
	if s.ExitCode != code || s.FinishedAt == 0 {
		d.Lost(harness.Statuses, "%s has ended with %d (%s: %s), want %d",
			c.Config.Metadata.Name, s.ExitCode, s.Reason, s.Message, code)
	}
}

// wantRunning fails unless a container runs, as the same process.
func wantRunning(t *testing.T, d *harness.Tally, c *harness.Container, pid int) {
	t.Helper()
	c = c.With(t)
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || c.Info().PID != pid ||
		!harness.IsProcess(pid) {
		d.Lost(harness.Statuses, "%s is %s (%s: %s), process %d alive: %v",
			c.Config.Metadata.Name, s.State, s.Reason, s.Message, pid, harness.IsProcess(pid))
	}
}

// wantClean counts what is left of a node, and fails the test if it is anything.
func wantClean(t *testing.T, d *harness.Tally, n *harness.Node) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * harness.Tick) {
		if left = n.Leftovers(); len(left) == 0 {
			return
		}
	}
	for _, what := range left {
		d.Lost(harness.Leaks, "left behind: %s", what)
	}
}

// tryRun makes a container, starts it and ends it, each call for a minute at most. What
// was acknowledged is in the container that it gives.
func tryRun(pod *harness.Pod, name string) (*harness.Container, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := &harness.Container{N: pod.N, Pod: pod, Config: harness.ContainerConfig(name, []string{"true"})}
	r, err := pod.N.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: pod.ID, Config: c.Config, SandboxConfig: pod.Config})
	if err != nil {
		return nil, err
	}
	c.ID = r.ContainerId
	_, err = pod.N.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID})
	return c, err
}

// numberOf is the number of a line that testbox has written, 0 if it is none.
func numberOf(l harness.Line) (n int) {
	var word string
	fmt.Sscanf(l.Text, "%s %d", &word, &n)
	return n
}

// waitsForPipe says whether a process waits for somebody to read what it writes.
func waitsForPipe(pid int) bool { return waitsIn(pid, fmt.Sprintf("%d 0x1 ", unix.SYS_WRITE)) }

// waitsIn says whether a thread of a process is in a system call, whose number and arguments
// begin like this.
func waitsIn(pid int, call string) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	for _, path := range tasks {
		b, _ := os.ReadFile(path)
		if strings.HasPrefix(string(b), call) {
			return true
		}
	}
	return false
}
