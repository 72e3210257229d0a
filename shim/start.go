package shim

import (
	"context"
	"errors"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/runc"
)

// startTimeout bounds how long init may take to answer. It waits for nothing but
// the shim, so only a frozen or starved one takes longer than a moment.
const startTimeout = time.Minute

// Start lets init run the container's program, once: a repeated call gets the result
// of the first one. While it waits for the disk of the log, the container can be ended.
func (t *task) Start() (rundir.Process, time.Time, error) {
	t.opening.Lock()
	defer t.opening.Unlock()
	t.mu.Lock()
	c, s := t.container, t.status
	t.mu.Unlock()
	if !s.StartedAt.IsZero() {
		return s.Init, s.StartedAt, nil
	}
	if s.Phase != rundir.PhaseCreated {
		return s.Init, s.StartedAt, kind.Errorf(kind.State, "cannot start: the container is %s", s.Phase)
	}
	var logErr error
	if c.log != nil && !c.init.Ended() { // there is none of a container that was never started
		_, logErr = c.log.Reopen()
	}
	t.starting.Lock()
	defer t.starting.Unlock()
	if t.over {
		return s.Init, s.StartedAt, kind.Errorf(kind.State, "cannot start: %w", runc.ErrNotStartable)
	}
	if logErr != nil {
		return s.Init, s.StartedAt, logError(logErr)
	}
	// A caller that goes away does not stop a start half way.
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	at := time.Now()
	err := c.start(ctx)
	if errors.Is(err, runc.ErrNotStartable) {
		err = kind.As(kind.State, err)
	}
	if err != nil {
		return s.Init, s.StartedAt, err
	}
	t.reach(step.ShimReleased)
	t.update(rundir.EventStarted, func(s *rundir.Status) {
		s.Phase, s.StartedAt = rundir.PhaseRunning, at
	})
	t.log.Info("container started", "pid", s.Init.PID)
	return s.Init, at, step.Reach(step.ShimStarted)
}

// start lets the processes run that the create has left waiting.
func (c *container) start(ctx context.Context) error {
	if c.traits.Restored {
		return c.init.Resume(ctx)
	}
	return c.init.Start(ctx, c.traits.Fifo)
}
