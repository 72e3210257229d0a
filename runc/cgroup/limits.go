package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// limitFiles are the patterns of the files that an update of resources writes, by the
// controller of v1; "" is v2. A map would cost each shim memory.
var limitFiles = [...]struct {
	controller string
	patterns   []string
}{
	{"cpu", []string{"cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"}},
	{"cpuset", []string{"cpuset.cpus", "cpuset.mems"}},
	{"memory", []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"}},
	{"hugetlb", []string{"hugetlb.*.limit_in_bytes"}},
	{"", []string{
		"cpu.weight", "cpu.max", "cpuset.cpus", "cpuset.mems", "memory.max", "memory.swap.max", "memory.min",
		"memory.low", "memory.high", "pids.max", "hugetlb.*.max",
	}},
}

// Limits are the limits of a container at one moment.
type Limits []limit

type limit struct{ path, value string }

// limited is the set in which a container has its limits. Some OCI runtimes put the
// processes one cgroup below it.
func (c Set) limited() Set {
	above := maps.Clone(c)
	for controller, path := range c {
		if filepath.Base(path) == "container" {
			above[controller] = filepath.Dir(path)
		}
	}
	return above
}

// Limits reads the limits, and with them other files of v2, so that Restore can take
// back what is changed after it.
func (c Set) Limits(others ...string) (all Limits, err error) {
	for _, f := range limitFiles {
		dir, ok := c.limited().dir(f.controller)
		if !ok {
			continue
		}
		var paths []string
		for _, pattern := range f.patterns {
			found, _ := filepath.Glob(filepath.Join(dir, pattern)) // only a bad pattern is an error
			paths = append(paths, found...)
		}
		for _, name := range others {
			if f.controller == "" && filepath.IsLocal(name) {
				paths = append(paths, filepath.Join(dir, name))
			}
		}
		slices.Sort(paths)
		for _, path := range slices.Compact(paths) {
			b, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue // whoever writes it fails
			}
			if err != nil {
				return nil, fmt.Errorf("cannot read a limit: %w", err)
			}
			all = append(all, limit{path, strings.TrimSpace(string(b))})
		}
	}
	return all, nil
}

// Restore writes back what has another value now. The kernel takes some values only
// after others, so it goes on for as long as one more is taken.
func (l Limits) Restore() error {
	for {
		var errs []error
		progress := false
		for _, f := range l {
			b, err := os.ReadFile(f.path)
			if err := ignoreGone(err); err != nil {
				errs = append(errs, err)
			}
			if err != nil || strings.TrimSpace(string(b)) == f.value {
				continue
			}
			if err := set(f.path, f.value+"\n"); err != nil {
				errs = append(errs, err)
				continue
			}
			progress = true
		}
		if !progress {
			if err := errors.Join(errs...); err != nil {
				return fmt.Errorf("cannot restore a limit: %w", err)
			}
			return nil
		}
	}
}

// set writes a file of the kernel. To make one that is missing is refused with other errors
// than that it is missing.
func set(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

// MemoryUsed is the memory that is charged to a container, in bytes; 0 without a memory
// controller.
func (c Set) MemoryUsed() (uint64, error) {
	controller, file := "memory", "memory.usage_in_bytes"
	if _, v1 := c[controller]; !v1 {
		controller, file = "", "memory.current"
	}
	lines, err := c.limited().Words(controller, file)
	if err != nil || len(lines) == 0 {
		return 0, err
	}
	return strconv.ParseUint(lines[0][0], 10, 64)
}

// LimitHugePages limits the memory in huge pages of a size such as 2MB, in bytes: what is
// used and, where the kernel tells them apart, what is reserved. A size that the machine
// does not have needs no limit of 0.
func (c Set) LimitHugePages(size string, bytes uint64) error {
	controller, suffix := "hugetlb", "limit_in_bytes"
	if _, v1 := c[controller]; !v1 {
		controller, suffix = "", "max"
	}
	dir, ok := c.limited().dir(controller)
	if !ok || strings.Contains(size, "/") {
		return fmt.Errorf("cannot limit huge pages of %q: %w", size, ErrNone)
	}
	value := strconv.FormatUint(bytes, 10)
	for _, middle := range []string{".", ".rsvd."} {
		path := filepath.Join(dir, "hugetlb."+size+middle+suffix)
		err := set(path, value)
		if err != nil && !(errors.Is(err, fs.ErrNotExist) && (bytes == 0 || middle != ".")) {
			return fmt.Errorf("cannot limit huge pages: %w", err)
		}
	}
	return nil
}

// adjustRounds bounds how often AdjustOOMScore looks for processes that were forked
// meanwhile by one that it had not reached yet.
const adjustRounds = 10

// AdjustOOMScore gives another oom_score_adj to the processes that have the first one:
// a process that has set its own keeps it.
func (c Set) AdjustOOMScore(from, to int) error {
	if from == to {
		return nil
	}
	for range adjustRounds {
		var errs []error
		changed := false
		err := c.each(func(p *pidfd.Process) bool {
			done, err := adjustOOMScore(p, from, to)
			changed = changed || done
			errs = append(errs, err)
			return false
		})
		if err = errors.Join(append(errs, err)...); err != nil {
			return fmt.Errorf("cannot set oom_score_adj to %d: %w", to, err)
		}
		if !changed {
			return nil
		}
	}
	return nil
}

// adjustOOMScore is for one process. The open file is that of the process, whatever has
// its pid later, if it lives after the opening.
func adjustOOMScore(p *pidfd.Process, from, to int) (changed bool, err error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.PID), os.O_RDWR, 0)
	if err != nil {
		return false, ignoreEnded(err)
	}
	defer f.Close()
	if p.Ended() {
		return false, nil
	}
	b := make([]byte, 16)
	n, err := f.ReadAt(b, 0)
	if n == 0 {
		return false, ignoreEnded(err)
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err != nil || now != from {
		return false, err
	}
	_, err = f.WriteAt(strconv.AppendInt(nil, int64(to), 10), 0)
	return err == nil, ignoreEnded(err)
}

// ignoreEnded forgives a process that has ended meanwhile.
func ignoreEnded(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
