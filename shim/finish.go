package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/reaper"
)

const (
	// killTimeout bounds how long processes may take to die of SIGKILL: one in an
	// uninterruptible wait can take for ever.
	killTimeout = 10 * time.Second
	// drainFirst is how long the end of a container may be held back until its
	// output is in the log; drainTotal is when the rest is given up.
	drainFirst = 2 * time.Second
	drainTotal = 30 * time.Second
	// execsTimeout is how long execs may take to notice that the container
	// has gone before they are cut off.
	execsTimeout = 2 * time.Second
)

// finish waits for init to end and does all that follows, in this order: record,
// reap, drain, announce, clean up. It runs once, in its own goroutine, unless the
// container is handed over first.
func (t *task) finish(c *container) {
	end, err := c.init.Wait(c.supervision)
	at := time.Now()
	left := err != nil && c.supervision.Err() != nil
	c.left <- left
	if left {
		return
	}
	// A Start that is under way sees the same end on the pidfd and returns.
	t.starting.Lock()
	t.over = true
	t.starting.Unlock()
	t.freezer.clear() // execs that wait see the end
	t.mu.Lock()
	started, killed, asked := t.status.StartedAt, t.status.Killed, t.status.Stop != nil
	t.mu.Unlock()

	record := judge(end, err, started, c.oom.verdict(end, at, killed, asked))
	record.ExitedAt = at
	t.reach(step.ShimExitSeen)
	durable := t.conclude(c, record)
	t.reach(step.ShimExitRecorded)
	c.init.Reap()
	t.reach(step.ShimReaped)
	t.log.Info("container exited", "code", record.Code, "signal", record.Signal, "reason", record.Reason)

	if !c.traits.PrivatePID {
		// Others of the container outlive its init, and may keep its output open.
		if err := c.killTree(); err != nil {
			t.log.Error("processes left behind", "error", err)
		}
	}
	c.stdio.Finish()
	given := time.After(drainTotal)
	drained := c.stdio.Drained()
	wait(drained, time.After(drainFirst))
	t.announceExit("")
	t.reach(step.ShimExitAnnounced)
	t.mu.Lock()
	if t.stopTimer != nil { // no Stop sets it any more
		t.stopTimer.close()
	}
	t.mu.Unlock()
	t.cleanUp(c)
	t.reach(step.ShimCleaned)
	if !wait(drained, given) {
		t.log.Warn("output given up: something still keeps it open, or the log is too slow",
			"after", drainTotal.String())
	}
	c.close()
	t.waitSessions()
	<-durable
	close(t.ended)
}

// waitSessions waits until the clients of sessions know of the end.
func (t *task) waitSessions() {
	served := make(chan struct{})
	go func() { // at the latest the end of this process ends it
		t.serving.Wait()
		close(served)
	}()
	if !wait(served, time.After(execsTimeout)) {
		t.log.Warn("clients of sessions left behind")
	}
}

func wait(done <-chan struct{}, limit <-chan time.Time) bool {
	select {
	case <-done:
		return true
	case <-limit:
		return false
	}
}

// judge turns the end of init into an exit record.
func judge(end reaper.Status, err error, started time.Time, oom verdict) rundir.Exit {
	e := rundir.Exit{
		Code: end.Code, Signal: int(end.Signal), StartedAt: started,
		OOMKilled: oom.killed, Source: rundir.SourceWaited, Message: oom.says,
	}
	switch {
	case err != nil:
		e.Code, e.Source = rundir.CodeUnknown, rundir.SourceInferred
		e.Reason, e.Message = rundir.ReasonUnknown, err.Error()
	case started.IsZero():
		e.Reason, e.Message = rundir.ReasonNeverRan, "it was killed before it was started"
	case oom.killed:
		e.Reason = rundir.ReasonOOMKilled
	case e.Code == 0:
		e.Reason = rundir.ReasonCompleted
	default:
		e.Reason = rundir.ReasonError
	}
	return e
}

// conclude writes the exit record: the one in the run directory before it
// returns, the durable one behind it, because a disk may be slow. The channel
// is closed when that is there too.
func (t *task) conclude(c *container, record rundir.Exit) (durable <-chan struct{}) {
	t.mu.Lock()
	t.exit = &record
	t.mu.Unlock()
	if c.exit != nil {
		if err := c.exit.Commit(record); err != nil {
			t.log.Error("exit record not written", "error", err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c.durableExit != nil {
			if err := c.durableExit.Commit(record); err != nil {
				t.log.Error("durable exit record not written", "error", err)
			}
		}
	}()
	return done
}

// announceExit is the moment from which on the container has ended for everybody
// else: Wait and Delete answer. message says why it was never created.
func (t *task) announceExit(message string) {
	t.update(rundir.EventExited, func(s *rundir.Status) { s.Phase, s.Error = rundir.PhaseExited, message })
	close(t.exited)
}

// cleanUp removes what the OCI runtime keeps of a container that has ended.
func (t *task) cleanUp(c *container) {
	t.updating.Lock() // an OCI runtime that updates would bring back what is removed
	defer t.updating.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	err := c.init.Cgroups.Kill(ctx)
	t.endExecs(c, execsTimeout)
	if err = errors.Join(err, c.init.Delete(ctx, c.traits.CheapDelete)); err != nil {
		t.log.Error("container not cleaned up", "error", fmt.Errorf("cannot delete %s: %w", t.dir.ID(), err))
	}
}
