package audit

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// role is what a cgroup is for.
type role string

const (
	shimRole      role = "shim"
	streamRole    role = "stream"
	containerRole role = "container"
	podRole       role = "pod"
)

// place is what the path of a cgroup says: for what, and for whose id.
type place struct {
	role   role
	id     string
	below  bool // it is one that somebody has made inside
	shared bool // other container runtimes have theirs beside it, with names such as this
}

// placeOf tells by its path whose a cgroup is: by the names that placement gives, or as a child of the parent of a pod
// that is known. systemd has scopes in nothing but slices; elsewhere whoever has made them called them so.
func (l *look) placeOf(cgroup string) (at place, ok bool) {
	parent, inSlices := "/", true
	parts := strings.Split(strings.TrimPrefix(cgroup, "/"), "/")
	for i, name := range parts {
		at.below = i < len(parts)-1
		shim, isShim := placement.ShimOfScope(name)
		container, isContainer := placement.ContainerOfScope(name)
		switch full := path.Join(parent, name); {
		case parent == placement.ShimsPath:
			at.role, at.id = shimRole, name
		case full == placement.StreamPath, inSlices && placement.IsStreamScope(name):
			at.role = streamRole
		case parent == placement.PodsPath && !at.below:
			at.role, at.id = podRole, name
		case path.Dir(parent) == placement.PodsPath:
			at.role, at.id = containerRole, name
		case idForm.MatchString(name) && l.parents[parent]:
			at.role, at.id, at.shared = containerRole, name, true
		case inSlices && isShim:
			at.role, at.id = shimRole, shim
		case inSlices && isContainer:
			at.role, at.id = containerRole, container
		default:
			inSlices = inSlices && strings.HasSuffix(name, ".slice")
			parent = full
			continue
		}
		return at, true
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

// ofPlace is the verdict on a cgroup.
func (l *look) ofPlace(at place) verdict {
	switch at.role {
	case streamRole:
		return of("sessions", "holdfast-stream sits there")
	case podRole:
		return l.unlessForeign(at.id, l.ofPod(at.id, records.DebtCgroup))
	}
	v := l.unlessForeign(at.id, l.ofContainer(at.id))
	if v.none() && at.shared && !l.known[at.id] && !exists(filepath.Join(l.State, "runc", at.id)) {
		return doubtful("another container runtime may have made it: %s, and it is in the cgroup of a pod", v.why)
	}
	return v
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// judgeCgroups judges the cgroups of shims, of containers, and of pods without a parent.
func (l *look) judgeCgroups() {
	dirs, paths := map[place][]string{}, map[place]string{}
	for _, g := range l.cgroups {
		if at, ok := l.placeOf(g.path); ok && !at.below {
			dirs[at] = append(dirs[at], g.dir)
			paths[at] = g.path
		}
	}
	for at, path := range paths {
		l.add(Cgroup, path, "", l.ofPlace(at), removeCgroup(dirs[at]))
	}
}

func (l *look) judgeProcesses() {
	for _, p := range l.processes {
		if k, v, ok := l.ofProgram(p); ok {
			l.addProcess(k, p, v)
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

// ofProgram is the verdict on a process that is one of our programs, a CNI plugin, an OCI runtime. not ok: it is none,
// or another daemon's.
func (l *look) ofProgram(p *process) (k Kind, v verdict, ok bool) {
	plugin, isPlugin := strings.CutPrefix(p.third, l.Root+"/cni/running/")
	switch {
	case p.keeps != "" && l.ours(p.keeps):
		return Shim, l.ofShim(p), true
	case p.is("holdfast-stream") && l.inState(p.argument("--dir")):
		return Process, l.ofStream(p), true
	case l.isDaemon(p):
		return Daemon, of("holdfastd", "it uses "+l.State), true
	case p.is("holdfast-pause") && len(p.args) > 1 && l.inState(p.args[1]):
		if parent := l.processes[p.parent]; parent != nil && parent.is("holdfastd") {
			return Process, of("holdfastd", "it keeps new namespaces until they are pinned"), true
		}
		return Process, none("the daemon that started it to keep new namespaces is gone"), true
	case isPlugin:
		return Process, l.ofPlugin(plugin), true
	case l.inState(p.argument("--root")) && filepath.Base(p.argument("--root")) == "runc":
		v, ok = l.ofRuntime(p)
		return Process, v, ok
	}
	return "", v, false
}

// argument gives the value of a flag of the command line; empty: it is not there.
func (p *process) argument(flag string) string {
	if i := slices.Index(p.args, flag); i >= 0 && i+1 < len(p.args) {
		return p.args[i+1]
	}
	return ""
}

// inState says whether a path that a command line names is below STATE.
func (l *look) inState(path string) bool {
	dir, err := filepath.EvalSymlinks(path)
	if err != nil {
		dir = path
	}
	return strings.HasPrefix(dir, l.State+"/")
}

func (l *look) ofShim(p *process) verdict {
	v := l.ofContainer(p.keeps.ID())
	identity, err := l.runDir(p.keeps.ID()).ReadIdentity()
	if err == nil && v.owner != "" && identity.Shim != p.Process && identity.Shim.Alive() &&
		identity.BootID == rundir.BootID() {
		v = none("another process is the shim of %s", v.owner)
	}
	if v.none() && l.hasChildren(p.PID) {
		return doubtful("it keeps processes, and %s", v.why)
	}
	return v
}

// ofStream is the verdict on a process that serves sessions. One that was replaced serves those that it has to their
// ends.
func (l *look) ofStream(p *process) verdict {
	a, err := stream.Dir(filepath.Join(l.State, stream.DirName)).Running()
	if err == nil && a.Process == p.Process {
		return of("sessions", "it serves exec, attach and port-forward, and ends when it is idle")
	}
	return of("sessions", "it starts, or serves its sessions to their ends; another one takes new ones")
}

func (l *look) isDaemon(p *process) bool {
	if !p.is("holdfastd") {
		return false
	}
	run, err := records.ReadDaemon(l.State)
	return err == nil && run.Process == p.Process || l.inState(p.argument("--state")+"/x")
}

func (l *look) ofPlugin(id string) verdict {
	if id == ".gc" {
		return of("holdfastd", "a CNI plugin collects garbage")
	}
	v := l.ofPod(id, records.DebtNetwork)
	if v.owner != "" {
		v.why = "a CNI plugin works for it; the next one of the pod waits for its end"
	}
	return v
}

// ofRuntime is the verdict on an OCI runtime at work for one of our containers. not ok: in the cgroup of a container it
// is its init, or an exec, that has not run its program yet.
func (l *look) ofRuntime(p *process) (v verdict, ok bool) {
	for _, cgroup := range p.cgroups {
		if at, ok := l.placeOf(cgroup); ok && at.role == containerRole {
			return v, false
		}
	}
	if parent := l.processes[p.parent]; parent != nil && (parent.PID != 1 || parent.is("holdfastd")) {
		return of(fmt.Sprintf("process %d, %s", parent.PID, parent.exe), "it has called the OCI runtime"), true
	}
	return none("the shim or daemon that called the OCI runtime is gone"), true
}

// judgeMember judges a process by the cgroup that it is in.
func (l *look) judgeMember(p *process, at place) {
	v, c := l.ofPlace(at), l.containers[at.id]
	switch {
	case at.role == streamRole && (len(l.others) > 0 || l.stranger != ""):
		return // it is another daemon's
	case at.role == streamRole:
		v = none("it is no holdfast-stream, and is in the cgroup of those")
	case v.owner == "":
	case at.role == podRole && l.pods[at.id] != nil:
		v = none("it is in the cgroup of a pod, and in none of a container")
	case c == nil:
	case c.shim == nil && c.exit != nil:
		v = none("%s has ended, and its shim is gone", v.owner)
	case at.role == shimRole && c.shim == nil:
		v = none("it is in the cgroup of the shim of %s, which is gone", v.owner)
	case at.role == shimRole && l.descends(p, c.shim.PID):
		v.why = "its shim has started it"
	case at.role == containerRole:
		l.noteNamespaces(p, v.owner)
	}
	l.addProcess(Process, p, v)
}

// noteNamespaces notes what namespaces a process of a container has, other than this process. One without an owner is
// told by its process.
func (l *look) noteNamespaces(p *process, owner string) {
	for _, kind := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.PID, kind))
		own, ownErr := os.Readlink("/proc/self/ns/" + kind)
		if err == nil && ownErr == nil && ns != own && !l.held[ns] {
			l.held[ns] = true
			l.add(Namespace, ns, "", of(owner, fmt.Sprintf("process %d is in it", p.PID)), nil)
		}
	}
}

// judgePins judges the network namespaces of pods.
func (l *look) judgePins() {
	mounted := map[string]string{}
	for _, m := range l.mounts {
		mounted[m.Point] = m.ID
	}
	for _, path := range l.pins {
		id := strings.TrimPrefix(filepath.Base(path), netns.PinPrefix)
		l.add(Namespace, path, mounted[path], l.unlessForeign(id, l.ofPod(id, records.DebtNamespaces)), unpin(path))
	}
}
