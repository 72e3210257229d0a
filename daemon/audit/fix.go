package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/reaper/pidfd"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// ErrOwned says that a thing that was to be taken away has an owner by now, or is gone.
var ErrOwned = errors.New("it has an owner now, or is gone")

// ErrNotHere says that a thing is not for this package to take away, or not now.
var ErrNotHere = errors.New("it is not taken away")

// fix is how something is taken away that has no owner.
type fix struct {
	text string // what is done
	// offline says that no daemon may run meanwhile.
	offline bool
	// do is nil where only a person can do it. It finds out again that nobody uses the thing.
	do func(ctx context.Context) error
}

// remedy says what is to be done.
func (f *fix) remedy(daemonRuns bool) string {
	switch {
	case f == nil:
		return ""
	case f.offline && daemonRuns:
		return f.text + ", once the daemon is stopped (containers do not notice)"
	}
	return f.text
}

// CanFix says whether Fix would try to take a thing away now.
func (r *Report) CanFix(t Thing) bool {
	return t.fix != nil && t.fix.do != nil && !(t.fix.offline && r.DaemonRuns)
}

// fixTimeout bounds the taking away of one thing.
const fixTimeout = time.Minute

// Fix takes a thing away that a Report says has no owner. It looks once more before, under
// the daemon's lock where no daemon may run meanwhile. ErrOwned: there is nothing to do any
// more. What a running process uses is left, with an error.
func Fix(ctx context.Context, o Options, t Thing) error {
	o, err := o.resolved()
	if err != nil {
		return err
	}
	if t.fix == nil || t.fix.do == nil {
		return ErrNotHere
	}
	ctx, cancel := context.WithTimeout(ctx, fixTimeout)
	defer cancel()
	if t.fix.offline {
		locks, err := state.Lock(o.Root, o.State)
		if err != nil {
			return fmt.Errorf("%w: stop the daemon first: %w", ErrNotHere, err)
		}
		for _, f := range locks {
			defer f.Close()
		}
	}
	now := takeLook(o)
	for _, again := range now.things {
		if again.key() == t.key() && again.Ownerless() {
			return again.fix.do(ctx)
		}
	}
	return ErrOwned
}

// killProcess ends a process with SIGKILL.
func killProcess(p *process) *fix {
	return &fix{text: "kill it", do: func(ctx context.Context) error { return kill(ctx, p) }}
}

func kill(ctx context.Context, p *process) error {
	held, err := pidfd.Open(p.PID, p.Alive)
	if errors.Is(err, pidfd.ErrEnded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer held.Close()
	return held.Kill(ctx)
}

// killMember is killProcess for one that its cgroup tells. Where another container runtime
// may have made the cgroup, a person has to decide.
func killMember(l *look, p *process, at place) *fix {
	if !l.surelyOurs(p.cgroups, at) {
		return &fix{text: "find out whose it is: another container runtime may have put it there"}
	}
	return killProcess(p)
}

// surelyOurs says whether a cgroup was made for one of our containers: it is below one of
// our own, or a scope that is called as ours are, or the container is known.
func (l *look) surelyOurs(paths []string, at place) bool {
	if at.role != containerRole || l.containers[at.id] != nil {
		return true
	}
	if _, err := os.Lstat(filepath.Join(l.State, "runc", at.id)); err == nil {
		return true
	}
	return slices.ContainsFunc(paths, func(path string) bool {
		return strings.HasPrefix(path, "/holdfast/") || strings.Contains(path, "/holdfast-"+at.id+".scope")
	})
}

// endShim ends a shim of which no record tells what it keeps, unless it keeps something.
func endShim(l *look, p *process) *fix {
	dir := p.keeps
	return &fix{text: "kill the shim, if it keeps no container that lives", do: func(ctx context.Context) error {
		if s, err := dir.ReadStatus(); err == nil && s.Init.Alive() {
			return fmt.Errorf("%w: its container lives; end it with: holdfastctl stop %s", ErrNotHere, dir.ID())
		}
		for _, other := range l.processes {
			for _, path := range other.cgroups {
				if at, ok := l.placeOf(path); ok && at == (place{containerRole, dir.ID(), at.below}) {
					return fmt.Errorf("%w: process %d of its container lives", ErrNotHere, other.PID)
				}
			}
		}
		return kill(ctx, p)
	}}
}

// unmount takes a mount away that nobody uses: the kernel refuses it else.
func unmount(m mounts.Mount) *fix {
	return &fix{text: "unmount it", do: func(context.Context) error {
		if err := unix.Unmount(m.Point, unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("cannot unmount %s: %w", m.Point, err)
		}
		return nil
	}}
}

// unpin takes away the pin of a namespace that no process is in.
func unpin(path string) *fix {
	return &fix{text: "unpin the namespace, if no process is in it", do: func(context.Context) error {
		if pid, err := inNamespace(path); err != nil || pid != 0 {
			return errors.Join(err, fmt.Errorf("cannot unpin %s: process %d is in it", path, pid))
		}
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cannot unpin %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
			return err
		}
		return nil
	}}
}

// inNamespace gives a process that is in the namespace that is pinned at a path, 0 if none
// is.
func inNamespace(path string) (int, error) {
	var pin unix.Stat_t
	if err := unix.Stat(path, &pin); err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return 0, err
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/*")
	for _, link := range links {
		var ns unix.Stat_t
		if unix.Stat(link, &ns) == nil && ns.Ino == pin.Ino && ns.Dev == pin.Dev {
			pid := 0
			fmt.Sscanf(link, "/proc/%d/", &pid)
			return pid, nil
		}
	}
	return 0, err
}

// removeCgroup removes a cgroup without processes from all hierarchies.
func removeCgroup(l *look, dirs []string, path string, at place) *fix {
	if !l.surelyOurs([]string{path}, at) {
		return &fix{text: "find out whose it is: another container runtime may have made it"}
	}
	return &fix{text: "remove it, if no process is in it", do: func(context.Context) error {
		return cgroup.RemoveDirs(dirs)
	}}
}

// settled is how long what a creation has just made may be without a record.
const settled = 10 * time.Minute

// removePath removes a file or a tree that nobody uses. inTheWay: a daemon that runs may be
// just about to use it, unless it is old.
func removePath(e entry, inTheWay bool) *fix {
	young := time.Since(time.Unix(e.at.Unix())) < settled
	return &fix{text: "remove it, if nobody uses it", offline: inTheWay && young, do: func(context.Context) error {
		if err := unused(e.path); err != nil {
			return err
		}
		return state.RemoveTree(e.path)
	}}
}

// unused says who uses a file, or something below a directory: a mount, a process that has
// it open, a socket that somebody listens on.
func unused(path string) error {
	table, err := mounts.Read(mounts.Self)
	if err != nil {
		return err
	}
	for _, m := range table {
		if m.Below(path) {
			return fmt.Errorf("cannot remove %s: %s is mounted", path, m.Point)
		}
	}
	if b, _ := os.ReadFile("/proc/net/unix"); strings.Contains(string(b), " "+path+"\n") {
		return fmt.Errorf("cannot remove %s: somebody has the socket open", path)
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return err
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		more, _ := filepath.Glob("/proc/[0-9]*/" + name)
		links = append(links, more...)
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err == nil && (to == path || strings.HasPrefix(to, path+"/")) {
			return fmt.Errorf("cannot remove %s: %s leads to it", path, link)
		}
	}
	return nil
}

// same is when a file was changed, for two looks at it.
func sameFile(st fs.FileInfo) string {
	sys := st.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d %d", sys.Ino, sys.Ctim.Nano())
}
