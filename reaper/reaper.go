// Package reaper starts children and learns how each one died.
//
// A subreaper has three kinds of children: commands that it started, processes
// that a command left to it (adopted by pid), and orphans that nobody waits for.
// The first two have an owner here and only the owner reaps them; a sweep after
// each SIGCHLD reaps the rest.
package reaper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Reaper owns the children of this process.
type Reaper struct {
	sigchld chan os.Signal
	done    sync.WaitGroup

	mu    sync.Mutex
	owned map[int]bool // pids that somebody waits for
	holds int          // while above 0, an unowned child may yet be adopted
}

// New makes this process a child subreaper (prctl(2)). It reaps no orphan before
// Begin: a process that was here before may be adopted. There is one Reaper per
// process. Close ends it.
func New() (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("cannot become a child subreaper: %w", err)
	}
	r := &Reaper{sigchld: make(chan os.Signal, 1), owned: make(map[int]bool), holds: 1}
	signal.Notify(r.sigchld, unix.SIGCHLD)
	r.done.Go(func() {
		for range r.sigchld {
			r.sweep()
		}
	})
	return r, nil
}

// Begin begins to reap orphans. It is called once.
func (r *Reaper) Begin() { r.release() }

// Close stops reaping orphans. Owners may go on.
func (r *Reaper) Close() {
	signal.Stop(r.sigchld)
	close(r.sigchld)
	r.done.Wait()
}

// Start starts a command that Wait alone reaps.
func (r *Reaper) Start(cmd *exec.Cmd) error {
	// Held over the start: the child may end before its pid is known here, and
	// a sweep must not take it for an orphan.
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	r.owned[cmd.Process.Pid] = true
	return nil
}

// Wait waits for a started command, as exec.Cmd.Wait does.
func (r *Reaper) Wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.disown(cmd.Process.Pid)
	return err
}

// Hold keeps orphans from being reaped until release is called: a command that
// is going to leave a process behind is run, and the process adopted, under it.
func (r *Reaper) Hold() (release func()) {
	r.mu.Lock()
	r.holds++
	r.mu.Unlock()
	return sync.OnceFunc(r.release)
}

func (r *Reaper) release() {
	r.mu.Lock()
	r.holds--
	r.mu.Unlock()
	r.sweep()
}

func (r *Reaper) disown(pid int) {
	r.mu.Lock()
	delete(r.owned, pid)
	r.mu.Unlock()
	r.sweep()
}

// sweep reaps every dead child that nobody owns. The kernel shows one dead
// child at a time; when that one is owned, the sweep ends, and goes on when its
// owner has reaped it.
func (r *Reaper) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.holds == 0 {
		st, err := waitid(unix.P_ALL, 0, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
		if err != nil || st.pid == 0 || r.owned[st.pid] {
			return
		}
		// It is dead and only this function reaps it, so the pid is still its own.
		if _, err := waitid(unix.P_PID, st.pid, unix.WEXITED|unix.WNOHANG); err != nil {
			return
		}
	}
}

// KillStrays sends SIGKILL to every living child that nobody owns. It needs
// /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN).
func (r *Reaper) KillStrays() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("cannot list the children: %w", err)
	}
	var errs []error
	for _, task := range tasks {
		b, err := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			errs = append(errs, err)
		}
		for f := range strings.FieldsSeq(string(b)) {
			// A child's pid is not reused before it is reaped, and sweep,
			// which would reap it, waits for mu.
			if pid, err := strconv.Atoi(f); err == nil && !r.owned[pid] {
				if err := unix.Kill(pid, unix.SIGKILL); err != unix.ESRCH {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}
