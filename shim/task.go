package shim

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/shim/process"
)

// task is the life of the shim's one container:
//
//	empty -> creating -> created -> running -> exited
//	             |          |                    ^
//	             +----------+--------------------+
//
// updateLocked is the only function that changes the status, and with it the phase.
type task struct {
	dir    rundir.Dir
	log    *slog.Logger
	reaper *reaper.Reaper

	created chan struct{} // closed when create is over, well or badly
	exited  chan struct{} // closed with the exited event
	ended   chan struct{} // closed when nothing is left to do: the process may end

	// opening serialises Start with itself. It is held while the log is opened, which takes
	// as long as its disk wants, so nothing else takes it. It is taken before starting.
	opening sync.Mutex

	// starting serialises Start with a new exec and with the end of init, so that the
	// started event always comes before the exited one. It is taken before mu.
	starting sync.Mutex
	over     bool // guarded by starting: init has ended, or the container was handed over

	// updating is held by an update of resources, and by the removal of what the OCI
	// runtime keeps. It is taken before starting.
	updating sync.Mutex
	// updateAskedAt is when the last update was asked for, on CLOCK_BOOTTIME. It is
	// guarded by updating.
	updateAskedAt time.Duration

	freezer freezer // its saving is taken before mu, its mu after all others

	forgetting sync.Mutex     // of forgetExecs, taken before mu
	serving    sync.WaitGroup // for the clients of sessions
	attached   atomic.Int32   // clients of the container, and those awaited
	execStarts chan struct{}  // full while as many execs as may be are being started

	mu            sync.Mutex
	status        rundir.Status // as in state.json
	requestID     string
	abandoned     bool // ends without a container; no Create any more
	cancelCreate  context.CancelFunc
	createErr     error
	container     *container // from created on
	exit          *rundir.Exit
	stopTimer     *deadline   // from the first Stop on
	pending       unix.Signal // that deliverLater is at
	execs         map[string]*exec
	execSerial    int
	sessions      int // clients that are served or awaited
	sessionSerial int
	leftovers     []*process.Process // ended execs of which something lives on
	changed       chan struct{}      // closed and replaced with each event
}

func newTask(dir rundir.Dir, log *slog.Logger, r *reaper.Reaper) *task {
	return &task{
		dir:        dir,
		log:        log,
		reaper:     r,
		created:    make(chan struct{}),
		exited:     make(chan struct{}),
		ended:      make(chan struct{}),
		execStarts: make(chan struct{}, maxExecStarts),
		status:     rundir.Status{Phase: rundir.PhaseEmpty, BootID: rundir.BootID()},
		execs:      map[string]*exec{},
		changed:    make(chan struct{}),
	}
}

// noEvent says that the status changes and nobody is told: watchers do not wake up.
const noEvent rundir.EventType = ""

// updateLocked changes the status, writes it down and announces the event.
//
// That it cannot be written is no reason to refuse what has happened already:
// memory stays the truth for as long as the shim lives.
func (t *task) updateLocked(event rundir.EventType, change func(*rundir.Status)) {
	change(&t.status)
	if event != noEvent {
		at := time.Now()
		if event == rundir.EventStarted {
			at = t.status.StartedAt
		}
		t.status.Events = append(t.status.Events, rundir.Event{Type: event, At: at})
		t.status.Seq = uint64(len(t.status.Events))
	}
	if err := t.dir.WriteStatus(t.status); err != nil {
		t.log.Error("state record not written", "error", err)
	}
	if event != noEvent {
		close(t.changed)
		t.changed = make(chan struct{})
	}
}

func (t *task) update(event rundir.EventType, change func(*rundir.Status)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.updateLocked(event, change)
}

// reach is for a step after which nothing can fail.
func (t *task) reach(s step.Step) {
	if err := step.Reach(s); err != nil {
		t.log.Error("cannot fail here", "error", err)
	}
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

// Shutdown ends the shim if it has no container. After the end of the container it does
// so by itself.
func (t *task) Shutdown() error {
	if t.abandon() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status.Phase != rundir.PhaseExited {
		return kind.Errorf(kind.State, "the shim keeps container %s, which is %s", t.dir.ID(), t.status.Phase)
	}
	return nil
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

// Kill sends a signal. To a container that has ended it does nothing.
func (t *task) Kill(sig unix.Signal, all bool) error {
	c, err := t.alive()
	if c == nil {
		return err
	}
	if sig == unix.SIGKILL {
		t.noteKill()
		if !all {
			defer c.init.Cgroups.Thaw() // or a frozen init would not die
			return c.init.Signal(sig)
		}
		return c.killTree()
	}
	if all {
		return c.init.SignalTree(sig)
	}
	return c.init.Signal(sig)
}

// noteKill is called before SIGKILL is sent, so that the end is not taken for the OOM
// killer's work.
func (t *task) noteKill() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.status.Killed {
		t.updateLocked(noEvent, func(s *rundir.Status) { s.Killed = true })
	}
}

// kill ends the container now: init, which takes a private pid namespace along,
// then whatever else is in the cgroup.
func (t *task) kill(c *container) {
	t.noteKill()
	if err := c.killTree(); err != nil {
		t.log.Error("container not killed whole", "error", err)
	}
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
	if !force && (phase == rundir.PhaseCreating || phase == rundir.PhaseRunning) {
		return nil, kind.Errorf(kind.State, "cannot delete without force: the container is %s", phase)
	}
	if phase == rundir.PhaseCreating {
		cancel()
		select {
		case <-t.created:
		case <-ctx.Done():
			return nil, fmt.Errorf("the container is not gone yet: %w", ctx.Err())
		}
		t.mu.Lock()
		c = t.container // set if the create was over before it could be cut short
		t.mu.Unlock()
	}
	if c != nil && phase != rundir.PhaseExited {
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
		events, changed := t.eventsAfter(after)
		if len(events) > 0 {
			return events, nil
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

func (t *task) eventsAfter(after uint64) (events []*pb.Event, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for seq := after + 1; after < t.status.Seq && seq <= t.status.Seq; seq++ {
		from := t.status.Events[seq-1]
		e := &pb.Event{
			Seq:  seq,
			At:   pb.TimeOf(from.At),
			Type: pb.EventTypeOf(from.Type),
			Init: pb.ProcessOf(t.status.Init),
		}
		if from.Type == rundir.EventExited {
			e.Exit = pb.ExitOf(t.exit)
		}
		events = append(events, e)
	}
	return events, t.changed
}

// Resize sets the size of a terminal: of an exec, or with an empty execID that of the
// container.
func (t *task) Resize(execID string, width, height uint16) error {
	if execID != "" {
		s, err := t.sessionOf(execID)
		if err == nil && !s.terminal {
			err = kind.Errorf(kind.State, "exec %s has no terminal", execID)
		}
		if err != nil {
			return err
		}
		return pty.Resize(s.files.master, width, height)
	}
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
	t.update(noEvent, func(s *rundir.Status) { s.InputClosed = true })
}

// ReopenLog opens the log anew, unless ctx is over first.
func (t *task) ReopenLog(ctx context.Context) (uint64, error) {
	t.mu.Lock()
	c := t.container
	t.mu.Unlock()
	if c == nil || c.log == nil {
		return 0, kind.Errorf(kind.State, "the container has no log")
	}
	inode, err := c.log.ReopenContext(ctx)
	if err == nil {
		err = step.Reach(step.ShimReopened)
	}
	return inode, logError(err)
}

// Pids lists the processes of the container.
func (t *task) Pids() ([]int, error) {
	c, err := t.alive()
	if c == nil {
		return nil, err
	}
	return c.init.Cgroups.Pids()
}
