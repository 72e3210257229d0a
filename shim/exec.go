package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// execDrain is how long the output of an exec may stay open after its process
// has ended: a background child may keep it open for ever.
const execDrain = 2 * time.Second

// execStartTimeout bounds the OCI runtime, not the process that it starts.
const execStartTimeout = time.Minute

// execRun is one exec. ExecSync owns it from begin to end.
type execRun struct {
	task    *task
	c       *container
	serial  string
	sub     cgroup.Set // of its process tree; empty where there can't be one
	subName string     // the same for the OCI runtime
	stdin   *os.File
	stdout  *outlet
	stderr  *outlet
	child   *reaper.Child
}

// ExecSync runs a process in the container until it ends, ctx is over, or the
// time is up; in the last two cases its whole tree is killed.
func (t *task) ExecSync(ctx context.Context, p *specs.Process, req *pb.ExecSyncRequest) (*pb.ExecSyncResponse, error) {
	e, err := t.beginExec()
	if err != nil {
		return nil, err
	}
	defer e.end()
	if req.TimeoutMs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, milliseconds(req.TimeoutMs), errExecTimeout)
		defer cancel()
	}
	ctx, cut := context.WithCancelCause(ctx)
	defer context.AfterFunc(e.c.life, func() { cut(errContainerGone) })()
	defer cut(nil)
	if err := e.open(req); err != nil {
		return nil, err
	}
	if err := e.start(ctx, p, req.SetUser); err != nil {
		e.killTree()
		e.drain()
		if context.Cause(ctx) == errExecTimeout {
			return e.result(reaper.Status{Code: rundir.CodeSignalOffset + int(unix.SIGKILL)}, true), nil
		}
		return nil, err
	}
	type ending struct {
		status reaper.Status
		err    error
	}
	ended := make(chan ending, 1)
	go func() {
		st, err := e.child.Wait()
		ended <- ending{st, err}
	}()
	var end ending
	over := false
	select {
	case end = <-ended:
	case <-ctx.Done():
		over = true
		e.killTree()
		end = <-ended
	}
	e.child.Reap()
	e.drain()
	switch {
	case over && context.Cause(ctx) != errExecTimeout:
		return nil, fmt.Errorf("exec killed: %w: %w", ctx.Err(), context.Cause(ctx))
	case end.err != nil:
		return nil, end.err
	}
	return e.result(end.status, over), nil
}

// Why the context of an exec ended, if it was not the caller.
var (
	errExecTimeout   = errors.New("the exec's time is up")
	errContainerGone = errors.New("the container has ended")
)

// beginExec counts a new exec, which end undoes.
func (t *task) beginExec() (*execRun, error) {
	t.starting.Lock() // guards over, and keeps execs.Add apart from execs.Wait
	defer t.starting.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status.Phase != rundir.PhaseRunning || t.over {
		return nil, kind.Errorf(kind.State, "cannot exec: the container is not running")
	}
	t.execs.Add(1)
	t.execCount++
	t.execSerial++
	e := &execRun{task: t, c: t.container, serial: "exec-" + strconv.Itoa(t.execSerial)}
	return e, nil
}

func (e *execRun) end() {
	for _, o := range []*outlet{e.stdout, e.stderr} {
		if o != nil {
			o.close()
		}
	}
	if e.stdin != nil {
		e.stdin.Close()
	}
	for _, name := range []string{"json", "pid", "log"} {
		os.Remove(e.path(name))
	}
	os.Remove(e.task.dir.Path("." + e.serial + ".pid")) // of an OCI runtime that was killed
	t := e.task
	t.mu.Lock()
	t.execCount--
	last := t.execCount == 0
	if e.sub != nil {
		t.execCgroups = append(t.execCgroups, e.sub)
	}
	t.mu.Unlock()
	t.removeExecCgroups()
	t.execs.Done()
	if last {
		// A container with a probe would keep the garbage of a hundred execs
		// otherwise: the collector lets a small heap grow to 4 MiB. It costs a
		// small part of what the exec did, and nobody waits for it.
		go debug.FreeOSMemory()
	}
}

// removeExecCgroups removes the cgroups of execs that have ended. A background
// child that outlives its exec, as it may, keeps its cgroup until a later exec
// has ended too, or the container.
func (t *task) removeExecCgroups() {
	t.mu.Lock()
	all := t.execCgroups
	t.execCgroups = nil
	t.mu.Unlock()
	all = slices.DeleteFunc(all, func(g cgroup.Set) bool {
		idle, err := g.RemoveIdle()
		if err != nil {
			t.log.Warn("cgroup of an exec not removed", "err", err)
		}
		return idle || err != nil
	})
	t.mu.Lock()
	t.execCgroups = append(t.execCgroups, all...)
	t.mu.Unlock()
}

func (e *execRun) path(ext string) string { return e.task.dir.Path(e.serial + "." + ext) }

func (e *execRun) open(req *pb.ExecSyncRequest) (err error) {
	if req.StdinPath != "" {
		// Without O_NONBLOCK a FIFO that nobody writes to would block the shim.
		if e.stdin, err = openFor(req.StdinPath, "stdin_path", unix.O_RDONLY); err != nil {
			return err
		}
	}
	if e.stdout, err = newOutlet(req.StdoutPath, "stdout_path", req.OutputLimit); err != nil {
		return err
	}
	e.stderr, err = newOutlet(req.StderrPath, "stderr_path", req.OutputLimit)
	return err
}

// openFor opens a file that the caller named.
func openFor(path, field string, flags int) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, kind.Errorf(kind.Invalid, "%s %q is not absolute", field, path)
	}
	fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "cannot open %s %s: %w", field, path, err)
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		unix.SetNonblock(fd, false) // the command gets it as it is
	}
	return os.NewFile(uintptr(fd), path), nil
}

// start runs the process and adopts it.
func (e *execRun) start(ctx context.Context, p *specs.Process, setUser bool) error {
	t := e.task
	full, err := t.completeProcess(p, setUser)
	if err != nil {
		return err
	}
	b, err := json.Marshal(full)
	if err == nil {
		err = os.WriteFile(e.path("json"), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("cannot write the process of an exec: %w", err)
	}
	if e.sub, e.subName, err = e.c.cgroups.Sub(e.serial); err != nil {
		t.log.Warn("exec without a cgroup: only its first process can be killed", "err", err)
		e.subName = ""
	}
	if e.c.userns {
		for _, o := range []*outlet{e.stdout, e.stderr} {
			if err := o.child.Chmod(shareMode); err != nil {
				return fmt.Errorf("cannot share the output of an exec: %w", err)
			}
		}
	}
	runtime := *e.c.runtime
	runtime.Log = e.path("log") // of its own, so that its errors are not mixed with others'
	release := t.reaper.Hold()
	defer release()
	ctx, cancel := context.WithTimeout(ctx, execStartTimeout)
	defer cancel()
	err = runtime.Exec(ctx, t.dir.ID(), runc.ExecOptions{
		IO:      runc.IO{Stdin: e.stdin, Stdout: e.stdout.child, Stderr: e.stderr.child},
		Process: e.path("json"),
		PidFile: e.path("pid"),
		Cgroup:  e.subName,
	})
	e.stdout.start()
	e.stderr.start()
	if err != nil {
		return err
	}
	pid, err := readPid(e.path("pid"))
	if err != nil {
		return err
	}
	e.child, err = t.reaper.Adopt(pid)
	return err
}

// completeProcess fills what the caller left empty from the container's own
// process. An empty user is the container's, unless setUser says that root is meant.
func (t *task) completeProcess(p *specs.Process, setUser bool) (*specs.Process, error) {
	b, err := os.ReadFile(t.dir.Path(rundir.SpecName))
	if err != nil {
		return nil, fmt.Errorf("cannot exec: %w", err)
	}
	var spec struct{ Process *specs.Process }
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("cannot exec: cannot read %s: %w", t.dir.Path(rundir.SpecName), err)
	}
	q := *spec.Process
	q.Terminal, q.ConsoleSize, q.CommandLine = false, nil, ""
	q.Args = p.Args
	if p.Env != nil {
		q.Env = p.Env
	}
	if p.Cwd != "" {
		q.Cwd = p.Cwd
	}
	if u := p.User; setUser || u.UID != 0 || u.GID != 0 || u.Username != "" || len(u.AdditionalGids) > 0 || u.Umask != nil {
		q.User = u
	}
	if p.Capabilities != nil {
		q.Capabilities = p.Capabilities
	}
	if p.Rlimits != nil {
		q.Rlimits = p.Rlimits
	}
	if p.ApparmorProfile != "" {
		q.ApparmorProfile = p.ApparmorProfile
	}
	if p.SelinuxLabel != "" {
		q.SelinuxLabel = p.SelinuxLabel
	}
	if p.OOMScoreAdj != nil {
		q.OOMScoreAdj = p.OOMScoreAdj
	}
	if p.Scheduler != nil {
		q.Scheduler = p.Scheduler
	}
	if p.IOPriority != nil {
		q.IOPriority = p.IOPriority
	}
	if p.ExecCPUAffinity != nil {
		q.ExecCPUAffinity = p.ExecCPUAffinity
	}
	q.NoNewPrivileges = q.NoNewPrivileges || p.NoNewPrivileges
	return &q, nil
}

// killTree kills the process of the exec and all that came of it, also what
// has left its session or lost its parent.
func (e *execRun) killTree() {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	var err error
	if e.child != nil {
		if err = e.child.Signal(unix.SIGKILL); errors.Is(err, reaper.ErrGone) {
			err = nil
		}
	}
	if err = errors.Join(err, e.sub.Kill(ctx)); err != nil {
		e.task.log.Error("exec not killed whole", "exec", e.serial, "err", err)
	}
}

// drain waits for the rest of the output, for a while.
func (e *execRun) drain() {
	limit := time.After(execDrain)
	for _, o := range []*outlet{e.stdout, e.stderr} {
		o.start()
		if !wait(o.done, limit) {
			o.giveUp()
			limit = time.After(0)
		}
		<-o.done
	}
}

func (e *execRun) result(st reaper.Status, timedOut bool) *pb.ExecSyncResponse {
	return &pb.ExecSyncResponse{
		ExitCode:     uint32(st.Code),
		TimedOut:     timedOut,
		StdoutBytes:  e.stdout.written,
		StderrBytes:  e.stderr.written,
		DroppedBytes: e.stdout.dropped + e.stderr.dropped,
	}
}

// endExecs ends the execs of a container that has ended. Their processes are
// dead already; only one that the OCI runtime is just starting needs a hint.
func (t *task) endExecs(c *container) {
	done := make(chan struct{})
	go func() {
		t.execs.Wait()
		close(done)
	}()
	if !wait(done, time.After(execsTimeout)) {
		c.gone()
		wait(done, time.After(killTimeout))
	}
}

// outlet copies one output of an exec to the file that its caller named, up to
// a limit. What is beyond, or cannot be written, is read and dropped, so that
// the process never waits for it.
type outlet struct {
	child *os.File // write end, for the process; closed by start
	r     *os.File
	w     *os.File // nil: the output is not wanted
	limit uint64   // 0: none

	once sync.Once
	done chan struct{} // closed at the end of the output

	// For others only after done.
	written, dropped uint64
}

func newOutlet(path, field string, limit uint64) (*outlet, error) {
	o := &outlet{limit: limit, done: make(chan struct{})}
	var err error
	if path != "" {
		// O_APPEND: two outputs may go to the same file.
		if o.w, err = openFor(path, field, unix.O_WRONLY|unix.O_APPEND); err != nil {
			return nil, err
		}
	}
	if o.r, o.child, err = os.Pipe(); err != nil {
		if o.w != nil {
			o.w.Close()
		}
		return nil, fmt.Errorf("cannot make %s of an exec: %w", field, err)
	}
	return o, nil
}

// start closes the child's end and begins to copy, once.
func (o *outlet) start() {
	o.once.Do(func() {
		o.child.Close()
		go o.copy()
	})
}

func (o *outlet) copy() {
	defer close(o.done)
	b := make([]byte, 32<<10)
	broken := false
	for {
		n, err := o.r.Read(b)
		if o.w != nil {
			keep := n
			if o.limit > 0 {
				keep = int(min(uint64(n), o.limit-o.written))
			}
			if broken {
				keep = 0
			}
			if keep > 0 {
				var werr error
				keep, werr = o.w.Write(b[:keep])
				broken = werr != nil
			}
			o.written += uint64(keep)
			o.dropped += uint64(n - keep)
		}
		if err != nil { // io.EOF, or giveUp
			return
		}
	}
}

// giveUp ends a copy whose output is kept open, or whose reader has stopped.
func (o *outlet) giveUp() {
	o.r.SetReadDeadline(time.Now())
	if o.w != nil {
		o.w.SetWriteDeadline(time.Now())
	}
}

func (o *outlet) close() {
	o.once.Do(func() { // never started
		o.child.Close()
		close(o.done)
	})
	o.r.Close()
	if o.w != nil {
		o.w.Close()
	}
}
