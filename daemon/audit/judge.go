package audit

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// userWaysSuffix ends the name of the directory with the ways of pods with user namespaces.
const userWaysSuffix = "-userns"

// role is what a cgroup is for.
type role string

const (
	shimRole      role = "shim"
	streamRole    role = "stream"
	containerRole role = "container"
	podRole       role = "pod"
)

// place is what the path of a cgroup says: for what, and for whose id. below: it is one
// that somebody has made inside.
type place struct {
	role  role
	id    string
	below bool
}

// placeOf tells by its path whose a cgroup is: by the names that placement gives, or as a
// child of the parent of a pod that is known.
func (l *look) placeOf(cgroup string) (place, bool) {
	parts := strings.Split(strings.TrimPrefix(cgroup, "/"), "/")
	for i, part := range parts {
		below := i < len(parts)-1
		if id, ok := placement.ShimOfScope(part); ok {
			return place{shimRole, id, below}, true
		}
		if id, ok := placement.ContainerOfScope(part); ok {
			return place{containerRole, id, below}, true
		}
		if placement.IsStreamScope(part) {
			return place{streamRole, "", below}, true
		}
		if idForm.MatchString(part) && l.parents["/"+strings.Join(parts[:i], "/")] {
			return place{containerRole, part, below}, true
		}
	}
	for _, own := range []struct {
		top string
		role
	}{
		{placement.ShimsPath, shimRole}, {placement.StreamPath, streamRole}, {placement.PodsPath, podRole},
	} {
		rest, ok := strings.CutPrefix(cgroup, own.top)
		if !ok || own.role != streamRole && rest == "" {
			continue
		}
		names := strings.Split(strings.Trim(rest, "/"), "/")
		if own.role == podRole && len(names) > 1 {
			return place{containerRole, names[1], len(names) > 2}, true
		}
		return place{own.role, names[0], len(names) > 1}, true
	}
	return place{}, false
}

// cgroupParents are the cgroups in which containers of known pods may have theirs.
func (l *look) cgroupParents() map[string]bool {
	parents := map[string]bool{}
	for _, p := range l.pods {
		if parent := p.Config.M.GetLinux().GetCgroupParent(); parent != "" && !strings.HasSuffix(parent, ".slice") {
			parents[path.Join("/", parent)] = true
		}
	}
	for id, c := range l.containers {
		if dir, ok := strings.CutSuffix(c.CgroupsPath, "/"+id); ok {
			parents[path.Clean(dir)] = true
		}
	}
	return parents
}

func (l *look) judgeProcesses() {
	l.parents, l.held = l.cgroupParents(), map[string]bool{}
	for _, p := range l.processes {
		if l.judgeProgram(p) {
			continue
		}
		for _, cgroup := range p.cgroups {
			if at, ok := l.placeOf(cgroup); ok {
				l.judgeMember(p, at)
				break
			}
		}
	}
}

// judgeProgram judges a process by its program: one of ours, a CNI plugin, an OCI runtime.
func (l *look) judgeProgram(p *process) bool {
	dir, _ := argument(p.args, "--dir")
	switch {
	case p.elsewhere:
		return false
	case p.keeps != "" && l.ours(p.keeps):
		l.judgeShim(p)
	case p.keeps != "":
		// Of another daemon.
	case strings.HasPrefix(p.exe, "holdfast-stream") && l.inState(dir):
		l.add(Process, p.text(), p.same(), l.ofStream(p), nil)
	case p.exe == "holdfast-stream":
	case strings.HasPrefix(p.exe, "holdfastd") && l.isDaemon(p):
		l.add(Daemon, p.text(), p.same(), verdict{owner: "holdfastd", why: "it uses " + l.State}, nil)
	case strings.HasPrefix(p.exe, "holdfast-pause") && len(p.args) > 1 && l.inState(p.args[1]):
		l.add(Process, p.text(), p.same(), l.ofKeeper(p), killProcess(p))
	case strings.HasPrefix(p.third, l.Root+"/cni/running/"):
		l.judgePlugin(p)
	case l.isRuntime(p):
		l.judgeRuntime(p)
	default:
		return false
	}
	return true
}

// argument gives the value of a flag of a command line.
func argument(args []string, flag string) (string, bool) {
	i := slices.Index(args, flag)
	if i < 0 || i+1 >= len(args) {
		return "", false
	}
	return args[i+1], true
}

// inState says whether a path that a command line names is below STATE.
func (l *look) inState(path string) bool {
	dir, err := filepath.EvalSymlinks(path)
	if err != nil {
		dir = path
	}
	return strings.HasPrefix(dir, l.State+"/")
}

func (l *look) judgeShim(p *process) {
	id := p.keeps.ID()
	v := l.ofContainer(id)
	if identity, err := l.runDir(id).ReadIdentity(); err == nil && v.owner != "" && identity.Shim != p.Process &&
		identity.Shim.Alive() && identity.BootID == rundir.BootID() {
		v = none("another process is the shim of %s", v.owner)
	}
	l.add(Shim, p.text(), p.same(), v, endShim(l, p))
}

// ofStream is the verdict on a process that serves sessions. One that was replaced serves
// those that it has to their ends.
func (l *look) ofStream(p *process) verdict {
	a, err := stream.Dir(filepath.Join(l.State, stream.DirName)).Running()
	if err == nil && a.Process == p.Process {
		return verdict{owner: "sessions", why: "it serves exec, attach and port-forward, and ends when it is idle"}
	}
	return verdict{owner: "sessions", why: "it starts, or serves its sessions to their ends; another one takes new ones"}
}

func (l *look) isDaemon(p *process) bool {
	if p.elsewhere {
		return false
	}
	if run, err := records.ReadDaemon(l.State); err == nil && run.Process == p.Process {
		return true
	}
	dir, ok := argument(p.args, "--state")
	return ok && l.inState(dir+"/x")
}

// ofKeeper is the verdict on a process that keeps namespaces until they are pinned.
func (l *look) ofKeeper(p *process) verdict {
	if parent := l.processes[p.parent]; parent != nil && strings.HasPrefix(parent.exe, "holdfastd") {
		return verdict{owner: "holdfastd", why: "it keeps new namespaces until they are pinned"}
	}
	return none("the daemon that started it to keep new namespaces is gone")
}

func (l *look) judgePlugin(p *process) {
	id := filepath.Base(p.third)
	v := l.ofPod(id, records.DebtNetwork)
	if id == ".gc" {
		v = verdict{owner: "holdfastd", why: "a CNI plugin collects garbage"}
	} else if v.owner != "" {
		v.why = "a CNI plugin works for it; the next one of the pod waits for its end"
	}
	l.add(Process, p.text(), p.same(), v, killProcess(p))
}

// isRuntime says whether a process is an OCI runtime at work for one of our containers.
func (l *look) isRuntime(p *process) bool {
	root, ok := argument(p.args, "--root")
	return ok && l.inState(root) && filepath.Base(root) == "runc"
}

func (l *look) judgeRuntime(p *process) {
	for parent := l.processes[p.parent]; parent != nil; parent = l.processes[parent.parent] {
		if parent.keeps != "" || !parent.elsewhere && strings.HasPrefix(parent.exe, "holdfastd") {
			l.add(Process, p.text(), p.same(),
				verdict{owner: fmt.Sprintf("process %d, %s", parent.PID, parent.exe), why: "the OCI runtime at work"}, nil)
			return
		}
	}
	// In a container's cgroup it is its init, or an exec, that has not run its program yet.
	for _, cgroup := range p.cgroups {
		if at, ok := l.placeOf(cgroup); ok && at.role == containerRole {
			l.judgeMember(p, at)
			return
		}
	}
	l.add(Process, p.text(), p.same(), none("the shim or daemon that called the OCI runtime is gone"), killProcess(p))
}

// perhapsForeign is the verdict on what is called as ours is, where there is another daemon.
var perhapsForeign = verdict{
	owner: "another daemon, perhaps",
	why:   "this one does not know it, and there is another holdfastd on this machine",
}

// judgeMember judges a process by the cgroup that it is in.
func (l *look) judgeMember(p *process, at place) {
	var v verdict
	switch at.role {
	case streamRole:
		if !l.alone {
			return
		}
		v = none("it is no holdfast-stream, and is in the cgroup of those")
	case podRole:
		v = none("it is in the cgroup of a pod, and in none of a container")
	default:
		v = l.ofContainer(at.id)
		if v.owner == "" && !v.doubt && l.foreign(at.id) {
			l.add(Process, p.text(), p.same(), perhapsForeign, nil)
			return
		}
	}
	c := l.containers[at.id]
	if v.owner != "" && c.shim == nil && c.exit != nil {
		v = none("%s has ended, and its shim is gone", v.owner)
	}
	if v.owner != "" && at.role == shimRole {
		switch {
		case c.shim != nil && l.descends(p, c.shim.PID):
			v.why = "its shim has started it"
		case c.shim == nil:
			v = none("it is in the cgroup of the shim of %s, which is gone", v.owner)
		}
	}
	l.add(Process, p.text(), p.same(), v, killMember(l, p, at))
	if v.owner != "" && at.role == containerRole {
		l.noteNamespaces(p, v.owner)
	}
}

// noteNamespaces notes what namespaces a process of a container has, other than this
// process. One without an owner is told by its process.
func (l *look) noteNamespaces(p *process, owner string) {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/ns/*", p.PID))
	for _, link := range links {
		kind := filepath.Base(link)
		if strings.HasSuffix(kind, "_for_children") {
			continue
		}
		ns, err := os.Readlink(link)
		if err != nil || l.held[ns] {
			continue
		}
		l.held[ns] = true
		if ours, err := os.Readlink("/proc/self/ns/" + kind); err == nil && ours != ns {
			l.add(Namespace, ns, "", verdict{owner: owner, why: fmt.Sprintf("process %d is in it", p.PID)}, nil)
		}
	}
}

// judgeMounts judges what is mounted below the trees.
func (l *look) judgeMounts() {
	for i := len(l.mounts) - 1; i >= 0; i-- { // the last one has to go first
		m := l.mounts[i]
		var v verdict
		switch {
		case m.Point == l.Root || m.Point == l.State:
			continue
		case strings.HasPrefix(m.Point, l.State+"/"):
			v = l.ofStateMount(m, strings.Split(m.Point[len(l.State)+1:], "/"))
		case strings.HasPrefix(m.Point, l.State+userWaysSuffix+"/"):
			v = l.ofWay(strings.Split(m.Point[len(l.State+userWaysSuffix)+1:], "/"))
		case strings.HasPrefix(m.Point, l.Root+"/"):
			v = l.ofRootMount(strings.Split(m.Point[len(l.Root)+1:], "/"))
		default:
			continue
		}
		k, f := Mount, unmount(m)
		if m.Kind == "nsfs" {
			k, f = Namespace, unpin(m.Point)
		}
		l.add(k, m.Point, m.ID, v, f)
	}
}

func (l *look) ofStateMount(m mounts.Mount, parts []string) verdict {
	if len(parts) < 3 {
		return none("nothing is mounted there by this version")
	}
	kind, id, rest := parts[0], parts[1], strings.Join(parts[2:], "/")
	if kind == "pods" {
		switch {
		case slices.Contains([]string{"ns/ipc", "ns/uts", "ns/user"}, rest):
			return l.ofPod(id, records.DebtNamespaces)
		case rest == "shm" || rest == "etc" || rest == "pid":
			return l.ofPod(id, records.DebtMounts)
		}
	}
	if kind != "containers" {
		return none("nothing is mounted there by this version")
	}
	v := l.ofContainer(id)
	if strings.HasSuffix(rest, ".layers") && v.owner != "" && l.containers[id].Phase == records.ContainerCreated {
		return none("it is needed only while %s is created", v.owner)
	}
	return v
}

// ofWay is the verdict on the mount of a root for the OCI runtime of a container in a user
// namespace.
func (l *look) ofWay(parts []string) verdict {
	v := l.ofContainer(parts[0])
	if v.owner != "" && l.containers[parts[0]].Phase == records.ContainerCreated {
		return none("it is needed only while %s is created", v.owner)
	}
	return v
}

func (l *look) ofRootMount(parts []string) verdict {
	if len(parts) == 3 && parts[0] == "containers" && parts[2] == "upper" {
		return l.ofContainer(parts[1])
	}
	return none("nothing is mounted there by this version")
}

// judgePins judges the network namespaces of pods.
func (l *look) judgePins() {
	mounted := map[string]string{}
	for _, m := range l.mounts {
		if strings.HasPrefix(m.Point, netnsDir+"/") {
			mounted[m.Point] = m.ID
		}
	}
	for _, path := range l.pins {
		id := strings.TrimPrefix(filepath.Base(path), pinPrefix)
		v := l.ofPod(id, records.DebtNamespaces)
		if v.owner == "" && !v.doubt && l.pods[id] == nil && l.foreign(id) {
			v = perhapsForeign
		}
		l.add(Namespace, path, mounted[path], v, unpin(path))
	}
}

// judgeCgroups judges the cgroups of shims, of containers, and of pods without a parent.
func (l *look) judgeCgroups() {
	dirs := map[place][]string{}
	paths := map[place]string{}
	for _, g := range l.cgroups {
		at, ok := l.placeOf(g.path)
		if !ok || at.below {
			continue
		}
		dirs[at] = append(dirs[at], g.dir)
		paths[at] = g.path
	}
	for at, path := range paths {
		v := verdict{owner: "sessions", why: "holdfast-stream sits there"}
		switch at.role {
		case streamRole:
		case podRole:
			v = l.ofPod(at.id, records.DebtCgroup)
		default:
			v = l.ofContainer(at.id)
		}
		if v.owner == "" && !v.doubt && l.foreign(at.id) {
			v = perhapsForeign
		}
		l.add(Cgroup, path, "", v, removeCgroup(l, dirs[at], path, at))
	}
}
