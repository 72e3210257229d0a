package containers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Remove removes a container, running or not, and all that was its.
func (m *Manager) Remove(ctx context.Context, id string) error {
	c, err := m.Find(id)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.Remove(ctx)
}

// Remove is Manager.Remove. It fails only while the container cannot be ended: what else
// cannot be given back is owed, and tried again in the background, once the record says so.
func (c *Container) Remove(ctx context.Context) error {
	if c.interrupt.Load() != nil && c.Record().Phase != records.ContainerCreating {
		c.stop(ctx, 0, "its removal") // or the checkpoint would keep the lock; what fails is done again below
	}
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	rec := c.Record()
	if c.removed || !rec.Init && !c.m.known(c) {
		return nil // another call has removed it; the next init of a pod has the same id
	}
	unnoted := c.note(func(r *records.Container) { r.Phase = records.ContainerRemoving })
	if err := step.Reach(step.ContainerRemoving); err != nil {
		return err
	}
	if c.Seen().Exit == nil && !rec.Init {
		c.journal(records.Stopping, time.Now(), "its removal: SIGKILL at once")
	}
	if err := c.end(ctx, "it was removed"); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot remove %s: %w", c, err))
	}
	c.m.tellRemoved(ctx, c)
	if err := c.giveBack(ctx); err != nil {
		if unnoted != nil { // the next start would serve it again
			return kind.As(kind.Unavailable, fmt.Errorf("cannot remove %s: %w", c, errors.Join(err, unnoted)))
		}
		c.m.owe(c, err)
	}
	c.removed = true
	c.m.forget(c)
	c.announce(deleted + 1)
	c.m.Images.Unwanted(rec.AllLayers()) // it may have been the last one that used a removed image
	if !rec.Init {
		c.m.Claims.Release(NameOf(rec).Name, rec.ID)
		c.m.Log.Info("container removed", "container", rec.ID, "pod", rec.PodID, "name", c.name())
	}
	return nil
}

// tellRemoved tells plugins of a container that goes.
func (m *Manager) tellRemoved(ctx context.Context, c *Container) {
	if !c.Record().Init {
		m.Plugins.RemoveContainer(ctx, c)
	}
}

// Erase removes all trace of a container that nobody knows: of a creation that
// failed anywhere, or of a removal that was cut short. Each step looks whether it
// is due.
func (c *Container) Erase(ctx context.Context) error {
	if err := c.end(ctx, "it was removed"); err != nil {
		return err
	}
	return c.giveBack(ctx)
}

// Undo is Erase for a creation that was cut short. What cannot be given back now is tried again
// in the background, and by the next start.
func (c *Container) Undo(ctx context.Context) error {
	err := c.Erase(ctx)
	if err != nil {
		c.m.owe(c, err)
	}
	return err
}

// GiveBack keeps a container that a daemon before has removed, and gives the function that
// gives back what is left of it.
func (m *Manager) GiveBack(c *Container) func(context.Context) {
	m.mu.Lock()
	m.owed[c.ID()] = c
	m.mu.Unlock()
	return func(ctx context.Context) {
		if c.Undo(ctx) == nil {
			m.paid(c)
		}
		m.tellRemoved(ctx, c)
		c.announce(deleted + 1)
	}
}

// owes says whether something is left of a removed container. Nothing else can be made under
// its id meanwhile: it would be taken away with what is left.
func (m *Manager) owes(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.owed[id] != nil
}

// paid forgets a container of which nothing is left.
func (m *Manager) paid(c *Container) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.owed, c.ID())
}

// giveBack gives back what a container holds that has ended, its record last. All
// steps are tried, also after one has failed; only the directories stay while
// something is mounted in them.
func (c *Container) giveBack(ctx context.Context) error {
	if err := step.Reach(step.ContainerEnded); err != nil {
		return err
	}
	c.client.Close()
	if !c.readExit() {
		c.observe(func(s *records.Seen) {
			s.Exit = &rundir.Exit{
				Code:     rundir.CodeUnknown,
				Source:   rundir.SourceInferred,
				Reason:   rundir.ReasonNeverRan,
				ExitedAt: time.Now(),
			}
		})
	}
	c.dropFiles()
	// Neither this container nor its pod is made anew from it, were their records damaged.
	os.Remove(c.dir.Path(rundir.LaunchName))
	err := errors.Join(c.unmount(), c.m.Cgroups.RemoveShim(ctx, c.ID()))
	// Fails, and follows nothing, while something is mounted below.
	if rerr := c.m.State.RemoveRunDir(state.Containers, c.ID()); err != nil || rerr != nil {
		return errors.Join(err, rerr)
	}
	if err := step.Reach(step.ContainerErased); err != nil {
		return err
	}
	return c.m.State.Remove(state.Containers, c.ID())
}

func (c *Container) unmount() error {
	errs := []error{c.m.Roots.RemoveWay(c.ID()), c.m.Roots.Unmount(c.Layer())}
	for _, name := range []string{imagesName, volumesName, rundir.CRIUName} { // CRIU leaves mounts when it is killed
		errs = append(errs, c.m.Roots.UnmountBelow(c.dir.Path(name)))
	}
	for _, name := range []string{rundir.RootfsName, pidName} {
		errs = append(errs, c.m.Roots.Unmount(c.dir.Path(name)))
	}
	return errors.Join(errs...)
}

// owe keeps a container of which something could not be given back, and tries
// again until it can. Its record says removing, or still creating: the next start
// goes on with it.
func (m *Manager) owe(c *Container, err error) {
	m.mu.Lock()
	m.owed[c.ID()] = c
	m.mu.Unlock()
	m.Log.Error("something is left of a removed container; trying again", "container", c.ID(), "error", err)
	m.Go(func(ctx context.Context) {
		const first, last = time.Second, 10 * time.Minute
		for wait := first; ; wait = min(2*wait, last) {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
			ctx, cancel := context.WithTimeout(ctx, eraseTimeout)
			err := c.Erase(ctx)
			cancel()
			if err == nil {
				break
			}
			m.Log.Debug("something is still left of a removed container", "container", c.ID(), "error", err)
		}
		m.paid(c)
		m.Log.Info("gave back the rest of a removed container", "container", c.ID())
		m.Images.Unwanted(c.Record().AllLayers())
	})
}
