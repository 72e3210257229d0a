package shims

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var binary string // the real shim

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	tmp, err := os.MkdirTemp("", "shims")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(tmp)
	binary = filepath.Join(tmp, "holdfast-shim")
	build := exec.Command("go", "build", "-o", binary, "../../cmd/holdfast-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build the shim: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// ends collects how shims ended, from the launcher's log.
type ends struct {
	slog.Handler
	mu   sync.Mutex
	list []string
}

func (e *ends) Enabled(context.Context, slog.Level) bool { return true }
func (e *ends) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "status" {
			e.mu.Lock()
			e.list = append(e.list, fmt.Sprint(a.Value))
			e.mu.Unlock()
		}
		return true
	})
	return nil
}

func (e *ends) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.list, ", ")
}

// newDir makes a run directory in a state directory of its own.
func newDir(t *testing.T) rundir.Dir {
	t.Helper()
	state, err := os.MkdirTemp("", "shims")
	check(t, err)
	dir := rundir.Dir(filepath.Join(state, "containers", "c1"))
	check(t, os.MkdirAll(string(dir), 0o700))
	t.Cleanup(func() {
		if p, err := dir.FindShim(); err == nil {
			syscall.Kill(p.PID, syscall.SIGKILL)
		}
		os.RemoveAll(state)
	})
	return dir
}

// launch starts a shim that has no container.
func launch(t *testing.T, dir rundir.Dir) (rundir.Process, *client.Client, *ends) {
	t.Helper()
	e := &ends{}
	l := &Launcher{Binary: binary, LogLevel: "debug", Log: slog.New(e)}
	check(t, l.Launch(t.Context(), dir))
	id, err := dir.ReadIdentity()
	check(t, err)
	c := client.New(dir)
	t.Cleanup(c.Close)
	return id.Shim, c, e
}

var until = must.Come

// damages are what can happen to the files of a shim that lives.
var damages = map[string]func(rundir.Dir) error{
	"nothing":       func(rundir.Dir) error { return nil },
	"no socket":     func(d rundir.Dir) error { return os.Remove(d.Path(rundir.SocketName)) },
	"no lock":       func(d rundir.Dir) error { return os.Remove(d.Path(rundir.LockName)) },
	"no shim.json":  func(d rundir.Dir) error { return os.Remove(d.Path(rundir.IdentityName)) },
	"bad shim.json": func(d rundir.Dir) error { return os.WriteFile(d.Path(rundir.IdentityName), []byte("x"), 0o600) },
	"no directory":  func(d rundir.Dir) error { return os.RemoveAll(string(d)) },
	"no lock and no socket": func(d rundir.Dir) error {
		return errors.Join(os.Remove(d.Path(rundir.LockName)), os.Remove(d.Path(rundir.SocketName)))
	},
	"a dangling link for a lock": func(d rundir.Dir) error {
		return errors.Join(os.Remove(d.Path(rundir.LockName)), os.Symlink("/nowhere/x", d.Path(rundir.LockName)))
	},
	"another process in shim.json": func(d rundir.Dir) error {
		self, err := rundir.FindProcess(os.Getpid())
		return errors.Join(err, d.WriteIdentity(rundir.Identity{Shim: self, BootID: rundir.BootID()}))
	},
	"the shim.json of another container, no lock, no socket": func(d rundir.Dir) error {
		ended := rundir.Identity{Shim: rundir.Process{PID: 1 << 22, StartTime: 1}, BootID: rundir.BootID()}
		return errors.Join(
			record.WriteOf(d.Path(rundir.IdentityName), "another", ended, false),
			os.Remove(d.Path(rundir.LockName)),
			os.Remove(d.Path(rundir.SocketName)),
		)
	},
	"an ended process in shim.json": func(d rundir.Dir) error {
		return d.WriteIdentity(rundir.Identity{Shim: rundir.Process{PID: 1 << 22, StartTime: 1},
			BootID: rundir.BootID()})
	},
}

// Whatever has become of its files, a shim is found, can be reached, and ends
// by itself when it is told to.
func TestDamage(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, reach := range []bool{true, false} {
				dir := newDir(t)
				shim, c, ends := launch(t, dir)
				check(t, damage(dir))
				if got, err := dir.FindShim(); err != nil || got != shim {
					t.Errorf("found %+v, %v, want %+v", got, err, shim)
				}
				if reach {
					if err := Reach(t.Context(), dir, c); err != nil {
						t.Errorf("reach: %v", err)
					}
					if s, err := c.State(t.Context()); err != nil || s.Shim != shim {
						t.Errorf("state: %+v, %v", s, err)
					}
				}
				if err := End(t.Context(), dir, c); err != nil {
					t.Errorf("end: %v", err)
				}
				if shim.Alive() {
					t.Error("it lives")
				}
				until(t, "the status of the shim", func() bool { return ends.String() != "" })
				if got := ends.String(); got != "<nil>" {
					t.Errorf("it did not end by itself: %s", got)
				}
				if got, err := dir.FindShim(); !errors.Is(err, rundir.ErrNoProcess) {
					t.Errorf("after the end: %+v, %v", got, err)
				}
				if held, err := dir.Held(); held || err != nil {
					t.Errorf("after the end its lock is held: %v, %v", held, err)
				}
			}
		})
	}
}

func TestRunning(t *testing.T) {
	dir := newDir(t)
	state := filepath.Dir(filepath.Dir(string(dir)))
	second := rundir.Dir(filepath.Join(state, "containers", "c2"))
	check(t, os.Mkdir(string(second), 0o700))
	elsewhere := newDir(t)
	first, c, _ := launch(t, dir)
	other, c2, _ := launch(t, second)
	_, far, _ := launch(t, elsewhere)

	// Others name a run directory too.
	sleep, err := exec.LookPath("sleep")
	check(t, err)
	namesake := filepath.Join(state, "holdfast-shim")
	check(t, os.Chmod(state, 0o711))
	if b, err := os.ReadFile(sleep); err != nil || os.WriteFile(namesake, b, 0o755) != nil {
		t.Fatal(err)
	}
	third := filepath.Join(state, "containers", "c3")
	for _, cmd := range []*exec.Cmd{
		{Path: sleep, Args: []string{"sleep", "600", "--dir", third}},
		{
			Path: namesake, Args: []string{"sleep", "600", "--dir", third},
			SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS},
		},
		{
			Path: namesake, Args: []string{"sleep", "600", "--dir", third},
			SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
		},
	} {
		if os.Geteuid() != 0 && cmd.SysProcAttr != nil {
			continue
		}
		check(t, cmd.Start())
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
	}

	link := filepath.Join(t.TempDir(), "link")
	check(t, os.Symlink(state, link))
	for _, path := range []string{state, link} {
		got, err := rundir.Shims(path)
		if err != nil || len(got) != 2 || got["c1"] != first || got["c2"] != other {
			t.Errorf("%s: %v, %v", path, got, err)
		}
	}
	for d, c := range map[rundir.Dir]*client.Client{dir: c, second: c2, elsewhere: far} {
		if err := End(t.Context(), d, c); err != nil {
			t.Error(err)
		}
	}
	if got, err := rundir.Shims(state); err != nil || len(got) != 0 {
		t.Errorf("after the end: %v, %v", got, err)
	}
}

func TestNoShim(t *testing.T) {
	dir := newDir(t)
	c := client.New(dir)
	defer c.Close()
	if err := Reach(t.Context(), dir, c); !errors.Is(err, rundir.ErrNoProcess) {
		t.Errorf("reach: %v", err)
	}
	if err := End(t.Context(), dir, c); err != nil {
		t.Errorf("end: %v", err)
	}
	shim, c2, _ := launch(t, dir)
	syscall.Kill(shim.PID, syscall.SIGKILL)
	if err := End(t.Context(), dir, c2); err != nil {
		t.Errorf("end of a killed one: %v", err)
	}
}

// A shim that is stopped takes no signal and answers nothing. It is killed by
// End alone, and only after it was silent.
func TestStoppedShim(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	shim, c, ends := launch(t, dir)
	check(t, syscall.Kill(shim.PID, syscall.SIGSTOP))
	until(t, "the stop", shim.Stopped)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // it has to be connected to by then
	defer cancel()
	if err := Reach(ctx, dir, c); !errors.Is(err, client.ErrUnreachable) ||
		!strings.Contains(err.Error(), "kill -CONT") {
		t.Errorf("reach: %v", err)
	}
	if err := End(ctx, dir, c); err == nil || !shim.Alive() {
		t.Errorf("end: %v, and it lives: %v", err, shim.Alive())
	}
	if testing.Short() {
		syscall.Kill(shim.PID, syscall.SIGCONT)
		return
	}
	if err := End(t.Context(), dir, c); err != nil || ends.String() == "" && shim.Alive() {
		t.Errorf("end: %v", err)
	}
}

func TestLaunchFails(t *testing.T) {
	dir := newDir(t)
	placed := 0
	for name, l := range map[string]*Launcher{
		"no program": {Binary: "/nowhere/holdfast-shim"},
		"no place": {Binary: binary, Place: func(_ context.Context, _ string, pid int) error {
			placed = pid
			return errors.New("no room")
		}},
		"a bad flag": {Binary: binary, LogLevel: "loud"},
	} {
		l.Log = slog.New(slog.DiscardHandler)
		if err := l.Launch(t.Context(), dir); err == nil ||
			!strings.Contains(err.Error(), "cannot start the shim of c1") {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := dir.FindShim(); !errors.Is(err, rundir.ErrNoProcess) {
			t.Errorf("%s: left %+v, %v", name, got, err)
		}
	}
	if placed == 0 {
		t.Error("nobody asked for a place")
	}
	_, c, _ := launch(t, dir)
	l := &Launcher{Binary: binary, LogLevel: "info", Log: slog.New(slog.DiscardHandler)}
	if err := l.Launch(t.Context(), dir); err == nil || !strings.Contains(err.Error(), rundir.ErrLocked.Error()) {
		t.Errorf("a second one: %v", err)
	}
	if err := End(t.Context(), dir, c); err != nil {
		t.Error(err)
	}
}

var check = must.Succeed
