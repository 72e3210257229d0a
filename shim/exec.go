package shim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/shim/process"
)

// execDrain is how long the output of an exec may stay open after its process
// has ended: a background child may keep it open for ever.
const execDrain = 2 * time.Second

// maxExecStarts is how many execs may be started at a time. It takes system calls that
// may block, each of which occupies a thread, and a thread is never given back.
const maxExecStarts = 8

// execPrefix stands before the serial number in an exec's id, which also names its
// cgroup and its files.
const execPrefix = "exec-"

// exec is one exec in the task's table, from its request to its end. Its own goroutine,
// run, takes it through its life, whether somebody waits for it or not.
type exec struct {
	task    *task
	c       *container
	id      string
	process *process.Process // nil: it was never prepared
	stdio   execStdio        // nil: it was never opened
	timer   *time.Timer      // of its timeout; nil: it has none

	life    context.Context // ends when it is to be killed
	kill    context.CancelCauseFunc
	started chan struct{} // closed when it runs, or never will
	done    chan struct{} // closed at its end

	// For others only after done.
	status reaper.Status
	err    error // how it could not be started or waited for, or why it was killed
}

// execStdio is the standard files of an exec. Its methods are called by run, in this
// order, but close, which may come at any time and more than once.
type execStdio interface {
	// child gives the process's ends. They stay open until begin.
	child() runc.IO
	// begin is called when the process has its ends, or never will. master is that of
	// its terminal.
	begin(master *os.File)
	// drain is called when the process has ended, and returns when nobody waits for
	// its output any more.
	drain(*exec)
	close()
}

// Why an exec was killed, if it was not its caller.
var (
	errExecTimeout   = errors.New("the exec's time is up")
	errExecHangup    = errors.New("the client of the exec has hung up")
	errExecLease     = errors.New("the client of the exec has gone and has not come back")
	errContainerGone = kind.As(context.Canceled, errors.New("the container has ended"))
)

// hangupGrace is what the processes of an exec whose client has gone get between
// SIGHUP and SIGKILL.
const hangupGrace = time.Second

// ExecSync runs a process in the container until it ends, ctx is over, or the
// time is up; in the last two cases its whole tree is killed.
func (t *task) ExecSync(ctx context.Context, p *specs.Process, req *pb.ExecSyncRequest) (*pb.ExecSyncResponse, error) {
	e, err := t.newExec(ctx)
	if err != nil {
		return nil, err
	}
	o, err := openOutlets(req)
	e.stdio = o
	if err != nil {
		e.end()
		return nil, err
	}
	e.limit(req.TimeoutMs)
	go e.run(p, req.SetUser)
	select {
	case <-e.done:
	case <-ctx.Done():
		e.kill(context.Cause(ctx))
		<-e.done
	}
	timedOut := errors.Is(e.err, errExecTimeout)
	if e.err != nil && !timedOut {
		return nil, e.err
	}
	return &pb.ExecSyncResponse{
		ExitCode:     uint32(e.status.Code),
		TimedOut:     timedOut,
		StdoutBytes:  o.stdout.written,
		StderrBytes:  o.stderr.written,
		DroppedBytes: o.stdout.dropped + o.stderr.dropped,
	}, nil
}

// limit has the exec killed after some milliseconds; 0 is never.
func (e *exec) limit(ms uint64) {
	if ms > 0 {
		e.timer = time.AfterFunc(milliseconds(ms), func() { e.kill(errExecTimeout) })
	}
}

// newExec puts a new exec into the table, which its end takes out. It waits while the
// container is frozen.
func (t *task) newExec(ctx context.Context) (*exec, error) {
	if err := t.freezer.awaitThaw(ctx); err != nil {
		return nil, err
	}
	t.starting.Lock() // guards over: no exec comes after finish has looked at the table
	defer t.starting.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.freezer.frozen() != nil {
		return nil, kind.Errorf(kind.State, "cannot exec: the container is frozen while a checkpoint is made")
	}
	if t.status.Phase != rundir.PhaseRunning || t.over {
		return nil, kind.Errorf(kind.State, "cannot exec: the container is not running")
	}
	cgroup.WaitAhead()
	t.execSerial++
	e := &exec{
		task:    t,
		c:       t.container,
		id:      execPrefix + strconv.Itoa(t.execSerial),
		started: make(chan struct{}),
		done:    make(chan struct{}),
	}
	e.life, e.kill = context.WithCancelCause(e.c.life)
	t.execs[e.id] = e
	return e, nil
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

// run starts the process, waits for its end, and ends the exec. When it is to be killed
// its tree is.
func (e *exec) run(p *specs.Process, setUser bool) {
	defer e.end()
	err := e.start(p, setUser)
	if err == nil {
		close(e.started)
		e.status, err = e.process.Wait(e.life)
	}
	// Who hangs up when the process is just ending means all that it has started.
	hungUp := errors.Is(context.Cause(e.life), errExecHangup)
	if (err != nil || hungUp) && e.process != nil {
		e.hangUp()
		e.task.killExec(e.id, e.process)
	}
	if err != nil && e.process.Started() {
		e.status, _ = e.process.Wait(context.Background())
	} else if err != nil {
		e.status = reaper.Status{Code: rundir.CodeSignalOffset + int(unix.SIGKILL), Signal: unix.SIGKILL}
	}
	if e.life.Err() != nil && err != nil {
		err = fmt.Errorf("exec killed: %w", context.Cause(e.life))
	}
	e.err = err
	if e.process.Started() {
		e.process.Reap()
	}
	e.task.reach(step.ShimExecEnded)
	e.stdio.drain(e)
}

// hangUp gives the processes of an exec whose client has gone the time to notice.
func (e *exec) hangUp() {
	cause := context.Cause(e.life)
	if !errors.Is(cause, errExecHangup) && !errors.Is(cause, errExecLease) || !e.process.Started() {
		return
	}
	ctx, cancel := context.WithTimeout(e.c.life, hangupGrace)
	defer cancel()
	if e.process.SignalTree(unix.SIGHUP) == nil {
		e.process.Wait(ctx)
	}
}

// start runs the process, as one of a few that are started at a time.
func (e *exec) start(p *specs.Process, setUser bool) error {
	select {
	case e.task.execStarts <- struct{}{}:
		defer func() { <-e.task.execStarts }()
	case <-e.life.Done():
		return context.Cause(e.life)
	}
	full, err := e.c.host.Complete(p, setUser)
	if err != nil {
		return err
	}
	child := e.stdio.child()
	if e.c.traits.UserNS {
		pipes := []*os.File{child.Stdout, child.Stderr}
		if _, named := e.stdio.(*outlets); !named { // or the input is a file of the caller's
			pipes = append(pipes, child.Stdin)
		}
		if err := shareWithUserns(pipes); err != nil {
			return fmt.Errorf("cannot start an exec: %w", err)
		}
	}
	var cgroupErr error
	if e.process, cgroupErr, err = e.c.host.NewExec(e.id, e.c.init.Cgroups); err != nil {
		return err
	}
	if cgroupErr != nil {
		e.task.log.Warn("exec without a cgroup: only its first process can be killed", "error", cgroupErr)
	}
	master, err := e.process.Exec(e.life, full, child)
	e.stdio.begin(master)
	return err
}

// killExec kills the whole tree of an exec.
func (t *task) killExec(id string, p *process.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	if err := p.KillTree(ctx); err != nil {
		t.log.Error("exec not killed whole", "exec", id, "error", err)
	}
}

// end takes the exec out of the table.
func (e *exec) end() {
	e.kill(nil)
	if e.timer != nil {
		e.timer.Stop()
	}
	if e.stdio != nil {
		e.stdio.close()
	}
	t := e.task
	t.mu.Lock()
	delete(t.execs, e.id)
	last := len(t.execs) == 0
	if e.process != nil {
		t.leftovers = append(t.leftovers, e.process)
	}
	t.mu.Unlock()
	t.forgetExecs()
	close(e.done)
	if last {
		// A container with a probe would keep the garbage of a hundred execs
		// otherwise: the collector lets a small heap grow to 4 MiB. It costs a
		// small part of what the exec did, and nobody waits for it.
		go debug.FreeOSMemory()
	}
}

// forgetExecs removes cgroups and records of execs that have ended. A background
// child that outlives its exec, as it may, keeps both until a later exec has ended
// too, or the container.
func (t *task) forgetExecs() {
	t.forgetting.Lock() // or the last call would miss what another one has in hand
	defer t.forgetting.Unlock()
	t.mu.Lock()
	all := t.leftovers
	t.leftovers = nil
	t.mu.Unlock()
	all = slices.DeleteFunc(all, func(p *process.Process) bool {
		gone, err := p.Forget()
		if err != nil {
			t.log.Warn("something is left of an exec", "error", err)
		}
		return gone
	})
	t.mu.Lock()
	t.leftovers = append(t.leftovers, all...)
	t.mu.Unlock()
}

// endExecs ends the execs of a container that has ended, or is handed over. No new one
// comes. The processes of one that has ended are dead already, but the OCI runtime may
// just be starting another one, which is cut short after the limit.
func (t *task) endExecs(c *container, limit time.Duration) {
	t.mu.Lock()
	all := slices.Collect(maps.Values(t.execs))
	t.mu.Unlock()
	late := time.After(limit)
	for _, e := range all {
		if wait(e.done, late) {
			continue
		}
		c.gone(errContainerGone)
		late = time.After(0)
		wait(e.done, time.After(killTimeout))
	}
	t.forgetExecs()
}
