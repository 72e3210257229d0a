package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/shim/stdio"
)

// task is the life of the shim's one container:
//
//	empty -> creating -> created -> running -> exited
//	             |          |                    ^
//	             +----------+--------------------+
//
// update is the only function that changes the phase.
type task struct {
	dir    rundir.Dir
	log    *slog.Logger
	reaper *reaper.Reaper

	created chan struct{} // closed when create is over, well or badly
	exited  chan struct{} // closed with the EXITED event
	ended   chan struct{} // closed when nothing is left to do: the process may end

	// starting serialises Start with itself and with the end of init, so that
	// STARTED always comes before EXITED. It is taken before mu.
	starting sync.Mutex
	over     bool // guarded by starting: init has ended

	execs sync.WaitGroup // one for each exec that is counted in execCount

	mu           sync.Mutex
	status       rundir.Status
	requestID    string
	abandoned    bool // ends without a container; no Create any more
	cancelCreate context.CancelFunc
	createErr    error
	container    *container // from created on
	exit         *rundir.Exit
	stopTimer    *deadline // from the first Stop on
	execCount    int
	execSerial   int
	execCgroups  []cgroup.Set // of execs that have ended, still to be removed
	events       []*pb.Event
	changed      chan struct{} // closed and replaced with each event
}

// container is what create made. It does not change, but for what its members
// guard themselves. The task's finish closes what is in it.
type container struct {
	terminal   bool
	privatePID bool
	userns     bool
	runtimeExe string // what init runs until it runs the container's program
	cheapEnd   bool   // delete of the OCI runtime would do no more than remove files and cgroups
	fifo       bool   // start of the OCI runtime would do no more than open a FIFO

	runtime *runc.Runtime
	init    *reaper.Child
	cgroups cgroup.Set
	oom     *oomWatch

	exit        *rundir.ExitFile
	durableExit *rundir.ExitFile // nil without a durable directory

	log     *logfile.File // nil: the output is dropped
	stdio   *stdio.Hub
	memory  *stdio.Memory
	console *os.File // a second master of the terminal, for its size

	life context.Context // of execs; gone ends it
	gone context.CancelFunc

	killed atomic.Bool // by this shim, with SIGKILL
}

func newTask(dir rundir.Dir, log *slog.Logger, r *reaper.Reaper) *task {
	return &task{
		dir:     dir,
		log:     log,
		reaper:  r,
		created: make(chan struct{}),
		exited:  make(chan struct{}),
		ended:   make(chan struct{}),
		status:  rundir.Status{Phase: rundir.PhaseEmpty, BootID: rundir.BootID()},
		changed: make(chan struct{}),
	}
}

// update changes the status, writes it down and, with an event type, tells it.
// The caller holds mu.
//
// That it cannot be written is no reason to refuse what has happened already:
// memory stays the truth for as long as the shim lives.
func (t *task) update(event pb.EventType, change func(*rundir.Status)) {
	change(&t.status)
	if event != pb.EventType_EVENT_TYPE_UNSPECIFIED {
		t.status.Seq++
		e := &pb.Event{Seq: t.status.Seq, At: timestamp(time.Now()), Type: event, Init: process(t.status.Init)}
		switch event {
		case pb.EventType_EVENT_TYPE_STARTED:
			e.At = timestamp(t.status.StartedAt) // the same as in the record
		case pb.EventType_EVENT_TYPE_EXITED:
			e.Exit = exit(t.exit)
		}
		t.events = append(t.events, e)
	}
	if err := t.dir.WriteStatus(t.status); err != nil {
		t.log.Error("state record not written", "err", err)
	}
	close(t.changed)
	t.changed = make(chan struct{})
}

// abandon makes an empty task refuse every Create from now on. It reports false
// if there is a container, or was.
func (t *task) abandon() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status.Phase == rundir.PhaseEmpty && !t.abandoned {
		t.abandoned = true
		close(t.ended)
	}
	return t.abandoned
}

// alive gives the container in a phase where its init may live. nil without an
// error: it has ended.
func (t *task) alive() (*container, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch t.status.Phase {
	case rundir.PhaseCreated, rundir.PhaseRunning:
		return t.container, nil
	case rundir.PhaseExited:
		return nil, nil
	}
	return nil, kind.Errorf(kind.State, "the container is %s", t.status.Phase)
}

// startTimeout bounds how long init may take to answer. It waits for nothing but
// us, so only a frozen or starved one takes longer than a moment.
const startTimeout = time.Minute

func (t *task) Start() (rundir.Process, time.Time, error) {
	t.starting.Lock()
	defer t.starting.Unlock()
	t.mu.Lock()
	c, s := t.container, t.status
	t.mu.Unlock()
	if !s.StartedAt.IsZero() {
		return s.Init, s.StartedAt, nil // a repeated call
	}
	if s.Phase != rundir.PhaseCreated {
		return s.Init, s.StartedAt, kind.Errorf(kind.State, "cannot start: the container is %s", s.Phase)
	}
	if t.over {
		return s.Init, s.StartedAt, kind.Errorf(kind.State, "cannot start: %w", runc.ErrNotStartable)
	}
	// A caller that goes away does not stop a start half way.
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	at := time.Now()
	var err error
	if c.fifo {
		err = c.init.Control(func(pidfd int) error { return c.runtime.Release(ctx, t.dir.ID(), pidfd) })
	} else {
		err = c.runtime.Start(ctx, t.dir.ID())
	}
	if errors.Is(err, runc.ErrNotStartable) {
		err = kind.As(kind.State, err)
	}
	if err != nil {
		return s.Init, s.StartedAt, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(pb.EventType_EVENT_TYPE_STARTED, func(s *rundir.Status) {
		s.Phase, s.StartedAt = rundir.PhaseRunning, at
	})
	t.log.Info("container started", "pid", s.Init.PID)
	return s.Init, at, nil
}

// Kill sends a signal. To a container that has ended it does nothing.
func (t *task) Kill(sig unix.Signal, all bool) error {
	c, err := t.alive()
	if c == nil {
		return err
	}
	if sig == unix.SIGKILL {
		c.killed.Store(true)
	}
	if all {
		err = c.signalAll(sig)
	} else if err = c.init.Signal(sig); err == nil && sig == unix.SIGKILL {
		c.cgroups.Thaw()
	}
	if errors.Is(err, reaper.ErrGone) {
		return nil
	}
	return err
}

// killTimeout bounds how long processes may take to die of SIGKILL: one in an
// uninterruptible wait can take for ever.
const killTimeout = 10 * time.Second

func (c *container) signalAll(sig unix.Signal) error {
	if sig != unix.SIGKILL {
		return c.cgroups.Signal(sig)
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	return c.cgroups.Kill(ctx)
}

// kill ends the container now: init, which takes a private pid namespace along,
// then whatever else is in the cgroup.
func (t *task) kill(c *container) {
	c.killed.Store(true)
	if err := c.init.Signal(unix.SIGKILL); err != nil && !errors.Is(err, reaper.ErrGone) {
		t.log.Error("init not killed", "err", err)
	}
	if err := c.signalAll(unix.SIGKILL); err != nil {
		t.log.Error("container not killed whole", "err", err)
	}
}

// Stop sends the signal and sets the deadline for SIGKILL, in that record first.
// It returns the deadline that holds now, on CLOCK_BOOTTIME.
func (t *task) Stop(sig unix.Signal, grace time.Duration) (time.Duration, error) {
	c, err := t.alive()
	if c == nil {
		return bootNow(), err
	}
	at := bootNow() + grace
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.init.Ended() { // and finish closes the timer, if it has not yet
		return bootNow(), nil
	}
	if t.status.Phase == rundir.PhaseCreated {
		at = bootNow() // nothing of the container's runs that could take the time
	}
	last := t.status.Stop
	if last != nil {
		at = min(at, last.KillAt)
	}
	if t.stopTimer == nil {
		if t.stopTimer, err = newDeadline(func() { t.kill(c) }); err != nil {
			return 0, err
		}
	}
	if last == nil || at != last.KillAt || int(sig) != last.Signal {
		var event pb.EventType // only the first is one
		stop := rundir.Stop{Signal: int(sig), RequestedAt: time.Now(), KillAt: at}
		if last == nil {
			event = pb.EventType_EVENT_TYPE_STOPPING
		} else {
			stop.RequestedAt = last.RequestedAt
		}
		t.update(event, func(s *rundir.Status) { s.Stop = &stop })
		t.log.Info("container stopping", "signal", int(sig), "grace", (at - bootNow()).String())
	}
	if err := t.stopTimer.set(at); err != nil {
		return 0, err
	}
	if grace > 0 && (last == nil || last.Signal != int(sig)) {
		if err := t.deliver(c, sig); err != nil {
			return 0, err
		}
	}
	return at, nil
}

// Delete ends the container, or the shim if there is none, and waits for the
// exit record. nil: there was no container.
func (t *task) Delete(ctx context.Context, force bool) (*rundir.Exit, error) {
	if t.abandon() {
		return nil, nil
	}
	t.mu.Lock()
	phase, c, cancel := t.status.Phase, t.container, t.cancelCreate
	t.mu.Unlock()
	switch phase {
	case rundir.PhaseCreating:
		if !force {
			return nil, kind.Errorf(kind.State, "cannot delete without force: the container is %s", phase)
		}
		cancel()
		select {
		case <-t.created:
		case <-ctx.Done():
			return nil, fmt.Errorf("the container is not gone yet: %w", ctx.Err())
		}
		t.mu.Lock()
		c = t.container
		t.mu.Unlock()
		if c != nil { // the create was over before it could be cut short
			t.kill(c)
		}
	case rundir.PhaseRunning:
		if !force {
			return nil, kind.Errorf(kind.State, "cannot delete without force: the container is %s", phase)
		}
		t.kill(c)
	case rundir.PhaseCreated:
		t.kill(c)
	}
	select {
	case <-t.exited:
		return t.exit, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("the container is not gone yet: %w", ctx.Err())
	}
}

// Wait gives the exit, or nil when the time is up first.
func (t *task) Wait(ctx context.Context, limit time.Duration) (*rundir.Exit, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-t.exited:
		return t.exit, nil
	case <-timer.C:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Events gives the events after a number, waiting for one up to a limit.
func (t *task) Events(ctx context.Context, after uint64, limit time.Duration) ([]*pb.Event, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		t.mu.Lock()
		events, changed := t.events, t.changed
		t.mu.Unlock()
		if n := uint64(len(events)); after < n { // event i has number i+1
			return events[after:n:n], nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Resize sets the size of the terminal.
func (t *task) Resize(width, height uint16) error {
	c, err := t.alive()
	if err != nil {
		return err
	}
	if c == nil {
		return kind.Errorf(kind.State, "cannot resize the terminal: the container is %s", rundir.PhaseExited)
	}
	if c.console == nil {
		return kind.Errorf(kind.State, "the container has no terminal")
	}
	return pty.Resize(c.console, width, height)
}

// inputClosed notes that the container gets no more input.
func (t *task) inputClosed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.update(pb.EventType_EVENT_TYPE_UNSPECIFIED, func(s *rundir.Status) { s.InputClosed = true })
}

// ReopenLog opens the log anew.
func (t *task) ReopenLog() (uint64, error) {
	t.mu.Lock()
	c := t.container
	t.mu.Unlock()
	if c == nil || c.log == nil {
		return 0, kind.Errorf(kind.State, "the container has no log")
	}
	inode, err := c.log.Reopen()
	return inode, logError(err)
}

// Pids lists the processes of the container.
func (t *task) Pids() ([]int, error) {
	c, err := t.alive()
	if c == nil {
		return nil, err
	}
	return c.cgroups.Pids()
}
