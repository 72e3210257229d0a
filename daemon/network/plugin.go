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

	grace := r.net.grace
	if d, ok := ctx.Deadline(); ok {
		grace = min(grace, time.Until(d)/2)
	}
	err = r.poll(ctx, grace)
	if !errors.Is(err, errLockHeld) {
		return err
	}
	killed, err := killHolders(ctx, r.path)
	if err != nil {
		return fmt.Errorf("cannot end CNI plugins left by an earlier daemon: %w", err)
	}
	r.net.log.Warn("CNI plugins left by an earlier daemon killed", "pod", filepath.Base(r.path), "pids", killed)
	return r.poll(ctx, killTimeout)
}

var errLockHeld = errors.New("held by a plugin of an earlier daemon, see `fuser` for it")

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
		_, killErr = killHolders(kill, r.path)
	}
	name := filepath.Base(path)
	if ctx.Err() != nil && err != nil {
		return nil, errors.Join(fmt.Errorf("CNI plugin %s killed: %w", name, context.Cause(ctx)), killErr)
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, pluginError(name, err, stdout.Bytes(), stderr.Bytes())
	}
	if said := stderr.Bytes(); len(said) > 0 {
		r.net.log.Debug("CNI plugin said", "plugin", name, "stderr", string(said))
	}
	return stdout.Bytes(), nil
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

// killHolders kills every other process that has the lock file at path open as
// lockFD, until there is none, and returns their pids. They are looked for in
// /proc: a cgroup for each run would have to be one of systemd's where that
// manages them, and on v1 a plugin enters one only after it has begun.
func killHolders(ctx context.Context, path string) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	var killed []int
	for {
		holders, err := lockHolders(path)
		if err != nil || len(holders) == 0 {
			return killed, err
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

// lockHolders gives the processes that killHolders kills; the caller closes them.
func lockHolders(path string) ([]*pidfd.Process, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var holders []*pidfd.Process
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() || !holds(pid, real) {
			continue
		}
		h, err := pidfd.Open(pid, func() bool { return holds(pid, real) })
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

func holds(pid int, path string) bool {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, lockFD))
	return err == nil && link == path
}
