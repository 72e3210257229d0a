package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// Pids lists the processes. No cgroup, no processes.
func (c Set) Pids() ([]int, error) {
	dir, ok := c.tracker()
	if !ok {
		return nil, nil
	}
	var pids []int
	err := walk(dir, func(f *os.File) error {
		more, err := procs(f)
		pids = append(pids, more...)
		return err
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes of %s: %w", dir, err)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// procs lists the processes of one cgroup.
func procs(dir *os.File) ([]int, error) {
	b, err := read(dir, "cgroup.procs")
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a threaded cgroup; its processes are listed further up
	}
	if err != nil {
		return nil, ignoreGone(err)
	}
	var pids []int
	for f := range strings.FieldsSeq(string(b)) {
		// 0 is a process outside of our pid namespace.
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Populated says in which directory of the set, if any, processes are left. It
// looks at all hierarchies.
func (c Set) Populated() (dir string, populated bool, err error) {
	for _, dir := range c.dirs() {
		if events, err := os.ReadFile(filepath.Join(dir, "cgroup.events")); err == nil { // v2 alone
			if strings.Contains("\n"+string(events), "\npopulated 1\n") {
				return dir, true, nil
			}
			continue
		}
		err := walk(dir, func(f *os.File) error {
			b, err := read(f, "cgroup.procs")
			if populated = err == nil && !blank(b); populated {
				return errStop
			}
			return err
		}, nil)
		if err != nil {
			return "", false, fmt.Errorf("cannot learn whether processes are left in %s: %w", dir, err)
		}
		if populated {
			return dir, true, nil
		}
	}
	return "", false, nil
}

// holdAtOnce bounds the descriptors of processes that are open at a time.
const holdAtOnce = 128

// each lends every process to f, which gives true to keep it open, and then
// closes it. The membership is checked again behind the descriptor, so that a
// pid that is used again is not taken for a member.
func (c Set) each(f func(*pidfd.Process) (keep bool)) error {
	dir, ok := c.tracker()
	if !ok {
		return nil
	}
	err := walk(dir, func(dir *os.File) error {
		pids, err := procs(dir)
		for some := range slices.Chunk(pids, holdAtOnce) {
			if err := eachOf(dir, some, f); err != nil {
				return err
			}
		}
		return err
	}, nil)
	if err != nil {
		return fmt.Errorf("cannot get hold of the processes of %s: %w", dir, err)
	}
	return nil
}

func eachOf(dir *os.File, pids []int, f func(*pidfd.Process) (keep bool)) error {
	var held []*pidfd.Process
	var err error
	for _, pid := range pids {
		var p *pidfd.Process
		if p, err = pidfd.Open(pid, nil); err == nil {
			held = append(held, p)
		} else if !errors.Is(err, pidfd.ErrEnded) {
			break // as many as there are descriptors; the caller comes back for the rest
		}
	}
	if errors.Is(err, pidfd.ErrEnded) || len(held) > 0 {
		err = nil
	}
	now, nerr := procs(dir)
	for _, p := range held {
		if nerr != nil || !slices.Contains(now, p.PID) || p.Ended() || !f(p) {
			p.Close()
		}
	}
	return errors.Join(err, nerr)
}

// Signal sends a signal to every process.
func (c Set) Signal(sig unix.Signal) error {
	var errs []error
	err := c.each(func(p *pidfd.Process) bool {
		if err := p.Signal(sig); err != nil && !errors.Is(err, pidfd.ErrEnded) {
			errs = append(errs, err)
		}
		return false
	})
	return errors.Join(append(errs, err)...)
}

// killAgain is after how long a process that was killed and has not ended is
// looked for again: something may have frozen it, or moved it.
const killAgain = time.Second

// Kill kills every process, frozen ones and those being forked included, and
// returns when all have ended. ctx must have a deadline.
func (c Set) Kill(ctx context.Context) error {
	for {
		left, err := c.killOnce()
		if len(left) == 0 || err != nil {
			closeAll(left)
			return err
		}
		round, cancel := context.WithTimeout(ctx, killAgain)
		for _, p := range left {
			if err = p.Wait(round); err != nil {
				break
			}
		}
		cancel()
		closeAll(left)
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("cannot kill the processes of cgroup %s: %w", c, err)
		}
	}
}

func closeAll(ps []*pidfd.Process) {
	for _, p := range ps {
		p.Close()
	}
}

// killOnce kills every process and gives some of those that have to be waited
// for; none if there were none. The caller closes them.
func (c Set) killOnce() (left []*pidfd.Process, err error) {
	killed := false
	if dir, ok := c.dir(""); ok {
		killed = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) == nil
	}
	if !killed {
		// Without cgroup.kill: nothing forks or moves while it is frozen, so
		// all that is listed is all there is. A freeze that takes longer, or is
		// refused, costs another round.
		c.freeze()
	}
	// Also where something else has frozen it: on v1 the dying are held, too.
	defer c.Thaw()
	var errs []error
	err = c.each(func(p *pidfd.Process) bool {
		if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, pidfd.ErrEnded) {
			errs = append(errs, err)
		}
		if len(left) == holdAtOnce {
			return false
		}
		left = append(left, p)
		return true
	})
	return left, errors.Join(append(errs, err)...)
}

// freeze freezes the processes, those below by way of the top.
func (c Set) freeze() {
	if dir, name, state := c.freezer(); dir != "" {
		os.WriteFile(filepath.Join(dir, name), []byte(state.frozen), 0)
	}
}

// freezePoll is how often the kernel is asked whether all has stopped: on v1 it tells
// nobody.
const freezePoll = 2 * time.Millisecond

// Freeze stops all processes, those below included, and returns when they have stopped.
// After an error they run. ctx has a deadline.
func (c Set) Freeze(ctx context.Context) error {
	dir, name, state := c.freezer()
	if dir == "" {
		return ErrNone
	}
	err := os.WriteFile(filepath.Join(dir, name), []byte(state.frozen), 0)
	for err == nil {
		var now []byte
		if now, err = os.ReadFile(filepath.Join(dir, state.file)); err != nil || state.is(string(now)) {
			break
		}
		select {
		case <-time.After(freezePoll):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		c.Thaw()
		return fmt.Errorf("cannot freeze the processes of cgroup %s: %w", c, err)
	}
	return nil
}

// FreezesOnV1 says whether Freeze is that of cgroup v1.
func (c Set) FreezesOnV1() bool {
	_, ok := c.dir("freezer")
	return ok
}

// Thaw lets a frozen cgroup run, and each one below it that was frozen by
// itself. On v1 a frozen process does not die of a signal, SIGKILL included.
func (c Set) Thaw() {
	if dir, name, state := c.freezer(); dir != "" {
		walk(dir, func(f *os.File) error {
			write(f, name, state.thawed)
			return nil
		}, nil)
	}
}

type freezerStates struct {
	frozen, thawed string
	file, says     string // says is a line of the file when all processes have stopped
}

func (s freezerStates) is(content string) bool {
	return strings.Contains("\n"+content, "\n"+s.says+"\n")
}

// freezer is the directory and the file by which the set is frozen; "" if it
// cannot be.
func (c Set) freezer() (dir, name string, states freezerStates) {
	if dir, ok := c.dir("freezer"); ok {
		return dir, "freezer.state", freezerStates{"FROZEN", "THAWED", "freezer.state", "FROZEN"}
	}
	if dir, ok := c.dir(""); ok {
		return dir, "cgroup.freeze", freezerStates{"1", "0", "cgroup.events", "frozen 1"}
	}
	return "", "", freezerStates{}
}
