package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
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
	build := exec.Command("go", "build", "-o", dir+"/", repository+"/cmd/holdfast-shim", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
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
	must.BeRoot(t)
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
		Stdin:        terminal,
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
	eventually(t, "the state, by the shim itself", func() bool {
		r := n.ctl(t, "state", id)
		return strings.Contains(r.stdout, "source:") && strings.Contains(r.stdout, "cgroup ") &&
			strings.Contains(r.stdout, "log written:")
	})
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

// local runs the real program in a terminal of its own. typed is what goes to it, screen
// what it shows until a text has come.
func (n *node) local(t *testing.T, width, height uint16, args ...string) (master console.Console, cmd *exec.Cmd) {
	t.Helper()
	master, path, err := console.NewPty()
	check(t, err)
	t.Cleanup(func() { master.Close() })
	check(t, master.Resize(console.WinSize{Width: width, Height: height}))
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	check(t, err)
	defer slave.Close()
	cmd = exec.CommandContext(t.Context(), n.bin+"/holdfastctl", append([]string{"--state", n.state}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	check(t, cmd.Start())
	return master, cmd
}

// shows reads a terminal until a text has come.
func shows(t *testing.T, from io.Reader, text string) string {
	t.Helper()
	var all []byte
	for b := make([]byte, 4096); !strings.Contains(string(all), text); {
		n, err := from.Read(b)
		if all = append(all, b[:n]...); err != nil {
			t.Fatalf("%q, then %v, without %q", all, err, text)
		}
	}
	return string(all)
}

func TestRealSessions(t *testing.T) {
	n := newNode(t)
	n.run(t, "shell", "stty -echo; while read x; do echo got $x; done", true)

	at, cmd := n.local(t, 101, 31, "exec", "-it", "shell", "sh")
	io.WriteString(at, "stty -echo; echo size $(stty size)\n")
	shows(t, at, "size 31 101")
	check(t, at.Resize(console.WinSize{Width: 77, Height: 22}))
	eventually(t, "the new size", func() bool {
		io.WriteString(at, "echo size $(stty size) END\n")
		return strings.Contains(shows(t, at, "END"), "size 22 77")
	})
	io.WriteString(at, "x=kept\n\x10\x11")
	screen := shows(t, at, " shell\r\n")
	check(t, cmd.Wait())
	_, exec, _ := strings.Cut(screen, "--exec ")
	exec, _, _ = strings.Cut(exec, " ")

	at, cmd = n.local(t, 80, 25, "attach", "-i", "--exec", exec, "shell")
	io.WriteString(at, "echo x is $x; exit 4\n")
	shows(t, at, "x is kept")
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 4 {
		t.Errorf("exit code %d of a command that came back", cmd.ProcessState.ExitCode())
	}

	at, cmd = n.local(t, 80, 25, "attach", "-i", "shell")
	io.WriteString(at, "something\n")
	shows(t, at, "got something")
	io.WriteString(at, "\x10\x11")
	check(t, cmd.Wait())
	if r := n.ctl(t, "shims"); !strings.Contains(r.stdout, "running") {
		t.Errorf("after detaching: %+v", r)
	}
}

func TestRealAttachWithoutInput(t *testing.T) {
	n := newNode(t)
	n.run(t, "deaf", "sleep 600", false)
	if r := n.ctl(t, "attach", "-i", "deaf"); r.code != 1 || !strings.Contains(r.stderr, "no input") {
		t.Errorf("attach -i: %+v", r)
	}
}

func TestRealPortForward(t *testing.T) {
	n := newNode(t)
	dir := n.run(t, "net", "sleep 600", false)
	status, err := dir.ReadStatus()
	check(t, err)
	pod := fmt.Sprintf("/proc/%d/ns/net", status.Init.PID)
	check(t, exec.Command("nsenter", "--net="+pod, "ip", "link", "set", "lo", "up").Run())
	var l net.Listener
	check(t, netns.OnThread(func() (err error) {
		if err = netns.Enter(pod); err == nil {
			l, err = net.Listen("tcp", "[::1]:0")
		}
		return err
	}))
	defer l.Close()
	go func() { // answers behind the end of the question
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			fmt.Fprintf(c, "you said %s", b)
			c.Close()
		}
	}()
	at, cmd := n.local(t, 80, 25, "port-forward", "net", fmt.Sprint("0:", l.Addr().(*net.TCPAddr).Port))
	_, address, _ := strings.Cut(shows(t, at, "to port"), "from ")
	address, _, _ = strings.Cut(address, " ")
	for range 3 {
		c, err := net.Dial("tcp", address)
		check(t, err)
		io.WriteString(c, "hello")
		check(t, c.(*net.TCPConn).CloseWrite())
		if b, err := io.ReadAll(c); string(b) != "you said hello" {
			t.Errorf("%q, %v", b, err)
		}
		c.Close()
	}
	check(t, cmd.Process.Signal(syscall.SIGINT))
	check(t, cmd.Wait())
}
