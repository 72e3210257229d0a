package reaper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// TestMain lets the test binary be the processes of the tests.
func TestMain(m *testing.M) {
	switch os.Getenv("HOLDFAST_TEST_ROLE") {
	case "leave": // leaves a child behind, as an OCI runtime does
		leave(os.Args[1], os.Args[2])
	case "orphan":
		code, _ := strconv.Atoi(os.Args[1])
		os.Exit(code)
	case "wait":
		time.Sleep(time.Hour) // the Go runtime ends a program in which nothing can happen any more
	case "die":
		sig, _ := strconv.Atoi(os.Args[1])
		unix.Kill(os.Getpid(), unix.Signal(sig))
		select {}
	}
	os.Exit(m.Run())
}

func leave(pidfile, role string) {
	child := exec.Command(os.Args[0], os.Args[3:]...)
	child.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE="+role)
	if err := child.Start(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.WriteFile(pidfile, []byte(strconv.Itoa(child.Process.Pid)), 0o600)
	os.Exit(0)
}

// one is the reaper of the whole test binary: a subreaper is a process.
var one = sync.OnceValues(func() (*Reaper, error) {
	r, err := New()
	if err == nil {
		r.Begin()
	}
	return r, err
})

func newReaper(t *testing.T) *Reaper {
	t.Helper()
	r, err := one()
	check(t, err)
	return r
}

func command(role string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE="+role, "GORACE=atexit_sleep_ms=0")
	return c
}

// left runs a command that leaves a child behind and gives the child's pid.
func left(t *testing.T, r *Reaper, role string, args ...string) int {
	t.Helper()
	pidfile := filepath.Join(t.TempDir(), "pid")
	cmd := command("leave", append([]string{pidfile, role}, args...)...)
	check(t, r.Start(cmd))
	check(t, r.Wait(cmd))
	b, err := os.ReadFile(pidfile)
	check(t, err)
	pid, err := strconv.Atoi(string(b))
	check(t, err)
	return pid
}

var until = must.Come

func exists(pid int) bool { return unix.Kill(pid, 0) == nil }

func TestStartedCommandsKeepTheirCodes(t *testing.T) {
	r := newReaper(t)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			cmd := command("orphan", strconv.Itoa(i))
			if err := r.Start(cmd); err != nil {
				t.Error(err)
				return
			}
			err := r.Wait(cmd)
			if got := cmd.ProcessState.ExitCode(); got != i {
				t.Errorf("exit %d, %v; want %d", got, err, i)
			}
		})
	}
	wg.Wait()
}

func TestAdopt(t *testing.T) {
	for name, c := range map[string]struct {
		role string
		arg  int
		want Status
	}{
		"exit":   {"orphan", 42, Status{Code: 42}},
		"signal": {"die", 15, Status{Code: 143, Signal: 15}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReaper(t)
			release := r.Hold()
			defer release()
			child, err := r.Adopt(left(t, r, c.role, strconv.Itoa(c.arg)))
			check(t, err)
			release()
			for range 2 { // Wait leaves the zombie, so it can be asked again
				if got, err := child.Wait(t.Context()); err != nil || got != c.want {
					t.Errorf("got %+v, %v; want %+v", got, err, c.want)
				}
			}
			if !child.Ended() || !exists(child.PID) {
				t.Error("no zombie is left before Reap")
			}
			child.Reap()
			child.Reap()
			if exists(child.PID) {
				t.Error("a zombie is left after Reap")
			}
			if err := child.Signal(unix.SIGTERM); !errors.Is(err, ErrGone) {
				t.Errorf("signal after the end: %v", err)
			}
		})
	}
}

// A child that died before it was adopted still tells how.
func TestAdoptDead(t *testing.T) {
	r := newReaper(t)
	release := r.Hold()
	defer release()
	pid := left(t, r, "orphan", "7")
	until(t, "the child is a zombie", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return strings.Contains(string(b), ") Z ")
	})
	child, err := r.Adopt(pid)
	check(t, err)
	release()
	if got, err := child.Wait(t.Context()); err != nil || got.Code != 7 {
		t.Errorf("got %+v, %v", got, err)
	}
	child.Reap()
}

func TestAdoptOnlyChildren(t *testing.T) {
	r := newReaper(t)
	if _, err := r.Adopt(os.Getppid()); err == nil {
		t.Error("the parent was adopted")
	}
	defer r.Hold()()
	child, err := r.Adopt(left(t, r, "wait"))
	check(t, err)
	if _, err := r.Adopt(child.PID); err == nil {
		t.Error("adopted twice")
	}
	if child.Ended() {
		t.Error("ended?")
	}
	if err := child.Signal(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if got, err := child.Wait(t.Context()); err != nil || got.Signal != unix.SIGKILL {
		t.Errorf("got %+v, %v", got, err)
	}
	child.Reap()
}

func TestOrphansAreReaped(t *testing.T) {
	r := newReaper(t)
	var pids []int
	for range 10 {
		pids = append(pids, left(t, r, "orphan", "0"))
	}
	until(t, "no orphan is left", func() bool {
		return !slices.ContainsFunc(pids, exists)
	})
}

// An owned zombie hides the orphans behind it; they go when it is reaped.
func TestSweepGoesOnAfterOwned(t *testing.T) {
	r := newReaper(t)
	release := r.Hold()
	owned, err := r.Adopt(left(t, r, "orphan", "1"))
	check(t, err)
	owned.Wait(t.Context())
	orphan := left(t, r, "orphan", "0")
	release()
	owned.Reap()
	until(t, "the orphan is reaped", func() bool { return !exists(orphan) })
}

func TestKillStrays(t *testing.T) {
	r := newReaper(t)
	release := r.Hold()
	owned, err := r.Adopt(left(t, r, "wait"))
	check(t, err)
	stray := left(t, r, "wait")
	if err := r.KillStrays(); err != nil {
		t.Error(err)
	}
	release()
	until(t, "the stray is gone", func() bool { return !exists(stray) })
	if owned.Ended() {
		t.Error("an owned child was killed")
	}
	owned.Signal(unix.SIGKILL)
	owned.Wait(t.Context())
	owned.Reap()
}

var check = must.Succeed
