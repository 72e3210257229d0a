package streams

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// The tests start this test binary as holdfast-stream: with the real handshake, lock
// and files, but it serves nobody.
func TestMain(m *testing.M) {
	if strings.HasPrefix(filepath.Base(os.Args[0]), "holdfast-stream") {
		if err := serve(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// How the process behaves that is started, as the file beside its directory says.
const (
	fails  = "fails"  // says why it cannot start
	dies   = "dies"   // and says nothing
	hangs  = "hangs"  // before it is ready
	brief  = "brief"  // is ready and ends
	deaf   = "deaf"   // to SIGTERM
	locked = "locked" // has the lock for some time before it listens
)

// serve is holdfast-stream.
func serve() error {
	handshake := os.NewFile(3, "handshake")
	if _, err := handshake.Read(make([]byte, 1)); err != nil {
		return err
	}
	dir := stream.Dir(os.Args[slices.Index(os.Args, "--dir")+1])
	mode, _ := os.ReadFile(modePath(dir))
	switch string(mode) {
	case fails:
		handshake.Write([]byte("\x01no luck"))
		return nil
	case dies:
		return errors.New("dead")
	case hangs:
		select {}
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	s, err := dir.Lock()
	if err != nil {
		handshake.Write(append([]byte{1}, err.Error()...))
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:"+s.LastPort())
	if err != nil {
		return err
	}
	if string(mode) == locked {
		handshake.Read(make([]byte, 1)) // until the launcher is gone
	}
	if err := s.Announce("http://" + l.Addr().String()); err != nil {
		return err
	}
	if string(mode) == brief {
		l.Close()
		s.Close()
	}
	handshake.Write([]byte{0})
	if string(mode) == brief {
		return nil
	}
	for range terminated {
		if string(mode) != deaf {
			break
		}
	}
	l.Close()
	return s.Close()
}

func modePath(d stream.Dir) string { return filepath.Join(filepath.Dir(string(d)), "mode") }

// bed is a state directory, and the daemons on it.
type bed struct {
	t      *testing.T
	dir    stream.Dir
	binary string
	mu     sync.Mutex
	placed []int // pids of all that were started
}

func newBed(t *testing.T) *bed {
	t.Helper()
	t.Parallel()
	tmp := t.TempDir()
	b := &bed{t: t, dir: stream.Dir(filepath.Join(tmp, stream.DirName)), binary: filepath.Join(tmp, "holdfast-stream")}
	b.install()
	t.Cleanup(func() {
		for _, pid := range b.starts() {
			syscall.Kill(pid, syscall.SIGKILL) // those that are children are reaped by Ended
		}
	})
	return b
}

// install puts another file in the place of the program. A process of its own writes it:
// a child that is just being started could otherwise have it open, and it does not run.
func (b *bed) install() {
	b.t.Helper()
	out, err := exec.Command("cp", "--remove-destination", os.Args[0], b.binary).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
}

func (b *bed) behave(mode string) {
	b.t.Helper()
	must.Succeed(b.t, os.WriteFile(modePath(b.dir), []byte(mode), 0o600))
}

// daemon is what a daemon that has just been started has.
func (b *bed) daemon() *Sessions {
	return New(Options{
		Settings: Settings{Address: "127.0.0.1:0", IdleTimeout: 4 * time.Hour, CreationTimeout: time.Minute},
		Dir:      b.dir,
		Binary:   b.binary,
		LogLevel: "info",
		Place: func(_ context.Context, pid int) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.placed = append(b.placed, pid)
			return nil
		},
		Log: slog.New(slog.DiscardHandler),
	})
}

func (b *bed) starts() []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.placed)
}

// url asks for a session and checks the token of it.
func (b *bed) url(s *Sessions) (base string) {
	b.t.Helper()
	url, err := s.URL(b.t.Context(), stream.Request{Kind: stream.Exec, ID: "c"})
	must.Succeed(b.t, err)
	base, token, ok := strings.Cut(url, "/exec/")
	r, err := b.dir.Take(token)
	if !ok || err != nil || r.ID != "c" {
		b.t.Fatalf("%s stands for %+v, %v", url, r, err)
	}
	c, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	must.Succeed(b.t, err)
	c.Close()
	return base
}

// running is the process that serves.
func (b *bed) running() rundir.Process {
	b.t.Helper()
	a, err := b.dir.Running()
	must.Succeed(b.t, err)
	return a.Process
}

// kill kills the process that serves and waits until nobody sees it any more.
func (b *bed) kill() {
	b.t.Helper()
	syscall.Kill(b.running().PID, syscall.SIGKILL)
	b.until(stream.ErrNotRunning)
}

// until waits until the process that serves is as it is wanted.
func (b *bed) until(want error) {
	b.t.Helper()
	for b.t.Context().Err() == nil {
		if _, err := b.dir.Running(); errors.Is(err, want) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	b.t.Fatalf("not yet: %v", want)
}

// One process serves any number of requests, of one daemon after the other, and the next
// one has its port.
func TestOneProcess(t *testing.T) {
	b := newBed(t)
	s := b.daemon()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { b.url(s) })
	}
	wg.Wait()
	base, first := b.url(s), b.running()
	if again := b.url(b.daemon()); again != base || b.running() != first || len(b.starts()) != 1 {
		t.Errorf("after a restart: %s, %s; started: %v", base, again, b.starts())
	}
	if sid, err := syscall.Getpgid(first.PID); err != nil || sid != first.PID {
		t.Errorf("it is no leader of a session: %d, %v", sid, err)
	}
	for _, s := range []*Sessions{s, b.daemon()} {
		b.kill()
		if again := b.url(s); again != base {
			t.Errorf("after it was killed: %s, was %s", again, base)
		}
	}
	if n := len(b.starts()); n != 3 {
		t.Errorf("%d processes were started, want 3", n)
	}
}

// What runs is replaced where the settings or the program have changed, without a sign
// of it but in the log.
func TestReplace(t *testing.T) {
	b := newBed(t)
	base, first := b.url(b.daemon()), b.running()
	s := b.daemon()
	s.TLSCert, s.TLSKey = "/cert", "/key"
	if again := b.url(s); again != base || b.running() == first || first.Alive() && len(b.starts()) != 2 {
		t.Errorf("with other settings: %s, was %s; %v", again, base, b.starts())
	}
	second := b.running()
	b.install()
	if b.url(s); b.running() != second {
		t.Error("the daemon that has started it has replaced it")
	}
	s = b.daemon()
	s.TLSCert, s.TLSKey = "/cert", "/key"
	if again := b.url(s); again != base || b.running() == second {
		t.Errorf("with another program: %s, was %s", again, base)
	}
	b.behave(deaf)
	b.kill()
	b.url(s)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := b.daemon().URL(ctx, stream.Request{Kind: stream.Exec})
	want := fmt.Sprintf("process %d), kill it if it hangs", b.running().PID)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("one that hangs: %v, want %q", err, want)
	}
}

// A failure leaves no process and no token, and the next request tries again.
func TestFailures(t *testing.T) {
	for mode, want := range map[string]string{
		fails: "cannot serve sessions: cannot start holdfast-stream: no luck",
		dies:  "it ended before it was ready; see ",
		hangs: "it was not ready in time",
		brief: "ended as soon as it was ready; see ",
	} {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t)
			b.behave(mode)
			s := b.daemon()
			ctx, cancel := context.WithCancel(t.Context())
			if mode == hangs {
				ctx, cancel = context.WithTimeout(ctx, 3*time.Second) // it has to have started by then
			}
			defer cancel()
			_, err := s.URL(ctx, stream.Request{Kind: stream.Exec})
			if err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, kind.Unavailable) {
				t.Errorf("%v, want %q", err, want)
			}
			entries, err := os.ReadDir(b.dir.Path("tokens"))
			if err != nil || len(entries) != 0 {
				t.Errorf("tokens are left: %v, %v", entries, err)
			}
			for _, pid := range b.starts() {
				if _, err := rundir.FindProcess(pid); err == nil && mode != brief {
					t.Errorf("process %d is left", pid)
				}
			}
			b.behave("")
			b.url(s)
		})
	}
}

// A daemon was killed while it started holdfast-stream: the next one waits for it.
func TestStartedByAKilledDaemon(t *testing.T) {
	b := newBed(t)
	b.behave(locked)
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must.Succeed(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "handshake"), os.NewFile(uintptr(fds[1]), "handshake")
	defer ours.Close()
	s := b.daemon()
	cmd := exec.Command(b.binary, s.args()...)
	cmd.ExtraFiles = []*os.File{theirs}
	must.Succeed(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	theirs.Close()
	if _, err := ours.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	b.until(stream.ErrStarting)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = s.URL(ctx, stream.Request{Kind: stream.Exec})
	if !errors.Is(err, stream.ErrStarting) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one that does not listen: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := s.URL(t.Context(), stream.Request{Kind: stream.Exec})
		got <- err
	}()
	ours.Close() // the daemon that started it is gone, and it goes on
	if err := <-got; err != nil || b.running().PID != cmd.Process.Pid || b.starts() != nil {
		t.Errorf("%v; started: %v", err, b.starts())
	}
}
