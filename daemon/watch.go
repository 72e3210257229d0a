package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

const defaultStopSignal = syscall.SIGTERM

// watch follows one shim until its container has ended. A shim that is stopped
// or slow is asked again; one that is gone is buried.
func (d *Daemon) watch(ctx context.Context, c *container) {
	const first, last = 50 * time.Millisecond, 5 * time.Second
	rec := c.rec.Load()
	dir := d.runDir(rec.ID)
	for wait := first; ; wait = min(2*wait, last) {
		err := c.client.Watch(ctx, 0, func(e client.Event) {
			wait = first
			d.heard(c, e)
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
		held, herr := dir.Held()
		if herr == nil && !held {
			if d.lost(ctx, c, "its shim was killed") {
				return
			}
		}
		d.log.Debug("asking a shim again", "container", rec.ID, "in", wait, "error", errors.Join(err, herr))
		select {
		case <-time.After(wait):
		case <-c.exited:
			return
		case <-ctx.Done():
			return
		}
	}
}

// heard takes an event of a shim.
func (d *Daemon) heard(c *container, e client.Event) {
	d.observe(c, func(s *seen) {
		if e.Init.PID != 0 {
			s.status.Init = e.Init
		}
		switch e.Type {
		case client.Created:
			s.status.Phase = rundir.PhaseCreated
		case client.Started:
			s.status.Phase = rundir.PhaseRunning
			if s.status.StartedAt.IsZero() {
				s.status.StartedAt = e.At
			}
		case client.Exited:
			if e.Exit != nil {
				e.Exit.StartedAt = s.status.StartedAt
			}
			s.status.Phase = rundir.PhaseExited
			s.exit = e.Exit
		}
	})
}

// lost deals with a shim whose lock is free: either the container has ended and
// the record says how, or the shim was killed. It says whether that is settled.
func (d *Daemon) lost(ctx context.Context, c *container, why string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	rec := c.rec.Load()
	err := c.ending.lock(ctx, "container "+shortID(rec.ID))
	if err == nil {
		defer c.ending.unlock()
		if c.seen.Load().exit != nil || d.settled(c) {
			return true
		}
		err = d.bury(ctx, rec, why)
	}
	if err != nil {
		d.log.Error("cannot clean up after a dead shim; trying again", "container", rec.ID, "error", err)
		return false
	}
	return d.settled(c)
}

// endShim ends a shim and its container, whatever state they are in, and sees
// to it that there is an exit record.
func (d *Daemon) endShim(ctx context.Context, c *container, why string) error {
	rec := c.rec.Load()
	if err := c.ending.lock(ctx, "container "+shortID(rec.ID)); err != nil {
		return err
	}
	defer c.ending.unlock()
	if err := shims.End(ctx, d.runDir(rec.ID), c.client); err != nil {
		return err
	}
	return d.bury(ctx, rec, why)
}

// bury ends what a dead shim left running and writes the exit record that the
// shim could not. It holds the shim's lock while doing so, and its caller
// c.ending: to others the lock looks like a shim. With nothing left it does
// nothing; a shim that lives is an error. why is for whoever reads the record.
func (d *Daemon) bury(ctx context.Context, rec *containerRecord, why string) error {
	dir := d.runDir(rec.ID)
	if !exists(string(dir)) {
		return nil
	}
	lock, err := dir.Lock()
	if errors.Is(err, rundir.ErrLocked) {
		return fmt.Errorf("its shim is alive: %w", err)
	}
	if err != nil {
		return err
	}
	defer lock.Close()

	status, serr := dir.ReadStatus() // damaged: the OCI runtime knows the cgroups too
	alive := status.Init.Alive()
	cgroups := cgroup.Set(status.Cgroups)
	kerr := cgroups.Kill(ctx)
	if err := d.runtimeDelete(ctx, rec); err != nil {
		return errors.Join(kerr, err)
	}
	if kerr != nil && serr == nil {
		return kerr
	}
	if err := cgroups.Remove(ctx); err != nil {
		return err
	}
	if _, err := dir.ReadExit(); err == nil {
		return nil
	}
	exit := rundir.Exit{Code: rundir.CodeUnknown, StartedAt: status.StartedAt, ExitedAt: time.Now(), Source: rundir.SourceInferred,
		Reason: rundir.ReasonShimDied, Message: fmt.Sprintf("%s; how the container ended is not known", why)}
	switch {
	case alive:
		exit.Code, exit.Signal = rundir.CodeSignalOffset+int(syscall.SIGKILL), int(syscall.SIGKILL)
		exit.Message = fmt.Sprintf("%s; the container still ran and was killed", why)
	case status.StartedAt.IsZero():
		exit.Reason = rundir.ReasonNeverRan
		exit.Message = why + "; the container was never started"
	}
	d.log.Warn("buried a container", "container", rec.ID, "pod", rec.PodID, "code", exit.Code, "reason", exit.Reason, "message", exit.Message)
	if err := d.writeExit(rec.ID, exit); err != nil {
		// Who needs the record looks for it. A removal goes on without, or a
		// full disk would keep what it has to give back.
		d.log.Warn("cannot write an inferred exit record", "container", rec.ID, "error", err)
	}
	return nil
}

// writeExit writes an inferred exit record to both of its places. The caller
// holds the shim's lock, or knows that the machine was booted since.
func (d *Daemon) writeExit(id string, exit rundir.Exit) error {
	var errs []error
	for _, at := range []struct {
		dir  string
		sync bool
	}{{string(d.runDir(id)), false}, {d.state.Dir(state.Containers, id), true}} {
		if !exists(at.dir) {
			continue
		}
		f, err := rundir.PrepareExit(at.dir, at.sync)
		if err == nil {
			if err = f.Commit(exit); errors.Is(err, rundir.ErrExists) {
				err = nil
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// runtimeDelete has the OCI runtime forget a container whose shim cannot ask it
// to, killing what is left. One that it doesn't know is no error.
func (d *Daemon) runtimeDelete(ctx context.Context, rec *containerRecord) error {
	if !exists(filepath.Join(d.runtimeRoot(), rec.ID)) {
		return nil
	}
	h, err := d.handlerFor(rec.Handler)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r := runc.Runtime{Path: h.Path, Root: d.runtimeRoot(), SystemdCgroup: d.cgroups.Driver() == placement.Systemd}
	return r.Delete(ctx, rec.ID, true)
}
