package rundir

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Process is an identity that is not reused before the next boot: the pid and
// when it started, in clock ticks since boot (field 22 of /proc/PID/stat).
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
}

// ErrNoProcess says that there is no such process, or that it is a zombie.
var ErrNoProcess = errors.New("no such process")

// FindProcess gives the identity of the process that has the pid now.
func FindProcess(pid int) (Process, error) {
	start, state, err := procStat(pid)
	if err != nil {
		return Process{}, err
	}
	if state == 'Z' || state == 'X' {
		return Process{}, fmt.Errorf("process %d is a zombie: %w", pid, ErrNoProcess)
	}
	return Process{PID: pid, StartTime: start}, nil
}

// Alive says whether this very process runs. A zombie does not.
func (p Process) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	q, err := FindProcess(p.PID)
	return err == nil && p == q
}

// Stopped says whether this very process is stopped by a signal.
func (p Process) Stopped() bool {
	start, state, err := procStat(p.PID)
	return err == nil && start == p.StartTime && state == 'T'
}

func procStat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	// The second field is the name in parentheses and may hold anything.
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, 0, fmt.Errorf("cannot read /proc/%d/stat: %q", pid, b)
	}
	if start, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		return 0, 0, fmt.Errorf("cannot read /proc/%d/stat: %w", pid, err)
	}
	return start, fields[0][0], nil
}

// maxCommandLine is how much of a command line is read, in bytes: a process can make its own one appear as large as
// all memory that it can address (PR_SET_MM_MAP of prctl(2)).
const maxCommandLine = 64 << 10

// CommandLine gives the beginning of the command line of a process, empty if there is none. It is what the process
// wants it to be. The call waits for memory of the process to be read in, which a file system of its own can delay.
func CommandLine(pid int) []string {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxCommandLine)) // a process that ends meanwhile has none
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// BootID is the kernel's name for this boot. It cannot fail on a Linux with
// /proc; where it does, it is empty, and nothing recorded matches.
var BootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})
