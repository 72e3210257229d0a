package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/journal"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// owners are the pods and containers that something may belong to. They are read as a
// daemon reads them that starts: the record in ROOT, or else a copy of it.
type owners struct {
	pods       map[string]*records.Pod
	containers map[string]*container
	doubtful   map[string]bool // ids of which a record is there, and none reads
	known      map[string]bool // ids that are ours, or were
	others     []string        // state directories of other daemons on this machine
	alone      bool            // there is no sign of another daemon
}

// container is one with what its shim has written.
type container struct {
	*records.Container
	exit *rundir.Exit    // nil: it has not ended, or nothing says so
	shim *process        // nil: none lives
	run  *rundir.Runtime // nil: not known
}

func (l *look) readOwners() owners {
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
	for _, id := range l.ids(state.Pods) {
		l.readPod(id, kept[id])
	}
	for id, p := range kept {
		if l.pods[id] == nil {
			l.fail("the record of pod %s is missing; a shim keeps a copy: restart the daemon", id)
			l.pods[id] = p
		}
	}
	l.others = l.otherStates()
	l.alone = len(l.others) == 0 && !l.otherPrograms()
	return l.owners
}

// ids are those of objects that have a directory in either tree.
func (l *look) ids(k state.Kind) (ids []string) {
	seen := map[string]bool{}
	for _, tree := range []string{l.Root, l.State} {
		entries, err := os.ReadDir(filepath.Join(tree, string(k)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			l.fail("cannot list the %s: %w", k, err)
		}
		for _, e := range entries {
			if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !seen[e.Name()] {
				seen[e.Name()], l.known[e.Name()] = true, true
				ids = append(ids, e.Name())
			}
		}
	}
	return ids
}

// readContainer reads the record of a container, or what its shim was given. kept gets the
// record of its pod that the shim has.
func (l *look) readContainer(id string, kept map[string]*records.Pod) {
	rec, copied := new(records.Container), new(records.Container)
	err := state.Read(l.Root, state.Containers, id, rec)
	if err == nil && rec.ID != id {
		err = fmt.Errorf("it is the record of %q", rec.ID)
	}
	dir := l.runDir(id)
	launch, lerr := dir.ReadLaunch()
	if lerr == nil {
		lerr = json.Unmarshal(launch.Container.Value, copied)
	}
	if lerr == nil && copied.ID != id {
		lerr = fmt.Errorf("it is that of %q", copied.ID)
	}
	pod := new(records.Pod)
	if lerr == nil && json.Unmarshal(launch.Sandbox.Value, pod) == nil && pod.ID != "" {
		kept[pod.ID] = pod
	}
	if err != nil && lerr == nil {
		rec = copied
		l.missing("container", id, err)
	}
	if err != nil && lerr != nil {
		if !errors.Is(err, fs.ErrNotExist) || !errors.Is(lerr, fs.ErrNotExist) {
			l.doubt("container", id, errors.Join(err, lerr))
		}
		return
	}
	c := &container{Container: rec}
	if lerr == nil {
		c.run = &launch.Runtime
	}
	for _, at := range []string{string(dir), filepath.Join(l.Root, string(state.Containers), id)} {
		if exit, err := rundir.ReadExitIn(at); err == nil && c.exit == nil {
			c.exit = &exit
		}
	}
	for _, p := range l.processes {
		if p.keeps != "" && p.keeps.ID() == id && l.ours(p.keeps) {
			c.shim = p
		}
	}
	l.containers[id] = c
}

// readPod reads the record of a pod, or a copy of it.
func (l *look) readPod(id string, kept *records.Pod) {
	var errs []error
	for _, tree := range []string{l.Root, l.State} {
		rec := new(records.Pod)
		err := state.Read(tree, state.Pods, id, rec)
		if err == nil && rec.ID != id {
			err = fmt.Errorf("it is the record of %q", rec.ID)
		}
		if err == nil {
			if len(errs) > 0 {
				l.missing("pod", id, errs[0])
			}
			l.pods[id] = rec
			return
		}
		errs = append(errs, err)
	}
	switch {
	case kept != nil:
		l.missing("pod", id, errs[0])
		l.pods[id] = kept
	case !errors.Is(errs[0], fs.ErrNotExist) || !errors.Is(errs[1], fs.ErrNotExist):
		l.doubt("pod", id, errors.Join(errs...))
	}
}

// readPodRecord reads the record of a pod in ROOT.
func (l *look) readPodRecord(id string, rec *records.Pod) error {
	return state.Read(l.Root, state.Pods, id, rec)
}

// missing notes a record that does not read, of which there is a copy.
func (l *look) missing(what, id string, err error) {
	l.fail("the record of %s %s does not read; there is a copy, from which a restart of the daemon makes it anew: %w",
		what, id, err)
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
	c := l.containers[id]
	switch {
	case c != nil:
		return verdict{owner: l.containerName(id), why: c.state()}
	case l.doubtful[id]:
		return verdict{why: "no record of container " + records.ShortID(id) + " reads", doubt: true}
	}
	return none("there is no container %s", records.ShortID(id))
}

// ofPod is the verdict on what a pod may hold.
func (l *look) ofPod(id string, d records.Debt) verdict {
	p := l.pods[id]
	switch {
	case p != nil && p.Owes(d):
		return verdict{owner: l.podName(id), why: podState(p)}
	case p != nil && p.Phase != records.PodReady:
		return none("%s has given it back (%s), its record says", l.podName(id), d)
	case p != nil:
		return none("%s does not hold it (%s), its record says", l.podName(id), d)
	case l.doubtful[id]:
		return verdict{why: "no record of pod " + records.ShortID(id) + " reads", doubt: true}
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

// otherStates are the state directories of other daemons, as far as mounts and processes
// tell. Network namespaces and cgroups of all daemons of a machine lie beside each other.
func (l *look) otherStates() (others []string) {
	found := map[string]bool{}
	for _, m := range l.mounts {
		if f := stateForm.FindStringSubmatch(m.Point); f != nil {
			found[f[1]] = true
		}
	}
	for _, p := range l.processes {
		if p.keeps != "" {
			found[filepath.Dir(filepath.Dir(string(p.keeps)))] = true
		}
	}
	for dir := range found {
		if real, err := filepath.EvalSymlinks(dir); err == nil && real != l.State {
			others = append(others, real)
		}
	}
	return others
}

// otherPrograms says whether processes of another daemon run, in whatever mount namespace.
func (l *look) otherPrograms() bool {
	for _, p := range l.processes {
		dir, ok := argument(p.args, "--dir")
		switch {
		case strings.HasPrefix(p.exe, "holdfastd"):
			if !l.isDaemon(p) {
				return true
			}
		case strings.HasPrefix(p.exe, "holdfast-shim"), strings.HasPrefix(p.exe, "holdfast-stream"):
			if ok && (p.elsewhere || !l.inState(dir)) {
				return true
			}
		}
	}
	return false
}

// foreign says whether something that is named after an id may be of another daemon. All
// daemons of a machine have cgroups and network namespaces beside each other, and those in
// another mount namespace show no files. known ids are ours.
func (l *look) foreign(id string) bool {
	for _, dir := range l.others {
		for _, k := range []state.Kind{state.Pods, state.Containers} {
			if _, err := os.Lstat(filepath.Join(dir, string(k), id)); err == nil {
				return true
			}
		}
	}
	return !l.alone && !l.known[id]
}
