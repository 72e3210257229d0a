package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// updateTimeout bounds one run of the OCI runtime: lowering a limit has the kernel
// reclaim memory, and systemd may be slow.
const updateTimeout = time.Minute

// resources is the part of linux.resources that the shim cares about.
type resources struct {
	Memory struct{ Limit *int64 }

	HugepageLimits []struct {
		Pagesize string
		Limit    uint64
	}
	Unified map[string]string
}

// Update sets the resources of the container, all of them or none. update is a
// rundir.Update in JSON; without resources nothing is done but to wait for an update that
// is under way. It owes nothing to the call that asked for it: it ends by itself.
func (t *task) Update(update []byte) error {
	t.updating.Lock()
	defer t.updating.Unlock()
	u := &updating{dir: t.dir, exited: t.exited}
	if err := json.Unmarshal(update, &u.Update); err != nil {
		return kind.Errorf(kind.Invalid, "update: %w", err)
	}
	// Calls of one connection may overtake each other.
	if u.AskedAt < t.updateAskedAt {
		return kind.Errorf(kind.Aborted, "a later update was asked for")
	}
	t.updateAskedAt = u.AskedAt
	if len(u.Resources) == 0 {
		return nil
	}
	// The connection of the caller has broken, and the call is made again: its container may
	// have ended since, which is no reason to refuse what has been done.
	if kept, err := t.dir.ReadUpdate(); err == nil && u.AskedAt != 0 && kept.AskedAt == u.AskedAt {
		return nil
	}
	if err := errors.Join(json.Unmarshal(u.Resources, &u.now), json.Unmarshal(u.Undo, &u.was)); err != nil {
		return kind.Errorf(kind.Invalid, "update: %w", err)
	}
	c, err := t.alive()
	if err != nil {
		return err
	}
	if c == nil {
		return kind.Errorf(kind.State, "cannot update: the container is %s", rundir.PhaseExited)
	}
	u.c = c
	if err := u.check(); err != nil {
		return err
	}
	if err := u.apply(); err != nil {
		t.log.Error("update undone", "error", err)
		if uerr := u.undo(); uerr != nil {
			t.log.Error("something is left of an update", "error", uerr)
		}
		if c.init.Ended() {
			// As text, because the kind of the cause would come first.
			err = kind.Errorf(kind.State, "cannot update: the container has ended: %v", err)
		}
		return err
	}
	t.log.Info("container updated")
	return step.Reach(step.ShimUpdateKept)
}

// updating is an update under way.
type updating struct {
	rundir.Update
	dir      rundir.Dir
	c        *container
	exited   <-chan struct{} // closed when the container has ended
	now, was resources
	before   cgroup.Limits // what the kernel had
}

// check refuses a memory limit below what is used. The kernel of cgroup v2 would kill
// processes until it holds.
func (u *updating) check() error {
	limit, old := u.now.Memory.Limit, u.was.Memory.Limit
	if limit == nil || *limit < 0 || old != nil && *old == *limit {
		return nil
	}
	used, err := u.c.init.Cgroups.MemoryUsed()
	if err == nil && used > uint64(*limit) {
		err = kind.Errorf(kind.State, "the memory limit of %d bytes is below the %d bytes that the container uses",
			*limit, used)
	}
	return err
}

// apply makes the change. What it has done when it fails is for undo to take back.
func (u *updating) apply() (err error) {
	var files []string
	for _, r := range []resources{u.was, u.now} {
		for name := range r.Unified {
			files = append(files, name)
		}
	}
	if u.before, err = u.c.init.Cgroups.Limits(files...); err != nil {
		return err
	}
	if err := u.run(u.Resources); err != nil {
		return err
	}
	// Not every OCI runtime updates them; some set them again as they were at create.
	for _, l := range u.now.HugepageLimits {
		if err := u.c.init.Cgroups.LimitHugePages(l.Pagesize, l.Limit); err != nil {
			return err
		}
	}
	if err := u.c.init.Cgroups.AdjustOOMScore(u.OOMScoreAdj[0], u.OOMScoreAdj[1]); err != nil {
		return err
	}
	if err := step.Reach(step.ShimUpdated); err != nil {
		return err
	}
	return u.dir.WriteUpdate(u.Update)
}

// undo takes back what apply has done. The OCI runtime comes first, for its own record
// and for systemd's; what it cannot express, the files of the kernel say.
func (u *updating) undo() error {
	return errors.Join(
		u.run(u.Undo),
		u.before.Restore(),
		u.c.init.Cgroups.AdjustOOMScore(u.OOMScoreAdj[1], u.OOMScoreAdj[0]),
	)
}

// run has the OCI runtime set resources. The end of the container cuts it short: nothing
// of it is left that could have any, and its removal waits.
func (u *updating) run(resources json.RawMessage) error {
	// The run directory is closed, so the name needs no secret.
	path := u.dir.Path("." + rundir.UpdateName + ".oci")
	if err := os.WriteFile(path, resources, 0o600); err != nil {
		return fmt.Errorf("cannot hand resources to the OCI runtime: %w", err)
	}
	defer os.Remove(path)
	ctx, cancel := context.WithTimeout(context.Background(), updateTimeout)
	defer cancel()
	go func() {
		select {
		case <-u.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	return u.c.host.Runtime.Update(ctx, u.dir.ID(), path)
}
