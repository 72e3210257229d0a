//go:build failpoint

package step

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Variable names the file of failpoints. It is read each time a step is reached,
// so that it may be replaced while a process runs. A line is
//
//	STEP ACTION [ERRNO] [N]
//
// ACTION is kill (SIGKILL), stop (SIGSTOP), fail, or a duration that the step is
// delayed by. ERRNO is ENOSPC or EIO, the reason of a step that fails. N is which
// time it happens, 0 or nothing: each time. What was
// reached is appended to FILE.reached, as "PID STEP"; N counts the step's lines
// there, whichever process wrote them, so that a restart does not begin anew.
const Variable = "HOLDFAST_FAILPOINTS"

// Environ is what a child needs in its environment to have the same failpoints.
func Environ() []string {
	if f := os.Getenv(Variable); f != "" {
		return []string{Variable + "=" + f}
	}
	return nil
}

// Reach says that a step has been reached, and does what the file says.
func Reach(s Step) error {
	file := os.Getenv(Variable)
	if file == "" {
		return nil
	}
	n, err := note(file+".reached", s)
	if err != nil {
		return fmt.Errorf("failpoint %s: %w", s, err)
	}
	lines, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("failpoint %s: %w", s, err)
	}
	for line := range strings.Lines(string(lines)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != string(s) {
			continue
		}
		action, rest := f[1], f[2:]
		var why error
		if len(rest) > 0 && reasons[rest[0]] != nil {
			why, rest = reasons[rest[0]], rest[1:]
		}
		if len(rest) > 0 && rest[0] != "0" && rest[0] != strconv.Itoa(n) {
			continue
		}
		if err := act(s, action, why); err != nil {
			return err
		}
	}
	return nil
}

// reasons are what a step may fail of, by name.
var reasons = map[string]error{"ENOSPC": unix.ENOSPC, "EIO": unix.EIO}

// note appends a step to the file of those that were reached, and gives which time
// it is. Others may append at the same time.
func note(path string, s Step) (int, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%d %s\n", os.Getpid(), s); err != nil {
		return 0, err
	}
	end, err := f.Seek(0, io.SeekCurrent) // of our own line: the kernel appends it whole
	if err != nil {
		return 0, err
	}
	b := make([]byte, end)
	if _, err := f.ReadAt(b, 0); err != nil {
		return 0, err
	}
	return bytes.Count(b, []byte(" "+string(s)+"\n")), nil
}

func act(s Step, action string, why error) error {
	switch action {
	case "kill":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // until the signal has come
	case "stop":
		return unix.Kill(os.Getpid(), unix.SIGSTOP)
	case "fail":
		if why != nil {
			return fmt.Errorf("failpoint %s: %w", s, why)
		}
		return fmt.Errorf("failpoint %s", s)
	}
	d, err := time.ParseDuration(action)
	if err != nil {
		return fmt.Errorf("failpoint %s: there is no action %q", s, action)
	}
	time.Sleep(d)
	return nil
}
