package stream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func newDir(t *testing.T) Dir {
	t.Helper()
	d := Dir(filepath.Join(t.TempDir(), "stream"))
	must.Succeed(t, d.Make())
	return d
}

func put(t *testing.T, d Dir, r Request) string {
	t.Helper()
	token, err := d.Put(t.Context(), r)
	must.Succeed(t, err)
	return token
}

// tokens are the names of what lies among the tokens.
func tokens(t *testing.T, d Dir) []string {
	t.Helper()
	entries, err := os.ReadDir(d.Path(tokensName))
	must.Succeed(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// store writes the record of a token of its own, which expires at a time on
// CLOCK_BOOTTIME.
func store(t *testing.T, d Dir, expires time.Duration, s stored) (token string) {
	t.Helper()
	token = newToken(expires)
	must.Succeed(t, record.WriteOf(d.tokenPath(token), token, s, false))
	return token
}

var anExec = stored{Request{Kind: Exec}, rundir.BootID()}

func TestTokenIsTakenOnce(t *testing.T) {
	d := newDir(t)
	for _, want := range []Request{
		{Kind: Exec, ID: "c", RunDir: "/run/c", Cmd: []string{"sh", "-c", "\x00\"é"}, Stdin: true, Stdout: true,
			TTY: true},
		{Kind: Attach, ID: "c", RunDir: "/run/c", Stdout: true, Stderr: true},
		{Kind: PortForward, ID: "p", Netns: "/run/netns/p", Ports: []int32{80, 65535}},
	} {
		token := put(t, d, want)
		if !regexp.MustCompile(`^[0-9a-f]{44}$`).MatchString(token) {
			t.Errorf("the token %q is not a time and 128 bits in hexadecimal", token)
		}
		if st, err := os.Stat(d.tokenPath(token)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("the file of a token: %v, %v", st.Mode(), err)
		}
		got, err := d.Take(token)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("put %+v, took %+v, %v", want, got, err)
		}
		if r, err := d.Take(token); !errors.Is(err, kind.NotFound) || r.Kind != "" {
			t.Errorf("taken again: %+v, %v", r, err)
		}
	}
	if left := tokens(t, d); left != nil {
		t.Errorf("left: %q", left)
	}
}

// Many callers want the same tokens while others are put.
func TestRacesOfTake(t *testing.T) {
	d := newDir(t)
	const rounds, takers = 50, 8
	for range rounds {
		token := put(t, d, Request{Kind: Exec})
		var wg sync.WaitGroup
		var mu sync.Mutex
		got := 0
		for range takers {
			wg.Go(func() {
				r, err := d.Take(token)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && r.Kind == Exec:
					got++
				case !errors.Is(err, kind.NotFound):
					t.Errorf("taken: %+v, %v", r, err)
				}
			})
		}
		wg.Go(func() {
			if other, err := d.Put(t.Context(), Request{Kind: Attach}); err != nil || other == token {
				t.Errorf("put: %q, %v", other, err)
			}
		})
		wg.Wait()
		if got != 1 {
			t.Fatalf("%d callers got the request of one token", got)
		}
	}
	if left := tokens(t, d); len(left) != rounds {
		t.Errorf("%d tokens are left, want the %d that nobody took", len(left), rounds)
	}
}

func TestExpiry(t *testing.T) {
	d := newDir(t)
	now := rundir.BootTime()
	otherBoot := stored{Request{Kind: Exec}, "another"}
	for i, c := range []struct {
		token string
		valid bool
	}{
		{store(t, d, now+Lifetime, anExec), true},
		{store(t, d, now, anExec), false},
		{store(t, d, 0, anExec), false},
		{store(t, d, now+Lifetime, otherBoot), false},
	} {
		_, err := d.Take(c.token)
		if c.valid != (err == nil) || !c.valid && !errors.Is(err, kind.NotFound) {
			t.Errorf("%d: %v", i, err)
		}
	}
	valid := store(t, d, now+Lifetime, anExec)
	store(t, d, now, anExec)
	// What a killed daemon has left of a write goes as well.
	must.Succeed(t, os.WriteFile(d.tokenPath("."+valid+".123"), nil, 0o600))
	must.Succeed(t, d.Sweep(t.Context()))
	if left := tokens(t, d); len(left) != 1 || left[0] != valid {
		t.Errorf("after the sweep: %q", left)
	}
	// A time that was changed is another token.
	later := fmt.Sprintf("%012x", (now+time.Hour).Milliseconds()) + valid[12:]
	if _, err := d.Take(later); !errors.Is(err, kind.NotFound) {
		t.Errorf("with another time: %v", err)
	}
	token := put(t, d, Request{Kind: Exec})
	first, last := newToken(now + Lifetime)[:12], newToken(rundir.BootTime() + Lifetime)[:12]
	if expired(token) || token[:12] < first || token[:12] > last {
		t.Errorf("put from %s to %s: %s", first, last, token)
	}
}

func TestBounds(t *testing.T) {
	d := newDir(t)
	until := rundir.BootTime() + Lifetime
	for range maxUnused - 1 {
		store(t, d, until, anExec)
	}
	last := put(t, d, Request{Kind: Exec})
	if _, err := d.Put(t.Context(), Request{Kind: Exec}); !errors.Is(err, kind.Exhausted) {
		t.Errorf("one more than %d: %v", maxUnused, err)
	}
	if _, err := d.Take(last); err != nil {
		t.Error(err)
	}
	put(t, d, Request{Kind: Exec}) // there is room again
}

func TestBytesAreBounded(t *testing.T) {
	d := newDir(t)
	for range maxUnused {
		store(t, d, rundir.BootTime(), anExec) // expired
	}
	large := Request{Kind: Exec, Cmd: []string{strings.Repeat("x", 1<<20)}}
	for n := range 17 {
		_, err := d.Put(t.Context(), large)
		if n < 15 && err != nil || n == 16 && !errors.Is(err, kind.Exhausted) {
			t.Errorf("command %d of 1 MiB: %v", n, err)
		}
	}
}

// What comes from the network is never made a path.
func TestWhatIsNoToken(t *testing.T) {
	d := newDir(t)
	token := put(t, d, Request{Kind: Exec})
	secret := newToken(rundir.BootTime() + Lifetime)
	must.Succeed(t, record.Write(d.Path(secret), anExec, false))
	for _, bad := range []string{
		"", ".", "..", "../" + secret, "x/../../" + secret, "/etc/passwd", strings.ToUpper(token) + "G",
		token[1:], token + "0", token + "\n", token + "\x00", "./" + token[2:], "." + token[1:],
		strings.Repeat("a", 1<<20), "../" + tokensName + "/" + token,
	} {
		if r, err := d.Take(bad); !errors.Is(err, kind.NotFound) || len(err.Error()) > 200 {
			t.Errorf("%.80q gave %+v, %v", bad, r, err)
		}
	}
	if _, err := os.Stat(d.Path(secret)); err != nil {
		t.Error(err)
	}
	if _, err := d.Take(token); err != nil {
		t.Error(err)
	}
}

func TestDamagedTokens(t *testing.T) {
	damaged, another := newToken(rundir.BootTime()+Lifetime), newToken(rundir.BootTime()+Lifetime)
	for name, damage := range map[string]func(path string) error{
		"empty":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"garbage":    func(path string) error { return os.WriteFile(path, []byte(`{"version":1}`), 0o600) },
		"another's":  func(path string) error { return record.WriteOf(path, another, anExec, false) },
		"a FIFO":     func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a link":     func(path string) error { return os.Symlink("/dev/zero", path) },
		"a folder":   func(path string) error { return os.Mkdir(path, 0o700) },
		"large":      func(path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) },
		"wrong type": func(path string) error { return record.WriteOf(path, damaged, []int{1}, false) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			must.Succeed(t, damage(d.tokenPath(damaged)))
			if r, err := d.Take(damaged); !errors.Is(err, kind.NotFound) {
				t.Errorf("took %+v, %v", r, err)
			}
			if left := tokens(t, d); left != nil {
				t.Errorf("it is left")
			}
		})
	}
}

func TestMake(t *testing.T) {
	d := newDir(t)
	for _, path := range []string{string(d), d.Path(tokensName)} {
		must.Succeed(t, os.Chmod(path, 0o755))
	}
	old := syscall.Umask(0o777)
	err := os.RemoveAll(d.Path(tokensName))
	if err == nil {
		err = d.Make()
	}
	syscall.Umask(old)
	must.Succeed(t, err)
	for _, path := range []string{string(d), d.Path(tokensName)} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	must.Succeed(t, os.RemoveAll(string(d)))
	must.Succeed(t, os.Symlink(t.TempDir(), string(d)))
	if _, err := d.Put(t.Context(), Request{}); err == nil {
		t.Error("the directory may be a link")
	}
}

func TestLockAndAddress(t *testing.T) {
	d := newDir(t)
	if _, err := d.Running(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("running: %v", err)
	}
	// What is no lock does not keep anybody from running.
	must.Succeed(t, os.Mkdir(d.Path(lockName), 0o700))
	s, err := d.Lock()
	must.Succeed(t, err)
	if _, err := d.Lock(); !errors.Is(err, rundir.ErrLocked) {
		t.Errorf("locked twice: %v", err)
	}
	if _, err := d.Running(); !errors.Is(err, ErrStarting) || s.LastPort() != "" {
		t.Errorf("running: %v; last port %q", err, s.LastPort())
	}
	must.Succeed(t, s.Announce("https://[::1]:4711"))
	a, err := d.Running()
	if err != nil || a.URL(PortForward, "x") != "https://[::1]:4711/portforward/x" || a.Process.PID != os.Getpid() {
		t.Errorf("running: %+v, %v", a, err)
	}
	s.Close()
	if _, err := d.Running(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("closed, and running: %v", err)
	}
	// This process lives, and another one has the lock.
	if s, err = d.Lock(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Running(); !errors.Is(err, ErrStarting) || s.LastPort() != "4711" {
		t.Errorf("running: %v; last port %q", err, s.LastPort())
	}
	s.Close()
	// The next one has the lock and does not listen yet: the address is the earlier one's.
	child := exec.Command("true")
	must.Succeed(t, child.Run())
	dead := Address{"http://127.0.0.1:4712", rundir.Process{PID: child.Process.Pid, StartTime: 1}, rundir.BootID()}
	must.Succeed(t, record.Write(d.Path(addressName), dead, false))
	if s, err = d.Lock(); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := d.Running(); !errors.Is(err, ErrStarting) || s.LastPort() != "4712" {
		t.Errorf("running: %v; last port %q", err, s.LastPort())
	}
	must.Succeed(t, os.WriteFile(d.Path(addressName), []byte("x"), 0o600))
	if _, err := d.Running(); !errors.Is(err, ErrStarting) || s.LastPort() != "" {
		t.Errorf("a damaged address: %v; last port %q", err, s.LastPort())
	}
}

// A holdfast-stream whose address was lost writes it down again.
func TestLostAddress(t *testing.T) {
	d := newDir(t)
	s, err := d.Lock()
	must.Succeed(t, err)
	defer s.Close()
	if err := s.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := d.Running(); !errors.Is(err, ErrStarting) {
		t.Errorf("running before it listens: %v", err)
	}
	const base = "http://127.0.0.1:4711"
	must.Succeed(t, s.Announce(base))
	path := d.Path(addressName)
	for name, damage := range map[string]func() error{
		"removed":   func() error { return os.Remove(path) },
		"emptied":   func() error { return os.Truncate(path, 0) },
		"directory": func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"nothing":   func() error { return nil },
	} {
		if err := errors.Join(damage(), s.Sweep(t.Context())); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if a, err := d.Running(); err != nil || a.Base != base {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

// What a holdfast-stream leaves that is killed while it writes its address goes with the next start of
// the daemon, or of another one; that of one that lives does not.
func TestLeftAddress(t *testing.T) {
	d := newDir(t)
	left := func() bool {
		_, err := os.Lstat(d.Path(".address.123"))
		return err == nil
	}
	leave := func() {
		t.Helper()
		must.Succeed(t, os.WriteFile(d.Path(".address.123"), nil, 0o600))
	}
	sweep := func() {
		t.Helper()
		must.Succeed(t, d.Sweep(t.Context()))
	}
	leave()
	s, err := d.Lock()
	must.Succeed(t, err)
	if left() {
		t.Error("the next holdfast-stream leaves it")
	}
	leave()
	if sweep(); !left() {
		t.Error("the daemon takes it from one that runs")
	}
	s.Close()
	if sweep(); left() {
		t.Error("the daemon leaves it")
	}
}

func TestRetire(t *testing.T) {
	d := newDir(t)
	s, err := d.Lock()
	must.Succeed(t, err)
	yes := func() bool { return true }
	token := put(t, d, Request{Kind: Exec})
	if ok, err := s.Retire(t.Context(), yes); ok || err != nil {
		t.Errorf("with a token: %v, %v", ok, err)
	}
	if _, err := d.Take(token); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Retire(t.Context(), func() bool { return false }); ok || err != nil {
		t.Errorf("with a connection: %v, %v", ok, err)
	}
	if _, err := d.Lock(); !errors.Is(err, rundir.ErrLocked) {
		t.Errorf("the lock is gone: %v", err)
	}
	store(t, d, rundir.BootTime(), anExec) // expired
	if ok, err := s.Retire(t.Context(), yes); !ok || err != nil {
		t.Errorf("idle: %v, %v", ok, err)
	}
	if left := tokens(t, d); left != nil {
		t.Errorf("left: %q", left)
	}
	if _, err := d.Running(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("running: %v", err)
	}
}

// A token is either seen by the process that is about to end, or whoever put it sees
// that nobody runs.
func TestNoTokenIsMissed(t *testing.T) {
	d := newDir(t)
	for range 100 {
		s, err := d.Lock()
		must.Succeed(t, err)
		must.Succeed(t, s.Announce("http://127.0.0.1:1"))
		var retired bool
		var wg sync.WaitGroup
		wg.Go(func() {
			var err error
			if retired, err = s.Retire(t.Context(), func() bool { return true }); err != nil {
				t.Error(err)
			}
		})
		token := put(t, d, Request{Kind: Exec})
		_, rerr := d.Running()
		wg.Wait()
		if retired != errors.Is(rerr, ErrNotRunning) {
			t.Fatalf("the server has ended: %v; whoever put a token sees %v", retired, rerr)
		}
		if _, err := d.Take(token); err != nil {
			t.Fatal(err)
		}
		if !retired {
			s.Close()
		}
	}
}

// Who waits for the gate waits no longer than it wants to.
func TestGateIsHeld(t *testing.T) {
	d := newDir(t)
	gate, err := d.gate(t.Context())
	must.Succeed(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := d.Put(ctx, Request{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("put: %v", err)
	}
	gate.Close()
	put(t, d, Request{})
}
