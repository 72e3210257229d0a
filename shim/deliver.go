package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
)

// The kernel drops a signal for process 1 of a pid namespace that has no handler
// for it (pid_namespaces(7)). A container that is stopped before its program has
// come to set one up would lose the signal and sit out its whole grace. So the
// stop signal is kept until it can be heard. Nothing tells when that is; the
// shim looks, at growing intervals.
const (
	deafFirst = 2 * time.Millisecond
	deafLast  = 500 * time.Millisecond
)

// deliver sends the stop signal now if init hears it, and else as soon as it does.
// It is sent once.
func (t *task) deliver(c *container, sig unix.Signal) error {
	if c.deaf(sig) {
		go t.deliverLater(c, sig)
		return nil
	}
	return sendTo(c.init, sig)
}

// deliverLater ends with the container, or when another signal or the deadline
// has taken over.
func (t *task) deliverLater(c *container, sig unix.Signal) {
	for wait := deafFirst; ; wait = min(2*wait, deafLast) {
		select {
		case <-time.After(wait):
		case <-c.life.Done():
			return
		}
		t.mu.Lock()
		stop := t.status.Stop
		over := t.status.Phase == rundir.PhaseExited || stop.Signal != int(sig) || stop.KillAt <= bootNow()
		t.mu.Unlock()
		if over || c.init.Ended() {
			return
		}
		if !c.deaf(sig) {
			if err := sendTo(c.init, sig); err != nil {
				t.log.Error("stop signal not sent", "err", err)
			}
			return
		}
	}
}

func sendTo(init *reaper.Child, sig unix.Signal) error {
	if err := init.Signal(sig); err != nil && !errors.Is(err, reaper.ErrGone) {
		return err
	}
	return nil
}

// programOf tells which file a process runs. It changes with execve(2).
func programOf(pid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return ""
	}
	return exe
}

// deaf says whether init would not hear the signal: it is still the OCI runtime,
// which takes its handlers along when it runs the program; or the kernel would
// drop the signal, because it is neither caught nor blocked (a blocked one waits
// for the program to fetch it).
func (c *container) deaf(sig unix.Signal) bool {
	if !c.privatePID || sig == unix.SIGKILL || sig == unix.SIGSTOP {
		return false
	}
	pid := c.init.PID
	if c.runtimeExe != "" && programOf(pid) == c.runtimeExe {
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
	return true
}
