package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// repository is the root of the source tree.
const repository = "../.."

// binDir is what programs made, for TestMain to remove.
var binDir string

// programs builds the shim and holdfastctl once, and gives where they are.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "hctl-bin")
	if err != nil {
		return "", err
	}
	binDir = dir
	out, err := exec.Command("go", "build", "-o", dir+"/", repository+"/cmd/holdfast-shim", ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("cannot build the programs: %w: %s", err, out)
	}
	return dir, err
})

// node is a state directory with real shims in it, and no daemon.
type node struct {
	state, bin string
	cgroups    *placement.Manager
	pod        string
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	bin, err := programs()
	check(t, err)
	m, err := placement.New(placement.Cgroupfs)
	check(t, err)
	n := &node{state: newState(t), bin: bin, cgroups: m, pod: fmt.Sprintf("holdfastctl-%d", os.Getpid())}
	t.Cleanup(func() {
		if err := m.RemovePod(context.Background(), "", n.pod); err != nil {
			t.Error(err)
		}
	})
	return n
}

// ctl runs the real program.
func (n *node) ctl(t *testing.T, args ...string) result {
	t.Helper()
	return n.start(t, args...)()
}

// start runs it beside the test; the function returned waits for its end.
func (n *node) start(t *testing.T, args ...string) func() result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), n.bin+"/holdfastctl", append([]string{"--state", n.state}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Stdin = strings.NewReader("typed\n")
	check(t, cmd.Start())
	return func() result {
		err := cmd.Wait()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	}
}

// run makes a container of busybox that runs a script, under a real shim.
func (n *node) run(t *testing.T, id, script string, terminal bool) rundir.Dir {
	t.Helper()
	dir := rundir.Dir(filepath.Join(n.state, "containers", id))
	bin := filepath.Join(dir.Path(rundir.RootfsName), "bin")
	for _, d := range []string{bin, dir.Path(rundir.RootfsName) + "/proc", dir.Path(rundir.RootfsName) + "/dev",
		dir.Path(rundir.RootfsName) + "/tmp"} {
		check(t, os.MkdirAll(d, 0o755))
	}
	busybox, err := os.ReadFile("/bin/busybox")
	check(t, err)
	check(t, os.WriteFile(bin+"/busybox", busybox, 0o755))
	for _, applet := range []string{"sh", "cat", "sleep", "stty", "id", "env", "echo"} {
		check(t, os.Symlink("busybox", filepath.Join(bin, applet)))
	}

	l := &shims.Launcher{Binary: n.bin + "/holdfast-shim", LogLevel: "debug", Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	check(t, l.Launch(ctx, dir))
	t.Cleanup(func() { n.end(t, dir) })

	path, err := n.cgroups.ContainerPath("", n.pod, id)
	check(t, err)
	spec := &specs.Spec{
		Version:  "1.2.0",
		Root:     &specs.Root{Path: rundir.RootfsName},
		Hostname: id,
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance",
				"ptmxmode=0666"}},
		},
		Process: &specs.Process{Terminal: terminal, Args: []string{"sh", "-c", script}, Cwd: "/",
			Env:         []string{"PATH=/bin", "LANG=C"},
			OOMScoreAdj: new(int)},
		Linux: &specs.Linux{CgroupsPath: path, Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}}},
	}
	runc, err := filepath.Abs(repository + "/bin/runc")
	check(t, err)
	c := client.New(dir)
	defer c.Close()
	record, err := json.Marshal(map[string]any{"id": id, "podId": n.pod,
		"config": map[string]any{"metadata": map[string]any{"name": "web"}}})
	check(t, err)
	_, err = c.Create(ctx, rundir.Launch{
		RequestID:    "r",
		Runtime:      rundir.Runtime{Path: runc, Root: filepath.Join(n.state, "runc")},
		LogDirectory: n.state,
		LogPath:      id + ".log",
		Container:    rundir.Opaque{TypeURL: "holdfast/container", Value: record},
	}, spec)
	check(t, err)
	_, _, err = c.Start(ctx)
	check(t, err)
	return dir
}

// end leaves nothing of a container, whatever the test did to it.
func (n *node) end(t *testing.T, dir rundir.Dir) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if id, err := dir.ReadIdentity(); err == nil && id.Shim.Alive() {
		syscall.Kill(id.Shim.PID, syscall.SIGCONT)
		c := client.New(dir)
		defer c.Close()
		// It may be ending by itself, with its socket gone.
		if _, err := c.Delete(ctx, true); err != nil && !errors.Is(err, client.ErrUnreachable) {
			t.Errorf("cannot delete %s: %v", dir.ID(), err)
		}
		eventually(t, "the end of the shim", func() bool { return !id.Shim.Alive() })
	}
	if st, err := dir.ReadStatus(); err == nil && st.Init.Alive() {
		syscall.Kill(st.Init.PID, syscall.SIGKILL)
		eventually(t, "the end of the container", func() bool { return !st.Init.Alive() })
	}
}

func TestRealShim(t *testing.T) {
	n := newNode(t)
	const script = `trap 'echo bye; exit 7' TERM; trap 'echo usr1' USR1; echo hello; echo oops >&2
		while :; do sleep 0.1; done`
	dir := n.run(t, "4f1c0ffee4f1c0ffee", script, false)
	const id = "4f1c"

	eventually(t, "the first line in the log", func() bool { return n.ctl(t, "logs", id).stdout == "hello\n" })
	logs := n.start(t, "logs", "-f", id)
	wait := n.start(t, "wait", id)
	events := n.start(t, "events", "-f", id)

	eventually(t, "the list, by the shim itself", func() bool { // which may be too busy once
		r := n.ctl(t, "shims")
		return strings.Contains(r.stdout, "running") && !strings.Contains(r.stdout, "(running") &&
			strings.Contains(r.stdout, "web")
	})
	if r := n.ctl(t, "pids", id); !strings.Contains(r.stdout, "trap") {
		t.Errorf("pids: %+v", r)
	}
	if r := n.ctl(t, "state", id); !strings.Contains(r.stdout, "source:") || !strings.Contains(r.stdout, "cgroup ") ||
		!strings.Contains(r.stdout, "log written:") {
		t.Errorf("state: %+v", r)
	}
	if r := n.ctl(t, "exec", "-e", "X=y", "-w", "/tmp", "-u", "1000:100", id, "sh", "-c",
		"echo $X $LANG $PWD; id -u; id -g; echo no >&2; exit 5"); r.code != 5 || r.stdout != "y C /tmp\n1000\n100\n" ||
		r.stderr != "no\n" {
		t.Errorf("exec: %+v", r)
	}
	if r := n.ctl(t, "exec", "-i", id, "cat"); r.code != 0 || r.stdout != "typed\n" {
		t.Errorf("exec -i: %+v", r)
	}
	if r := n.ctl(t, "exec", "--timeout", "300ms", id, "sleep", "600"); r.code != codeTimeout {
		t.Errorf("exec --timeout: %+v", r)
	}
	if r := n.ctl(t, "exec", id, "nothing"); r.code == 0 || r.stderr == "" {
		t.Errorf("exec of nothing: %+v", r)
	}
	if r := n.ctl(t, "resize", id, "80x25"); r.code != 1 || r.stderr == "" {
		t.Errorf("resize without a terminal: %+v", r)
	}
	n.ctl(t, "kill", "-s", "USR1", id)
	eventually(t, "the signal", func() bool { return strings.Contains(n.ctl(t, "logs", id).stdout, "usr1") })

	identity, err := dir.ReadIdentity()
	check(t, err)
	check(t, syscall.Kill(identity.Shim.PID, syscall.SIGSTOP))
	eventually(t, "the list with a stopped shim", func() bool {
		r := n.ctl(t, "shims")
		return r.code == 0 && strings.Contains(r.stdout, "(running)") && strings.Contains(r.stdout, "kill -CONT")
	})
	check(t, syscall.Kill(identity.Shim.PID, syscall.SIGCONT))

	if r := n.ctl(t, "delete", id); r.code != 1 {
		t.Errorf("delete of a running one: %+v", r)
	}
	if r := n.ctl(t, "stop", "-t", "60", id); r.code != 0 || !strings.Contains(r.stdout, "exit code 7 Error") {
		t.Errorf("stop: %+v", r)
	}
	if r := wait(); r.code != 0 || r.stdout != "7\n" {
		t.Errorf("wait: %+v", r)
	}
	if r := logs(); r.code != 0 || r.stdout != "hello\nusr1\nbye\n" || r.stderr != "oops\n" {
		t.Errorf("logs -f: %+v", r)
	}
	if r := events(); r.code != 0 || !strings.Contains(r.stdout, "started") ||
		!strings.Contains(r.stdout, "stopping") || strings.Count(r.stdout, "exited  exit code 7 Error") != 1 {
		t.Errorf("events -f: %+v", r)
	}

	// The shim ends by itself; then the files answer.
	eventually(t, "the end of the shim", func() bool { return !identity.Shim.Alive() })
	if r := n.ctl(t, "shims"); !strings.Contains(r.stdout, "7 Error") || !strings.Contains(r.stdout, "exited") {
		t.Errorf("shims: %+v", r)
	}
	if r := n.ctl(t, "kill", id); r.code != 1 || !strings.Contains(r.stderr, "has ended: exit code 7") {
		t.Errorf("kill: %+v", r)
	}
}

func TestRealTerminal(t *testing.T) {
	n := newNode(t)
	n.run(t, "tty", "sleep 600", true)
	if r := n.ctl(t, "resize", "tty", "120x40"); r.code != 0 {
		t.Fatalf("resize: %+v", r)
	}
	if r := n.ctl(t, "exec", "tty", "stty", "-F", "/dev/console", "size"); r.stdout != "40 120\n" {
		t.Errorf("the terminal's size: %+v", r)
	}
	if r := n.ctl(t, "delete", "-f", "tty"); r.code != 0 || !strings.Contains(r.stdout, "137") {
		t.Errorf("delete -f: %+v", r)
	}
}

// A shim that lives is not lost, whatever has become of its files.
func TestRealShimWithoutFiles(t *testing.T) {
	n := newNode(t)
	dir := n.run(t, "bare", "sleep 600", false)
	shim, err := dir.FindShim()
	check(t, err)
	for _, name := range []string{rundir.SocketName, rundir.LockName, rundir.IdentityName} {
		check(t, os.Remove(dir.Path(name)))
		var v view
		check(t, json.Unmarshal([]byte(n.ctl(t, "--json", "state", "bare").stdout), &v))
		if v.State != "running" || v.Source != client.FromFiles || v.Shim != shim || v.Init.PID == 0 {
			t.Errorf("without %s: %+v", name, v)
		}
		want := fmt.Sprintf("kill -HUP %d", shim.PID)
		if r := n.ctl(t, "pids", "bare"); r.code != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("without %s: pids: %+v", name, r)
		}
	}
	check(t, syscall.Kill(shim.PID, rundir.SignalReappear))
	eventually(t, "its files", func() bool { return n.ctl(t, "pids", "bare").code == 0 })
}

// A shim that was killed shows as such, without a daemon to bury it.
func TestRealShimKilled(t *testing.T) {
	n := newNode(t)
	dir := n.run(t, "orphan", "sleep 600", false)
	identity, err := dir.ReadIdentity()
	check(t, err)
	wait := n.start(t, "wait", "orphan")
	check(t, syscall.Kill(identity.Shim.PID, syscall.SIGKILL))
	if r := wait(); r.code != 1 || !strings.Contains(r.stderr, "no exit record") {
		t.Errorf("wait: %+v", r)
	}
	if r := n.ctl(t, "shims"); !strings.Contains(r.stdout, "(lost)") {
		t.Errorf("shims: %+v", r)
	}
}
