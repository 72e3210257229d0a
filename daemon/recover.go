package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/daemon/journal"
	"github.com/holdfast-cri/holdfast/daemon/pods"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Recovery loads, decides and acts. It reads files and asks the kernel; no shim is
// asked. Everything that takes time, or another process, goes on behind a daemon
// that already serves.

// recovery is one start.
type recovery struct {
	*Daemon
	pods, containers, running, rebuilt, undone, quarantined int // for its one line of log

	undecided bool     // some container could not be judged: nothing unknown may be erased now
	podIDs    []string // of all pods that hold something, or may

	byPod        map[string]*pods.Pod
	kept         map[string]*records.Pod       // pods as shims keep them
	anyContainer map[string]*records.Container // one container of each pod that has any
	later        []func(context.Context)       // done in the background, in order
	ended        []*containers.Container       // those that are served, and have ended
}

// loaded is a container's record, and what was decided about it.
type loaded struct {
	id  string
	rec *records.Container // nil: nothing can be read of it
	records.Verdict
}

func (d *Daemon) recover() (*recovery, error) {
	r := &recovery{
		Daemon:       d,
		byPod:        map[string]*pods.Pod{},
		kept:         map[string]*records.Pod{},
		anyContainer: map[string]*records.Container{},
	}
	podIDs, err := d.state.IDs(state.Pods)
	if err != nil {
		return nil, err
	}
	containerIDs, err := d.state.IDs(state.Containers)
	if err != nil {
		return nil, err
	}
	var list []loaded
	for _, id := range containerIDs {
		l := r.loadContainer(id)
		list = append(list, l)
		// What is left of a removed one says nothing of its pod, which may have been removed with it.
		if l.rec != nil && l.Do != records.Undo && l.rec.Phase != records.ContainerRemoving {
			r.anyContainer[l.rec.PodID] = l.rec
		}
	}
	for id := range r.anyContainer {
		if !slices.Contains(podIDs, id) {
			podIDs = append(podIDs, id)
		}
	}
	r.podIDs = podIDs
	undoPods := r.loadPods(podIDs)
	r.actOnContainers(list)
	r.later = append(r.later, undoPods...) // after their containers
	d.Events.Found(r.found())
	r.pods, r.containers = len(d.Pods.All()), len(d.Containers.All())
	d.background(func(context.Context) { r.completeJournal() })
	d.background(func(ctx context.Context) {
		for _, f := range r.later {
			// What cannot be killed, or does not answer, holds up nothing else. It is owed, or stays
			// listed as one whose removal is asked for again.
			limited, cancel := context.WithTimeout(ctx, d.laterLimit)
			f(limited)
			cancel()
		}
		d.state.Sweep()
		d.Images.CollectAll()
	})
	return r, nil
}

// completeJournal has the journal know of what has happened while no daemon ran.
func (r *recovery) completeJournal() {
	entries, err := journal.Read(filepath.Join(r.cfg.Root, journal.DirName))
	if err != nil {
		r.log.Warn("cannot read the journal", "error", err)
		return
	}
	known := map[string]map[records.What]bool{}
	for _, e := range entries {
		if known[e.ID] == nil {
			known[e.ID] = map[records.What]bool{}
		}
		known[e.ID][e.What] = true
	}
	for _, c := range r.Containers.All() {
		c.JournalMissing(func(w records.What) bool { return known[c.ID()][w] })
	}
}

// found are the events of what has ended before this daemon came: containers, in the order
// of their ends, and pods. Which of them the one before has told of is not known.
func (r *recovery) found() (all []func() events.Event) {
	const stopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	slices.SortFunc(r.ended, func(a, b *containers.Container) int {
		return a.Seen().Exit.ExitedAt.Compare(b.Seen().Exit.ExitedAt)
	})
	for _, c := range r.ended {
		all = append(all, func() events.Event {
			p, err := r.Pods.Find(c.Record().PodID)
			if _, cerr := r.Containers.Find(c.ID()); err != nil || cerr != nil {
				return nil // it was removed since
			}
			return p.Event(c.ID(), stopped)
		})
	}
	for _, p := range r.Pods.All() {
		if p.Ready() != nil {
			all = append(all, func() events.Event {
				if _, err := r.Pods.Find(p.ID()); err != nil {
					return nil
				}
				return p.Event(p.ID(), stopped)
			})
		}
	}
	return all
}

// complete says whether podIDs are all pods of this node: nothing was damaged or
// could not be read.
func (r *recovery) complete() bool { return r.quarantined == 0 && !r.undecided }

// loadContainer reads the record of a container, or makes one from what its shim
// keeps, and decides what the container is.
func (r *recovery) loadContainer(id string) loaded {
	dir := rundir.Dir(r.state.RunDir(state.Containers, id))
	kept := r.launched(dir)
	rec := new(records.Container)
	err := r.state.Get(state.Containers, id, rec)
	if err == nil && rec.ID != id {
		err = wrongID(rec.ID)
	}
	if err == nil {
		r.takeUpdate(dir, rec)
	} else {
		rec = kept
		if !errors.Is(err, fs.ErrNotExist) {
			r.quarantined++
			r.state.QuarantineRecord(state.Containers, id, err)
		}
	}
	if err != nil && kept != nil {
		r.log.Warn("rebuilt a container from what its shim kept", "container", id)
		r.restore(state.Containers, id, kept)
	}
	files, kernel, kerr := r.Containers.Ask(id, rec)
	l := loaded{id: id, rec: rec, Verdict: records.Decide(rec, files, kernel)}
	if kerr != nil {
		// The kernel could not be asked: nothing is concluded, and it is asked again.
		r.undecided = true
		r.log.Error("cannot ask what is left of a container", "container", id, "error", kerr)
		switch l.Do {
		case records.Bury:
			l.Do = records.Watch
		case records.GiveBack:
			l.Do = records.Remove
		case records.Erase:
			l.Do = records.LeaveAlone
		}
	}
	r.undecided = r.undecided || l.Do == records.LeaveAlone
	return l
}

// launched gives the records that a shim keeps: that of its container, nil if it
// does not read, and that of the pod, which is noted.
func (r *recovery) launched(dir rundir.Dir) *records.Container {
	launch, err := dir.ReadLaunch()
	if err != nil {
		return nil
	}
	rec := new(records.Container)
	if json.Unmarshal(launch.Container.Value, rec) != nil || rec.ID != dir.ID() {
		return nil
	}
	r.takeUpdate(dir, rec)
	pod := new(records.Pod)
	if json.Unmarshal(launch.Sandbox.Value, pod) == nil && pod.ID != "" && rec.Phase != records.ContainerCreating {
		if old := r.kept[pod.ID]; old == nil || len(old.IPs()) == 0 {
			r.kept[pod.ID] = pod // all of them were written when the pod was whole
		}
	}
	return rec
}

// takeUpdate gives a record the resources that the shim has on record.
func (r *recovery) takeUpdate(dir rundir.Dir, rec *records.Container) {
	if err := rec.TakeUpdate(dir); err != nil {
		r.log.Error("cannot read the resources of a container that were changed last", "container", rec.ID, "error",
			err)
	}
}

func wrongID(id string) error { return kind.Errorf(record.ErrDamaged, "it is the record of %q", id) }

// restore writes a record that was found elsewhere.
func (r *recovery) restore(k state.Kind, id string, rec any) {
	r.rebuilt++
	err := r.state.Create(k, id)
	if err == nil {
		err = r.state.Put(k, id, rec, false)
	}
	if err != nil {
		r.log.Error("cannot write a rebuilt record", "kind", k, "id", id, "error", err)
	}
}

// loadPods makes the pods known that there are, and returns what has to be done
// about the others.
func (r *recovery) loadPods(ids []string) (later []func(context.Context)) {
	var serve, undo []*records.Pod
	for _, id := range ids {
		rec, do := r.loadPod(id)
		switch do {
		case records.Serve:
			serve = append(serve, rec)
		case records.Undo:
			undo = append(undo, rec)
		case records.Remove:
			r.byPod[id] = r.Pods.Adopt(rec)
			r.byPod[id].Owe()
		case records.Erase:
			if r.undecided { // it may be the pod of a container that lives, which has no record either
				r.log.Error("a pod has no readable record, and a container that lives neither; it is left alone", "pod",
					id)
				continue
			}
			p := r.Pods.Adopt(r.unknownPod(id))
			r.byPod[id] = p
			later = append(later, func(ctx context.Context) {
				r.log.Warn("removing what is left of a pod without a record", "pod", id)
				p.Undo(ctx) // what cannot be given back is tried again
			})
		}
	}
	r.servePods(serve)
	// After those that have their names rightly: one whose undoing has failed before may be older
	// than the pod that was made under its name since.
	for _, rec := range undo {
		r.undone++
		p := r.Pods.Adopt(rec)
		r.byPod[rec.ID] = p
		later = append(later, r.undoing("pod", rec.ID, r.claims.Undo(pods.NameOf(rec), rec.ID, p.Undo)))
	}
	return later
}

// loadPod reads the record of a pod, or what stands in for it.
func (r *recovery) loadPod(id string) (*records.Pod, records.Action) {
	read := func(get func(state.Kind, string, any) error) (*records.Pod, error) {
		rec := new(records.Pod)
		err := get(state.Pods, id, rec)
		if err == nil && rec.ID != id {
			err = wrongID(rec.ID)
		}
		if err != nil {
			return nil, err
		}
		return rec, nil
	}
	f := records.PodFiles{Kept: r.kept[id], Pinned: r.Pods.Network.Pinned(id) != (records.Namespaces{})}
	var err error
	if f.Record, err = read(r.state.Get); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.quarantined++
		r.state.QuarantineRecord(state.Pods, id, err)
	}
	f.Copy, _ = read(r.state.GetCopy)
	f.Of = r.anyContainer[id]
	rec, do, rebuilt := records.DecidePod(f)
	if rebuilt {
		r.log.Warn("rebuilt a pod from a copy of its record", "pod", id, "kept_by_shim", f.Copy == nil)
		r.restore(state.Pods, id, rec)
	}
	return rec, do
}

// unknownPod is the record of a pod whose records are gone: all that it may hold is
// named after its id, and the plugins' cache knows its addresses. A start that finds it
// half removed goes on with that, and serves it to nobody.
func (r *recovery) unknownPod(id string) *records.Pod {
	ns := r.Pods.Network.Pinned(id)
	return &records.Pod{
		ID:         id,
		BootID:     rundir.BootID(),
		Phase:      records.PodRemoved,
		Namespaces: ns,
		Network: &records.Network{
			Phase:      records.NetworkAdding,
			Attachment: records.Attachment{ID: id, Netns: ns.Net},
		},
	}
}

// servePods makes pods known. Of two with one name the one that holds something
// has it, then the younger.
func (r *recovery) servePods(recs []*records.Pod) {
	empty := func(rec *records.Pod) int {
		if records.ThisBoot(rec.BootID) && !r.state.HasRunDir(state.Pods, rec.ID) {
			return 1
		}
		return 0
	}
	slices.SortFunc(recs, func(a, b *records.Pod) int {
		return cmp.Or(cmp.Compare(empty(a), empty(b)), b.CreatedAt.Compare(a.CreatedAt))
	})
	for _, rec := range recs {
		name := pods.NameOf(rec)
		if !r.claims.Take(name, rec.ID) {
			r.log.Error("two pods have one name", "name", name.Name, "pod", rec.ID)
			if empty(rec) == 1 {
				r.quarantined++
				r.state.Quarantine(r.state.Dir(state.Pods, rec.ID), kind.Errorf(kind.Exists, "%s exists twice",
					name.Name))
				continue
			}
			// Both are served: each holds what only its own id names.
		}
		p := r.Pods.Adopt(rec)
		r.byPod[rec.ID] = p
		r.Pods.Add(p)
		p.Owe()
	}
}

// pod gives the pod of a container. For a pod that is not known it is a placeholder
// that counts as removed, so that no container can be created in it.
func (r *recovery) pod(id string) *pods.Pod {
	if p := r.byPod[id]; p != nil {
		return p
	}
	return r.Pods.Adopt(&records.Pod{ID: id, Phase: records.PodRemoved, Debts: []records.Debt{}})
}

// actOnContainers does what was decided. Of two containers with one name the live
// one has it, then the younger; last of all one that was never finished.
func (r *recovery) actOnContainers(list []loaded) {
	rank := func(l loaded) int {
		switch {
		case l.rec == nil, l.Do == records.Undo:
			return 2
		case l.Do == records.Watch:
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b loaded) int {
		c := cmp.Compare(rank(a), rank(b))
		if c == 0 && a.rec != nil && b.rec != nil {
			c = b.rec.CreatedAt.Compare(a.rec.CreatedAt)
		}
		return c
	})
	for _, l := range list {
		switch {
		case l.rec == nil:
			r.actOnUnknown(l)
		case l.rec.Init:
			r.actOnInit(l)
		case l.Do == records.Undo:
			r.undone++
			c := r.Containers.Adopt(l.rec, r.pod(l.rec.PodID), l.Seen)
			undo := r.claims.Undo(containers.NameOf(l.rec), l.id, c.Undo)
			r.later = append(r.later, r.undoing("container", l.id, undo))
		case l.Do == records.GiveBack:
			r.later = append(r.later, r.Containers.GiveBack(r.Containers.Adopt(l.rec, r.pod(l.rec.PodID), l.Seen)))
		default:
			r.serve(l)
		}
	}
}

// serve makes a container known, and has done what is due.
func (r *recovery) serve(l loaded) {
	c := r.Containers.Adopt(l.rec, r.pod(l.rec.PodID), l.Seen)
	name := containers.NameOf(l.rec)
	if !r.claims.Take(name, l.id) {
		r.log.Error("two containers have one name", "name", name.Name, "container", l.id, "live", l.Do == records.Watch)
		if l.Do != records.Watch {
			r.quarantined++
			r.state.Quarantine(r.state.Dir(state.Containers, l.id), kind.Errorf(kind.Exists, "%s exists twice",
				name.Name))
			r.later = append(r.later, r.erasing(c))
			return
		}
	}
	r.Containers.Add(c, func() error { return nil })
	r.act(c, l.Do)
	if l.Seen.Exit != nil {
		r.ended = append(r.ended, c)
	}
	if l.rec.Updating {
		r.Containers.EndUpdate(c)
	}
	if l.rec.Checkpoint != nil || len(l.rec.Leftover) > 0 {
		r.Containers.EndCheckpoint(c)
	}
}

// act has done what is due of a container that is known.
func (r *recovery) act(c *containers.Container, do records.Action) {
	switch do {
	case records.Watch, records.Bury:
		r.running++
		r.Containers.Follow(c) // buries one whose shim is gone
	case records.WriteExit:
		if err := r.Containers.WriteExit(c.ID(), *c.Seen().Exit); err != nil {
			r.log.Warn("cannot write an inferred exit record", "container", c.ID(), "error", err)
		}
	case records.Remove, records.GiveBack:
		r.later = append(r.later, func(ctx context.Context) {
			if err := c.Remove(ctx); err != nil {
				r.log.Error("cannot finish a removal", "container", c.ID(), "error", err)
			}
		})
	}
}

// actOnInit gives a pod its init back. One that was never finished is to be
// removed: it has the same id as the next one, which has to find it first.
func (r *recovery) actOnInit(l loaded) {
	if l.Do == records.Undo {
		r.undone++
		l.rec.Phase, l.Do = records.ContainerRemoving, records.Remove
	}
	p := r.pod(l.rec.PodID)
	c := r.Containers.Adopt(l.rec, p, l.Seen)
	p.AdoptInit(c)
	r.act(c, l.Do)
}

// actOnUnknown deals with a container of which no record can be read.
func (r *recovery) actOnUnknown(l loaded) {
	if l.Do == records.LeaveAlone {
		// Its layers stay while this daemon lives. Nobody knows its pod.
		root := rundir.Dir(r.state.RunDir(state.Containers, l.id)).Path(rundir.RootfsName)
		r.Images.Library.Hold(rootfs.LayersAt(root))
		r.log.Error("a live shim has no readable record of its container; it is left alone", "container", l.id)
		return
	}
	rec := &records.Container{ID: l.id, BootID: rundir.BootID(), Phase: records.ContainerRemoving}
	c := r.Containers.Adopt(rec, r.pod(""), l.Seen)
	r.later = append(r.later, r.erasing(c)) // before its pod
}

// erasing erases a container that nobody knows. What cannot be given back is tried again.
func (r *recovery) erasing(c *containers.Container) func(context.Context) {
	return func(ctx context.Context) { c.Undo(ctx) }
}

// undoing undoes a creation that was never acknowledged. A request for the name
// waits for that and begins afresh.
func (r *recovery) undoing(what, id string, undo func(context.Context) error) func(context.Context) {
	return func(ctx context.Context) {
		if err := undo(ctx); err != nil {
			r.log.Error("cannot undo a creation that was cut short; trying again", what, id, "error", err)
			return
		}
		r.log.Info("undid a creation that was cut short", what, id)
	}
}
