package shim

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Stop sends the signal and sets the deadline for SIGKILL, in that record first.
// It returns the deadline that holds now, on CLOCK_BOOTTIME.
func (t *task) Stop(sig unix.Signal, grace time.Duration) (time.Duration, error) {
	c, err := t.alive()
	if c == nil {
		return rundir.BootTime(), err
	}
	at := rundir.BootTime() + grace
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.init.Ended() { // and finish closes the timer, if it has not yet
		return rundir.BootTime(), nil
	}
	if t.status.Phase == rundir.PhaseCreated {
		at = rundir.BootTime() // nothing of the container's runs that could take the time
	}
	stop := rundir.Stop{Signal: int(sig), RequestedAt: time.Now(), KillAt: at}
	event := rundir.EventStopping // only the first is one
	last := t.status.Stop
	if last != nil {
		event = noEvent
		stop.RequestedAt = last.RequestedAt
		stop.KillAt = min(at, last.KillAt)
	}
	if err := t.makeTimerLocked(c); err != nil {
		return 0, err
	}
	// A signal is sent once, and not at all without a grace.
	known := last != nil && last.Signal == stop.Signal
	sent := grace <= 0 || known && t.status.StopSent
	if last == nil || stop != *last || sent != t.status.StopSent {
		t.updateLocked(event, func(s *rundir.Status) { s.Stop, s.StopSent = &stop, sent })
		t.log.Info("container stopping", "signal", int(sig), "grace", (stop.KillAt - rundir.BootTime()).String())
	}
	if err := step.Reach(step.ShimStopping); err != nil {
		return 0, err
	}
	if err := t.stopTimer.set(stop.KillAt); err != nil {
		return 0, err
	}
	if !sent && t.pending != sig {
		err = t.deliverLocked(c, sig)
	}
	return stop.KillAt, err
}

func (t *task) makeTimerLocked(c *container) (err error) {
	if t.stopTimer == nil {
		t.stopTimer, err = newDeadline(func() { t.kill(c) })
	}
	return err
}

// resumeStopLocked goes on with a stop that another supervisor was asked for.
func (t *task) resumeStopLocked(c *container) error {
	stop := t.status.Stop
	if stop == nil {
		return nil
	}
	if err := t.makeTimerLocked(c); err != nil {
		return err
	}
	if err := t.stopTimer.set(stop.KillAt); err != nil || t.status.StopSent {
		return err
	}
	return t.deliverLocked(c, unix.Signal(stop.Signal))
}

// The kernel drops a signal for process 1 of a pid namespace that has no handler
// for it (pid_namespaces(7)). A container that is stopped before its program has
// come to set one up would lose the signal and sit out its whole grace. So the
// stop signal is kept until init can take it. Nothing tells when that is; the
// shim looks, at growing intervals.
const (
	firstLook = 2 * time.Millisecond
	lastLook  = 500 * time.Millisecond
)

// deliverLocked sends the stop signal now if init takes it, and else as soon as it
// does.
func (t *task) deliverLocked(c *container, sig unix.Signal) error {
	if c.ignores(sig) {
		t.pending = sig
		go t.deliverLater(c, sig)
		return nil
	}
	if err := c.init.Signal(sig); err != nil {
		return err
	}
	t.reach(step.ShimSignalled)
	t.updateLocked(noEvent, func(s *rundir.Status) { s.StopSent = true })
	return nil
}

// deliverLater ends with the container, or when another signal or the deadline
// has taken over.
func (t *task) deliverLater(c *container, sig unix.Signal) {
	for pause := firstLook; ; pause = min(2*pause, lastLook) {
		select {
		case <-time.After(pause):
		case <-c.life.Done():
			return
		}
		if c.ignores(sig) && !c.init.Ended() {
			continue
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		stop := t.status.Stop
		over := t.status.Phase == rundir.PhaseExited || c.init.Ended() || stop.KillAt <= rundir.BootTime()
		if over || t.status.StopSent || stop.Signal != int(sig) {
			return
		}
		t.pending = 0
		if err := t.deliverLocked(c, sig); err != nil {
			t.log.Error("stop signal not sent", "error", err)
		}
		return
	}
}

// programOf tells which file a process runs. It changes with execve(2).
func programOf(pid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return ""
	}
	return exe
}

// ignores says whether init would not take the signal: it is still the OCI runtime,
// which takes its handlers along when it runs the program; or the kernel would
// drop the signal, because it is neither caught nor blocked (a blocked one waits
// for the program to fetch it), nor does init wait for signals at this moment.
func (c *container) ignores(sig unix.Signal) bool {
	if !c.traits.PrivatePID || sig == unix.SIGKILL || sig == unix.SIGSTOP {
		return false
	}
	pid := c.init.PID
	if exe := c.traits.RuntimeExe; exe != "" && programOf(pid) == exe {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	bit := uint64(1) << (sig - 1)
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != "SigCgt" && string(name) != "SigBlk" {
			continue
		}
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		if err != nil || mask&bit != 0 {
			return false
		}
	}
	return !waitsForSignals(pid)
}

// waitsForSignals says whether a process is in sigwait(3) or the like, as small inits
// are all the time. The kernel unblocks what they wait for meanwhile, so that it is not
// among the blocked signals of /proc, and yet does not drop it.
func waitsForSignals(pid int) bool {
	place, err := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", pid)) // a function of the kernel
	return err == nil && bytes.Contains(place, []byte("sigtimedwait"))
}
