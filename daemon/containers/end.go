package containers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// end ends a shim and its container, whatever state they are in, and sees to it
// that there is an exit record. why is for whoever reads that.
func (c *Container) end(ctx context.Context, why string) error {
	if err := c.ending.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.ending.Unlock()
	if err := c.m.Shims.End(ctx, c.dir, c.client); err != nil {
		return err
	}
	return c.buryLocked(ctx, why)
}

// buryLocked ends what a dead shim left running and writes the exit record that
// the shim could not. With nothing left it does nothing; a shim that lives is an
// error. The caller holds c.ending; the shim's lock is held meanwhile, so that no
// other shim can come, and to others the lock looks like a shim.
func (c *Container) buryLocked(ctx context.Context, why string) error {
	rec := c.Record()
	files, k, err := c.m.Ask(rec.ID, rec)
	switch {
	case err != nil:
		return err
	case k.Shim:
		return fmt.Errorf("its shim is alive: %w", rundir.ErrLocked)
	}
	if c.m.State.HasRunDir(state.Containers, rec.ID) {
		lock, err := c.dir.Relock()
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if err := c.killRest(ctx, files); err != nil {
		return err
	}
	if err := step.Reach(step.ContainerBuried); err != nil {
		return err
	}
	if rec.Phase == records.ContainerCreating {
		return nil
	}
	exit := files.Exit
	if exit == nil {
		exit = c.infer(files, k, why)
	}
	c.observe(func(s *records.Seen) { s.Phase, s.Exit = rundir.PhaseExited, exit })
	return nil
}

// infer makes the exit record that the shim could not write. Where no disk takes it,
// it holds all the same: what the container has is to be given back, and the next
// start infers it once more.
func (c *Container) infer(files records.Files, k records.Kernel, why string) *rundir.Exit {
	rec := c.Record()
	exit := records.Infer(files, k, why)
	c.m.Log.Warn("buried a container",
		"container", rec.ID,
		"pod", rec.PodID,
		"code", exit.Code,
		"reason", exit.Reason,
		"message", exit.Message)
	if err := c.m.WriteExit(rec.ID, exit); err != nil {
		c.m.Log.Warn("cannot write an inferred exit record", "container", rec.ID, "error", err)
	}
	return &exit
}

// killRest kills all processes of a container that has no shim, and has the OCI
// runtime forget it.
func (c *Container) killRest(ctx context.Context, f records.Files) error {
	rec := c.Record()
	// First an OCI runtime that the shim has left at work: it could make a process more, or a cgroup
	// that is not looked for any more.
	errs := []error{c.m.Cgroups.OfShim(rec.ID).Kill(ctx)}
	groups := c.m.cgroups(rec.ID, f, rec)
	for _, g := range groups {
		errs = append(errs, g.Kill(ctx))
	}
	if err := c.m.Runtimes.Delete(ctx, rec.Handler, rec.ID); err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, g := range groups {
		errs = append(errs, g.Remove(ctx))
	}
	return errors.Join(errs...)
}

// WriteExit writes an inferred exit record to its two places. The caller holds
// the shim's lock, or knows that the machine was booted since.
func (m *Manager) WriteExit(id string, exit rundir.Exit) error {
	var errs []error
	for _, at := range []struct {
		dir  string
		sync bool
	}{
		{string(m.dir(id)), false},
		{m.State.Dir(state.Containers, id), true},
	} {
		f, err := rundir.PrepareExit(at.dir, at.sync)
		if err == nil {
			err = f.Commit(exit)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, rundir.ErrExists) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
