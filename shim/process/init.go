package process

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// Create runs the OCI runtime's create and adopts the init that it leaves. After an
// error there may be an init that has to be ended: End.
func (h *Host) Create(ctx context.Context, o runc.CreateOptions) (*Process, error) {
	return h.create(o, func(o runc.CreateOptions) error { return h.Runtime.Create(ctx, h.Dir.ID(), o) })
}

// Restore is Create from what a checkpoint has saved. What comes of it has stopped, and
// goes on with Resume.
func (h *Host) Restore(ctx context.Context, o runc.CreateOptions, from string) (*Process, error) {
	if err := h.configureCRIU(leaveStopped); err != nil {
		return nil, err
	}
	saved := runc.CheckpointOptions{Images: from, Work: h.Dir.Path(rundir.CRIUName)}
	return h.create(o, func(o runc.CreateOptions) error {
		return h.Runtime.Restore(ctx, h.Dir.ID(), o, saved)
	})
}

func (h *Host) create(o runc.CreateOptions, run func(runc.CreateOptions) error) (*Process, error) {
	o.PidFile = h.Dir.Path(rundir.PidfileName)
	// Of an OCI runtime that was killed while it wrote it.
	defer os.Remove(h.Dir.Path("." + rundir.PidfileName))
	release := h.Reaper.Hold()
	defer release()
	if err := run(o); err != nil {
		return nil, err
	}
	p := &Process{host: h}
	err := p.adopt(o.PidFile)
	if err == nil && p.StartTime == 0 {
		err = fmt.Errorf("cannot create %s: its init has ended already", h.Dir.ID())
	}
	if err == nil {
		p.Cgroups, err = cgroup.Of(p.PID)
	}
	return p, err // with the process, which is still to be ended
}

// End kills a process that is not to be started any more, with all that came of it,
// and reaps it. ctx has a deadline.
func (p *Process) End(ctx context.Context) error {
	err := p.KillTree(ctx)
	if _, werr := p.Wait(ctx); werr != nil {
		return errors.Join(err, werr)
	}
	p.Reap()
	return err
}

// Adopt takes over the init that another supervisor has created. It is a child of
// this process, dead or alive, which nobody has reaped.
func (h *Host) Adopt(init rundir.Process, cgroups cgroup.Set) (*Process, error) {
	release := h.Reaper.Hold()
	defer release()
	child, err := h.Reaper.Adopt(init.PID)
	if err != nil {
		return nil, err
	}
	// The pid of a child is its own until it is reaped, which is left to its owner
	// from here on. A zombie is not found, and no stranger.
	if now, err := rundir.FindProcess(init.PID); err == nil && now != init {
		child.Disown()
		return nil, fmt.Errorf("cannot adopt process %d: it started at %d, not at %d",
			init.PID, now.StartTime, init.StartTime)
	}
	return &Process{Process: init, Cgroups: cgroups, host: h, child: child}, nil
}

// Start lets the init run the container's program. With fifo, which HasFifo tells of
// a container that was just created, that takes no OCI runtime.
func (p *Process) Start(ctx context.Context, fifo bool) error {
	id := p.host.Dir.ID()
	if !fifo {
		return p.host.Runtime.Start(ctx, id)
	}
	return p.child.Control(func(pidfd int) error { return p.host.Runtime.Release(ctx, id, pidfd) })
}

// Delete removes what the OCI runtime keeps of the container, which has ended, and its
// cgroups. With cheap that takes no OCI runtime.
func (p *Process) Delete(ctx context.Context, cheap bool) error {
	id := p.host.Dir.ID()
	if !cheap {
		return p.host.Runtime.Delete(ctx, id, true)
	}
	return errors.Join(p.Cgroups.Remove(ctx), os.RemoveAll(p.host.Runtime.StateDir(id)))
}
