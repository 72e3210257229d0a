//go:build failpoint

package step

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Variable names the file of failpoints. It is read each time a step is reached,
// so that it may change while a process runs. A line is
//
//	STEP ACTION [N]
//
// ACTION is kill (SIGKILL), stop (SIGSTOP), fail, or a duration that the step is
// delayed by; N is which time it happens, counted in each process, 0: each time.
// The steps that were reached are appended to FILE.reached, as "PID STEP".
const Variable = "HOLDFAST_FAILPOINTS"

var (
	mu    sync.Mutex
	count = map[Step]int{}
)

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
	mu.Lock()
	count[s]++
	n := count[s]
	mu.Unlock()
	if f, err := os.OpenFile(file+".reached", os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err == nil {
		fmt.Fprintf(f, "%d %s\n", os.Getpid(), s)
		f.Close()
	}
	lines, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(lines)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != string(s) {
			continue
		}
		if len(f) > 2 && f[2] != "0" && f[2] != strconv.Itoa(n) {
			continue
		}
		if err := act(s, f[1]); err != nil {
			return err
		}
	}
	return nil
}

func act(s Step, action string) error {
	switch action {
	case "kill":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // until the signal has come
	case "stop":
		return unix.Kill(os.Getpid(), unix.SIGSTOP)
	case "fail":
		return fmt.Errorf("failpoint %s", s)
	}
	d, err := time.ParseDuration(action)
	if err != nil {
		return fmt.Errorf("failpoint %s: there is no action %q", s, action)
	}
	time.Sleep(d)
	return nil
}
