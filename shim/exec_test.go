package shim_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	pb "github.com/holdfast-cri/holdfast/proto"
	records "github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func (b *box) exec(p *specs.Process, req *pb.ExecSyncRequest) (*pb.ExecSyncResponse, error) {
	return b.execOn(b.client, p, req)
}

func (b *box) execOn(client pb.ShimService, p *specs.Process, req *pb.ExecSyncRequest) (*pb.ExecSyncResponse, error) {
	b.t.Helper()
	a, err := pb.MarshalAny(p)
	must.Succeed(b.t, err)
	req.Id, req.Process = b.id, a
	return client.ExecSync(b.ctx(), req)
}

func sh(script string) *specs.Process {
	return &specs.Process{Args: []string{"/bin/sh", "-c", script}}
}

// memfd is a file of this process that the shim can open by path.
func memfd(t *testing.T) (*os.File, string) {
	t.Helper()
	fd, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC)
	must.Succeed(t, err)
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	return f, procPath(f)
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }

func contents(t *testing.T, f *os.File) string {
	t.Helper()
	s, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	must.Succeed(t, err)
	return string(s)
}

func TestExecSync(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	stdin, inPath := memfd(t)
	stdin.WriteString("input")
	stdout, outPath := memfd(t)
	stderr, errPath := memfd(t)
	r, err := b.exec(sh("cat; echo $WHERE $PWD; echo oops >&2; exit 42"),
		&pb.ExecSyncRequest{StdinPath: inPath, StdoutPath: outPath, StderrPath: errPath})
	must.Succeed(t, err)
	if r.ExitCode != 42 || r.TimedOut || r.StdoutBytes != 17 || r.StderrBytes != 5 || r.DroppedBytes != 0 {
		t.Errorf("%v", r)
	}
	if s := contents(t, stdout); s != "inputcontainer /\n" {
		t.Errorf("stdout %q", s)
	}
	if s := contents(t, stderr); s != "oops\n" {
		t.Errorf("stderr %q", s)
	}
	if n := b.state().Execs; n != 0 {
		t.Errorf("%d execs counted after the end", n)
	}
}

func TestExecOwnProcess(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	stdout, path := memfd(t)
	p := sh("echo $WHERE $PWD; id -u; id -g")
	p.Env, p.Cwd = []string{"PATH=/bin", "WHERE=exec"}, "/tmp"
	p.User = specs.User{UID: 11, GID: 12}
	if _, err := b.exec(p, &pb.ExecSyncRequest{StdoutPath: path}); err != nil {
		t.Fatal(err)
	}
	if s := contents(t, stdout); s != "exec /tmp\n11\n12\n" {
		t.Errorf("got %q", s)
	}
}

// Where process.json is gone, or is another container's, the spec has the process.
func TestExecWithoutProcessFile(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	path := b.dir.Path(rundir.ProcessName)
	for name, damage := range map[string]func() error{
		"gone": func() error { return os.Remove(path) },
		"another container's": func() error {
			return records.WriteOf(path, "another", specs.Process{User: specs.User{UID: 7}, Cwd: "/"}, false)
		},
	} {
		must.Succeed(t, damage())
		stdout, out := memfd(t)
		if _, err := b.exec(sh("id -u"), &pb.ExecSyncRequest{StdoutPath: out}); err != nil {
			t.Fatal(name, err)
		}
		if s := contents(t, stdout); s != "0\n" {
			t.Errorf("%s: got %q", name, s)
		}
	}
}

// Root in a container of another user has to be asked for.
func TestExecUser(t *testing.T) {
	b := newBox(t)
	spec := b.spec("exec sleep 1000")
	spec.Process.User = specs.User{UID: 11, GID: 12}
	b.create(spec)
	b.start()
	for set, want := range map[bool]string{false: "11\n12\n", true: "0\n0\n"} {
		stdout, path := memfd(t)
		_, err := b.exec(sh("id -u; id -g"), &pb.ExecSyncRequest{StdoutPath: path, SetUser: set})
		if s := contents(t, stdout); err != nil || s != want {
			t.Errorf("set_user %v: %q, %v", set, s, err)
		}
	}
}

func TestExecSignal(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	r, err := b.exec(sh("kill -9 $$"), &pb.ExecSyncRequest{})
	if err != nil || r.ExitCode != 137 || r.TimedOut {
		t.Errorf("%v, %v", r, err)
	}
}

func TestExecNoSuchCommand(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	_, err := b.exec(&specs.Process{Args: []string{"/no/such"}}, &pb.ExecSyncRequest{})
	if err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Errorf("got %v", err)
	}
}

func TestExecOutputLimit(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	stdout, path := memfd(t)
	r, err := b.exec(sh("head -c 1000000 /proc/self/exe; exit 3"),
		&pb.ExecSyncRequest{StdoutPath: path, OutputLimit: 1000})
	if err != nil || r.ExitCode != 3 || r.StdoutBytes != 1000 || r.DroppedBytes != 999000 {
		t.Errorf("%v, %v", r, err)
	}
	if n := len(contents(t, stdout)); n != 1000 {
		t.Errorf("%d bytes arrived", n)
	}
}

// A background child in a session of its own keeps the output open; the
// timeout kills it as well.
func TestExecTimeout(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	// The OCI runtime has to start it within that time, which on a slow machine
	// takes more than one attempt.
	for ms := uint64(1500); ; ms *= 2 {
		stdout, path := memfd(t)
		r, err := b.exec(sh("(setsid sleep 1234 &); echo started; exec sleep 1235"),
			&pb.ExecSyncRequest{TimeoutMs: ms, StdoutPath: path})
		if err != nil || !r.TimedOut {
			t.Fatalf("%v, %v", r, err)
		}
		b.onlyInit()
		s := contents(t, stdout)
		if s == "" && ms < 60_000 {
			continue
		}
		if s != "started\n" {
			t.Errorf("output %q", s)
		}
		return
	}
}

// onlyInit waits until nothing but init runs in the container.
func (b *box) onlyInit() {
	b.t.Helper()
	b.until("only init is left", func() bool {
		p, err := b.client.Pids(b.ctx(), &pb.PidsRequest{Id: b.id})
		return err == nil && len(p.Pids) == 1
	})
}

// Without a timeout, a background child keeps neither the answer nor its life.
func TestExecBackgroundChild(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	stdout, path := memfd(t)
	r, err := b.exec(sh("setsid sleep 1234 & echo done; exit 4"), &pb.ExecSyncRequest{StdoutPath: path})
	if err != nil || r.ExitCode != 4 || r.TimedOut {
		t.Errorf("%v, %v", r, err)
	}
	if s := contents(t, stdout); s != "done\n" {
		t.Errorf("output %q", s)
	}
	p, err := b.client.Pids(b.ctx(), &pb.PidsRequest{Id: b.id})
	if err != nil || len(p.Pids) != 2 {
		t.Errorf("processes %v, %v; the background child should live on", p, err)
	}
}

func TestExecCancelled(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	for range 3 {
		client, conn, raw := b.dial()
		r, w, err := os.Pipe()
		must.Succeed(t, err)
		failed := make(chan error, 1)
		go func() {
			_, err := b.execOn(client, sh("(setsid sleep 1234 &); echo started; exec sleep 1235"),
				&pb.ExecSyncRequest{StdoutPath: procPath(w)})
			failed <- err
		}()
		line := make([]byte, 8)
		if _, err := io.ReadFull(r, line); err != nil || string(line) != "started\n" {
			t.Fatalf("%q, %v", line, err)
		}
		raw.Close()
		if err := <-failed; err == nil {
			t.Error("the call did not fail")
		}
		conn.Close()
		r.Close()
		w.Close()
		b.onlyInit()
	}
	b.until("no exec is counted", func() bool { return b.state().Execs == 0 })
}

// The end of the container is not held back by its execs, and ends them.
func TestExecWhenInitEnds(t *testing.T) {
	b := newBox(t)
	b.run("echo ready; exec sleep 1000")
	b.says("ready")
	var wg sync.WaitGroup
	started, path := memfd(t)
	for range 3 {
		client, conn, _ := b.dial()
		defer conn.Close()
		wg.Go(func() {
			r, err := b.execOn(client, sh("echo x; exec sleep 1234"), &pb.ExecSyncRequest{StdoutPath: path})
			cutOff := code(err) == codes.Unknown || code(err) == codes.Canceled
			if err != nil && !cutOff || err == nil && r.ExitCode != 137 {
				t.Errorf("%v, %v", r, err)
			}
		})
	}
	b.until("three execs run", func() bool { return len(contents(t, started)) == 6 })
	b.client.Kill(b.ctx(), &pb.KillRequest{Id: b.id, Signal: 9})
	if e := b.wait(); e.Signal != 9 {
		t.Errorf("exit %v", e)
	}
	wg.Wait()
	if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); err == nil {
		t.Error("an exec after the end")
	}
	b.gone()
}

func TestExecMany(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := range 5 {
				stdout, path := memfd(t)
				want := fmt.Sprintf("%d.%d\n", worker, i)
				r, err := b.exec(sh("echo "+strings.TrimSpace(want)), &pb.ExecSyncRequest{StdoutPath: path})
				if err != nil || r.ExitCode != 0 || contents(t, stdout) != want {
					t.Errorf("%v, %v", r, err)
				}
			}
		})
	}
	wg.Wait()
	b.onlyInit()
	b.until("no cgroup of an exec is left", func() bool {
		// One that was not idle in time goes after the next exec.
		if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); err != nil {
			t.Fatal(err)
		}
		dirs, _ := filepath.Glob("/sys/fs/cgroup/freezer" + b.state().Cgroups["freezer"] + "/exec-*")
		return len(dirs) == 0
	})
}

// The deadline that the client put on its call holds as well.
func TestExecCallersDeadline(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	a, err := pb.MarshalAny(sh("exec sleep 1234"))
	must.Succeed(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 1e9)
	defer cancel()
	_, err = b.client.ExecSync(ctx, &pb.ExecSyncRequest{Id: b.id, Process: a})
	if err == nil || !errors.Is(err, context.DeadlineExceeded) && code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	b.onlyInit()
}

// A burst of execs costs threads, which are never given back: only a few.
func TestExecsLeaveNoThreads(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	threads := func() int {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", b.cmd.Process.Pid))
		must.Succeed(t, err)
		return len(tasks)
	}
	before := threads()
	var wg sync.WaitGroup
	for range 150 {
		wg.Go(func() {
			if r, err := b.exec(sh("exit 3"), &pb.ExecSyncRequest{}); err != nil || r.ExitCode != 3 {
				t.Errorf("%v, %v", r, err)
			}
		})
	}
	wg.Wait()
	if after := threads(); after > before+20 {
		t.Errorf("%d threads, %d before", after, before)
	}
}

// While an exec lives it has a record in the run directory. What it leaves behind keeps
// that. Nothing that has become of config.json matters.
func TestExecRecord(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	must.Succeed(t, os.Remove(b.dir.Path(rundir.SpecName)))
	must.Succeed(t, unix.Mkfifo(b.dir.Path(rundir.SpecName), 0o600))
	read := func(id string) (r rundir.Exec, err error) {
		err = records.Read(b.dir.ExecPath(id, ".json"), &r)
		return r, err
	}
	stdin, hold, err := os.Pipe()
	must.Succeed(t, err)
	defer stdin.Close()
	done := make(chan error, 1)
	go func() {
		_, err := b.exec(sh("setsid sleep 1234 & exec cat"), &pb.ExecSyncRequest{StdinPath: procPath(stdin)})
		done <- err
	}()
	b.until("it is on record", func() bool { r, err := read("exec-1"); return err == nil && r.Process.Alive() })
	if n := b.state().Execs; n != 1 {
		t.Errorf("%d execs", n)
	}
	hold.Close()
	must.Succeed(t, <-done)
	r, err := read("exec-1")
	if err != nil || !r.Ended || len(r.Cgroups) == 0 {
		t.Errorf("after the end: %+v, %v", r, err)
	}
	if err := cgroup.Set(r.Cgroups).Kill(b.ctx()); err != nil {
		t.Error(err)
	}
	if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); err != nil {
		t.Fatal(err)
	}
	b.until("all records are gone", func() bool {
		left, _ := filepath.Glob(b.dir.ExecPath("*", ""))
		return len(left) == 0
	})
}
