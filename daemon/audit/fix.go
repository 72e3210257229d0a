package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
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

// byHand is the fix of what a person has to decide.
func byHand(text string) *fix { return &fix{text: text} }

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

const (
	fixTimeout = time.Minute      // for one thing
	maxLookAge = 10 * time.Second // of a look by which things are taken away
)

// Fix takes away things that a Report says have no owner, and tells done of each: nil, it is gone; ErrOwned, there is
// nothing to do any more. It looks once more before, and holds the daemon's lock where no daemon may run
// meanwhile. What a running process uses is left, with an error.
func Fix(ctx context.Context, o Options, things []Thing, done func(Thing, error)) error {
	o, err := o.resolved()
	if err != nil {
		return err
	}
	var online, offline []Thing
	for _, t := range things {
		switch {
		case t.fix == nil || t.fix.do == nil:
			done(t, ErrNotHere)
		case t.fix.offline:
			offline = append(offline, t)
		default:
			online = append(online, t)
		}
	}
	fixThose(ctx, o, online, done)
	if len(offline) == 0 {
		return nil
	}
	locks, err := state.Lock(o.Root, o.State)
	if err != nil {
		for _, t := range offline {
			done(t, fmt.Errorf("%w: stop the daemon first: %w", ErrNotHere, err))
		}
		return nil
	}
	for _, f := range locks {
		defer f.Close()
	}
	fixThose(ctx, o, offline, done)
	return nil
}

func fixThose(ctx context.Context, o Options, things []Thing, done func(Thing, error)) {
	var now *look
	var at time.Time
	for _, t := range things {
		if now == nil || time.Since(at) > maxLookAge {
			now, at = takeLook(o), time.Now()
		}
		done(t, now.fix(ctx, t))
	}
}

func (l *look) fix(ctx context.Context, t Thing) error {
	if l.blind {
		return fmt.Errorf("%w: not all of the machine can be looked at", ErrNotHere)
	}
	ctx, cancel := context.WithTimeout(ctx, fixTimeout)
	defer cancel()
	for _, again := range l.things {
		if again.key == t.key && again.Ownerless() {
			return again.fix.do(ctx)
		}
	}
	return ErrOwned
}

// killProcess ends a process with SIGKILL.
func killProcess(p *process) *fix {
	return &fix{text: "kill it", do: func(ctx context.Context) error {
		held, err := pidfd.Open(p.PID, p.Alive)
		if errors.Is(err, pidfd.ErrEnded) {
			return nil
		}
		if err != nil {
			return err
		}
		defer held.Close()
		return held.Kill(ctx)
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

// inNamespace gives a process of which a thread is in the namespace that is pinned at a path, 0 if none is.
func inNamespace(path string) (pid int, err error) {
	pin, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return 0, err
	}
	links, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/*")
	for _, link := range links {
		if ns, err := os.Stat(link); err == nil && os.SameFile(ns, pin) {
			fmt.Sscanf(link, "/proc/%d/", &pid)
			return pid, nil
		}
	}
	return 0, err
}

// removeCgroup removes a cgroup without processes from all hierarchies.
func removeCgroup(dirs []string) *fix {
	return &fix{text: "remove it, if no process is in it", do: func(context.Context) error {
		return cgroup.RemoveDirs(dirs)
	}}
}

// removePath removes a file or a tree that nobody uses. offline: a daemon that runs may be just about to use it.
func removePath(path string, offline bool) *fix {
	return &fix{text: "remove it, if nobody uses it", offline: offline, do: func(context.Context) error {
		if err := unused(path); err != nil {
			return err
		}
		return state.RemoveTree(path)
	}}
}

// unused says who uses a file, or something below a directory: a mount, a process that has it open, a socket that
// somebody listens on, an overlay in whatever mount namespace.
func unused(path string) error {
	table, err := mounts.Read(mounts.Self)
	if err != nil {
		return err
	}
	within := func(to string) bool { return to == path || strings.HasPrefix(to, path+"/") }
	for _, m := range table {
		if m.Below(path) {
			return fmt.Errorf("cannot remove %s: %s is mounted", path, m.Point)
		}
	}
	if b, _ := os.ReadFile("/proc/net/unix"); strings.Contains(string(b), " "+path+"\n") {
		return fmt.Errorf("cannot remove %s: somebody has the socket open", path)
	}
	for _, pattern := range []string{"fd/*", "cwd", "root", "exe"} {
		links, err := filepath.Glob("/proc/[0-9]*/" + pattern)
		if err != nil {
			return err
		}
		for _, link := range links {
			if to, err := os.Readlink(link); err == nil && within(to) {
				return fmt.Errorf("cannot remove %s: %s leads to it", path, link)
			}
		}
	}
	return notInOverlay(path)
}

// notInOverlay says which process sees an overlay that has a directory as a layer, by the last two names of its path,
// or may have it: the kernel tells some layers without their names.
func notInOverlay(path string) error {
	store := filepath.Dir(filepath.Dir(path))
	name, layer := strings.TrimPrefix(path, store)+"/", filepath.Base(store) == "layers"
	lists, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	seen := map[string]bool{}
	for _, list := range lists {
		ns, nerr := os.Readlink(filepath.Join(filepath.Dir(list), "ns/mnt"))
		if nerr != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		table, merr := mounts.Read(list)
		if merr != nil {
			seen[ns] = false // the process has ended; another one may be in the namespace
		}
		for _, m := range table {
			_, all := rootfs.LayersIn(m.FSOptions)
			if m.Kind == "overlay" && (strings.Contains(m.FSOptions, name) || layer && !all) {
				return fmt.Errorf("cannot remove %s: it may be a layer of what is mounted at %s (%s)", path, m.Point,
					list)
			}
		}
	}
	return err
}
