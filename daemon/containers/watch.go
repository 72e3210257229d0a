package containers

import (
	"context"
	"errors"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Follow watches the shim of a container in the background until the container
// has ended.
func (m *Manager) Follow(c *Container) { m.Go(c.watch) }

// watch follows one shim. A shim that is stopped or slow is asked again; one that
// is gone is buried.
func (c *Container) watch(ctx context.Context) {
	const first, last = 50 * time.Millisecond, 5 * time.Second
	for wait := first; ; wait = min(2*wait, last) {
		c.askPhase(ctx)
		err := c.client.Watch(ctx, 0, func(e client.Event) {
			wait = first
			c.take(e)
		})
		if ctx.Err() != nil {
			return
		}
		select {
		case <-c.exited:
			c.client.Close() // the shim need not wait for us
			return
		default:
		}
		alive, aerr := c.m.Shims.Alive(c.dir)
		switch {
		case aerr == nil && alive:
			aerr = c.m.Shims.Reach(ctx, c.dir, c.client)
		case aerr == nil && c.concludeWithout(ctx):
			return
		}
		c.m.Log.Debug("asking a shim again", "container", c.ID(), "in", wait, "error", errors.Join(err, aerr))
		select {
		case <-time.After(wait):
		case <-c.exited:
			return
		case <-ctx.Done():
			return
		}
	}
}

// askPhase asks the shim for a phase that was guessed. Its events would tell it, too,
// but one after the other, and a container that runs would look created in between.
func (c *Container) askPhase(ctx context.Context) {
	if !c.Seen().Guessed {
		return
	}
	now, err := c.client.State(ctx)
	if err != nil || now.Status.Phase == rundir.PhaseExited { // the events tell how
		return
	}
	c.observe(func(s *records.Seen) {
		if s.Guessed { // nobody was faster
			s.Phase, s.Guessed, s.Init, s.StartedAt = now.Status.Phase, false, now.Status.Init, now.Status.StartedAt
		}
	})
}

// take takes an event of the shim in.
func (c *Container) take(e client.Event) {
	c.observe(func(s *records.Seen) {
		if e.Init.PID != 0 {
			s.Init = e.Init
		}
		switch e.Type {
		case client.Created:
			s.Phase = rundir.PhaseCreated
		case client.Started:
			s.Phase, s.Guessed = rundir.PhaseRunning, false
			if s.StartedAt.IsZero() {
				s.StartedAt = e.At
			}
		case client.Exited:
			e.Exit.StartedAt = s.StartedAt
			s.Phase, s.Exit = rundir.PhaseExited, e.Exit
		}
	})
}

// concludeWithout deals with a shim that is gone: either the container has ended
// and the record says how, or the shim was killed. It says whether the end is
// known now.
func (c *Container) concludeWithout(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, eraseTimeout)
	defer cancel()
	err := c.ending.Lock(ctx, c.String())
	if err == nil {
		defer c.ending.Unlock()
		if c.Seen().Exit != nil || c.readExit() {
			return true
		}
		err = c.buryLocked(ctx, "its shim was killed")
	}
	if err != nil {
		c.m.Log.Error("cannot clean up after a dead shim; trying again", "container", c.ID(), "error", err)
		return false
	}
	return c.Seen().Exit != nil
}
