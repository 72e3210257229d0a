package audit

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/journal"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// owners are the pods and containers that something may belong to. They are read as a daemon reads them that starts:
// the record in ROOT, or else a copy of it.
type owners struct {
	pods       map[string]*records.Pod
	containers map[string]*container
	doubtful   map[string]bool // ids of which a record is there, and none reads
	known      map[string]bool // ids that are ours, or were
	others     []string        // state directories of other daemons on this machine
	stranger   string          // a process that is one of theirs
}

// container is one with what its shim has written.
type container struct {
	*records.Container
	exit *rundir.Exit // nil: it has not ended, or nothing says so
	shim *process     // nil: none lives
}

func (l *look) readOwners() {
	l.owners = owners{
		pods:       map[string]*records.Pod{},
		containers: map[string]*container{},
		doubtful:   map[string]bool{},
		known:      map[string]bool{},
	}
	entries, err := journal.Read(filepath.Join(l.Root, journal.DirName))
	if err != nil {
		l.fail("%w", err)
	}
	for _, e := range entries {
		l.known[e.ID] = true
	}
	kept := map[string]*records.Pod{}
	for _, id := range l.ids(state.Containers) {
		l.readContainer(id, kept)
	}
	l.matchShims()
	pods := l.ids(state.Pods)
	for id := range kept {
		pods = append(pods, id)
	}
	slices.Sort(pods)
	for _, id := range slices.Compact(pods) {
		l.readPod(id, kept[id])
	}
	l.lookForOthers()
}

// matchShims finds the shims of containers. One that keeps something of which no record tells is reason to doubt, and
// so is one that lives, by its lock, and is not seen.
func (l *look) matchShims() {
	for _, p := range l.processes {
		if p.keeps == "" || !l.ours(p.keeps) || !p.Alive() {
			continue
		}
		id := p.keeps.ID()
		if c := l.containers[id]; c != nil {
			c.shim = p
		} else if status, err := p.keeps.ReadStatus(); l.hasChildren(p.PID) || err == nil && status.Init.Alive() {
			l.doubt("container", id, fmt.Errorf("process %d, its shim, keeps processes", p.PID))
		}
	}
	for id, c := range l.containers {
		dir := l.runDir(id)
		held, _ := dir.Held()
		if c.shim != nil || !held {
			continue
		}
		_, err := dir.FindShim()                       // it may just have come
		if held, _ := dir.Held(); held && err != nil { // or gone
			l.miss("the shim of container %s lives, and is not among the processes: look from where the daemon runs",
				id)
		}
	}
}

// ids are those of objects that have a directory in either tree.
func (l *look) ids(k state.Kind) (ids []string) {
	for _, tree := range []string{l.Root, l.State} {
		for _, name := range l.names(filepath.Join(tree, string(k))) {
			if idForm.MatchString(name) && !slices.Contains(ids, name) {
				ids = append(ids, name)
				l.known[name] = true
			}
		}
	}
	return ids
}

// first gives an object by the first of its records that reads; nil: none does. A record that is there, and does not
// read, is reason to doubt.
func first[T any](l *look, what, id string, idOf func(*T) string, reads ...func(*T) error) *T {
	var errs []error
	for _, read := range reads {
		rec := new(T)
		err := read(rec)
		if err == nil && idOf(rec) != id {
			err = fmt.Errorf("it is the record of %q", idOf(rec))
		}
		if err == nil && len(errs) > 0 {
			l.fail("the record of %s %s does not read; there is a copy, from which a restart of the daemon makes it "+
				"anew: %w", what, id, errs[0])
		}
		if err == nil {
			return rec
		}
		errs = append(errs, err)
	}
	if slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, fs.ErrNotExist) }) {
		l.doubt(what, id, errors.Join(errs...))
	}
	return nil
}

// readContainer reads the record of a container, or what its shim was given. kept gets the record of its pod that the
// shim has.
func (l *look) readContainer(id string, kept map[string]*records.Pod) {
	dir := l.runDir(id)
	launch, lerr := dir.ReadLaunch()
	rec := first(l, "container", id, func(c *records.Container) string { return c.ID },
		func(c *records.Container) error { return state.Read(l.Root, state.Containers, id, c) },
		func(c *records.Container) error {
			return cmp.Or(lerr, json.Unmarshal(launch.Container.Value, c))
		})
	pod := new(records.Pod)
	if lerr == nil && json.Unmarshal(launch.Sandbox.Value, pod) == nil && pod.ID != "" {
		kept[pod.ID] = pod
	}
	if rec == nil {
		return
	}
	c := &container{Container: rec}
	for _, at := range []string{string(dir), filepath.Join(l.Root, string(state.Containers), id)} {
		if exit, err := rundir.ReadExitIn(at); err == nil && c.exit == nil {
			c.exit = &exit
		}
	}
	l.containers[id] = c
}

// readPod reads the record of a pod, or a copy of it.
func (l *look) readPod(id string, kept *records.Pod) {
	in := func(tree string) func(*records.Pod) error {
		return func(p *records.Pod) error { return state.Read(tree, state.Pods, id, p) }
	}
	last := func(p *records.Pod) error {
		if kept == nil {
			return fs.ErrNotExist
		}
		*p = *kept
		return nil
	}
	if p := first(l, "pod", id, func(p *records.Pod) string { return p.ID }, in(l.Root), in(l.State), last); p != nil {
		l.pods[id] = p
	}
}

// doubt notes an object of which no record reads.
func (l *look) doubt(what, id string, err error) {
	l.doubtful[id] = true
	l.fail("no record of %s %s reads, so that nobody knows what belongs to it; a restart of the daemon decides: %w",
		what, id, err)
}

func (l *look) runDir(id string) rundir.Dir {
	return rundir.Dir(filepath.Join(l.State, rundir.ContainersName, id))
}

// ours says whether a run directory is below STATE.
func (l *look) ours(dir rundir.Dir) bool {
	containers := filepath.Dir(string(dir))
	if real, err := filepath.EvalSymlinks(containers); err == nil {
		containers = real
	}
	return containers == filepath.Join(l.State, rundir.ContainersName)
}

// ofContainer is the verdict on what belongs to a container by its name.
func (l *look) ofContainer(id string) verdict {
	if c := l.containers[id]; c != nil {
		return of(l.containerName(id), c.state())
	}
	if l.doubtful[id] {
		return doubtful("no record of container %s reads", records.ShortID(id))
	}
	return none("there is no container %s", records.ShortID(id))
}

// ofPod is the verdict on what a pod may hold.
func (l *look) ofPod(id string, d records.Debt) verdict {
	p := l.pods[id]
	switch {
	case p != nil && p.Owes(d):
		return of(l.podName(id), podState(p))
	case p != nil && p.Phase != records.PodReady:
		return none("%s has given it back (%s), its record says", l.podName(id), d)
	case p != nil:
		return none("%s does not hold it (%s), its record says", l.podName(id), d)
	case l.doubtful[id]:
		return doubtful("no record of pod %s reads", records.ShortID(id))
	}
	return none("there is no pod %s", records.ShortID(id))
}

func (l *look) podName(id string) string {
	m := l.pods[id].Config.M.GetMetadata()
	name := strings.Trim(m.GetNamespace()+"/"+m.GetName(), "/")
	return fmt.Sprintf("pod %s (%s)", name, records.ShortID(id))
}

func (l *look) containerName(id string) string {
	c := l.containers[id]
	what := "container " + c.Config.M.GetMetadata().GetName()
	if c.Init {
		what = "the init"
	}
	if l.pods[c.PodID] == nil {
		return fmt.Sprintf("%s (%s)", what, records.ShortID(id))
	}
	return fmt.Sprintf("%s (%s) of %s", what, records.ShortID(id), l.podName(c.PodID))
}

func podState(p *records.Pod) string {
	switch p.Phase {
	case records.PodCreating:
		return "it is being created; a creation that was cut short is undone by the next start of the daemon"
	case records.PodReady:
		return "the pod is ready"
	case records.PodRemoved:
		return "the pod is removed and still owes it; the daemon tries again"
	}
	return "the pod is " + string(p.Phase)
}

func (c *container) state() string {
	switch {
	case c.Phase == records.ContainerCreating:
		return "it is being created; a creation that was cut short is undone by the next start of the daemon"
	case c.Phase == records.ContainerRemoving:
		return "it is being removed"
	case c.exit != nil:
		return "the container has ended and is not removed yet"
	case c.shim == nil && !records.ThisBoot(c.BootID):
		return "the container ended with the machine and is not removed yet"
	case c.shim == nil:
		return "its shim is gone: the daemon ends what is left of it"
	}
	return "the container lives"
}

// idForm is what ids of pods and containers look like.
var idForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// stateForm finds the state directory in the path of a mount that a daemon makes.
var stateForm = regexp.MustCompile(
	`^(/.+)/(?:pods/[0-9a-f]{64}/(?:ns/\w+|shm|etc|pid)|containers/[0-9a-f]{64}/rootfs)$`)

// lookForOthers finds the state directories of other daemons, as far as mounts and processes tell, and one of their
// programs, in whatever mount namespace.
func (l *look) lookForOthers() {
	found := map[string]bool{}
	for _, m := range l.mounts {
		if f := stateForm.FindStringSubmatch(m.Point); f != nil {
			found[f[1]] = true
		}
	}
	for _, p := range l.processes {
		switch {
		case !p.root:
		case p.keeps != "":
			found[filepath.Dir(filepath.Dir(string(p.keeps)))] = true
		case strings.HasPrefix(p.exe, "holdfastd") && !l.isDaemon(p),
			strings.HasPrefix(p.exe, "holdfast-shim") && !p.trusted,
			strings.HasPrefix(p.exe, "holdfast-stream") && !l.inState(p.argument("--dir")):
			l.stranger = p.text()
		}
	}
	for dir := range found {
		if real, err := filepath.EvalSymlinks(dir); err == nil && real != l.State {
			l.others = append(l.others, real)
		}
	}
}

// unlessForeign is a verdict on what is named after an id, where there may be another daemon: all of a machine have
// cgroups and network namespaces beside each other, and those in another mount namespace show no files.
func (l *look) unlessForeign(id string, v verdict) verdict {
	if !v.none() {
		return v
	}
	for _, dir := range l.others {
		for _, k := range []state.Kind{state.Pods, state.Containers} {
			if _, err := os.Lstat(filepath.Join(dir, string(k), id)); err == nil {
				return of("another daemon", "it uses "+dir)
			}
		}
	}
	if l.known[id] || len(l.others) == 0 && l.stranger == "" {
		return v
	}
	return doubtful("it may be another daemon's: %s", cmp.Or(l.stranger, strings.Join(l.others, ", ")))
}
