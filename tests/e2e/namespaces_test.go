package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

func namespace(t *testing.T, pid int, kind string) string {
	t.Helper()
	s, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	check(t, err)
	return s
}

// wantProcesses waits until ps in a container shows all that is wanted: a process
// of another one may not have become its program yet.
func wantProcesses(t *testing.T, c *harness.Container, columns string, want ...string) {
	t.Helper()
	var ps, missing string
	defer func() {
		if missing != "" {
			t.Logf("%q is not there:\n%s", missing, ps)
		}
	}()
	what := fmt.Sprintf("the processes %q are to be seen from a container of the pod", want)
	harness.Eventually(t, patience, what, func() bool {
		ps, missing = c.Output("ps", "-o", columns), ""
		for _, w := range want {
			if !strings.Contains(ps, w) {
				missing = w
			}
		}
		return missing == ""
	})
}

// Containers of a pod share what Kubernetes says they share, and the host keeps
// its own. A restart changes none of it.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("shared")
	a := pod.Run("a", []string{"sleep", "1000"})
	n.Restart()
	b := pod.Run("b", []string{"sleep", "1000"})
	pa, pb := a.Info().PID, b.Info().PID
	for _, kind := range []string{"net", "ipc", "uts"} {
		na, nb, host := namespace(t, pa, kind), namespace(t, pb, kind), namespace(t, os.Getpid(), kind)
		if na != nb {
			t.Errorf("the containers have different %s namespaces", kind)
		}
		if na == host {
			t.Errorf("the containers have the host's %s namespace", kind)
		}
	}
	for _, kind := range []string{"pid", "mnt"} {
		if namespace(t, pa, kind) == namespace(t, pb, kind) {
			t.Errorf("the containers share a %s namespace", kind)
		}
	}
	a.Output("sh", "-c", "echo shared >/dev/shm/file")
	if out := b.Output("cat", "/dev/shm/file"); out != "shared\n" {
		t.Errorf("/dev/shm is not shared: %q", out)
	}
	if out := b.Output("hostname"); out != "shared\n" {
		t.Errorf("the hostname is %q", out)
	}
	if out := b.Output("sh", "-c", "echo $$"); strings.TrimSpace(out) == fmt.Sprint(pb) {
		t.Errorf("the container sees the host's pids")
	}
	pod.Remove()
	n.CheckClean()
}

// A pod that shares its PID namespace has an init of its own.
func TestSharedPIDNamespace(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	share := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	pod := n.RunPod("pids", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: share}
	})
	edit := func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = share }
	a := pod.Run("a", []string{"sleep", "1111"}, edit)
	n.Restart()
	b := pod.Run("b", []string{"sleep", "2222"}, edit)
	wantProcesses(t, b, "pid,args", "sleep 1111", "sleep 2222", "pause")
	// The end of one container is not the end of the others.
	a.Stop(0)
	if s := b.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the other container is %s", s.State)
	}
	// What a container leaves behind is reaped by the pod's init.
	b.Output("sh", "-c", "(sleep 0.1 &) ; true")
	harness.Eventually(t, patience, "no zombie is left in the pod", func() bool {
		return !strings.Contains(b.Output("ps", "-o", "stat,args"), "Z ")
	})
	pod.Remove()
	n.CheckClean()
}

func TestHostNamespaces(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	opts := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE,
		Ipc: cri.NamespaceMode_NODE}
	pod := n.RunPod("host", func(c *cri.PodSandboxConfig) {
		c.Hostname = ""
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: opts}
	})
	seconds := number()
	c := pod.Run("host", []string{"sh", "-c", "sleep " + seconds + " & wait"}, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = opts
	})
	pid := c.Info().PID
	for _, kind := range []string{"net", "pid", "ipc"} {
		if namespace(t, pid, kind) != namespace(t, os.Getpid(), kind) {
			t.Errorf("the %s namespace is not the host's", kind)
		}
	}
	if ip := pod.Status().GetNetwork().GetIp(); ip != "" {
		t.Errorf("a pod in the host's network has the address %s of its own", ip)
	}
	harness.Eventually(t, patience, "the child runs", func() bool { return len(find("sleep\x00"+seconds)) == 1 })
	n.Restart()
	// Without a PID namespace the children would outlive their parent.
	c.Stop(0)
	harness.Eventually(t, patience, "the children of a stopped container are gone",
		func() bool { return len(find("sleep\x00"+seconds)) == 0 })
	pod.Remove()
	n.CheckClean()
}
