package network

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/group"
	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

const (
	// lockFD is where a plugin and all it starts find the run's lock. It is
	// never read; holding it is the point.
	lockFD = 3

	// maxOutput bounds what is kept of a plugin's stdout and stderr each.
	maxOutput = 1 << 20

	// pipeDelay is how long after a plugin's end its pipes may stay open in
	// something it started.
	pipeDelay = 2 * time.Second

	// killTimeout bounds the wait for killed processes to end.
	killTimeout = 10 * time.Second

	// orphanGrace is how long a plugin of an earlier daemon may go on, and
	// lockTick how often its lock is tried.
	orphanGrace = 10 * time.Second
	lockTick    = 5 * time.Millisecond
)

// run is one ADD or DEL of one pod, or one GC, and runs its plugins for libcni. One without
// a lock only asks, and leaves nothing that would have to be waited for.
//
// It holds a lock that the plugins inherit. If the daemon is killed meanwhile,
// they go on and the lock stays with them; the next run of that pod waits for
// their end. Otherwise an ADD nobody waits for any more could take an address
// after the DEL that was to give it back. Only those that hang are killed: a
// plugin cut in two may leave what its next DEL does not find, as bridge does
// with packet rules once the interface is gone.
type run struct {
	version.PluginDecoder
	net  *Network
	path string
	lock *os.File // closed by end
	real string   // the path of lock, as /proc has it
}

// startRun waits for a free place and then for the pod's lock.
func (n *Network) startRun(ctx context.Context, id string) (*run, error) {
	select {
	case n.runs <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("no turn to run CNI plugins, at most %d pods have one at once: %w",
			maxPlugins, context.Cause(ctx))
	}
	r := &run{net: n, path: n.lockFile(id)}
	if err := r.acquire(ctx); err != nil {
		r.end()
		return nil, err
	}
	return r, nil
}

func (r *run) acquire(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(r.path), 0o700); err != nil {
		return fmt.Errorf("cannot create the directory of CNI locks: %w", err)
	}
	if st, err := os.Lstat(r.path); err == nil && !st.Mode().IsRegular() {
		// Damaged: nobody can hold it, and it must not keep the pod.
		if err := os.RemoveAll(r.path); err != nil {
			return fmt.Errorf("cannot replace the CNI lock: %w", err)
		}
	}
	f, err := os.OpenFile(r.path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the CNI lock: %w", err)
	}
	r.lock = f
	if r.real, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
		return fmt.Errorf("cannot find out the path of the CNI lock: %w", err)
	}
	err = r.poll(ctx, r.grace(ctx))
	if !errors.Is(err, errLockHeld) {
		return err
	}
	killed, err := killHolders(ctx, r.isHolder)
	if err != nil {
		return fmt.Errorf("cannot end CNI plugins left by an earlier daemon: %w", err)
	}
	r.net.log.Warn("CNI plugins left by an earlier daemon killed", "pod", filepath.Base(r.path), "pids", killed)
	return r.poll(ctx, killTimeout)
}

// grace is how long what an earlier plugin has left may go on.
func (r *run) grace(ctx context.Context) time.Duration {
	if d, ok := ctx.Deadline(); ok {
		return min(r.net.grace, time.Until(d)/2)
	}
	return r.net.grace
}

var errLockHeld = errors.New("a plugin holds it, see `fuser` for which")

// poll takes the lock, or gives up after a time with errLockHeld. A process
// between fork and exec, or half way through its end, has the lock and is not
// found; so it takes ticks, for flock has no deadline of its own.
func (r *run) poll(ctx context.Context, wait time.Duration) error {
	tick := time.NewTicker(lockTick)
	defer tick.Stop()
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		err := unix.Flock(int(r.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("cannot lock %s: %w", r.path, err)
		}
		select {
		case <-tick.C:
		case <-timeout.C:
			return fmt.Errorf("cannot lock %s: %w", r.path, errLockHeld)
		case <-ctx.Done():
			return fmt.Errorf("cannot lock %s: %w", r.path, context.Cause(ctx))
		}
	}
}

// end gives up the lock, also on behalf of anything a plugin left running on
// purpose, and the place.
func (r *run) end() {
	if r.lock != nil {
		_ = unix.Flock(int(r.lock.Fd()), unix.LOCK_UN)
		r.lock.Close()
	}
	<-r.net.runs
}

// remove takes the lock's file away once the pod needs it no more.
func (r *run) remove() error {
	if err := removeIfThere(r.path); err != nil {
		return fmt.Errorf("cannot remove the CNI lock: %w", err)
	}
	return nil
}

// FindInPath is part of libcni's interface.
func (r *run) FindInPath(plugin string, dirs []string) (string, error) {
	return findPlugin(plugin, dirs)
}

// ExecPlugin is part of libcni's interface. At the end of ctx it kills the
// plugin and all that it started, which libcni's own version would leave
// running: bridge runs an IPAM plugin and iptables.
func (r *run) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	stdout, stderr := group.Head{Max: maxOutput}, group.Head{Max: maxOutput}
	c := exec.Command(path)
	c.Env = env
	c.Stdin = bytes.NewReader(stdin)
	c.Stdout, c.Stderr = &stdout, &stderr
	if r.lock != nil {
		c.ExtraFiles = []*os.File{r.lock} // becomes lockFD
	}
	c.WaitDelay = pipeDelay
	err := group.Run(ctx, c, nil, group.Keep)
	var killErr error
	if err != nil && ctx.Err() != nil && r.lock != nil {
		// What left the group is still found by the lock.
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
		defer cancel()
		_, killErr = killHolders(kill, r.isHolder)
	}
	name := filepath.Base(path)
	if ctx.Err() != nil && err != nil {
		return nil, errors.Join(fmt.Errorf("CNI plugin %s killed: %w", name, context.Cause(ctx)), killErr)
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, errors.Join(pluginError(name, err, stdout.Bytes(), stderr.Bytes()), r.endRest(ctx, c))
	}
	if said := stderr.Bytes(); len(said) > 0 {
		r.net.log.Debug("CNI plugin said", "plugin", name, "stderr", string(said))
	}
	return stdout.Bytes(), nil
}

// endRest waits for what a plugin that failed has left in its process group, and kills
// what hangs. An IPAM plugin goes on when the bridge that runs it is killed, as for want
// of memory, and could take an address after the DEL that is to come. What a plugin has
// left that gave up by itself is waited for alone: it may be meant to stay.
func (r *run) endRest(ctx context.Context, plugin *exec.Cmd) error {
	if plugin.Process == nil || r.lock == nil {
		return nil
	}
	left := func(pid int) bool {
		group, err := unix.Getpgid(pid)
		return err == nil && group == plugin.Process.Pid && r.isHolder(pid)
	}
	wait, cancel := context.WithTimeout(ctx, r.grace(ctx))
	defer cancel()
	for wait.Err() == nil {
		processes, err := find(left)
		if err != nil || len(processes) == 0 {
			return err
		}
		for _, p := range processes {
			if p.Wait(wait) != nil {
				cancel() // also where it cannot be waited for
			}
			p.Close()
		}
	}
	const signalled = 128 // what a shell adds to the signal that has killed its command
	if s := plugin.ProcessState; s != nil && s.Exited() && s.ExitCode() < signalled {
		return nil
	}
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
	defer cancel()
	killed, err := killHolders(ctx, left)
	if len(killed) > 0 {
		r.net.log.Warn("what a failed CNI plugin left running was killed", "pod", filepath.Base(r.path), "pids", killed)
	}
	return err
}

// pluginError prefers the error object that the CNI specification has plugins
// print on stdout.
func pluginError(name string, err error, stdout, stderr []byte) error {
	var e types.Error
	if json.Unmarshal(stdout, &e) == nil && e.Msg != "" {
		e.Msg, e.Details = words([]byte(e.Msg)), words([]byte(e.Details))
		return fmt.Errorf("CNI plugin %s: %w", name, &e)
	}
	said := cmp.Or(words(stderr), words(stdout))
	if said == "" {
		return fmt.Errorf("CNI plugin %s: %w, it said nothing", name, err)
	}
	return fmt.Errorf("CNI plugin %s: %w: %s", name, err, said)
}

// maxWords bounds what an error repeats of a plugin, in characters: the reason why the
// network is not ready is part of each status of the node.
const maxWords = 1000

// words gives what a plugin has said as a text that can be shown.
func words(said []byte) string {
	shown := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return -1
		}
		return r
	}, string(said))
	return fmt.Sprintf("%.*s", maxWords, strings.TrimSpace(shown))
}

// killHolders kills every other process that is one of those wanted, until there is none,
// and returns their pids. They are looked for in /proc: a cgroup for each run would have
// to be one of systemd's where that manages them, and on v1 a plugin enters one only
// after it has begun.
func killHolders(ctx context.Context, wanted func(pid int) bool) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	var killed []int
	for {
		holders, err := find(wanted)
		if err != nil || len(holders) == 0 {
			return killed, err
		}
		for _, h := range holders { // all before any is waited for: a parent would go on
			h.Signal(unix.SIGKILL) // Kill tells what fails
		}
		for _, h := range holders {
			killed = append(killed, h.PID)
			err = errors.Join(err, h.Kill(ctx))
			h.Close()
		}
		if err != nil {
			return killed, err
		}
	}
}

// find gives the processes that are wanted, but this one; the caller closes them.
func find(wanted func(pid int) bool) ([]*pidfd.Process, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var holders []*pidfd.Process
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() || !wanted(pid) {
			continue
		}
		h, err := pidfd.Open(pid, func() bool { return wanted(pid) })
		if errors.Is(err, pidfd.ErrEnded) {
			continue
		}
		if err != nil && len(holders) == 0 { // otherwise the caller comes back
			return nil, err
		}
		if err != nil {
			break
		}
		holders = append(holders, h)
	}
	return holders, nil
}

// isHolder says whether a process has the lock's file open as lockFD.
func (r *run) isHolder(pid int) bool {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, lockFD))
	return err == nil && strings.TrimSuffix(link, " (deleted)") == r.real
}
