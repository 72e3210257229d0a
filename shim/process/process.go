// Package process is one process of a container, its init or an exec: started
// through the OCI runtime or adopted, signalled, killed with all that came of it,
// waited for and reaped.
package process

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// Host is what the processes of one container have in common. It does not change.
type Host struct {
	Dir     rundir.Dir
	Runtime *runc.Runtime // its Runner is Reaper
	Reaper  *reaper.Reaper
}

// Process is one process of the container. One goroutine owns it: it starts or
// adopts the process, waits for it and reaps it. Once it is started the other
// methods may be called by any.
type Process struct {
	rundir.Process            // zero until it was started
	Cgroups        cgroup.Set // of it and of all that comes of it

	host  *Host
	id    string // of an exec
	sub   string // the cgroup of an exec as the OCI runtime names it; empty: there is none
	child *reaper.Child
}

// adopt takes over the child whose pid the OCI runtime has written down. The caller
// has had the Hold since before the OCI runtime was run.
func (p *Process) adopt(pidfile string) error {
	pid, err := readPid(pidfile)
	if err != nil {
		return err
	}
	child, err := p.host.Reaper.Adopt(pid)
	if err != nil {
		return err
	}
	p.child = child
	// A zombie is not found: an exec may have ended already.
	p.Process, err = rundir.FindProcess(pid)
	if errors.Is(err, rundir.ErrNoProcess) {
		p.Process, err = rundir.Process{PID: pid}, nil
	}
	return err
}

// pidLength bounds a pid file, in bytes.
const pidLength = 32

func readPid(path string) (int, error) {
	b, err := record.ReadFile(path, pidLength)
	if err != nil {
		return 0, fmt.Errorf("cannot learn the pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("cannot learn the pid: %s holds %q", path, b)
	}
	return pid, nil
}

// Started says whether there is a process, dead or alive. It may be asked of nil.
func (p *Process) Started() bool { return p != nil && p.child != nil }

// Wait waits until the process has ended and leaves it as a zombie until Reap. When
// ctx ends first the error wraps its cause.
func (p *Process) Wait(ctx context.Context) (reaper.Status, error) { return p.child.Wait(ctx) }

// Reap lets the kernel forget a process that Wait has returned for.
func (p *Process) Reap() { p.child.Reap() }

// Ended says whether the process has ended, reaped or not.
func (p *Process) Ended() bool { return p.child.Ended() }

// Signal sends a signal to this very process. One that has ended is no error.
func (p *Process) Signal(sig unix.Signal) error {
	if err := p.child.Signal(sig); err != nil && !errors.Is(err, reaper.ErrGone) {
		return err
	}
	return nil
}

// SignalTree sends a signal to every process of the cgroup.
func (p *Process) SignalTree(sig unix.Signal) error { return p.Cgroups.Signal(sig) }

// KillTree kills the process and all that came of it, also what has left its
// session or lost its parent, and returns when that has ended. ctx has a deadline.
func (p *Process) KillTree(ctx context.Context) error {
	var err error
	if p.child != nil {
		err = p.Signal(unix.SIGKILL)
	}
	return errors.Join(err, p.Cgroups.Kill(ctx))
}
