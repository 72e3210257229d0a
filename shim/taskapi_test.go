package shim_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// taskClient is a client of containerd's task API.
func (b *box) taskClient() taskv3.TTRPCTaskService {
	b.t.Helper()
	_, conn, _ := b.dial()
	b.t.Cleanup(func() { conn.Close() })
	return taskv3.NewTTRPCTaskClient(conn)
}

// One container's whole life, as containerd's client sees it.
func TestTaskAPI(t *testing.T) {
	b := newBox(t)
	b.launch()
	c, ctx := b.taskClient(), b.ctx()
	if _, err := c.State(ctx, &taskv3.StateRequest{ID: b.id}); code(err) != codes.NotFound {
		t.Errorf("state without a container: %v", err)
	}
	created, err := b.client.Create(ctx, b.request(b.spec("trap 'exit 7' USR1; while :; do sleep 0.05; done")))
	must.Succeed(t, err)
	pid := uint32(created.Init.Pid)
	b.taskStatus(c, pid, tasktypes.Status_CREATED)
	if r, err := c.Start(ctx, &taskv3.StartRequest{ID: b.id}); err != nil || r.Pid != pid {
		t.Errorf("start: %v, %v", r, err)
	}
	b.taskStatus(c, pid, tasktypes.Status_RUNNING)
	r, err := c.Connect(ctx, &taskv3.ConnectRequest{ID: b.id})
	if err != nil || r.ShimPid != uint32(b.cmd.Process.Pid) || r.TaskPid != pid || r.Version == "" {
		t.Errorf("connect: %v, %v", r, err)
	}
	pids, err := c.Pids(ctx, &taskv3.PidsRequest{ID: b.id})
	if err != nil || len(pids.Processes) == 0 || pids.Processes[0].Pid != pid {
		t.Errorf("pids: %v, %v", pids, err)
	}
	b.taskStats(c)
	if _, err := c.Shutdown(ctx, &taskv3.ShutdownRequest{Now: true}); code(err) != codes.FailedPrecondition {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := c.Delete(ctx, &taskv3.DeleteRequest{ID: b.id}); code(err) != codes.FailedPrecondition {
		t.Errorf("delete: %v", err)
	}
	type end struct {
		r   *taskv3.WaitResponse
		err error
	}
	ended := make(chan end, 1)
	waiter := b.taskClient()
	go func() {
		r, err := waiter.Wait(ctx, &taskv3.WaitRequest{ID: b.id})
		ended <- end{r, err}
	}()
	b.until("it takes the signal", func() bool {
		_, err := c.Kill(ctx, &taskv3.KillRequest{ID: b.id, Signal: uint32(unix.SIGUSR1)})
		return err != nil || len(ended) > 0
	})
	e := <-ended
	if e.err != nil || e.r.ExitStatus != 7 || time.Since(e.r.ExitedAt.AsTime()).Abs() > limit {
		t.Errorf("wait: %v, %v", e.r, e.err)
	}
	b.gone()
}

// taskStatus asks both versions of the API.
func (b *box) taskStatus(c taskv3.TTRPCTaskService, pid uint32, want tasktypes.Status) {
	b.t.Helper()
	for _, id := range []string{b.id, ""} { // ctr sends no id unless it is told one
		r, err := c.State(b.ctx(), &taskv3.StateRequest{ID: id})
		if err != nil || r.ID != b.id || r.Pid != pid || r.Status != want || r.Bundle != string(b.dir) {
			b.t.Errorf("state, version 3: %v, %v", r, err)
		}
	}
	_, conn, _ := b.dial()
	defer conn.Close()
	r, err := taskv2.NewTTRPCTaskClient(conn).State(b.ctx(), &taskv2.StateRequest{ID: b.id})
	if err != nil || r.Pid != pid || r.Status != want {
		b.t.Errorf("state, version 2: %v, %v", r, err)
	}
}

// taskStats looks for the number of processes and the memory in the metrics.
func (b *box) taskStats(c taskv3.TTRPCTaskService) {
	b.t.Helper()
	r, err := c.Stats(b.ctx(), &taskv3.StatsRequest{ID: b.id})
	if err != nil {
		b.t.Errorf("stats: %v", err)
		return
	}
	var pids, memory []protowire.Number
	switch r.Stats.GetTypeUrl() {
	case "io.containerd.cgroups.v1.Metrics":
		pids, memory = []protowire.Number{2, 1}, []protowire.Number{4, 33, 2}
	case "io.containerd.cgroups.v2.Metrics":
		pids, memory = []protowire.Number{1, 1}, []protowire.Number{4, 32}
	default:
		b.t.Errorf("stats are %q", r.Stats.GetTypeUrl())
	}
	if n := field(b.t, r.Stats.GetValue(), pids); n < 1 || n > 10 {
		b.t.Errorf("%d processes", n)
	}
	if n := field(b.t, r.Stats.GetValue(), memory); n < 1<<12 || n > 1<<28 {
		b.t.Errorf("%d bytes of memory", n)
	}
}

// field gives the last of the numbers that are at a path of fields in a message.
func field(t *testing.T, m []byte, path []protowire.Number) (v uint64) {
	t.Helper()
	for len(m) > 0 {
		n, typ, tag := protowire.ConsumeTag(m)
		size := protowire.ConsumeFieldValue(n, typ, m[max(tag, 0):])
		if tag < 0 || size < 0 {
			t.Fatal("no message")
		}
		value := m[tag : tag+size]
		m = m[tag+size:]
		switch {
		case n != path[0]:
		case len(path) == 1:
			v, _ = protowire.ConsumeVarint(value)
		default:
			below, _ := protowire.ConsumeBytes(value)
			v = max(v, field(t, below, path[1:]))
		}
	}
	return v
}

func TestTaskAPIRefusals(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	_, conn, _ := b.dial()
	defer conn.Close()
	other, broken := &taskv3.KillRequest{ID: "other", Signal: 9}, &taskv3.KillRequest{}
	broken.ProtoReflect().SetUnknown([]byte{0xff}) // no field begins like that
	for _, c := range []struct {
		method  string
		request any
		want    codes.Code
	}{
		{"Create", &taskv3.CreateTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Pause", &taskv3.PauseRequest{ID: b.id}, codes.Unimplemented},
		{"Resume", &taskv3.ResumeRequest{ID: b.id}, codes.Unimplemented},
		{"Update", &taskv3.UpdateTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Checkpoint", &taskv3.CheckpointTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Kill", other, codes.NotFound},
		{"Kill", &taskv3.KillRequest{Signal: 9}, codes.InvalidArgument},
		{"Kill", &taskv3.KillRequest{ID: b.id, Signal: 65}, codes.InvalidArgument},
		{"Kill", broken, codes.InvalidArgument},
		{"Wait", &taskv3.WaitRequest{ID: "other"}, codes.NotFound},
		{"ResizePty", &taskv3.ResizePtyRequest{ID: b.id, Width: 1, Height: 1}, codes.FailedPrecondition},
	} {
		err := conn.Call(b.ctx(), "containerd.task.v3.Task", c.method, c.request, &taskv3.StateResponse{})
		if code(err) != c.want {
			t.Errorf("%s %v: %v, want %s", c.method, c.request, err, c.want)
		}
	}
}

// A shim without a container ends when it is told so, and one that was not started with it.
func TestTaskAPIEnd(t *testing.T) {
	b := newBox(t)
	b.launch()
	if _, err := b.taskClient().Shutdown(b.ctx(), &taskv3.ShutdownRequest{}); err != nil {
		t.Error(err)
	}
	b.gone()

	b = newBox(t)
	pid := b.create(b.spec("true")).Pid
	r, err := b.taskClient().Delete(b.ctx(), &taskv3.DeleteRequest{ID: b.id})
	if err != nil || r.Pid != uint32(pid) || r.ExitStatus != 137 || r.ExitedAt == nil {
		t.Errorf("delete: %v, %v", r, err)
	}
	b.gone()
}

// A caller that goes away leaves no Wait behind.
func TestTaskAPIWaitEndsWithItsCaller(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	ctx, cancel := context.WithTimeout(b.ctx(), 100*time.Millisecond)
	defer cancel()
	_, err := b.taskClient().Wait(ctx, &taskv3.WaitRequest{ID: b.id})
	if err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v", err)
	}
}

// fifoExec is an exec through containerd's task API, with the client's ends of its FIFOs.
type fifoExec struct {
	b     *box
	c     taskv3.TTRPCTaskService
	id    string
	paths [3]string
	req   *taskv3.ExecProcessRequest
}

func (b *box) fifoExec(id string, process *specs.Process) *fifoExec {
	b.t.Helper()
	x := &fifoExec{b: b, c: b.taskClient(), id: id}
	dir := b.t.TempDir()
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		x.paths[i] = filepath.Join(dir, name)
		must.Succeed(b.t, unix.Mkfifo(x.paths[i], 0o600))
	}
	a, err := pb.MarshalAny(process)
	must.Succeed(b.t, err)
	x.req = &taskv3.ExecProcessRequest{
		ID:       b.id,
		ExecID:   id,
		Terminal: process.Terminal,
		Stdin:    x.paths[0],
		Stdout:   x.paths[1],
		Stderr:   x.paths[2],
		Spec:     a,
	}
	if _, err := x.c.Exec(b.ctx(), x.req); err != nil {
		b.t.Fatal(err)
	}
	return x
}

func (x *fifoExec) start() (pid uint32) {
	x.b.t.Helper()
	r, err := x.c.Start(x.b.ctx(), &taskv3.StartRequest{ID: x.b.id, ExecID: x.id})
	must.Succeed(x.b.t, err)
	return r.Pid
}

// read reads an output to its end, from a reader that comes now.
func (x *fifoExec) read(i int) <-chan string {
	got := make(chan string, 1)
	go func() {
		b, err := os.ReadFile(x.paths[i])
		if err != nil {
			b = []byte(err.Error())
		}
		got <- string(b)
	}()
	return got
}

func (x *fifoExec) status() tasktypes.Status {
	x.b.t.Helper()
	r, err := x.c.State(x.b.ctx(), &taskv3.StateRequest{ID: x.b.id, ExecID: x.id})
	if err != nil || r.ExecID != x.id || r.Stdout != x.paths[1] || r.ID != x.b.id {
		x.b.t.Fatalf("state: %v, %v", r, err)
	}
	return r.Status
}

func (x *fifoExec) wait() *taskv3.WaitResponse {
	x.b.t.Helper()
	r, err := x.c.Wait(x.b.ctx(), &taskv3.WaitRequest{ID: x.b.id, ExecID: x.id})
	if err != nil || time.Since(r.ExitedAt.AsTime()).Abs() > limit {
		x.b.t.Fatalf("wait: %v, %v", r, err)
	}
	return r
}

func (x *fifoExec) delete() (*taskv3.DeleteResponse, error) {
	return x.c.Delete(x.b.ctx(), &taskv3.DeleteRequest{ID: x.b.id, ExecID: x.id})
}

// An exec as containerd's client does it: the FIFOs' other ends are opened at any time,
// and Wait is called before Start.
func TestTaskAPIExec(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	const script = "read a; echo got $a; cat; echo oops >&2; exit 5"
	x := b.fifoExec("of the client", sh(script))
	if s := x.status(); s != tasktypes.Status_CREATED {
		t.Errorf("%s before the start", s)
	}
	if _, err := x.c.Exec(b.ctx(), x.req); code(err) != codes.AlreadyExists {
		t.Errorf("the same once more: %v", err)
	}
	code5 := make(chan *taskv3.WaitResponse, 1)
	go func() { defer close(code5); code5 <- x.wait() }() // a wait that fails ends its goroutine
	pid := x.start()
	if s := x.status(); s != tasktypes.Status_RUNNING || !alive(int(pid)) {
		t.Errorf("%s after the start", s)
	}
	if _, err := x.delete(); code(err) != codes.FailedPrecondition {
		t.Errorf("delete while it runs: %v", err)
	}
	w, err := os.OpenFile(x.paths[0], os.O_WRONLY, 0)
	must.Succeed(t, err)
	more := strings.Repeat("0123456789abcde\n", 1<<14)
	go func() {
		w.WriteString("hello\n" + more)
		w.Close()
	}()
	stdout, stderr := x.read(1), x.read(2)
	if r := <-code5; r.GetExitStatus() != 5 {
		t.Errorf("exit: %v", r)
	}
	if s := <-stdout; s != "got hello\n"+more {
		t.Errorf("%d bytes of stdout, want %d", len(s), len("got hello\n"+more))
	}
	if s := <-stderr; s != "oops\n" {
		t.Errorf("stderr %q", s)
	}
	// A reader that comes after this one would wait for ever.
	r, err := x.delete()
	if err != nil || r.ExitStatus != 5 || r.Pid != pid {
		t.Errorf("delete: %v, %v", r, err)
	}
	if _, err := x.c.State(b.ctx(), &taskv3.StateRequest{ID: b.id, ExecID: x.id}); code(err) != codes.NotFound {
		t.Errorf("state of one that is deleted: %v", err)
	}
	if n := b.state().Execs; n != 0 {
		t.Errorf("%d execs left", n)
	}
}

// Output that nobody reads yet is kept after the end, and goes when it is deleted.
func TestTaskAPIExecUnread(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	late := b.fifoExec("late", sh("echo kept; exec true"))
	late.start()
	late.wait()
	f, err := os.Open(late.paths[1])
	must.Succeed(t, err)
	defer f.Close()
	if _, err := late.delete(); err != nil {
		t.Error(err)
	}
	if s, err := io.ReadAll(f); err != nil || string(s) != "kept\n" {
		t.Errorf("read late: %q, %v", s, err)
	}
	// 64 KiB are in the FIFO and no more can be.
	never := b.fifoExec("never", sh("head -c 100000 /dev/zero; exit 3"))
	never.start()
	if r := never.wait(); r.ExitStatus != 3 {
		t.Errorf("exit: %v", r)
	}
	if _, err := never.delete(); err != nil {
		t.Error(err)
	}
	b.until("no exec is left", func() bool { return b.state().Execs == 0 })
}

// CloseIO ends the input though its writer is still there, after what that has written.
func TestTaskAPICloseIO(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	x := b.fifoExec("x", sh("exec wc -c"))
	w, err := os.OpenFile(x.paths[0], os.O_RDWR, 0) // is its own reader: does not wait for one
	must.Succeed(t, err)
	defer w.Close()
	w.Write(make([]byte, 30000))
	request := &taskv3.CloseIORequest{ID: b.id, ExecID: x.id, Stdin: true}
	if _, err := x.c.CloseIO(b.ctx(), request); code(err) != codes.FailedPrecondition {
		t.Errorf("before the start: %v", err)
	}
	x.start()
	stdout := x.read(1)
	if _, err := x.c.CloseIO(b.ctx(), request); err != nil {
		t.Error(err)
	}
	if s := <-stdout; s != "30000\n" {
		t.Errorf("output %q", s)
	}
	if _, err := x.c.CloseIO(b.ctx(), &taskv3.CloseIORequest{ID: b.id, Stdin: true}); code(err) != codes.Unimplemented {
		t.Errorf("of the container: %v", err)
	}
}

func TestTaskAPIExecTerminal(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	process := sh("stty size; trap 'stty size; exit' WINCH; while :; do sleep 0.05; done")
	process.Terminal = true
	x := b.fifoExec("t", process)
	resize := func(width, height uint32) {
		t.Helper()
		request := &taskv3.ResizePtyRequest{ID: b.id, ExecID: "t", Width: width, Height: height}
		if _, err := x.c.ResizePty(b.ctx(), request); err != nil {
			t.Error(err)
		}
	}
	resize(80, 25)
	x.start()
	out, err := os.Open(x.paths[1])
	must.Succeed(t, err)
	defer out.Close()
	lines := bufio.NewScanner(out)
	if lines.Scan(); lines.Text() != "25 80" {
		t.Errorf("size %q", lines.Text())
	}
	resize(132, 43)
	ended := make(chan bool, 1)
	go func() { x.wait(); ended <- true }()
	b.until("it has seen the new size", func() bool { // busybox may not have its trap yet
		resizeAgain := &taskv3.KillRequest{ID: b.id, ExecID: "t", Signal: uint32(unix.SIGWINCH)}
		x.c.Kill(b.ctx(), resizeAgain)
		return len(ended) > 0
	})
	if lines.Scan(); lines.Text() != "43 132" {
		t.Errorf("size %q", lines.Text())
	}
}

// The output goes on where the process opens its terminal again. It ends with the process,
// or when a child that keeps the terminal is silent.
func TestTaskAPIExecTerminalOpenedAgain(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	for i, c := range []struct{ script, want string }{
		{reopening("/dev/tty"), "early\r\nlate\r\n"},
		{"echo x; exec </dev/null >/dev/null 2>&1; exit 3", "x\r\n"},
		{"trap '' HUP; sleep 1000 & echo x; exit 3", "x\r\n"},
	} {
		process := sh(c.script)
		process.Terminal = true
		x := b.fifoExec(fmt.Sprint(i), process)
		stdout := x.read(1) // a reader that comes after the end may wait for its own
		x.start()
		if i == 0 {
			b.awaitClosed()
			b.goOn()
		}
		if r := x.wait(); r.ExitStatus != 3 {
			t.Errorf("exit: %v", r)
		}
		if s := <-stdout; s != c.want {
			t.Errorf("output %q, want %q", s, c.want)
		}
		if _, err := x.delete(); err != nil {
			t.Error(err)
		}
	}
}

// ctr sends the id of an exec where that of the container belongs.
func TestTaskAPIExecOfCtr(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	ctx := b.ctx()
	x := b.fifoExec("first", sh("true"))
	for _, want := range []string{"one\n", "two\n"} { // it never deletes an exec
		a, _ := pb.MarshalAny(sh("echo " + want + "exec sleep 0"))
		x.req.ID, x.req.ExecID, x.req.Spec = "mine", "", a
		if _, err := x.c.Exec(ctx, x.req); err != nil {
			t.Fatal(err)
		}
		stdout := x.read(1)
		if _, err := x.c.Start(ctx, &taskv3.StartRequest{ID: "mine"}); err != nil {
			t.Fatal(err)
		}
		if s := <-stdout; s != want {
			t.Errorf("output %q, want %q", s, want)
		}
		if r, err := x.c.Wait(ctx, &taskv3.WaitRequest{ID: "mine"}); err != nil || r.ExitStatus != 0 {
			t.Errorf("wait: %v, %v", r, err)
		}
	}
}

func TestTaskAPIExecRefusals(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	ctx := b.ctx()
	x := b.fifoExec("x", sh("exec sleep 1000"))
	file := filepath.Join(t.TempDir(), "file")
	must.Succeed(t, os.WriteFile(file, nil, 0o600))
	link := filepath.Join(t.TempDir(), "link")
	must.Succeed(t, os.Symlink(x.paths[1], link))
	for _, path := range []string{"relative", "binary:///bin/true", file, link, "/dev/null", file + ".not-there"} {
		x.req.ExecID, x.req.Stdout = "path "+path, path
		_, err := x.c.Exec(ctx, x.req)
		if err == nil {
			_, err = x.c.Start(ctx, &taskv3.StartRequest{ID: b.id, ExecID: x.req.ExecID})
		}
		if code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "stdout") {
			t.Errorf("stdout %s: %v", path, err)
		}
	}
	x.req.ExecID, x.req.Stdout = "", x.paths[1]
	if _, err := x.c.Exec(ctx, x.req); code(err) != codes.InvalidArgument {
		t.Errorf("no exec_id: %v", err)
	}
	x.req.ExecID = strings.Repeat("x", 257)
	if _, err := x.c.Exec(ctx, x.req); code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "exec_id") {
		t.Errorf("a long exec_id: %v", err)
	}
	wide := &taskv3.ResizePtyRequest{ID: b.id, ExecID: "x", Width: 1 << 16}
	if _, err := x.c.ResizePty(ctx, wide); code(err) != codes.InvalidArgument ||
		!strings.Contains(err.Error(), "width") {
		t.Errorf("a width that there is none: %v", err)
	}
	for _, id := range []string{b.id, "other"} {
		_, err := x.c.Kill(ctx, &taskv3.KillRequest{ID: b.id, ExecID: id, Signal: 9})
		if code(err) != codes.NotFound {
			t.Errorf("kill of exec %s: %v", id, err)
		}
	}
	// What cannot be started can be deleted, and so can what was not.
	x.req.ExecID, x.req.Spec = "bad", &anypb.Any{TypeUrl: x.req.Spec.TypeUrl, Value: []byte("{")}
	if _, err := x.c.Exec(ctx, x.req); err != nil {
		t.Error(err)
	}
	_, err := x.c.Start(ctx, &taskv3.StartRequest{ID: b.id, ExecID: "bad"})
	if code(err) != codes.InvalidArgument {
		t.Errorf("start without a spec: %v", err)
	}
	x.req.ExecID, x.req.Spec = "empty", &anypb.Any{TypeUrl: x.req.Spec.TypeUrl, Value: []byte("{}")}
	if _, err = x.c.Exec(ctx, x.req); err == nil {
		_, err = x.c.Start(ctx, &taskv3.StartRequest{ID: b.id, ExecID: "empty"})
	}
	refusedBy(t, err, codes.InvalidArgument, "spec.args")
	for _, id := range []string{"bad", "empty", "x"} {
		if _, err := x.c.Delete(ctx, &taskv3.DeleteRequest{ID: b.id, ExecID: id}); err != nil {
			t.Errorf("delete %s: %v", id, err)
		}
	}
	b.onlyInit()
}

// A signal reaches an exec, and the end of the container ends all of them.
func TestTaskAPIExecEnds(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	for i, all := range []bool{false, true} {
		x := b.fifoExec(fmt.Sprint(i), sh("sleep 1234 & exec sleep 1235"))
		x.start()
		if _, err := x.c.Kill(b.ctx(), &taskv3.KillRequest{ID: b.id, ExecID: x.id, Signal: 9, All: all}); err != nil {
			t.Error(err)
		}
		if r := x.wait(); r.ExitStatus != 137 {
			t.Errorf("exit: %v", r)
		}
		if _, err := x.c.Kill(b.ctx(), &taskv3.KillRequest{ID: b.id, ExecID: x.id, Signal: 9}); err != nil {
			t.Errorf("kill after the end: %v", err)
		}
		if _, err := x.delete(); err != nil {
			t.Error(err)
		}
	}
	x := b.fifoExec("last", sh("exec sleep 1236"))
	x.start()
	stdout, err := os.Open(x.paths[1])
	must.Succeed(t, err)
	defer stdout.Close()
	ended := make(chan *taskv3.WaitResponse, 1)
	go func() { defer close(ended); ended <- x.wait() }() // a wait that fails ends its goroutine
	if _, err := x.c.Kill(b.ctx(), &taskv3.KillRequest{ID: b.id, Signal: 9}); err != nil {
		t.Error(err)
	}
	if r := <-ended; r.GetExitStatus() != 137 {
		t.Errorf("exit: %v", r)
	}
	if s, err := io.ReadAll(stdout); err != nil || len(s) > 0 {
		t.Errorf("output %q, %v", s, err)
	}
	b.gone()
}
