package containers

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// An update of resources is the shim's: it sets all of them or none, and writes down
// which hold. The daemon's record says before that there may be one, so that a daemon
// that does not know how it ended asks the shim, and reads it.

// updateTimeout bounds how long the end of an update is waited for whose answer did not
// come.
const updateTimeout = 10 * time.Second

// Update changes the resources of a container that has not ended: all that r sets, or
// nothing. Plugins may change r.
func (m *Manager) Update(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources) error {
	c, err := m.Find(id)
	if err != nil {
		return err
	}
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	// What is refused is refused first: plugins act on what they are told.
	if _, err := c.changeLocked(ctx, r); err != nil {
		return err
	}
	if r, err = m.Plugins.UpdateContainer(ctx, c, r); err != nil {
		return err
	}
	if err := c.setLocked(ctx, r); err != nil {
		return err
	}
	m.Plugins.PostUpdateContainer(ctx, c)
	return nil
}

// UpdateAsPluginWants is Update for a plugin: the others are not asked.
func (m *Manager) UpdateAsPluginWants(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources) error {
	c, err := m.Find(id)
	if err != nil {
		return err
	}
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	return c.setLocked(ctx, r)
}

// setLocked sets all that r sets, or nothing. The caller holds op.
func (c *Container) setLocked(ctx context.Context, r *runtimeapi.LinuxContainerResources) error {
	change, err := c.changeLocked(ctx, r)
	if err != nil {
		return err
	}
	for _, w := range change.Warnings {
		c.m.Log.Debug("update adapted to this machine", "container", c.ID(), "warning", w)
	}
	return c.updateLocked(ctx, change)
}

// changeLocked gives the change that r asks for, or says why there is none. The caller
// holds op.
func (c *Container) changeLocked(ctx context.Context, r *runtimeapi.LinuxContainerResources) (*spec.Change, error) {
	switch rec := c.Record(); {
	case rec.Phase == records.ContainerRemoving:
		return nil, kind.Errorf(kind.State, "container_id: %s is being removed", c)
	case c.Seen().Exit != nil:
		return nil, kind.Errorf(kind.State, "container_id: %s has ended", c)
	case rec.Updating:
		if err := c.endUpdateLocked(ctx); err != nil {
			return nil, err
		}
	}
	return spec.Update(c.m.Host.Now(), c.Record().Config.M.GetLinux().GetResources(), r)
}

// updateLocked has the shim make a change. The caller holds op.
func (c *Container) updateLocked(ctx context.Context, change *spec.Change) error {
	u, err := updateOf(change)
	if err != nil {
		return err
	}
	if err := c.save(func(r *records.Container) { r.Updating = true }); err != nil {
		return err
	}
	err = step.Reach(step.ContainerUpdating)
	if err == nil {
		err = c.call(ctx, func() error { return c.client.Update(ctx, *u) })
		err = spec.Blame("linux", change.Wanted, err)
	}
	if err == nil {
		err = step.Reach(step.ContainerUpdated)
	}
	if err != nil {
		c.afterFailedUpdateLocked(ctx, err)
		return err
	}
	c.noteUpdateLocked(func(r *records.Container) error { return r.SetResources(change.Wanted) })
	return nil
}

func updateOf(change *spec.Change) (*rundir.Update, error) {
	u := &rundir.Update{
		OOMScoreAdj: change.OOMScoreAdj,
		AskedAt:     rundir.BootTime(), // the same however often the shim has to be called
		Record:      rundir.Opaque{TypeURL: records.ResourcesURL},
	}
	record, err := records.Encoded(change.Wanted)
	if err == nil {
		u.Record.Value, err = record.MarshalJSON()
	}
	if err == nil {
		u.Resources, err = json.Marshal(change.Resources)
	}
	if err == nil {
		u.Undo, err = json.Marshal(change.Undo)
	}
	return u, err
}

// afterFailedUpdateLocked finds out what holds after an update that failed with err. A
// shim that does not answer is asked in the background. The caller holds op.
func (c *Container) afterFailedUpdateLocked(ctx context.Context, err error) {
	if !errors.Is(err, client.ErrUnreachable) && !errors.Is(err, context.Canceled) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateTimeout)
		defer cancel()
		err = c.endUpdateLocked(ctx)
	}
	if err != nil {
		c.m.Log.Warn("how an update ended is not known yet; asking the shim again", "container", c.ID(), "error", err)
		c.m.EndUpdate(c)
	}
}

// EndUpdate finds out in the background how an update ended that an earlier daemon, or an
// earlier call, was not told of.
func (m *Manager) EndUpdate(c *Container) {
	m.Go(func(ctx context.Context) {
		const first, last = 50 * time.Millisecond, 10 * time.Second
		for wait := first; ; wait = min(2*wait, last) {
			err := c.endUpdate(ctx)
			if err == nil || ctx.Err() != nil {
				return
			}
			m.Log.Debug("the end of an update is still not known", "container", c.ID(), "error", err)
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
	})
}

func (c *Container) endUpdate(ctx context.Context) error {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	rec := c.Record()
	if rec.Phase == records.ContainerRemoving || !rec.Updating {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, updateTimeout)
	defer cancel()
	return c.endUpdateLocked(ctx)
}

// endUpdateLocked waits for the shim to be done with an update and reads what holds. A
// container that has ended needs no shim for that. The caller holds op.
func (c *Container) endUpdateLocked(ctx context.Context) error {
	if c.Seen().Exit == nil {
		err := c.call(ctx, func() error { return c.client.Update(ctx, rundir.Update{}) })
		if err != nil && !c.readExit() {
			return err
		}
	}
	c.noteUpdateLocked(func(r *records.Container) error { return r.TakeUpdate(c.dir) })
	return nil
}

// noteUpdateLocked writes down that no update is under way, and what holds. The caller
// holds op.
func (c *Container) noteUpdateLocked(take func(*records.Container) error) {
	now := *c.Record()
	if err := take(&now); err != nil {
		c.m.Log.Warn("cannot read what an update has set", "container", now.ID, "error", err)
	}
	c.note(func(r *records.Container) { r.Updating, r.Config = false, now.Config })
}
