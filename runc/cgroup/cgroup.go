// Package cgroup is all that is known of the cgroups of a container, v1 and v2:
// who is in them, how they are killed and frozen, what the kernel counts there.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// Set are the cgroups of a container: controller -> path below the mount
// of its hierarchy, as /proc/PID/cgroup has them. "" is cgroup v2, "name=..."
// a named v1 hierarchy.
//
// No method touches the root of a hierarchy, whatever the map says.
type Set map[string]string

// ErrNone says that there is no cgroup to do this with.
var ErrNone = errors.New("the container has no cgroup of its own")

// Of tells the cgroups that a process has for itself: hierarchies
// where it sits in the root, or where the caller sits, are left out.
func Of(pid int) (Set, error) {
	theirs, err := procCgroups(strconv.Itoa(pid))
	if err != nil {
		return nil, err
	}
	ours, err := procCgroups("self")
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(theirs, func(c, path string) bool { return !safe(path) || ours[c] == path })
	return theirs, nil
}

func procCgroups(pid string) (Set, error) {
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return nil, fmt.Errorf("cannot read the cgroups of process %s: %w", pid, err)
	}
	c := Set{}
	for line := range strings.Lines(string(b)) {
		// hierarchy-ID:controller-list:cgroup-path, see cgroups(7).
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, path, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		path = strings.TrimSuffix(path, " (deleted)")
		for name := range strings.SplitSeq(controllers, ",") {
			c[name] = path
		}
	}
	return c, nil
}

// At are the cgroups that exist now at the same path of every hierarchy,
// where the cgroupfs driver makes those of a container.
func At(path string) Set {
	c := Set{}
	for name := range mounts() {
		c[name] = path
	}
	maps.DeleteFunc(c, func(name, _ string) bool {
		dir, ok := c.dir(name)
		_, err := os.Stat(dir)
		return !ok || err != nil
	})
	return c
}

// safe guards against the root, and against a path that leads out of its mount.
func safe(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/"
}

// mount is one cgroup file system: which part of the hierarchy it shows, where.
type mount struct{ root, dir string }

// mounts maps controllers to their hierarchies. They don't change during the
// life of a process that runs containers.
var mounts = sync.OnceValue(func() map[string]mount {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	m := map[string]mount{}
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		mt := mount{root: f[3], dir: f[4]}
		switch g[0] {
		case "cgroup2":
			if _, ok := m[""]; !ok {
				m[""] = mt
			}
		case "cgroup":
			for opt := range strings.SplitSeq(g[2], ",") {
				if _, ok := m[opt]; !ok && opt != "rw" && opt != "ro" {
					m[opt] = mt
				}
			}
		}
	}
	return m
})

// dir is the directory of a controller's cgroup.
func (c Set) dir(controller string) (string, bool) {
	path, ok := c[controller]
	m, mounted := mounts()[controller]
	if !ok || !mounted || !safe(path) {
		return "", false
	}
	if m.root != "/" {
		if path, ok = strings.CutPrefix(path, m.root); !ok || !safe(path) {
			return "", false
		}
	}
	return filepath.Join(m.dir, path), true
}

// tracker is the hierarchy by which the container's processes are known.
func (c Set) tracker() (controller, dir string, ok bool) {
	for _, controller := range []string{"", "freezer", "pids", "memory", "devices", "cpu"} {
		if dir, ok := c.dir(controller); ok {
			return controller, dir, true
		}
	}
	return "", "", false
}

// Sub makes a cgroup below the container's, for the tree of one exec. The
// argument is for ExecOptions.Cgroup. On v1 it is made where processes can be
// frozen, and nowhere else.
func (c Set) Sub(name string) (Set, string, error) {
	controller, argument := "freezer", "freezer:"
	if _, v1 := c[controller]; !v1 {
		controller, argument = "", ""
	}
	dir, ok := c.dir(controller)
	if !ok {
		return nil, "", fmt.Errorf("cannot make cgroup %s: %w", name, ErrNone)
	}
	if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
		return nil, "", fmt.Errorf("cannot make a cgroup for an exec: %w", err)
	}
	return Set{controller: c[controller] + "/" + name}, argument + name, nil
}

// Pids lists the processes in the cgroup and below it. No cgroup, no processes.
func (c Set) Pids() ([]int, error) {
	_, dir, ok := c.tracker()
	if !ok {
		return nil, nil
	}
	return pidsBelow(dir)
}

func pidsBelow(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return ignoreGone(err)
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a threaded cgroup; its processes are listed further up
		}
		for f := range strings.FieldsSeq(string(b)) {
			// 0 is a process outside of our pid namespace.
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return ignoreGone(err)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes of %s: %w", dir, err)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// ignoreGone forgives a cgroup that was removed meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// open gives pidfds of the living processes. The membership is checked again
// behind the pidfd, so that a reused pid is not taken for a member.
func (c Set) open() ([]unix.PollFd, error) {
	pids, err := c.Pids()
	if err != nil {
		return nil, err
	}
	controller, _, _ := c.tracker()
	var fds []unix.PollFd
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == unix.EMFILE || err == unix.ENFILE {
			if len(fds) == 0 {
				return nil, fmt.Errorf("cannot get hold of process %d: pidfd_open: %w", pid, err)
			}
			break // the caller comes back for the rest
		}
		if err != nil {
			continue // it has ended
		}
		now, err := procCgroups(strconv.Itoa(pid))
		path := now[controller]
		if err != nil || path != c[controller] && !strings.HasPrefix(path, c[controller]+"/") || ended(fd) {
			unix.Close(fd)
			continue
		}
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	return fds, nil
}

func ended(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n > 0
}

func closeAll(fds []unix.PollFd) {
	for _, f := range fds {
		unix.Close(int(f.Fd))
	}
}

// Signal sends a signal to every process of the cgroup.
func (c Set) Signal(sig unix.Signal) error {
	fds, err := c.open()
	if err != nil {
		return err
	}
	defer closeAll(fds)
	return signalAll(fds, sig)
}

func signalAll(fds []unix.PollFd, sig unix.Signal) error {
	var errs []error
	for _, f := range fds {
		if err := unix.PidfdSendSignal(int(f.Fd), sig, nil, 0); err != nil && err != unix.ESRCH {
			errs = append(errs, fmt.Errorf("pidfd_send_signal: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Kill kills every process of the cgroup, frozen ones and those being forked
// included, and returns when all have ended. ctx must have a deadline.
func (c Set) Kill(ctx context.Context) error {
	for {
		fds, err := c.open()
		if err != nil || len(fds) == 0 {
			return err
		}
		err = c.killOnce(fds)
		for err == nil && len(fds) > 0 {
			if err = pidfd.Poll(ctx, fds); err != nil {
				err = fmt.Errorf("cannot kill %d processes of cgroup %s: %w", len(fds), c, err)
				break
			}
			fds = slices.DeleteFunc(fds, func(f unix.PollFd) bool {
				if f.Revents != 0 {
					unix.Close(int(f.Fd))
				}
				return f.Revents != 0
			})
		}
		closeAll(fds)
		if err != nil {
			return err
		}
	}
}

func (c Set) killOnce(fds []unix.PollFd) error {
	if dir, ok := c.dir(""); ok {
		err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		if err == nil {
			c.thaw() // a v1 freezer of a hybrid holds the dying
			return nil
		}
	}
	// Without cgroup.kill: nothing forks while it is frozen, so all that was
	// listed after the freeze is all there is. A freeze that is refused costs
	// the caller another round.
	c.freeze()
	defer c.thaw()
	more, err := c.open()
	if err != nil {
		return err
	}
	defer closeAll(more)
	return errors.Join(signalAll(fds, unix.SIGKILL), signalAll(more, unix.SIGKILL))
}

func (c Set) freeze() { c.setFrozen("FROZEN", "1") }

// Thaw lets a frozen cgroup run. On v1 a frozen process does not die of a
// signal, SIGKILL included.
func (c Set) Thaw() { c.thaw() }

func (c Set) thaw() { c.setFrozen("THAWED", "0") }

func (c Set) setFrozen(v1, v2 string) {
	if dir, ok := c.dir("freezer"); ok {
		os.WriteFile(filepath.Join(dir, "freezer.state"), []byte(v1), 0)
	} else if dir, ok := c.dir(""); ok {
		os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte(v2), 0)
	}
}

// Remove removes the cgroups and those below them. They must be empty.
func (c Set) Remove() error {
	var errs []error
	for controller := range c {
		if dir, ok := c.dir(controller); ok {
			errs = append(errs, removeTree(dir))
		}
	}
	return errors.Join(errs...)
}

// RemoveIdle is Remove unless a process is left, which is reported as false.
func (c Set) RemoveIdle() (bool, error) {
	if pids, err := c.Pids(); err != nil || len(pids) > 0 {
		return false, err
	}
	return true, c.Remove()
}

func removeTree(dir string) error {
	if err := rmdir(dir); err == nil {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreGone(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// A process that has just died keeps its cgroup busy for a moment, and v1
	// has no way to be told when that is over.
	wait := time.Millisecond
	for {
		err := rmdir(dir)
		if !errors.Is(err, unix.EBUSY) || wait > 512*time.Millisecond {
			return err
		}
		time.Sleep(wait)
		wait *= 2
	}
}

func rmdir(dir string) error {
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return fmt.Errorf("cannot remove cgroup %s: %w", dir, err)
	}
	return nil
}

// InUse says whether a process is in one of the cgroups.
func (c Set) InUse() (string, bool) {
	for controller := range c {
		if dir, ok := c.dir(controller); ok {
			if pids, _ := pidsBelow(dir); len(pids) > 0 {
				return dir, true
			}
		}
	}
	return "", false
}
