package reaper

import (
	"context"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// ErrGone says that the child has been reaped.
var ErrGone = pidfd.ErrEnded

// Status says how a process ended.
type Status struct {
	Code   int         // exit code, or 128 + signal
	Signal unix.Signal // 0: it exited
}

// Child is an adopted process. Signals reach this very process or nothing.
type Child struct {
	PID int

	r    *Reaper
	held *pidfd.Process // Reap closes it

	mu     sync.Mutex
	reaped bool
}

// Adopt takes over a process that is a child of this one already, dead or
// alive, and not owned. Call it under the Hold under which the child came.
func (r *Reaper) Adopt(pid int) (*Child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owned[pid] {
		return nil, fmt.Errorf("cannot adopt process %d: it has an owner", pid)
	}
	held, err := pidfd.Open(pid, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot adopt process %d: %w", pid, err)
	}
	c := &Child{PID: pid, r: r, held: held}
	// ECHILD tells a stranger from a child before anything relies on it.
	if _, err := c.peek(); err != nil {
		held.Close()
		return nil, fmt.Errorf("cannot adopt process %d: not a child: %w", pid, err)
	}
	r.owned[pid] = true
	return c, nil
}

// Wait waits until the child has ended and leaves it as a zombie, so that its
// pid, its /proc entry and its cgroup stay its own until Reap. One goroutine
// may wait. When ctx ends first the error wraps its cause.
func (c *Child) Wait(ctx context.Context) (Status, error) {
	if err := c.held.Wait(ctx); err != nil {
		return Status{}, fmt.Errorf("cannot wait for process %d: %w", c.PID, err)
	}
	st, err := c.peek()
	if err != nil {
		return Status{}, fmt.Errorf("cannot wait for process %d: %w", c.PID, err)
	}
	return st.status(), nil
}

// peek asks how the child has ended, if it has, and leaves it as it is.
func (c *Child) peek() (st waitStatus, err error) {
	err = c.held.Control(func(fd int) (err error) {
		st, err = waitid(unix.P_PIDFD, fd, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
		return err
	})
	return st, err
}

// Reap lets the kernel forget a child that Wait has returned for.
func (c *Child) Reap() {
	c.mu.Lock()
	if c.reaped {
		c.mu.Unlock()
		return
	}
	c.reaped = true
	waitid(unix.P_PID, c.PID, unix.WEXITED|unix.WNOHANG)
	c.held.Close()
	c.mu.Unlock()
	c.r.disown(c.PID)
}

// Disown gives the child up without reaping it. Nothing but Reap and Disown may
// follow, and they do nothing.
func (c *Child) Disown() {
	c.mu.Lock()
	gone := c.reaped
	c.reaped = true
	c.mu.Unlock()
	if !gone {
		c.held.Close()
		c.r.disown(c.PID)
	}
}

// Signal sends a signal. ErrGone once the child has ended.
func (c *Child) Signal(sig unix.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return fmt.Errorf("cannot signal process %d: %w", c.PID, ErrGone)
	}
	return c.held.Signal(sig)
}

// Control lends the pidfd to f, which may only look at it. It becomes readable
// when the child ends.
func (c *Child) Control(f func(pidfd int) error) error {
	var ferr error
	err := c.held.Control(func(fd int) error {
		ferr = f(fd)
		return nil
	})
	if err != nil {
		return fmt.Errorf("process %d: %w: %w", c.PID, ErrGone, err)
	}
	return ferr
}

// Ended says whether the child has ended, reaped or not.
func (c *Child) Ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return true
	}
	st, err := waitid(unix.P_PID, c.PID, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
	return err != nil || st.pid != 0
}

// waitStatus is the part of siginfo_t that waitid(2) fills.
type waitStatus struct {
	pid    int // 0: nobody has ended
	code   int32
	detail int32
}

func (w waitStatus) status() Status {
	const cldExited = 1
	if w.code == cldExited {
		return Status{Code: int(w.detail)}
	}
	return Status{Code: 128 + int(w.detail), Signal: unix.Signal(w.detail)}
}

// siginfo mirrors siginfo_t of SIGCHLD: three ints, then a union aligned to a pointer.
type siginfo struct {
	_      [2]int32
	code   int32
	_      [unsafe.Sizeof(uintptr(0))/4 - 1]int32
	pid    int32
	_      uint32
	status int32
	_      [104]byte
}

func waitid(idtype, id, options int) (waitStatus, error) {
	for {
		var si siginfo
		err := unix.Waitid(idtype, id, (*unix.Siginfo)(unsafe.Pointer(&si)), options, nil)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN { // a non-blocking pidfd whose process lives
			return waitStatus{}, nil
		}
		return waitStatus{pid: int(si.pid), code: si.code, detail: si.status}, err
	}
}
