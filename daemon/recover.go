package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Recovery reads files only: what is wanted from the daemon's records, what is
// from the files of the shims. Everything that takes time, or another process,
// goes on behind a daemon that already serves.

// recovery counts what the start found, for its one line of log.
type recovery struct {
	pods, containers, running, rebuilt, undone, quarantined int
}

func (d *Daemon) recover() (r recovery, err error) {
	podIDs, err := d.state.IDs(state.Pods)
	if err != nil {
		return r, err
	}
	containerIDs, err := d.state.IDs(state.Containers)
	if err != nil {
		return r, err
	}
	var pods []*podRecord
	var unknown []string // pods without a record
	for _, id := range podIDs {
		if rec := d.loadPod(id, &r); rec != nil {
			pods = append(pods, rec)
		} else {
			unknown = append(unknown, id)
		}
	}
	var containers []*containerRecord
	kept := map[string]*podRecord{} // the pods that shims remember
	for _, id := range containerIDs {
		rec, pod := d.loadContainer(id, &r)
		if rec == nil {
			continue
		}
		containers = append(containers, rec)
		if pod != nil && rec.Phase != containerCreating {
			kept[pod.ID] = pod
		}
	}
	// A pod whose records are both gone comes back with its containers.
	for _, rec := range pods {
		delete(kept, rec.ID)
	}
	for _, rec := range kept {
		rec.Phase = podReady // it was, or nothing would have been created in it
		d.log.Warn("rebuilt a pod from what a shim kept", "pod", rec.ID)
		d.restore(state.Pods, rec.ID, rec, &r)
		pods = append(pods, rec)
	}
	var undo []func(context.Context)
	undo = append(undo, d.adoptContainers(containers, &r)...)
	undo = append(undo, d.adoptPods(pods, &r)...) // after their containers
	for _, id := range unknown {
		if kept[id] == nil {
			undo = append(undo, func(ctx context.Context) { d.eraseUnknownPod(ctx, id) })
		}
	}
	r.pods, r.containers = len(d.pods), len(d.containers)
	for _, c := range d.containers {
		if c.seen.Load().exit == nil {
			r.running++
			d.background(func(ctx context.Context) { d.watch(ctx, c) })
		}
	}
	d.background(func(ctx context.Context) {
		for _, f := range undo {
			f(ctx)
		}
		d.state.Sweep()
		d.collect(nil)
	})
	return r, nil
}

// loadPod reads the record of a pod, or its copy. Without either there is no
// such pod any more: nil.
func (d *Daemon) loadPod(id string, r *recovery) *podRecord {
	var rec podRecord
	err := d.state.Get(state.Pods, id, &rec)
	if err == nil && rec.ID != id {
		err = errWrongID(rec.ID)
	}
	if err == nil {
		return &rec
	}
	if !errors.Is(err, fs.ErrNotExist) {
		r.quarantined++
		d.state.QuarantineRecord(state.Pods, id, err)
	}
	rec = podRecord{}
	if cerr := d.state.GetCopy(state.Pods, id, &rec); cerr == nil && rec.ID == id {
		d.log.Warn("restored a pod from the copy of its record", "pod", id)
		d.restore(state.Pods, id, &rec, r)
		return &rec
	}
	return nil
}

// eraseUnknownPod gives back what a pod held whose records are gone: all of it
// is named after its id, and the plugins' cache knows its addresses.
func (d *Daemon) eraseUnknownPod(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	ns := d.net.Pinned(id)
	p := newPod(&podRecord{ID: id, BootID: rundir.BootID(), Phase: podStopping, Namespaces: ns,
		Network: &podNetwork{Phase: netAdding, Attachment: network.Attachment{ID: id, Netns: ns.Net}}})
	if err := d.erasePod(ctx, p); err != nil {
		d.log.Error("cannot remove what is left of a pod", "pod", id, "error", err)
		return
	}
	d.log.Warn("removed what was left of a pod without a record", "pod", id)
}

// restore writes a record that was found elsewhere.
func (d *Daemon) restore(k state.Kind, id string, rec any, r *recovery) {
	r.rebuilt++
	err := d.state.Create(k, id)
	if err == nil {
		err = d.state.Put(k, id, rec, false)
	}
	if err != nil {
		d.log.Error("cannot write a rebuilt record", "kind", k, "id", id, "error", err)
	}
}

// loadContainer reads the record of a container, or makes one from what its
// shim keeps. The second result is the pod as the shim keeps it.
func (d *Daemon) loadContainer(id string, r *recovery) (*containerRecord, *podRecord) {
	dir := d.runDir(id)
	var pod *podRecord
	var kept *containerRecord
	launch, lerr := dir.ReadLaunch()
	if lerr == nil {
		var p podRecord
		if json.Unmarshal(launch.Sandbox.Value, &p) == nil && p.ID != "" {
			pod = &p
		}
		var c containerRecord
		if json.Unmarshal(launch.Container.Value, &c) == nil && c.ID == id {
			kept = &c
		}
	}
	var rec containerRecord
	err := d.state.Get(state.Containers, id, &rec)
	if err == nil && rec.ID != id {
		err = errWrongID(rec.ID)
	}
	if err == nil {
		return &rec, pod
	}
	if !errors.Is(err, fs.ErrNotExist) {
		r.quarantined++
		d.state.QuarantineRecord(state.Containers, id, err)
	}
	if kept != nil {
		d.log.Warn("rebuilt a container from what its shim kept", "container", id)
		d.restore(state.Containers, id, kept, r)
		return kept, pod
	}
	held, herr := dir.Held()
	if held || herr != nil {
		// A live shim whose files are damaged: never killed on a guess, though
		// nobody can say what it keeps. Its layers stay while this daemon lives.
		d.pin(rootfs.LayersAt(dir.Path(rundir.RootfsName)))
		d.log.Error("a live shim has no readable record of its container; it is left alone", "container", id, "records", errors.Join(err, lerr, herr))
		return nil, nil
	}
	// Nobody else looks at this directory: it is in no map.
	d.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		rec := &containerRecord{ID: id, Handler: d.cfg.DefaultRuntime, BootID: rundir.BootID()}
		if err := d.eraseContainer(ctx, newContainer(rec, dir, seen{})); err != nil {
			d.log.Error("cannot remove what is left of a container", "container", id, "error", err)
		}
	})
	return nil, nil
}

func errWrongID(id string) error { return errorf(record.ErrDamaged, "it is the record of %q", id) }

// adoptContainers takes the containers in, and returns what there is to undo.
func (d *Daemon) adoptContainers(recs []*containerRecord, r *recovery) (undo []func(context.Context)) {
	// Of two with one name the live one has it, then the younger; last of all one
	// that was never finished.
	live := map[string]bool{}
	for _, rec := range recs {
		live[rec.ID], _ = d.runDir(rec.ID).Held()
	}
	rank := func(rec *containerRecord) int {
		switch {
		case rec.Phase == containerCreating:
			return 2
		case live[rec.ID]:
			return 0
		}
		return 1
	}
	slices.SortFunc(recs, func(a, b *containerRecord) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), b.CreatedAt.Compare(a.CreatedAt))
	})
	for _, rec := range recs {
		c := newContainer(rec, d.runDir(rec.ID), d.look(rec))
		name := containerName(rec.PodID, rec.Config.M.GetMetadata())
		if rec.Phase == containerCreating && rec.Init {
			// It has no name that the next one could wait for, and that one has
			// the same id: it has to find this one first.
			r.undone++
			rec.Phase = containerRemoving
		}
		if rec.Phase == containerCreating {
			r.undone++
			undo = append(undo, d.undoing(name, rec.PodID, rec.ID, func(ctx context.Context) error {
				return d.eraseContainer(ctx, c)
			}))
			continue
		}
		if !rec.Init && !d.settle(name, rec.PodID, rec.ID, rec.Fingerprint) {
			d.log.Error("two containers have one name", "name", name, "container", rec.ID, "live", live[rec.ID])
			if !live[rec.ID] {
				r.quarantined++
				d.state.Quarantine(d.state.Dir(state.Containers, rec.ID), errorf(ErrExists, "%s exists twice", name))
				undo = append(undo, func(ctx context.Context) {
					if err := d.eraseContainer(ctx, c); err != nil {
						d.log.Error("cannot remove the run directory of a quarantined container", "container", rec.ID, "error", err)
					}
				})
				continue
			}
		}
		d.containers[rec.ID] = c
		if rec.Phase == containerRemoving {
			undo = append(undo, func(ctx context.Context) {
				ctx, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				if err := d.removeContainer(ctx, c); err != nil {
					d.log.Error("cannot finish a removal", "container", rec.ID, "error", err)
				}
			})
		}
	}
	return undo
}

// adoptPods does the same for pods.
func (d *Daemon) adoptPods(recs []*podRecord, r *recovery) (undo []func(context.Context)) {
	// Of two with one name the one that holds something has it, then the younger.
	empty := func(rec *podRecord) bool {
		return thisBoot(rec.BootID) && !exists(d.state.RunDir(state.Pods, rec.ID))
	}
	slices.SortFunc(recs, func(a, b *podRecord) int {
		if empty(a) != empty(b) {
			if empty(b) {
				return -1
			}
			return 1
		}
		return b.CreatedAt.Compare(a.CreatedAt)
	})
	for _, rec := range recs {
		p := newPod(rec)
		name := podName(rec.Config.M.GetMetadata())
		if rec.Phase == podCreating {
			r.undone++
			undo = append(undo, d.undoing(name, "", rec.ID, func(ctx context.Context) error {
				return d.erasePod(ctx, p)
			}))
			continue
		}
		if !d.settle(name, "", rec.ID, rec.Fingerprint) {
			d.log.Error("two pods have one name", "name", name, "pod", rec.ID)
			if empty(rec) {
				r.quarantined++
				d.state.Quarantine(d.state.Dir(state.Pods, rec.ID), errorf(ErrExists, "%s exists twice", name))
				continue
			}
			// Both are served: each holds what only its own id names.
		}
		d.pods[rec.ID] = p
	}
	return undo
}

// undoing takes the name of a creation that was never acknowledged until f has
// removed what it left. A request for the name waits for that and starts afresh.
func (d *Daemon) undoing(name, podID, id string, f func(context.Context) error) func(context.Context) {
	c := newClaim(name, podID, "")
	c.id, c.stage = id, "undo"
	if _, taken := d.claims[name]; !taken {
		d.claims[name] = c
	}
	return func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, networkLimit)
		defer cancel()
		if err := f(ctx); err != nil {
			d.log.Error("cannot undo a creation that was cut short; the next start tries again", "name", name, "id", id, "error", err)
		} else {
			d.log.Info("undid a creation that was cut short", "name", name, "id", id)
		}
		c.err = errAgain
		d.release(c)
		close(c.done)
	}
}

// look finds out from files what a container is. No process is asked.
func (d *Daemon) look(rec *containerRecord) seen {
	dir := d.runDir(rec.ID)
	durable := d.state.Dir(state.Containers, rec.ID)
	exit, err := dir.ReadExit()
	if errors.Is(err, record.ErrDamaged) {
		d.state.Quarantine(dir.Path(rundir.ExitName), err)
	}
	if err != nil {
		exit, err = rundir.ReadExitIn(durable)
		if errors.Is(err, record.ErrDamaged) {
			d.state.Quarantine(filepath.Join(durable, rundir.ExitName), err)
		}
	}
	if err == nil {
		return seen{status: rundir.Status{Phase: rundir.PhaseExited, StartedAt: exit.StartedAt}, exit: &exit}
	}
	if rec.Phase == containerCreating {
		return seen{}
	}
	if !thisBoot(rec.BootID) {
		exit = rundir.Exit{Code: rundir.CodeUnknown, StartedAt: rec.CreatedAt, ExitedAt: time.Now(), Source: rundir.SourceInferred,
			Reason: rundir.ReasonUnknown, Message: "the machine went down while it ran, before its end was on the disk"}
		if err := d.writeExit(rec.ID, exit); err != nil {
			d.log.Warn("cannot write an inferred exit record", "container", rec.ID, "error", err)
		}
		return seen{status: rundir.Status{Phase: rundir.PhaseExited, StartedAt: exit.StartedAt}, exit: &exit}
	}
	status, err := dir.ReadStatus()
	if err != nil {
		// Its shim, if it lives, will say. Until then: the OCI runtime removes
		// the fifo when it starts a container.
		d.log.Warn("cannot read what a shim wrote down; it will be asked", "container", rec.ID, "error", err)
		status = rundir.Status{Phase: rundir.PhaseRunning}
		if exists(filepath.Join(d.runtimeRoot(), rec.ID, "exec.fifo")) {
			status.Phase = rundir.PhaseCreated
		}
	}
	return seen{status: status}
}
