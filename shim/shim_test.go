package shim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/shim"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestRunLogsAndExitCode(t *testing.T) {
	b := newBox(t)
	b.run("echo out; echo err >&2; exit 7")
	e := b.wait()
	if e.Code != 7 || e.Signal != 0 || e.Source != rundir.SourceWaited || e.Reason != rundir.ReasonError {
		t.Errorf("exit %v", e)
	}
	b.gone()
	if got := b.output(); got != "out\nerr\n" && got != "err\nout\n" {
		t.Errorf("log %q", got)
	}
	for _, dir := range []string{string(b.dir), b.durable} {
		if r, err := rundir.ReadExitIn(dir); err != nil || r.Code != 7 || r.StartedAt.IsZero() {
			t.Errorf("%s: %+v, %v", dir, r, err)
		}
	}
	if st, err := b.dir.ReadStatus(); err != nil || st.Phase != rundir.PhaseExited {
		t.Errorf("state %+v, %v", st, err)
	}
}

// A container that ends in its first millisecond still has its own exit code,
// its whole output in the log, and events in order.
func TestFirstMillisecond(t *testing.T) {
	n := 30
	if os.Getenv("HOLDFAST_DRILL") != "" {
		n = 200
	}
	for i := range n {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			b := newBox(t)
			want := i%100 + 1
			spec := b.spec("")
			spec.Process.Args = []string{"/bin/sh", "-c", fmt.Sprintf("echo %d; exit %d", i, want)}
			b.create(spec)
			b.start()
			if e := b.wait(); int(e.Code) != want {
				t.Errorf("exit %v, want %d", e, want)
			}
			if got, want := b.output(), strconv.Itoa(i)+"\n"; got != want {
				t.Errorf("log %q, want %q", got, want)
			}
		})
	}
}

// While it runs, the OCI runtime sees a container like its own.
func TestRuntimeAgrees(t *testing.T) {
	b := newBox(t)
	b.create(b.spec("exec sleep 1000"))
	ask := func() specs.ContainerState {
		out, err := exec.Command(b.runc.Path, "--root", b.runc.Root, "state", b.id).Output()
		must.Succeed(t, err)
		var s specs.State
		must.Succeed(t, json.Unmarshal(out, &s))
		return s.Status
	}
	if s := ask(); s != specs.StateCreated {
		t.Errorf("created, the runtime says %s", s)
	}
	b.start()
	if s := ask(); s != specs.StateRunning {
		t.Errorf("started, the runtime says %s", s)
	}
	out, err := exec.Command(b.runc.Path, "--root", b.runc.Root, "exec", b.id, "/bin/echo", "hello").CombinedOutput()
	if err != nil || string(out) != "hello\n" {
		t.Errorf("runc exec: %q, %v", out, err)
	}
}

func TestLargeOutput(t *testing.T) {
	b := newBox(t)
	b.run("yes 0123456789abcdef | head -n 200000; echo end >&2")
	if e := b.wait(); e.Code != 0 || e.Reason != rundir.ReasonCompleted {
		t.Errorf("exit %v", e)
	}
	if got := strings.Count(b.output(), "0123456789abcdef\n"); got != 200000 {
		t.Errorf("%d lines in the log", got)
	}
}

func TestTerminal(t *testing.T) {
	b := newBox(t)
	spec := b.spec("stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.01; done")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Width: 80, Height: 25}
	b.create(spec)
	b.start()
	b.says("ready")
	if !b.state().Terminal {
		t.Error("state: no terminal")
	}
	if _, err := b.client.ResizePty(b.ctx(), &pb.ResizePtyRequest{Id: b.id, Width: 132, Height: 43}); err != nil {
		t.Fatal(err)
	}
	if e := b.wait(); e.Code != 3 {
		t.Errorf("exit %v", e)
	}
	if got := b.output(); got != "25 80\nready\n43 132\n" {
		t.Errorf("log %q", got)
	}
}

// reopening is a script that closes its terminal, and goes on with it when it is told to.
func reopening(terminal string) string {
	return "echo early; exec </dev/null >/dev/null 2>&1; >/tmp/closed; until [ -e /tmp/go ]; do sleep 0.01; done; " +
		"echo late >" + terminal + "; exit 3"
}

// awaitClosed returns when the script of reopening has closed its terminal.
func (b *box) awaitClosed() {
	b.t.Helper()
	r, err := b.exec(sh("until [ -e /tmp/closed ]; do sleep 0.01; done"), &pb.ExecSyncRequest{})
	if err != nil || r.ExitCode != 0 {
		b.t.Fatalf("exec: %v, %v", r, err)
	}
}

// goOn has the script of reopening go on.
func (b *box) goOn() {
	b.t.Helper()
	if r, err := b.exec(sh(">/tmp/go"), &pb.ExecSyncRequest{}); err != nil || r.ExitCode != 0 {
		b.t.Fatalf("exec: %v, %v", r, err)
	}
}

// A container closes its terminal and opens it again. All is in the log, also where another
// shim has gone on with the container meanwhile, and clients see it.
func TestTerminalOpenedAgain(t *testing.T) {
	for _, another := range []bool{false, true} {
		t.Run(fmt.Sprintf("another shim %v", another), func(t *testing.T) {
			b := newBox(t)
			b.reopening = true
			spec := b.spec(reopening("/dev/console"))
			spec.Process.Terminal = true
			b.create(spec)
			b.start()
			b.awaitClosed()
			b.says("early") // or who attaches now might get it
			if another {
				b.reopen()
			}
			s := b.session(client.SessionOptions{Stdout: true})
			b.goOn()
			var out bytes.Buffer
			if exit, err := s.Copy(b.ctx(), client.Streams{Stdout: &out}); err != nil || exit.Reason != "" {
				t.Errorf("attached: %+v, %v", exit, err)
			}
			if out.String() != "late\r\n" {
				t.Errorf("attached, got %q", out.String())
			}
			if e := b.wait(); e.Code != 3 {
				t.Errorf("exit %v", e)
			}
			if got := b.output(); got != "early\nlate\n" {
				t.Errorf("log %q", got)
			}
		})
	}
}

// A terminal ends with its container, whatever the other processes have open, and has
// nothing to be given up.
func TestEndOfATerminal(t *testing.T) {
	for name, c := range map[string]struct {
		script  string
		hostPID bool
	}{
		"closed at the end":           {script: "echo x"},
		"closed before":               {script: "echo x; exec </dev/null >/dev/null 2>&1"},
		"a child has it":              {script: "trap '' HUP; sleep 1000 & echo x"},
		"closed before, host's PIDs":  {script: "echo x; exec </dev/null >/dev/null 2>&1", hostPID: true},
		"a child has it, host's PIDs": {script: "trap '' HUP; sleep 1000 & echo x", hostPID: true},
		"a child opens it, host's PIDs": {
			script:  "trap '' HUP; (sleep 0.1; exec sleep 1000 >/dev/console) & echo x",
			hostPID: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			spec := b.spec(c.script + "; exit 3")
			spec.Process.Terminal = true
			if c.hostPID {
				spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
			}
			b.create(spec)
			b.start()
			if e := b.wait(); e.Code != 3 {
				t.Errorf("exit %v", e)
			}
			if got := b.output(); got != "x\n" {
				t.Errorf("log %q", got)
			}
			b.gone()
			log, err := os.ReadFile(b.dir.Path(rundir.ShimLogName))
			if err != nil || strings.Contains(string(log), "given up") {
				t.Errorf("%s, %v", log, err)
			}
		})
	}
}

func TestResizeWithoutTerminal(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	_, err := b.client.ResizePty(b.ctx(), &pb.ResizePtyRequest{Id: b.id, Width: 80, Height: 25})
	if code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
}

func TestStop(t *testing.T) {
	t.Run("signal", func(t *testing.T) {
		b := newBox(t)
		b.run("trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done")
		b.says("ready")
		if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: 600000}); err != nil {
			t.Fatal(err)
		}
		if e := b.wait(); e.Code != 9 {
			t.Errorf("exit %v", e)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		b := newBox(t)
		b.run("trap '' TERM; echo ready; while :; do sleep 0.01; done")
		b.says("ready")
		if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: 50}); err != nil {
			t.Fatal(err)
		}
		if e := b.wait(); e.Code != 137 || e.Signal != 9 || e.OomKilled {
			t.Errorf("exit %v", e)
		}
	})
	t.Run("at once", func(t *testing.T) {
		b := newBox(t)
		b.run("trap '' TERM; echo ready; while :; do sleep 0.01; done")
		if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id}); err != nil {
			t.Fatal(err)
		}
		if e := b.wait(); e.Signal != 9 {
			t.Errorf("exit %v", e)
		}
	})
	t.Run("only sooner", func(t *testing.T) {
		b := newBox(t)
		b.run("trap '' TERM; echo ready; while :; do sleep 0.01; done")
		stop := func(ms uint64) time.Time {
			r, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: ms})
			must.Succeed(t, err)
			st, err := b.dir.ReadStatus()
			if err != nil || st.Stop == nil {
				t.Fatalf("the stop is not in the record: %+v, %v", st, err)
			}
			return r.KillAt.AsTime()
		}
		first := stop(600_000)
		if later := stop(6_000_000); later.Sub(first).Abs() > time.Second {
			t.Errorf("the deadline moved from %s to %s", first, later)
		}
		if sooner := stop(300_000); first.Sub(sooner) < 200*time.Second {
			t.Errorf("the deadline did not move from %s: %s", first, sooner)
		}
		stop(0)
		b.wait()
	})
	t.Run("paused", func(t *testing.T) {
		b := newBox(t)
		b.run("exec sleep 1000")
		if out, err := exec.Command(b.runc.Path, "--root", b.runc.Root, "pause", b.id).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: 20}); err != nil {
			t.Fatal(err)
		}
		if e := b.wait(); e.Signal != 9 {
			t.Errorf("exit %v", e)
		}
	})
}

// The deadline belongs to the shim: its launcher is killed right after asking.
func TestLauncherKilled(t *testing.T) {
	b := newBox(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_LAUNCH="+string(b.dir), "HOLDFAST_TEST_SHIM="+shimBinary)
	out, err := cmd.StdoutPipe()
	must.Succeed(t, err)
	must.Succeed(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	answer := make([]byte, 512)
	n, err := out.Read(answer)
	if got := string(answer[:n]); err != nil || got != "\"\\x00\" <nil>\n" {
		t.Fatalf("shim not ready: %s, %v", got, err)
	}
	b.connect()
	spec := b.spec("trap '' TERM; echo ready; while :; do sleep 0.01; done")
	if _, err := b.client.Create(b.ctx(), b.request(spec)); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.says("ready")
	if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: 300}); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	b.conn.Close()
	b.gone()
	r, err := rundir.ReadExitIn(b.durable)
	if err != nil || r.Signal != 9 || r.Source != rundir.SourceWaited {
		t.Errorf("exit %+v, %v", r, err)
	}
}

func TestCreateTwice(t *testing.T) {
	b := newBox(t)
	spec := b.spec("exec sleep 1000")
	init := b.create(spec)
	again, err := b.client.Create(b.ctx(), b.request(spec))
	if err != nil || again.Init.Pid != init.Pid {
		t.Errorf("the same request: %v, %v", again, err)
	}
	other := b.request(spec)
	other.RequestId = "r2"
	if _, err := b.client.Create(b.ctx(), other); code(err) != codes.AlreadyExists {
		t.Errorf("another request: %v", err)
	}
	b.start()
	if again := b.start(); again.Pid != init.Pid {
		t.Errorf("second start: %v", again)
	}
	if l, err := b.dir.ReadLaunch(); err != nil || l.RequestID != "r1" || l.DurableDir != b.durable {
		t.Errorf("create record %+v, %v", l, err)
	}
}

func TestCreateFails(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		says   string
		reason string
	}{
		"no such command": {
			func(s *specs.Spec) { s.Process.Args = []string{"/no/such"} },
			"/no/such", rundir.ReasonStartError,
		},
		"no such command on the PATH": {
			func(s *specs.Spec) { s.Process.Args = []string{"nosuch"} },
			"nosuch", rundir.ReasonStartError,
		},
		"a directory": {
			func(s *specs.Spec) { s.Process.Args = []string{"/bin"} },
			"/bin", rundir.ReasonStartError,
		},
		"not executable": {
			func(s *specs.Spec) { s.Process.Args = []string{"/proc/version"} },
			"permission denied", rundir.ReasonStartError,
		},
		"a file as working directory": {
			func(s *specs.Spec) { s.Process.Cwd = "/bin/sh" },
			"not a directory", rundir.ReasonStartError,
		},
		"below a file": {
			func(s *specs.Spec) { s.Process.Cwd = "/bin/sh/x" },
			"not a directory", rundir.ReasonStartError,
		},
		"with a terminal": {func(s *specs.Spec) {
			s.Process.Terminal, s.Process.Args = true, []string{"/no/such"}
		}, "/no/such", rundir.ReasonStartError},
		"no such rootfs": {
			func(s *specs.Spec) { s.Root.Path = "/no/such/rootfs" },
			"/no/such/rootfs", rundir.ReasonNeverRan,
		},
		"no such mount, of a misleading name": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{
				Destination: "/mnt", Type: "bind", Source: `/no/such: exec: "x": not found`, Options: []string{"bind"},
			})
		}, "/no/such", rundir.ReasonNeverRan},
		"hook fails": {func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false", Args: []string{"false"}}}}
		}, "hook", rundir.ReasonNeverRan},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			b.launch()
			spec := b.spec("")
			c.change(spec)
			_, err := b.client.Create(b.ctx(), b.request(spec))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want the runtime's message with %q", err, c.says)
			}
			b.gone()
			for _, dir := range []string{string(b.dir), b.durable} {
				r, err := rundir.ReadExitIn(dir)
				says := strings.Contains(r.Message, c.says)
				if err != nil || r.Reason != c.reason || r.Code != 128 || r.ExitedAt.IsZero() || !says {
					t.Errorf("%s: %+v, %v", dir, r, err)
				}
			}
			mounts, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil || strings.Contains(string(mounts), b.id) {
				t.Errorf("a mount is left, or %v", err)
			}
		})
	}
}

// An OCI runtime that hangs is killed with what it has started.
func TestDeleteWhileCreating(t *testing.T) {
	b := newBox(t)
	b.launch()
	fifo := filepath.Join(filepath.Dir(b.logs), "fifo")
	must.Succeed(t, unix.Mkfifo(fifo, 0o600))
	spec := b.spec("")
	spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{
		Path: "/bin/sh", Args: []string{"sh", "-c", "echo here > " + fifo + "; exec sleep 1000"},
	}}}
	failed := make(chan error, 1)
	go func() {
		_, err := b.client.Create(b.ctx(), b.request(spec))
		failed <- err
	}()
	if _, err := os.ReadFile(fifo); err != nil { // the hook runs now
		t.Fatal(err)
	}
	other, conn, _ := b.dial()
	defer conn.Close()
	if _, err := other.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id}); code(err) != codes.FailedPrecondition {
		t.Errorf("without force: %v", err)
	}
	r, err := other.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id, Force: true})
	if err != nil || r.Exit.GetReason() != rundir.ReasonNeverRan {
		t.Errorf("delete: %v, %v", r, err)
	}
	if err := <-failed; code(err) != codes.Aborted {
		t.Errorf("create: %v", err)
	}
	b.gone()
}

// refusedBy makes sure that an answer is an error of this code about a field, or that it has
// another text.
func refusedBy(t *testing.T, err error, want codes.Code, says string) {
	t.Helper()
	if code(err) != want || !strings.Contains(err.Error(), says) {
		t.Errorf("got %v, want %s about %q", err, want, says)
	}
}

func TestBadCreates(t *testing.T) {
	b := newBox(t)
	b.launch()
	call := func(r *pb.CreateRequest) error {
		_, err := b.client.Create(b.ctx(), r)
		return err
	}
	for _, c := range []struct {
		says   string
		change func(*pb.CreateRequest)
	}{
		{"spec is", func(r *pb.CreateRequest) { r.Spec = nil }},
		{"spec: ", func(r *pb.CreateRequest) { r.Spec = &anypb.Any{TypeUrl: r.Spec.TypeUrl, Value: []byte("{")} }},
		{"request_id", func(r *pb.CreateRequest) { r.RequestId = "" }},
		{"runtime.", func(r *pb.CreateRequest) { r.Runtime = nil }},
		{"log.directory", func(r *pb.CreateRequest) { r.Log.Directory = "logs" }},
		{"durable_dir", func(r *pb.CreateRequest) { r.DurableDir = "durable" }},
		{"payload_path", func(r *pb.CreateRequest) { r.PayloadPath = "/no/such/file" }},
	} {
		r := b.request(b.spec(""))
		c.change(r)
		refusedBy(t, call(r), codes.InvalidArgument, c.says)
	}
	for says, change := range map[string]func(*specs.Spec){
		"spec.linux.cgroupsPath": func(s *specs.Spec) { s.Linux.CgroupsPath = "/" },
		"spec.process.args":      func(s *specs.Spec) { s.Process.Args = nil },
		"spec.root.path":         func(s *specs.Spec) { s.Root = nil },
	} {
		s := b.spec("")
		change(s)
		refusedBy(t, call(b.request(s)), codes.InvalidArgument, says)
	}
	if b.state().Phase != pb.Phase_PHASE_EMPTY {
		t.Errorf("phase %s after refused creates", b.state().Phase)
	}
	// What is found only while a container is made is the end of it.
	for says, change := range map[string]func(*pb.CreateRequest){
		"spec.annotations":      func(r *pb.CreateRequest) { r.RestoreDir = "/" },
		"../x":                  func(r *pb.CreateRequest) { r.Log.Path = "../x" },
		"0.log below /dev/null": func(r *pb.CreateRequest) { r.Log.Directory = "/dev/null" },
	} {
		b := newBox(t)
		b.launch()
		r := b.request(b.spec(""))
		change(r)
		_, err := b.client.Create(b.ctx(), r)
		refusedBy(t, err, codes.InvalidArgument, says)
	}
}

func TestBadRequests(t *testing.T) {
	b := newBox(t)
	b.launch()
	ctx, id := b.ctx(), b.id
	call := func(_ any, err error) error { return err }
	_, err := b.client.State(ctx, &pb.StateRequest{Id: "other"})
	refusedBy(t, err, codes.NotFound, "other")
	refusedBy(t, call(b.client.State(ctx, &pb.StateRequest{})), codes.InvalidArgument, "id is empty")
	refusedBy(t, call(b.client.Start(ctx, &pb.StartRequest{Id: id})), codes.FailedPrecondition, "")
	refusedBy(t, call(b.client.Kill(ctx, &pb.KillRequest{Id: id, Signal: 9})), codes.FailedPrecondition, "")
	if _, err := b.client.Create(ctx, b.request(b.spec("exec sleep 1000"))); err != nil {
		t.Fatal(err)
	}
	_, err = b.exec(sh("true"), &pb.ExecSyncRequest{})
	refusedBy(t, err, codes.FailedPrecondition, "")
	b.start()
	if _, err := b.client.Freeze(ctx, &pb.FreezeRequest{Id: id, LimitMs: 600_000}); err != nil {
		t.Fatal(err)
	}
	_, err = b.client.Checkpoint(ctx, &pb.CheckpointRequest{Id: id, Dir: b.durable + "/absent"})
	refusedBy(t, err, codes.InvalidArgument, "dir ")
	if _, err := b.client.Thaw(ctx, &pb.ThawRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	resources := []byte(`{"resources": {"cpu": 1}}`)
	for _, c := range []struct {
		says string
		err  error
	}{
		{"signal 65", call(b.client.Kill(ctx, &pb.KillRequest{Id: id, Signal: 65}))},
		{"signal 0", call(b.client.Kill(ctx, &pb.KillRequest{Id: id}))},
		{"process.terminal", call(b.exec(&specs.Process{Args: []string{"true"}, Terminal: true}, &pb.ExecSyncRequest{}))},
		{"process.args", call(b.exec(&specs.Process{}, &pb.ExecSyncRequest{}))},
		{"stdout_path", call(b.exec(sh("true"), &pb.ExecSyncRequest{StdoutPath: "/no/such/file"}))},
		{"stdin_path", call(b.exec(sh("true"), &pb.ExecSyncRequest{StdinPath: "relative"}))},
		{"payload_path", call(b.exec(sh("true"), &pb.ExecSyncRequest{PayloadPath: "/no/such/file"}))},
		{"process: ", call(b.client.ExecSync(ctx, &pb.ExecSyncRequest{Id: id}))},
		{"payload_path", call(b.client.Exec(ctx, &pb.ExecRequest{Id: id, PayloadPath: "/no/such/file"}))},
		{"width and height", call(b.client.ResizePty(ctx, &pb.ResizePtyRequest{Id: id, Width: 1 << 16}))},
		{"limit_ms", call(b.client.Freeze(ctx, &pb.FreezeRequest{Id: id}))},
		{"dir ", call(b.client.Checkpoint(ctx, &pb.CheckpointRequest{Id: id, Dir: "relative"}))},
		{"update: ", call(b.client.Update(ctx, &pb.UpdateRequest{Id: id, Update: []byte("{")}))},
		{"update: ", call(b.client.Update(ctx, &pb.UpdateRequest{Id: id, Update: resources}))},
	} {
		refusedBy(t, c.err, codes.InvalidArgument, c.says)
	}
	refusedBy(t, call(b.client.Delete(ctx, &pb.DeleteRequest{Id: id})), codes.FailedPrecondition, "")
}

func TestDelete(t *testing.T) {
	t.Run("created", func(t *testing.T) {
		b := newBox(t)
		init := b.create(b.spec("echo never"))
		r, err := b.client.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id})
		if err != nil || r.Exit.GetReason() != rundir.ReasonNeverRan {
			t.Fatalf("%v, %v", r, err)
		}
		b.gone()
		if alive(int(init.Pid)) {
			t.Error("init lives")
		}
		// Not even an empty log: a kubelet takes it for that of a container that has run.
		if left, err := os.ReadDir(b.logs); err != nil || len(left) > 0 {
			t.Errorf("in the log directory there is %v, %v", left, err)
		}
	})
	t.Run("running", func(t *testing.T) {
		b := newBox(t)
		b.run("exec sleep 1000")
		r, err := b.client.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id, Force: true})
		if err != nil || r.Exit.GetSignal() != 9 {
			t.Fatalf("%v, %v", r, err)
		}
		b.gone()
	})
	t.Run("empty", func(t *testing.T) {
		b := newBox(t)
		b.launch()
		if r, err := b.client.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id}); err != nil || r.Exit != nil {
			t.Fatalf("%v, %v", r, err)
		}
		b.gone()
		if _, err := b.dir.ReadExit(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("exit record: %v", err)
		}
	})
}

func TestPoststopHook(t *testing.T) {
	b := newBox(t)
	mark := filepath.Join(b.logs, "poststop")
	spec := b.spec("exit 5")
	spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + mark}}}}
	b.create(spec)
	b.start()
	b.wait()
	b.gone()
	if s, err := os.ReadFile(mark); err != nil || !strings.Contains(string(s), b.id) {
		t.Errorf("the hook was not run: %q, %v", s, err)
	}
}

func TestKill(t *testing.T) {
	b := newBox(t)
	const forever = "while :; do sleep 0.01; done"
	b.run("trap 'echo got' USR1; (trap 'echo child' USR1; echo ready; " + forever + ") & " + forever)
	b.says("ready")
	if _, err := b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: uint32(unix.SIGUSR1)}); err != nil {
		t.Fatal(err)
	}
	b.says("got")
	if strings.Contains(b.output(), "child") {
		t.Error("a signal for init reached its child")
	}
	kill := &pb.KillRequest{Id: b.id, Signal: uint32(unix.SIGKILL), All: true}
	if _, err := b.client.Kill(b.ctx(), kill); err != nil {
		t.Fatal(err)
	}
	if e := b.wait(); e.Signal != 9 {
		t.Errorf("exit %v", e)
	}
}

func TestEvents(t *testing.T) {
	b := newBox(t)
	b.create(b.spec("exec sleep 1000"))
	next := uint64(0)
	want := func(typ pb.EventType) {
		t.Helper()
		request := &pb.EventsRequest{Id: b.id, After: next, WaitMs: uint32(limit.Milliseconds())}
		r, err := b.client.Events(b.ctx(), request)
		if err != nil || len(r.Events) == 0 || r.Events[0].Seq != next+1 || r.Events[0].Type != typ {
			t.Fatalf("after %d: %v, %v; want %s", next, r, err, typ)
		}
		next++
	}
	want(pb.EventType_EVENT_TYPE_CREATED)
	r, err := b.client.Events(b.ctx(), &pb.EventsRequest{Id: b.id, After: next, WaitMs: 1})
	if err != nil || len(r.Events) != 0 {
		t.Errorf("before anything happens: %v, %v", r, err)
	}
	b.start()
	want(pb.EventType_EVENT_TYPE_STARTED)
	b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: 60_000})
	want(pb.EventType_EVENT_TYPE_STOPPING)
	exited := make(chan *pb.EventsResponse, 1)
	go func() { // asked for before it comes: the shim ends soon after it
		r, _ := b.client.Events(b.ctx(), &pb.EventsRequest{Id: b.id, After: next, WaitMs: uint32(limit.Milliseconds())})
		exited <- r
	}()
	b.until("the shim has the question", func() bool {
		b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: 9})
		return len(exited) > 0
	})
	r = <-exited
	if e, err := b.dir.ReadExit(); r == nil && err == nil && e.Signal == 9 {
		return // the question came when the shim had gone
	}
	if len(r.GetEvents()) != 1 || r.Events[0].Type != pb.EventType_EVENT_TYPE_EXITED ||
		r.Events[0].Exit.GetSignal() != 9 {
		t.Errorf("at the end: %v", r)
	}
}

// oomSpec is a container that may use little memory, and no swap: where the
// machine has that, nothing would be killed.
func (b *box) oomSpec(script string) *specs.Spec {
	s := b.spec(script)
	limit, swappiness := int64(24<<20), uint64(0)
	memory := &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	const v1 = "/sys/fs/cgroup/memory/memory."
	_, isV1 := os.Stat(v1 + "limit_in_bytes")
	_, counted := os.Stat(v1 + "memsw.limit_in_bytes")
	if isV1 == nil && counted != nil { // a kernel that does not count swap
		memory = &specs.LinuxMemory{Limit: &limit, Swappiness: &swappiness}
	}
	s.Linux.Resources.Memory = memory
	return s
}

const eat = "dd if=/dev/zero of=/dev/null bs=200M count=1"

// zeroes is a file without end for tests that need memory.
var zeroes = specs.Mount{
	Destination: "/dev/zero", Type: "bind", Source: "/dev/zero", Options: []string{"bind"},
}

func TestOOM(t *testing.T) {
	b := newBox(t)
	spec := b.oomSpec("")
	spec.Process.Args = strings.Fields("/bin/" + eat)
	spec.Mounts = append(spec.Mounts, zeroes)
	b.create(spec)
	b.start()
	e := b.wait()
	if e.Signal != 9 || !e.OomKilled || e.Reason != rundir.ReasonOOMKilled ||
		!strings.Contains(e.Message, "killed the first process") {
		t.Errorf("exit %v", e)
	}
}

// Who looks for the cause of an end learns of a child that was killed just before.
func TestOOMEndsInit(t *testing.T) {
	for script, want := range map[string]rundir.Exit{
		eat + " || exit 3": {Code: 3, OOMKilled: true, Reason: rundir.ReasonOOMKilled, Message: "not the first one"},
		eat + "; exit 0":   {Code: 0, Reason: rundir.ReasonCompleted, Message: "1 in all"},
	} {
		t.Run(script, func(t *testing.T) {
			b := newBox(t)
			b.create(b.oomSpec(script))
			b.start()
			e := b.wait()
			if int(e.Code) != want.Code || e.OomKilled != want.OOMKilled || e.Reason != want.Reason ||
				!strings.Contains(e.Message, want.Message) || e.Source != rundir.SourceWaited {
				t.Errorf("exit %v, want %+v", e, want)
			}
		})
	}
}

// A child that was killed earlier is not the reason of a container's end.
func TestOOMOfAChild(t *testing.T) {
	b := newBox(t)
	b.create(b.oomSpec(eat + "; echo survived; exec sleep 1000"))
	b.start()
	b.says("survived")
	if n := b.state().OomKills; n == 0 {
		t.Error("the kill was not counted")
	}
	r, err := b.client.Events(b.ctx(), &pb.EventsRequest{Id: b.id, After: 2, WaitMs: uint32(limit.Milliseconds())})
	if err != nil || len(r.Events) == 0 || r.Events[0].Type != pb.EventType_EVENT_TYPE_OOM {
		t.Errorf("events %v, %v", r, err)
	}
	// It may have been long ago for a shim that could not watch.
	killed, says := shim.UnwatchedVerdict(b.state().Cgroups)
	if killed || !strings.Contains(says, "nobody saw when") {
		t.Errorf("an end with an error is said to be of the kill (%v): %s", killed, says)
	}
	b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: 9})
	if e := b.wait(); e.Signal != 9 || e.OomKilled {
		t.Errorf("exit %v", e)
	}
}

// Orphans of a container that shares the host's pid namespace come to the shim.
func TestOrphansReaped(t *testing.T) {
	b := newBox(t)
	spec := b.spec("for i in 1 2 3 4 5 6 7 8 9; do (setsid true &); done; " +
		"(setsid sleep 1001 &); echo ready; exec sleep 1000")
	spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
	b.create(spec)
	b.start()
	b.says("ready")
	shim := int(b.state().Shim.Pid)
	b.until("no zombies", func() bool {
		zombies := 0
		for _, pid := range children(t, shim) {
			if !alive(pid) {
				zombies++
			}
		}
		return zombies == 0
	})
	pids, err := b.client.Pids(b.ctx(), &pb.PidsRequest{Id: b.id})
	if err != nil || len(pids.Pids) < 2 {
		t.Errorf("pids %v, %v", pids, err)
	}
	// The orphan that still runs ends with the container.
	b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: 9})
	b.wait()
	for _, pid := range pids.GetPids() {
		b.until(fmt.Sprintf("process %d is gone", pid), func() bool { return !alive(int(pid)) })
	}
}

func children(t *testing.T, pid int) (all []int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		s, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for _, w := range strings.Fields(string(s)) {
			n, err := strconv.Atoi(w)
			must.Succeed(t, err)
			all = append(all, n)
		}
	}
	return all
}

func TestNoCreate(t *testing.T) {
	t.Run("in time", func(t *testing.T) {
		b := newBox(t)
		cmd, handshake, err := start(string(b.dir), "--create-timeout", "1ms")
		must.Succeed(t, err)
		defer handshake.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("got %v", err)
		}
		b.gone()
	})
	t.Run("terminated", func(t *testing.T) {
		b := newBox(t)
		cmd := b.launch()
		cmd.Process.Signal(unix.SIGTERM)
		b.gone()
	})
	t.Run("launcher gone before go", func(t *testing.T) {
		b := newBox(t)
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must.Succeed(t, err)
		ours, theirs := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
		cmd := exec.Command(shimBinary, "--dir", string(b.dir))
		cmd.ExtraFiles = []*os.File{theirs}
		must.Succeed(t, cmd.Start())
		theirs.Close()
		ours.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("got %v", err)
		}
		if left, _ := os.ReadDir(string(b.dir)); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestSecondShimRefused(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	cmd, handshake, err := start(string(b.dir))
	must.Succeed(t, err)
	defer handshake.Close()
	answer, err := io.ReadAll(handshake)
	if err != nil || len(answer) < 2 || answer[0] != 1 || !strings.Contains(string(answer), "lock") {
		t.Errorf("answer %q, %v", answer, err)
	}
	if cmd.Wait() == nil {
		t.Error("it ended without an error")
	}
	if b.state().Phase != pb.Phase_PHASE_RUNNING {
		t.Error("the first one was disturbed")
	}
}

// What a service manager sends to a group must not end a shim with a container.
func TestSignalsIgnored(t *testing.T) {
	b := newBox(t)
	cmd := b.launch()
	spec := b.spec("busybox grep SigIgn /proc/self/status; exec sleep 1000")
	if _, err := b.client.Create(b.ctx(), b.request(spec)); err != nil {
		t.Fatal(err)
	}
	b.start()
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE} {
		cmd.Process.Signal(sig)
	}
	b.says("SigIgn")
	// Those that this test was started with and that a Go program leaves alone
	// (32 and 33, the C library's) are passed on all the way.
	own, err := os.ReadFile("/proc/self/status")
	must.Succeed(t, err)
	ignored := func(status string) uint64 {
		_, rest, _ := strings.Cut(status, "SigIgn:\t")
		mask, err := strconv.ParseUint(rest[:16], 16, 64)
		must.Succeed(t, err)
		return mask
	}
	if got := ignored(b.output()) &^ (ignored(string(own)) & (3 << 31)); got != 0 {
		t.Errorf("the container starts with ignored signals: %s", b.output())
	}
	if b.state().Phase != pb.Phase_PHASE_RUNNING {
		t.Error("not running")
	}
}

// hurried is the context of a call whose time is up when it arrives.
type hurried struct{ context.Context }

func (hurried) Deadline() (time.Time, bool) { return time.Now().Add(-time.Second), true }

func TestReopenLog(t *testing.T) {
	b := newBox(t)
	b.run("echo one; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo two; exec sleep 1000")
	b.says("one")
	old := filepath.Join(b.logs, "0.log.old")
	must.Succeed(t, os.Rename(filepath.Join(b.logs, "0.log"), old))
	given := hurried{b.ctx()}
	if _, err := b.client.ReopenLog(given, &pb.ReopenLogRequest{Id: b.id}); code(err) != codes.DeadlineExceeded {
		t.Errorf("too late: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(b.logs, "0.log")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a log that nobody waits for: %v", err)
	}
	if _, err := b.client.ReopenLog(b.ctx(), &pb.ReopenLogRequest{Id: b.id}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.exec(sh("echo > /tmp/go"), &pb.ExecSyncRequest{}); err != nil {
		t.Fatal(err)
	}
	b.says("two")
	if strings.Contains(b.output(), "one") {
		t.Error("the new file holds the old line")
	}
	if n := b.state().Log; n.GetLines() != 2 || n.GetBytes() != 8 {
		t.Errorf("counters %v", n)
	}
}

func TestReopenWithoutLog(t *testing.T) {
	b := newBox(t)
	b.launch()
	r := b.request(b.spec("echo dropped; exec sleep 1000"))
	r.Log = nil
	if _, err := b.client.Create(b.ctx(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := b.client.ReopenLog(b.ctx(), &pb.ReopenLogRequest{Id: b.id}); code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
}

// Two containers never share a cgroup, and a refused one does not harm the other.
func TestCgroupInUse(t *testing.T) {
	a, b := newBox(t), newBox(t)
	a.run("exec sleep 1000")
	b.launch()
	spec := b.spec("")
	spec.Linux.CgroupsPath = a.cgroup
	if _, err := b.client.Create(b.ctx(), b.request(spec)); err == nil || !strings.Contains(err.Error(), a.cgroup) {
		t.Errorf("got %v", err)
	}
	b.gone()
	if a.state().Phase != pb.Phase_PHASE_RUNNING {
		t.Error("the other container was harmed")
	}
}

func TestHello(t *testing.T) {
	b := newBox(t)
	cmd := b.launch()
	r, err := b.client.Hello(b.ctx(), &pb.HelloRequest{Id: b.id})
	if err != nil || int(r.Shim.GetPid()) != cmd.Process.Pid || r.BootId != rundir.BootID() || r.ProtocolMax < 1 {
		t.Errorf("%v, %v", r, err)
	}
	id, err := b.dir.ReadIdentity()
	if err != nil || id.Nonce != r.GetNonce() || !id.Shim.Alive() {
		t.Errorf("%+v, %v", id, err)
	}
}

// The container's cgroups are in the record, so that it can be ended without a shim.
func TestBuryWithoutShim(t *testing.T) {
	b := newBox(t)
	cmd := b.launch()
	if _, err := b.client.Create(b.ctx(), b.request(b.spec("sleep 1001 & exec sleep 1000"))); err != nil {
		t.Fatal(err)
	}
	init := b.start()
	cmd.Process.Kill()
	cmd.Wait()
	st, err := b.dir.ReadStatus()
	if err != nil || len(st.Cgroups) == 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c := cgroup.Set(st.Cgroups)
	if err := c.Kill(ctx); err != nil {
		t.Error(err)
	}
	if err := b.runc.Delete(ctx, b.id, true); err != nil {
		t.Error(err)
	}
	if err := c.Remove(ctx); err != nil {
		t.Error(err)
	}
	b.until("init is dead", func() bool { return !alive(int(init.Pid)) })
	for _, pattern := range []string{".*", rundir.SocketName} {
		left, _ := filepath.Glob(b.dir.Path(pattern))
		for _, f := range left {
			os.Remove(f)
		}
	}
}

// With the systemd driver the container is a scope, which ends with it.
func TestSystemdCgroup(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skip("systemd does not run here")
	}
	b := newBox(t)
	b.launch()
	scope := "holdfast-" + b.id + ".scope"
	spec := b.oomSpec("echo ready; exec sleep 1000")
	spec.Linux.CgroupsPath = "system.slice:holdfast:" + b.id
	r := b.request(spec)
	r.Runtime.SystemdCgroup = true
	if _, err := b.client.Create(b.ctx(), r); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.says("ready")
	found := false
	for _, path := range b.state().Cgroups {
		found = found || filepath.Base(path) == scope
	}
	if !found {
		t.Errorf("no %s in %v", scope, b.state().Cgroups)
	}
	if r, err := b.exec(sh("exit 6"), &pb.ExecSyncRequest{}); err != nil || r.ExitCode != 6 {
		t.Errorf("exec: %v, %v", r, err)
	}
	result, err := b.exec(sh("(setsid sleep 1234 &); exec sleep 1235"), &pb.ExecSyncRequest{TimeoutMs: 5000})
	if err != nil || !result.TimedOut {
		t.Errorf("exec: %v, %v", result, err)
	}
	b.onlyInit()
	b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: 9})
	if e := b.wait(); e.Signal != 9 || e.OomKilled {
		t.Errorf("exit %v", e)
	}
	b.gone()
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/system.slice/" + scope); len(dirs) > 0 {
		t.Errorf("left: %v", dirs)
	}
}

// An OOM kill is reported although systemd removes the cgroup with the last process.
func TestSystemdOOM(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skip("systemd does not run here")
	}
	for range 5 {
		b := newBox(t)
		b.launch()
		spec := b.oomSpec("")
		spec.Process.Args = strings.Fields("/bin/" + eat)
		spec.Mounts = append(spec.Mounts, zeroes)
		spec.Linux.CgroupsPath = "system.slice:holdfast:" + b.id
		r := b.request(spec)
		r.Runtime.SystemdCgroup = true
		if _, err := b.client.Create(b.ctx(), r); err != nil {
			t.Fatal(err)
		}
		b.start()
		if e := b.wait(); e.Signal != 9 || !e.OomKilled {
			t.Errorf("exit %v", e)
		}
		b.gone()
	}
}
