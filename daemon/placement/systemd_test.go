package placement

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// newSystemd gives a systemd manager, or skips the test where there is none.
func newSystemd(t *testing.T) *Manager {
	t.Helper()
	driver, err := Detect(string(Systemd))
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and systemd: ", err)
	}
	m, err := New(driver)
	check(t, err)
	return m
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// startService starts a systemd service whose process has a child, as a daemon
// has a shim, and gives the pid of the child.
func startService(t *testing.T, unit string) int {
	t.Helper()
	file := t.TempDir() + "/pid"
	run(t, "systemd-run", "--unit="+unit, "--collect", "sh", "-c",
		"sleep 600 & echo $! >"+file+".new; mv "+file+".new "+file+"; wait")
	t.Cleanup(func() { exec.Command("systemctl", "stop", unit).Run() })
	deadline := time.Now().Add(2 * time.Minute)
	for {
		b, err := os.ReadFile(file)
		if err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
			check(t, err)
			return pid
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestScope(t *testing.T) {
	m := newSystemd(t)
	id := shimID(t, m, "scope")
	service := fmt.Sprintf("holdfast-test-%d.service", os.Getpid())
	pid := startService(t, service)
	process, err := os.FindProcess(pid)
	check(t, err)
	t.Cleanup(func() { process.Kill() })

	for range 2 {
		check(t, m.PlaceShim(t.Context(), id, pid))
	}
	if got, want := cgroupsOf(t, pid), ":/system.slice/"+scopeName(id)+"\n"; !strings.Contains(got, want) {
		t.Errorf("the shim is in %q, want %q", got, want)
	}
	if dir, alive, err := cgroup.Find(systemSlice+":"+scopePrefix+":"+id, true).Populated(); err != nil || !alive {
		t.Errorf("the shim is not seen in its cgroup: %q, %v, %v", dir, alive, err)
	}

	// Nothing of the service is left when stop returns; the shim is.
	run(t, "systemctl", "stop", service)
	if err := process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the shim ended with the daemon's service: %v", err)
	}
	// The first part of a shutdown does not end it either.
	show := run(t, "systemctl", "show", "-p", "Conflicts", "-p", "Requires", scopeName(id))
	if strings.Contains(show, "shutdown.target") ||
		strings.Contains(show, ".slice") && !strings.Contains(show, systemSlice) {
		t.Errorf("the scope ends with the shutdown: %s", show)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := m.RemoveShim(ctx, id); err == nil {
		t.Error("RemoveShim of a live one: no error")
	}
	process.Kill()
	for range 2 {
		check(t, m.RemoveShim(t.Context(), id))
	}
	if left := cgroup.Find(systemSlice+":"+scopePrefix+":"+id, true); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What serves sessions does not end with the daemon's service, and its scope ends with it.
func TestStreamScope(t *testing.T) {
	m := newSystemd(t)
	service := fmt.Sprintf("holdfast-test-stream-%d.service", os.Getpid())
	pid := startService(t, service)
	process, err := os.FindProcess(pid)
	check(t, err)
	t.Cleanup(func() { process.Kill() })
	check(t, m.PlaceStream(t.Context(), pid))
	run(t, "systemctl", "stop", service)
	if err := process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("it ended with the daemon's service: %v", err)
	}
	scope := fmt.Sprintf("holdfast-stream-%d.scope", pid)
	if !inScope(pid, scope) {
		t.Errorf("it is in %q, want %s", cgroupsOf(t, pid), scope)
	}
	process.Kill()
	check(t, removeScope(t.Context(), scope))
}

// The scope of a process that is just dying does not keep the next one out.
func TestScopeAgain(t *testing.T) {
	m := newSystemd(t)
	id := shimID(t, m, "again")
	first, endFirst := startSleep(t)
	check(t, m.PlaceShim(t.Context(), id, first))
	second, endSecond := startSleep(t)
	if err := m.PlaceShim(t.Context(), id, second); !errors.Is(err, ErrBusy) {
		t.Errorf("PlaceShim of a second process beside the first: %v, want ErrBusy", err)
	}
	endFirst()
	check(t, m.PlaceShim(t.Context(), id, second))
	if !inScope(second, scopeName(id)) {
		t.Errorf("the second process is in %q", cgroupsOf(t, second))
	}
	endSecond()
}

func TestScopeDeadProcess(t *testing.T) {
	m := newSystemd(t)
	id := shimID(t, m, "dead")
	pid, end := startSleep(t)
	end()
	if err := m.PlaceShim(t.Context(), id, pid); err == nil || !strings.Contains(err.Error(), scopeName(id)) {
		t.Errorf("PlaceShim of a dead process: %v, want an error that names the scope", err)
	}
}

// systemd that does not answer costs no more than the caller's deadline.
func TestScopeDeadline(t *testing.T) {
	m := newSystemd(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	pid, _ := startSleep(t)
	if err := m.PlaceShim(ctx, "late", pid); !errors.Is(err, context.Canceled) {
		t.Errorf("PlaceShim with a context that is over: %v, want context.Canceled", err)
	}
}
