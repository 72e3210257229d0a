// Package group runs commands as process groups of their own, so that a command
// can be ended together with what it has started.
package group

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// Runner starts a command and waits for it. A process that reaps its orphans
// gives its reaper, anybody else nil for os/exec.
type Runner interface {
	Start(*exec.Cmd) error
	Wait(*exec.Cmd) error
}

type osExec struct{}

func (osExec) Start(c *exec.Cmd) error { return c.Start() }
func (osExec) Wait(c *exec.Cmd) error  { return c.Wait() }

// Leftovers says what becomes of processes that a command leaves in its group
// when it ends by itself.
type Leftovers bool

// Both kinds of Leftovers.
const (
	Keep Leftovers = false
	Kill Leftovers = true
)

// Run runs a command, which must not have a context of its own, as the leader
// of a new process group, and waits for it as exec.Cmd.Wait does. When ctx ends
// first, the whole group is killed, and the error wraps that of ctx. What has
// left the group is not reached: set WaitDelay where it may keep a pipe.
func Run(ctx context.Context, cmd *exec.Cmd, r Runner, rest Leftovers) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if r == nil {
		r = osExec{}
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := r.Start(cmd); err != nil {
		return err
	}
	// The number of the group is its own until its leader is reaped, below.
	leader, err := pidfd.Open(cmd.Process.Pid, nil)
	if err == nil {
		defer leader.Close()
		err = leader.Wait(ctx)
	}
	if err != nil || rest == Kill {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	if leader != nil && err != nil {
		leader.Wait(context.Background()) // not for long, and without a thread
	}
	werr := r.Wait(cmd)
	switch {
	case err == nil || leader != nil && werr == nil: // or it ended before it was killed
		return werr
	case leader == nil: // no descriptor was left to wait with
		return err
	}
	return fmt.Errorf("killed after %w: %w", cmp.Or(ctx.Err(), context.DeadlineExceeded), err)
}

// Head keeps the first Max bytes of what is written to it and drops the rest, so that
// a command gone mad costs no memory. It does not embed the buffer, whose ReadFrom
// would let io.Copy pass by the limit.
type Head struct {
	Max int
	buf bytes.Buffer
}

func (h *Head) Write(p []byte) (int, error) {
	h.buf.Write(p[:min(len(p), h.Max-h.buf.Len())])
	return len(p), nil
}

// Bytes is what was kept.
func (h *Head) Bytes() []byte { return h.buf.Bytes() }
