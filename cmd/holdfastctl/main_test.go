package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// shimEnv makes the test binary a shim of the run directory that it names.
const shimEnv = "HOLDFASTCTL_TEST_SHIM"

func TestMain(m *testing.M) {
	if dir := os.Getenv(shimEnv); dir != "" {
		shimProcess(rundir.Dir(dir))
		return
	}
	code := m.Run()
	if binDir != "" {
		os.RemoveAll(binDir)
	}
	os.Exit(code)
}

// result is what one run of the program gave.
type result struct {
	code   int
	stdout string
	stderr string
}

// safeBuffer may be read while the program writes.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// ctl runs the program to its end.
func ctl(t *testing.T, args ...string) result {
	t.Helper()
	out, errs, wait := ctlStart(t.Context(), nil, args...)
	code := wait()
	return result{code, out.String(), errs.String()}
}

// ctlStart runs the program beside the test.
func ctlStart(ctx context.Context, stdin *os.File, args ...string) (stdout, stderr *safeBuffer, wait func() int) {
	stdout, stderr = new(safeBuffer), new(safeBuffer)
	done := make(chan int, 1)
	go func() {
		a := &app{stdin: stdin, stdout: stdout, stderr: stderr}
		done <- a.main(ctx, args)
	}()
	return stdout, stderr, func() int { return <-done }
}

var eventually = must.Come

var check = must.Succeed

// newState makes a state directory. A short name, because it holds sockets.
func newState(t *testing.T) string {
	t.Helper()
	state, err := os.MkdirTemp("", "hctl")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(state) })
	check(t, os.Mkdir(filepath.Join(state, "containers"), 0o700))
	return state
}

// newDir makes a run directory as Create leaves it.
func newDir(t *testing.T, state, id string) rundir.Dir {
	t.Helper()
	dir := rundir.Dir(filepath.Join(state, "containers", id))
	check(t, os.Mkdir(string(dir), 0o700))
	const record = `{"id":%q,"podId":"pod-id","config":{"metadata":{"name":"web","attempt":2},"unknown":[1]}}`
	container := fmt.Sprintf(record, id)
	check(t, dir.WriteLaunch(rundir.Launch{
		LogDirectory: state, LogPath: id + ".log",
		Container: rundir.Opaque{Value: []byte(container)},
		Sandbox: rundir.Opaque{Value: []byte(`{"id":"pod-id","config":{"metadata":` +
			`{"name":"front","namespace":"shop"}}}`)},
	}))
	return dir
}

var created = time.Now().Add(-90 * time.Second).UTC()

// fakeShim answers from its fields. Everything it does not serve panics, which
// ttrpc turns into an error.
type fakeShim struct {
	proto.ShimService
	dir  rundir.Dir
	lock *os.File

	mu      sync.Mutex
	exited  chan struct{} // closed by exit
	exit    *proto.Exit
	events  []*proto.Event
	kills   []*proto.KillRequest
	stops   []*proto.StopRequest
	resizes []*proto.ResizePtyRequest
	execs   func(*proto.ExecSyncRequest) (*proto.ExecSyncResponse, error)
	hello   func(*proto.HelloResponse)
}

// serve locks the run directory and answers there. It does not return before
// somebody could connect.
func (f *fakeShim) serve() (stop func(), err error) {
	f.exited = make(chan struct{})
	if f.lock, err = f.dir.Lock(); err != nil {
		return nil, err
	}
	self, err := rundir.FindProcess(os.Getpid())
	if err != nil {
		return nil, err
	}
	identity := rundir.Identity{Shim: self, BootID: rundir.BootID(), Nonce: "n", Version: "v1"}
	if err = f.dir.WriteIdentity(identity); err != nil {
		return nil, err
	}
	st := rundir.Status{
		Phase:     rundir.PhaseRunning,
		Init:      self,
		BootID:    rundir.BootID(),
		CreatedAt: created,
		StartedAt: created,
	}
	if err = f.dir.WriteStatus(st); err != nil {
		return nil, err
	}
	l, err := f.dir.Listen()
	if err != nil {
		return nil, err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return nil, err
	}
	proto.RegisterShimService(server, f)
	go server.Serve(context.Background(), net.Listener(l))
	return sync.OnceFunc(func() {
		server.Close()
		f.lock.Close()
	}), nil
}

func startFake(t *testing.T, f *fakeShim) *fakeShim {
	t.Helper()
	stop, err := f.serve()
	check(t, err)
	t.Cleanup(stop)
	return f
}

// shimProcess is the shim that is a process of its own: it says so and answers
// until it is killed.
func shimProcess(dir rundir.Dir) {
	f := &fakeShim{dir: dir}
	if _, err := f.serve(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	select {}
}

// startShimProcess starts one and waits until it is ready.
func startShimProcess(t *testing.T, dir rundir.Dir) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), shimEnv+"="+string(dir))
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line := make([]byte, 100)
	n, err := out.Read(line)
	if string(line[:n]) != "ready\n" {
		t.Fatalf("the shim says %q, %v", line[:n], err)
	}
	return cmd
}

func (f *fakeShim) process() *proto.Process {
	return &proto.Process{Pid: int32(os.Getpid()), StartTime: 7}
}

func (f *fakeShim) Hello(_ context.Context, req *proto.HelloRequest) (*proto.HelloResponse, error) {
	if req.GetId() != f.dir.ID() {
		return nil, status.Error(codes.NotFound, "another container's shim")
	}
	resp := &proto.HelloResponse{Id: f.dir.ID(), Shim: f.process(), ProtocolMin: 1, ProtocolMax: 1, Version: "v1"}
	if f.hello != nil {
		f.hello(resp)
	}
	return resp, nil
}

func (f *fakeShim) State(context.Context, *proto.StateRequest) (*proto.StateResponse, error) {
	return &proto.StateResponse{Id: f.dir.ID(), Phase: proto.Phase_PHASE_RUNNING, Shim: f.process(),
		Init:      &proto.Process{Pid: 4242, StartTime: 9},
		CreatedAt: timestamppb.New(created), StartedAt: timestamppb.New(created), OomKills: 3, LastEvent: 2,
		Log: &proto.LogCounters{Bytes: 10, Lines: 2, Error: "no space"}}, nil
}

// end records the exit as a shim does: the file, then the answer to Wait.
func (f *fakeShim) end(t *testing.T, code int) {
	t.Helper()
	e, err := rundir.PrepareExit(string(f.dir), false)
	check(t, err)
	now := time.Now()
	check(t, e.Commit(rundir.Exit{Code: code, StartedAt: created, ExitedAt: now, Source: rundir.SourceWaited,
		Reason: rundir.ReasonError}))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.exit = &proto.Exit{Code: uint32(code), ExitedAt: timestamppb.New(now), Source: rundir.SourceWaited,
		Reason: rundir.ReasonError}
	close(f.exited)
}

func (f *fakeShim) Wait(ctx context.Context, req *proto.WaitRequest) (*proto.WaitResponse, error) {
	select {
	case <-f.exited:
		return &proto.WaitResponse{Exited: true, Exit: f.exit}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(time.Duration(req.GetTimeoutMs()) * time.Millisecond):
		return &proto.WaitResponse{}, nil
	}
}

func (f *fakeShim) Kill(_ context.Context, req *proto.KillRequest) (*proto.KillResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kills = append(f.kills, req)
	return &proto.KillResponse{}, nil
}

func (f *fakeShim) Stop(_ context.Context, req *proto.StopRequest) (*proto.StopResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stops = append(f.stops, req)
	return &proto.StopResponse{}, nil
}

func (f *fakeShim) ResizePty(_ context.Context, req *proto.ResizePtyRequest) (*proto.ResizePtyResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resizes = append(f.resizes, req)
	return &proto.ResizePtyResponse{}, nil
}

func (f *fakeShim) Pids(context.Context, *proto.PidsRequest) (*proto.PidsResponse, error) {
	return &proto.PidsResponse{Pids: []int32{int32(os.Getpid())}}, nil
}

func (f *fakeShim) Delete(_ context.Context, req *proto.DeleteRequest) (*proto.DeleteResponse, error) {
	if !req.GetForce() {
		return nil, status.Error(codes.FailedPrecondition, "cannot delete a container that runs")
	}
	return &proto.DeleteResponse{Exit: &proto.Exit{Code: 137, Signal: 9, Reason: rundir.ReasonError,
		Source: rundir.SourceWaited}}, nil
}

func (f *fakeShim) ExecSync(_ context.Context, req *proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
	return f.execs(req)
}

func (f *fakeShim) Events(ctx context.Context, req *proto.EventsRequest) (*proto.EventsResponse, error) {
	deadline := time.Now().Add(time.Duration(req.GetWaitMs()) * time.Millisecond)
	for {
		f.mu.Lock()
		all := f.events
		f.mu.Unlock()
		if after := req.GetAfter(); after < uint64(len(all)) {
			return &proto.EventsResponse{Events: all[after:]}, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return &proto.EventsResponse{}, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (f *fakeShim) add(e *proto.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.Seq, e.At = uint64(len(f.events))+1, timestamppb.Now()
	f.events = append(f.events, e)
}

func TestUsage(t *testing.T) {
	state := newState(t)
	for _, c := range []struct {
		args []string
		code int
		want string // in stdout or stderr
	}{
		{nil, 2, "a command is missing"},
		{[]string{"-h"}, 0, "Commands:"},
		{[]string{"help"}, 0, "Commands:"},
		{[]string{"help", "exec"}, 0, "Examples:"},
		{[]string{"exec", "--help"}, 0, "Examples:"},
		{[]string{"help", "nothing"}, 2, `no command "nothing"`},
		{[]string{"nothing"}, 2, `no command "nothing"`},
		{[]string{"--nothing"}, 2, "not defined"},
		{[]string{"--state", state, "--config", "x", "shims"}, 2, "exclude"},
		{[]string{"--state", state, "state"}, 2, "want ID"},
		{[]string{"--state", state, "kill", "x", "-s", "9"}, 2, "flags go before"},
		{[]string{"--state", state, "kill", "-s", "NONE", "x"}, 2, "no such signal"},
		{[]string{"--state", state, "kill", "-s", "65", "x"}, 2, "1 to 64"},
		{[]string{"--state", state, "resize", "x", "80"}, 2, "120x40"},
		{[]string{"--state", state, "exec", "-e", "X", "x", "y"}, 2, "KEY=VALUE"},
		{[]string{"--state", state, "logs", "--stream", "x", "y"}, 2, "stdout or stderr"},
		{[]string{"--state", state, "state", "x"}, 1, "no container matches \"x\" in " + state + "; is --state right?"},
		{[]string{"--state", state + "/none", "shims"}, 1, "is --state right?"},
		{[]string{"--config", state + "/none", "shims"}, 1, "cannot read the config"},
		{[]string{"version"}, 0, "shim protocol 1 to 1"},
		{[]string{"--state", state, "--json", "shims"}, 0, "[]\n"},
	} {
		r := ctl(t, c.args...)
		if r.code != c.code || !strings.Contains(r.stdout+r.stderr, c.want) {
			t.Errorf("%q: code %d, want %d; %q, want %q in it", c.args, r.code, c.code, r.stdout+r.stderr, c.want)
		}
		if c.code != 0 && !strings.Contains(r.stderr, c.want) {
			t.Errorf("%q: the error is not on stderr", c.args)
		}
	}
}

// The examples of the help are command lines that work.
func TestExamples(t *testing.T) {
	for _, c := range commands() {
		_, examples, _ := strings.Cut(c.help(), "\n\n  ")
		if examples == "" {
			t.Errorf("%s has no examples", c.name)
		}
		for e := range strings.SplitSeq(examples, "\n") {
			line, _, _ := strings.Cut(strings.TrimSpace(e), " <")
			args := strings.Fields(line)[1:]
			global := newFlags("")
			global.String("state", "", "")
			check(t, global.Parse(args))
			if global.Arg(0) != c.name {
				t.Errorf("%q is an example of %s", e, c.name)
				continue
			}
			fs, _ := c.flags(&app{})
			err := fs.Parse(global.Args()[1:])
			if err == nil {
				err = c.checkArgs(fs.Args())
			}
			if err != nil {
				t.Errorf("%q: %v", e, err)
			}
		}
		fs, _ := c.flags(&app{})
		fs.VisitAll(func(f *flag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: flag %s is not explained", c.name, f.Name)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	state := newState(t)
	newDir(t, state, "abc")
	config := filepath.Join(state, "config.toml")
	check(t, os.WriteFile(config, fmt.Appendf(nil, "state = %q\nnonsense = 1\n[cni]\nmore = true\n", state), 0o600))
	if r := ctl(t, "--config", config, "shims"); r.code != 0 || !strings.Contains(r.stdout, "abc") {
		t.Errorf("with the state of the config: %+v", r)
	}
	check(t, os.WriteFile(config, []byte("state = \n"), 0o600))
	if r := ctl(t, "--config", config, "shims"); r.code != 1 || !strings.Contains(r.stderr, "--state") {
		t.Errorf("with a broken config: %+v, want an error that names --state", r)
	}
	// What is no file of a sane size is not waited for, and not taken in.
	check(t, errors.Join(os.Remove(config), syscall.Mkfifo(config, 0o600)))
	if r := ctl(t, "--config", config, "shims"); r.code != 1 || !strings.Contains(r.stderr, "not a regular file") {
		t.Errorf("with a FIFO as the config: %+v", r)
	}
	check(t, errors.Join(os.Remove(config), os.WriteFile(config, nil, 0o600), os.Truncate(config, 1<<40)))
	if r := ctl(t, "--config", config, "shims"); r.code != 1 || !strings.Contains(r.stderr, "larger than") {
		t.Errorf("with an endless config: %+v", r)
	}
}

// Without any shim, the files say it all, whatever they look like.
func TestFiles(t *testing.T) {
	state := newState(t)
	exited := newDir(t, state, "exited-container-with-a-long-id")
	check(t, exited.WriteStatus(rundir.Status{Phase: rundir.PhaseExited, CreatedAt: created}))
	e, err := rundir.PrepareExit(string(exited), false)
	check(t, err)
	check(t, e.Commit(rundir.Exit{Code: 137, Signal: 9, OOMKilled: true, Source: rundir.SourceWaited,
		Reason: rundir.ReasonOOMKilled, ExitedAt: created}))

	self, err := rundir.FindProcess(os.Getpid())
	check(t, err)
	lost := newDir(t, state, "lost")
	check(t, lost.WriteStatus(rundir.Status{Phase: rundir.PhaseRunning, BootID: rundir.BootID(), Init: self,
		CreatedAt: created}))

	newDir(t, state, "empty")

	damaged := newDir(t, state, "damaged")
	check(t, os.WriteFile(damaged.Path(rundir.StatusName), []byte("\x00\x00"), 0o600))
	check(t, os.WriteFile(damaged.Path(rundir.LaunchName), []byte(`{"version":99}`), 0o600))

	check(t, os.Mkdir(filepath.Join(state, "containers", ".del-x"), 0o700))

	var views []view
	r := ctl(t, "--state", state, "shims", "--json")
	check(t, json.Unmarshal([]byte(r.stdout), &views))
	got := map[string]view{}
	for _, v := range views {
		got[v.ID] = v
	}
	if len(got) != 4 {
		t.Errorf("%d containers, want 4", len(got))
	}
	if v := got[exited.ID()]; v.State != "exited" || v.Exit == nil || v.Exit.Code != 137 || v.Name != "web" ||
		v.Attempt != 2 || v.Pod != "front" || v.Namespace != "shop" || v.PodID != "pod-id" {
		t.Errorf("exited: %+v", v)
	}
	if v := got["lost"]; v.State != client.Lost || v.Init != self || !strings.Contains(v.Note, "still runs") {
		t.Errorf("lost: %+v", v)
	}
	if v := got["empty"]; v.State != "empty" || !strings.Contains(v.Note, "no shim") {
		t.Errorf("empty: %+v", v)
	}
	if v := got["damaged"]; !strings.Contains(v.Note, "damaged") {
		t.Errorf("damaged: %+v", v)
	}

	r = ctl(t, "--state", state, "shims")
	for _, want := range []string{"exited-contai  exited", "137 OOMKilled", "shop/front", "web", "(lost)"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("shims prints no %q:\n%s", want, r.stdout)
		}
	}
	r = ctl(t, "--state", state, "state", "exi")
	for _, want := range []string{"OOMKilled", "waited", exited.ID(), string(exited)} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("state prints no %q:\n%s", want, r.stdout)
		}
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"wait", "exi"}, 0, "137\n"},
		{[]string{"stop", "exi"}, 0, "exit code 137 OOMKilled"},
		{[]string{"delete", "-f", "exi"}, 0, "exit code 137 OOMKilled"},
		{[]string{"kill", "exi"}, 1, "has ended: exit code 137"},
		{[]string{"exec", "exi", "ls"}, 1, "has ended"},
		{[]string{"pids", "exi"}, 1, "has ended"},
		{[]string{"wait", "lost"}, 1, "no exit record"},
		{[]string{"kill", "lost"}, 1, "no exit record"},
		{[]string{"events", "exi"}, 0, "exited  exit code 137"},
		{[]string{"state", "e"}, 1, "2 containers match"},
	} {
		r := ctl(t, append([]string{"--state", state}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.stdout+r.stderr, c.want) {
			t.Errorf("%q: code %d, want %d; %q, want %q in it", c.args, r.code, c.code, r.stdout+r.stderr, c.want)
		}
	}
}

func TestShim(t *testing.T) {
	state := newState(t)
	f := startFake(t, &fakeShim{dir: newDir(t, state, "live")})
	var v view
	r := ctl(t, "--state", state, "--json", "state", "li")
	check(t, json.Unmarshal([]byte(r.stdout), &v))
	if v.Source != client.FromShim || v.State != "running" || v.Init.PID != 4242 || v.OOMKills != 3 || v.Log == nil ||
		v.Log.Error != "no space" {
		t.Errorf("state: %+v", v)
	}
	if r := ctl(t, "--state", state, "shims"); !regexp.MustCompile(`live +running +\d+[sm]`).MatchString(r.stdout) {
		t.Errorf("shims: %s", r.stdout)
	}
	ctl(t, "--state", state, "kill", "-s", "sigusr1", "--all", "live")
	ctl(t, "--state", state, "kill", "live")
	if len(f.kills) != 2 || f.kills[0].GetSignal() != uint32(syscall.SIGUSR1) || !f.kills[0].GetAll() ||
		f.kills[1].GetSignal() != uint32(syscall.SIGTERM) || f.kills[1].GetAll() {
		t.Errorf("kills: %v", f.kills)
	}
	ctl(t, "--state", state, "resize", "live", "120x40")
	if len(f.resizes) != 1 || f.resizes[0].GetWidth() != 120 || f.resizes[0].GetHeight() != 40 {
		t.Errorf("resizes: %v", f.resizes)
	}
	self := fmt.Sprintf("%d  %s", os.Getpid(), os.Args[0])
	if r := ctl(t, "--state", state, "pids", "live"); !strings.Contains(r.stdout, self) {
		t.Errorf("pids: %+v", r)
	}
	if r := ctl(t, "--state", state, "delete", "live"); r.code != 1 ||
		!strings.Contains(r.stderr, "cannot delete a container that runs") {
		t.Errorf("delete: %+v", r)
	}
	if r := ctl(t, "--state", state, "delete", "-f", "live"); r.code != 0 ||
		!strings.Contains(r.stdout, "exit code 137 Error") {
		t.Errorf("delete -f: %+v", r)
	}
	f.hello = func(r *proto.HelloResponse) { r.ProtocolMin, r.ProtocolMax = 8, 9 }
	if r := ctl(t, "--state", state, "kill", "live"); r.code != 1 || !strings.Contains(r.stderr, "protocol 8 to 9") {
		t.Errorf("kill of a younger shim: %+v", r)
	}
}

func TestStopWaits(t *testing.T) {
	state := newState(t)
	f := startFake(t, &fakeShim{dir: newDir(t, state, "live")})
	out, _, wait := ctlStart(t.Context(), nil, "--state", state, "stop", "-t", "7", "-s", "INT", "live")
	waited, _, waitDone := ctlStart(t.Context(), nil, "--state", state, "wait", "--json", "live")
	eventually(t, "the stop", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.stops) == 1
	})
	if f.stops[0].GetGraceMs() != 7000 || f.stops[0].GetSignal() != uint32(syscall.SIGINT) {
		t.Errorf("stop: %v", f.stops[0])
	}
	f.end(t, 3)
	if code := wait(); code != 0 || !strings.Contains(out.String(), "exit code 3 Error") {
		t.Errorf("stop: code %d, %q", code, out)
	}
	var e ended
	code := waitDone()
	check(t, json.Unmarshal([]byte(waited.String()), &e))
	if code != 0 || e.ID != "live" || e.Exit.Code != 3 || !e.Exit.StartedAt.Equal(created) {
		t.Errorf("wait: code %d, %+v", code, e)
	}
}

// What a container has its OCI runtime say drives no terminal, and makes no line of its own in a table.
func TestTerminalIsOurs(t *testing.T) {
	state := newState(t)
	dir := newDir(t, state, "bad")
	check(t, dir.WriteStatus(rundir.Status{Phase: rundir.PhaseExited, CreatedAt: created}))
	e, err := rundir.PrepareExit(string(dir), false)
	check(t, err)
	const words = "no \x1b]0;program\a\nstate:   running"
	check(t, e.Commit(rundir.Exit{Code: 128, Source: rundir.SourceWaited, Reason: words, Message: words}))
	for _, args := range [][]string{{"state", "bad"}, {"shims"}, {"events"}, {"stop", "bad"}, {"kill", "bad"}} {
		r := ctl(t, append([]string{"--state", state}, args...)...)
		out := r.stdout + r.stderr
		if !strings.Contains(out, "program") || strings.ContainsAny(out, "\x1b\a") ||
			args[0] == "state" && strings.Contains(out, "\nstate:   running") {
			t.Errorf("%q: %q", args, out)
		}
	}
}

// A lock that is not there, or is none, says nothing about a shim that answers.
func TestWithoutLock(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"removed":     func(string) error { return nil },
		"empty":       func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"a FIFO":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"a directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		state := newState(t)
		f := startFake(t, &fakeShim{dir: newDir(t, state, "live")})
		check(t, os.Remove(f.dir.Path(rundir.LockName)))
		check(t, put(f.dir.Path(rundir.LockName)))
		var v view
		check(t, json.Unmarshal([]byte(ctl(t, "--state", state, "--json", "state", "live").stdout), &v))
		if v.Source != client.FromShim || v.State != "running" || v.Note != "" {
			t.Errorf("%s: %+v", name, v)
		}
		if r := ctl(t, "--state", state, "events", "live"); r.code != 0 {
			t.Errorf("%s: events: %+v", name, r)
		}
		out, _, wait := ctlStart(t.Context(), nil, "--state", state, "stop", "live")
		eventually(t, "the stop", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return len(f.stops) == 1
		})
		f.end(t, 3)
		if code := wait(); code != 0 || !strings.Contains(out.String(), "exit code 3 Error") {
			t.Errorf("%s: stop: code %d, %q", name, code, out)
		}
	}
}

// A shim that is stopped by a signal costs the list a moment, not its life.
func TestStoppedShim(t *testing.T) {
	state := newState(t)
	stopped := startShimProcess(t, newDir(t, state, "stopped"))
	startFake(t, &fakeShim{dir: newDir(t, state, "live")})
	check(t, stopped.Process.Signal(syscall.SIGSTOP))
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(stopped.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatal(err, status)
	}
	r := ctl(t, "--state", state, "shims")
	if r.code != 0 || !strings.Contains(r.stdout, "(running)") ||
		!strings.Contains(r.stdout, fmt.Sprintf("kill -CONT %d", stopped.Process.Pid)) ||
		!strings.Contains(r.stdout, "live") {
		t.Errorf("shims: %+v", r)
	}
	if r := ctl(t, "--state", state, "kill", "stopped"); r.code != 1 || !strings.Contains(r.stderr, "does not answer") {
		t.Errorf("kill: %+v", r)
	}

	out, errs, wait := ctlStart(t.Context(), nil, "--state", state, "wait", "stopped")
	eventually(t, "a note about waiting", func() bool { return strings.Contains(errs.String(), "still waiting") })
	e, err := rundir.PrepareExit(filepath.Join(state, "containers", "stopped"), false)
	check(t, err)
	check(t, e.Commit(rundir.Exit{Code: 9, Source: rundir.SourceWaited}))
	if code := wait(); code != 0 || out.String() != "9\n" {
		t.Errorf("wait: code %d, %q", code, out)
	}
}

// A shim that hangs for another reason costs as much as the deadline.
func TestHangingShim(t *testing.T) {
	state := newState(t)
	hang := make(chan struct{})
	defer close(hang)
	for _, id := range []string{"h1", "h2", "h3"} {
		startFake(t, &fakeShim{dir: newDir(t, state, id), hello: func(*proto.HelloResponse) { <-hang }})
	}
	r := ctl(t, "--state", state, "shims")
	if r.code != 0 || strings.Count(r.stdout, "(running)") != 3 ||
		!strings.Contains(r.stdout, "does not answer in time; "+state) {
		t.Errorf("shims: %+v", r)
	}
}

func TestEvents(t *testing.T) {
	state := newState(t)
	f := startFake(t, &fakeShim{dir: newDir(t, state, "one")})
	f.add(&proto.Event{Type: proto.EventType_EVENT_TYPE_CREATED})
	f.add(&proto.Event{Type: proto.EventType_EVENT_TYPE_STARTED, Init: &proto.Process{Pid: 12}})
	r := ctl(t, "--state", state, "events", "--json")
	if lines := strings.Split(strings.TrimSpace(r.stdout), "\n"); len(lines) != 2 ||
		!strings.Contains(lines[1], `"seq":2`) || !strings.Contains(lines[1], `"type":"started"`) {
		t.Errorf("events: %q", r.stdout)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	all, _, waitAll := ctlStart(ctx, nil, "--state", state, "events", "-f")
	one, _, waitOne := ctlStart(ctx, nil, "--state", state, "events", "-f", "one")
	eventually(t, "the past", func() bool { return strings.Contains(all.String(), "started  pid 12") })
	two := startFake(t, &fakeShim{dir: newDir(t, state, "two")})
	two.add(&proto.Event{Type: proto.EventType_EVENT_TYPE_OOM})
	eventually(t, "an event of a new container", func() bool { return strings.Contains(all.String(), "two  oom") })
	f.add(&proto.Event{Type: proto.EventType_EVENT_TYPE_EXITED, Exit: &proto.Exit{Code: 5, Reason: "Error"}})
	eventually(t, "the exit", func() bool { return strings.Contains(all.String(), "one  exited  exit code 5 Error") })
	if code := waitOne(); code != 0 || strings.Count(one.String(), "\n") != 3 {
		t.Errorf("events -f one: code %d, %q", code, one)
	}
	cancel()
	waitAll()
	if n := strings.Count(all.String(), "\n"); n != 4 {
		t.Errorf("%d lines, want each event once:\n%s", n, all)
	}
}
