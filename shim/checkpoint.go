package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/runc"
)

const (
	// freezeTimeout bounds how long processes may take to stop.
	freezeTimeout = 10 * time.Second
	// quietTimeout is how long a freeze waits for execs to end: probes do soon. What an
	// exec has started is no child of init, and CRIU cannot save it.
	quietTimeout = 3 * time.Second
	// maxFreeze bounds how long a container is kept frozen, whatever is asked for.
	maxFreeze = time.Hour
	// stoppedPoll is how often the kernel is asked whether restored processes have stopped.
	stoppedPoll = 2 * time.Millisecond
)

// freezer holds a container still while a checkpoint is made of it.
type freezer struct {
	// saving is held while the container is frozen, while the OCI runtime works on it, and
	// while it is thawed: a thaw that came in between would be undone. It is taken before
	// all other locks.
	saving sync.Mutex

	mu    sync.Mutex
	until time.Time     // zero: nothing is frozen
	timer *time.Timer   // thaws it then
	thaw  chan struct{} // nil: nothing is frozen; closed by whoever thaws
}

// frozen gives what is closed when the container is thawed; nil if it is not frozen.
func (f *freezer) frozen() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.thaw
}

// awaitThaw waits until the container is not frozen.
func (f *freezer) awaitThaw(ctx context.Context) error {
	for thawed := f.frozen(); thawed != nil; thawed = f.frozen() {
		select {
		case <-thawed:
		case <-ctx.Done():
			return kind.Errorf(kind.State, "the container is frozen while a checkpoint is made: %w", ctx.Err())
		}
	}
	return nil
}

// set keeps the container frozen for a time from now on, then calls thaw.
func (f *freezer) set(limit time.Duration, thaw func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.timer != nil {
		f.timer.Stop()
	}
	if f.thaw == nil {
		f.thaw = make(chan struct{})
	}
	f.until, f.timer = time.Now().Add(limit), time.AfterFunc(limit, thaw)
}

// clear forgets that it is frozen, and lets those go on who wait for that.
func (f *freezer) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.thaw == nil {
		return
	}
	f.timer.Stop()
	close(f.thaw)
	f.until, f.timer, f.thaw = time.Time{}, nil, nil
}

// Freeze stops all processes of the container. They go on at Thaw, or after the limit.
func (t *task) Freeze(ctx context.Context, limit time.Duration) error {
	if limit <= 0 {
		return kind.Errorf(kind.Invalid, "limit_ms is 0: the container would stay frozen")
	}
	// A freeze that waited would come when nobody thaws any more.
	if !t.freezer.saving.TryLock() {
		return kind.Errorf(kind.State, "cannot freeze %s: a checkpoint of it is under way", t.dir.ID())
	}
	defer t.freezer.saving.Unlock()
	c, err := t.runs()
	if err != nil {
		return err
	}
	again := t.freezer.frozen() != nil
	// Before it is so, or an exec could start in between.
	t.freezer.set(min(limit, maxFreeze), func() {
		t.log.Warn("container thawed: nobody has done so in time")
		t.Thaw()
	})
	if again {
		return nil
	}
	if err = t.awaitQuiet(ctx); err == nil {
		err = c.checkStopped()
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
		defer cancel()
		err = c.init.Cgroups.Freeze(ctx)
	}
	if err == nil {
		err = step.Reach(step.ShimFrozen)
	}
	if err != nil {
		t.thawLocked()
		return fmt.Errorf("cannot freeze %s: %w", t.dir.ID(), err)
	}
	return nil
}

// runs gives the container if it runs, and is not handed over.
func (t *task) runs() (*container, error) {
	t.starting.Lock()
	over := t.over
	t.starting.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status.Phase != rundir.PhaseRunning {
		return nil, kind.Errorf(kind.State, "the container is %s", t.status.Phase)
	}
	if over {
		return nil, kind.Errorf(kind.State, "the container ends, or is handed over")
	}
	return t.container, nil
}

// checkStopped refuses a container for which CRIU would wait until its time is up: on cgroup
// v1 a process that a signal has stopped does not answer it while it is frozen.
func (c *container) checkStopped() error {
	if !c.init.Cgroups.FreezesOnV1() {
		return nil
	}
	pids, err := c.init.Cgroups.Pids()
	for _, pid := range pids {
		if p, perr := rundir.FindProcess(pid); perr == nil && p.Stopped() {
			return kind.Errorf(kind.State, "process %d was stopped by a signal, and CRIU cannot save it on cgroup v1: "+
				"send it SIGCONT first", pid)
		}
	}
	return err
}

// awaitQuiet waits until no exec runs. None is started meanwhile.
func (t *task) awaitQuiet(ctx context.Context) error {
	late := time.After(quietTimeout)
	t.mu.Lock()
	var running []*exec
	for _, e := range t.execs {
		running = append(running, e)
	}
	t.mu.Unlock()
	for _, e := range running {
		select {
		case <-e.done:
		case <-late:
			return kind.Errorf(kind.State, "%d execs run in the container, the first of them %s: end them first",
				len(running), e.id)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Thaw lets a container run that Freeze has frozen, when the OCI runtime is done with it, and
// after a Freeze that is under way.
func (t *task) Thaw() {
	t.freezer.saving.Lock()
	defer t.freezer.saving.Unlock()
	t.thawLocked()
}

// thawLocked is Thaw. The caller holds saving.
func (t *task) thawLocked() {
	t.mu.Lock()
	c := t.container
	t.mu.Unlock()
	if t.freezer.frozen() == nil {
		return
	}
	c.init.Cgroups.Thaw()
	t.freezer.clear()
}

// Checkpoint saves the processes of a frozen container in an empty directory. The OCI
// runtime is not stopped half way by a caller that goes away: it has its hands in the
// processes. Its time is up when that of the freeze is.
func (t *task) Checkpoint(dir string) error {
	if !filepath.IsAbs(dir) {
		return kind.Errorf(kind.Invalid, "dir %q is not absolute", dir)
	}
	t.freezer.saving.Lock()
	defer t.freezer.saving.Unlock()
	t.freezer.mu.Lock()
	until := t.freezer.until
	t.freezer.mu.Unlock()
	// Before the directory: the call is repeated when the end of the container cuts it short.
	c, err := t.runs()
	if err == nil && until.IsZero() {
		err = kind.Errorf(kind.State, "cannot checkpoint %s: it is not frozen", t.dir.ID())
	}
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		err = unix.ENOTEMPTY
	}
	if err != nil {
		return kind.Errorf(kind.Invalid, "dir %s is no empty directory: %w", dir, err)
	}
	ctx, cancel := context.WithDeadline(context.Background(), until)
	defer cancel()
	// Of a container that has ended there is nothing in which the OCI runtime has its hands.
	defer context.AfterFunc(c.life, cancel)()
	if err := c.host.Checkpoint(ctx, dir); err != nil {
		return kind.As(kind.State, err)
	}
	return step.Reach(step.ShimSaved)
}

// checkRestore refuses a spec with which CRIU would let restored processes run: it has to
// name our configuration.
func (m *making) checkRestore() error {
	want := m.task.dir.Path(rundir.CRIUConfigName)
	if m.launch.RestoreDir == "" || m.spec.Annotations[rundir.CRIUConfigAnnotation] == want {
		return nil
	}
	return kind.Errorf(kind.Invalid, "spec.annotations[%s] is not %s", rundir.CRIUConfigAnnotation, want)
}

// createInit has the OCI runtime make the container, anew or from a checkpoint.
func (m *making) createInit(ctx context.Context, o runc.CreateOptions) (err error) {
	if m.launch.RestoreDir == "" {
		m.c.init, err = m.c.host.Create(ctx, o)
		return err
	}
	if m.c.init, err = m.c.host.Restore(ctx, o, m.launch.RestoreDir); err != nil {
		return err
	}
	m.c.traits.Restored = true
	return m.awaitStopped(ctx)
}

// awaitStopped makes sure that nothing of a restored container runs before its start. A
// process may not have got as far as the stop that waits for it.
func (m *making) awaitStopped(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	for {
		pids, err := m.c.init.Cgroups.Pids()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(pids, func(pid int) bool {
			p, err := rundir.FindProcess(pid)
			return err == nil && !p.Stopped()
		})
		if i < 0 {
			return nil
		}
		select {
		case <-time.After(stoppedPoll):
		case <-ctx.Done():
			return fmt.Errorf("cannot restore %s: process %d runs before the start", m.task.dir.ID(), pids[i])
		}
	}
}
