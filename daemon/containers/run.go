package containers

import (
	"cmp"
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// dyingTimeout is how long SIGKILL may take: an init can be in a call that
// cannot be interrupted.
const dyingTimeout = 2 * time.Minute

// Start runs a created container. Repeating it after a lost answer is harmless.
func (m *Manager) Start(ctx context.Context, id string) error {
	c, err := m.Find(id)
	if err != nil {
		return err
	}
	if err := c.pod.Ready(); err != nil {
		return kind.Errorf(kind.State, "container_id: the pod of %s is not ready", c)
	}
	return c.Start(ctx)
}

// Start is Manager.Start for whoever knows that the pod takes it.
func (c *Container) Start(ctx context.Context) error {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	switch s := c.Seen(); {
	case c.Record().Phase == records.ContainerRemoving:
		return kind.Errorf(kind.State, "container_id: %s is being removed", c)
	case c.unrunnable():
		return kind.Errorf(kind.State, "container_id: %s cannot run: %s", c, s.Exit.Message)
	case s.Exit != nil:
		return kind.Errorf(kind.State, "container_id: %s has ended (%s) and cannot be started again", c, s.Exit.Reason)
	}
	tell := !c.Record().Init && c.Seen().Phase != rundir.PhaseRunning // else it was told
	if tell {
		// After an error it can still be started.
		if err := c.m.Plugins.StartContainer(ctx, c); err != nil {
			return err
		}
	}
	began := time.Now()
	var init rundir.Process
	var at time.Time
	err := c.call(ctx, func() (err error) {
		init, at, err = c.client.Start(ctx)
		return err
	})
	if err == nil {
		err = step.Reach(step.ContainerStarted)
	}
	if err != nil {
		// One that is over in a moment may take its shim along before the
		// answer has come.
		if c.readExit() && !c.Seen().Exit.StartedAt.IsZero() {
			return nil
		}
		return err
	}
	c.observe(func(s *records.Seen) {
		s.Phase, s.Guessed, s.Init, s.StartedAt = rundir.PhaseRunning, false, init, at
	})
	c.m.Log.Info("container started",
		"container", c.ID(),
		"pod", c.Record().PodID,
		"name", c.name(),
		"pid", init.PID,
		"took", time.Since(began).Round(time.Millisecond))
	if tell {
		c.m.Plugins.PostStartContainer(ctx, c)
	}
	return nil
}

// Stop asks a container to end, makes it end after the grace period, and returns
// when it has. The deadline is the shim's: when the caller, or this daemon, goes
// away, the container ends all the same.
func (m *Manager) Stop(ctx context.Context, id string, grace time.Duration) error {
	c, err := m.Find(id)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.stop(ctx, grace, "StopContainer"); err != nil {
		return err
	}
	c.tellEnd(ctx)
	return nil
}

// tellEnd has plugins told of the end of the container, if it has ended, before the call
// is answered that ended it.
func (c *Container) tellEnd(ctx context.Context) {
	if c.Seen().Exit != nil && !c.Record().Init {
		c.m.Plugins.StopContainer(ctx, c)
	}
}

// stop is told who asks, for the journal. It needs no lock: the shim puts stops in order, and a second one must be able
// to shorten the grace of the first one.
func (c *Container) stop(ctx context.Context, grace time.Duration, who string) error {
	switch s := c.Seen(); {
	case s.Exit != nil:
		return nil
	case s.Phase != rundir.PhaseRunning && grace > 0:
		return nil // a created container that is stopped may still be started
	}
	signal := cmp.Or(c.Record().Signal, int(syscall.SIGTERM))
	if grace > 0 {
		c.journal(records.Stopping, time.Now(), "%s: signal %d, and SIGKILL after %s", who, signal, grace)
	} else {
		c.journal(records.Stopping, time.Now(), "%s: SIGKILL at once", who)
	}
	c.interruptCheckpoint(who)
	err := c.call(ctx, func() error { return c.client.Stop(ctx, signal, grace) })
	if err != nil && !c.readExit() {
		return err
	}
	if err := step.Reach(step.ContainerStopping); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, grace+dyingTimeout)
	defer cancel()
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return kind.Errorf(kind.Unavailable, "%s has been told to stop and has not ended yet: %w", c, ctx.Err())
	}
}

// Kill kills a container and waits for its end. A shim that does not answer has
// no say in it: it is killed as well, and the exit record says so.
func (c *Container) Kill(ctx context.Context) error {
	if c.Record().Phase == records.ContainerRemoving {
		return c.Remove(ctx) // or waits for whoever does
	}
	defer c.tellEnd(ctx)
	err := c.stop(ctx, 0, "the stop of its pod")
	if !errors.Is(err, client.ErrUnreachable) {
		return err
	}
	if err := c.end(ctx, "its shim did not answer and was killed"); err != nil {
		return err
	}
	if c.Seen().Exit == nil {
		return err
	}
	return nil
}

// ReopenLog has the shim switch to a new log file.
func (m *Manager) ReopenLog(ctx context.Context, id string) error {
	c, err := m.Find(id)
	if err != nil {
		return err
	}
	if err := c.running(); err != nil {
		return err
	}
	if err := c.call(ctx, func() error { return c.client.ReopenLog(ctx) }); err != nil {
		return err
	}
	return step.Reach(step.ContainerReopened)
}

// call runs a call of the shim. One that lives and has no socket any more is made
// to put it back. A call that may have reached the shim is not repeated.
func (c *Container) call(ctx context.Context, f func() error) error {
	err := f()
	if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	if rerr := c.m.Shims.Reach(ctx, c.dir, c.client); rerr != nil {
		return err
	}
	return f()
}
