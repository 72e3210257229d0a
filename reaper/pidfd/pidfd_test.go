package pidfd

import (
	"context"
	"errors"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	must.Succeed(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

func open(t *testing.T, pid int) *Process {
	t.Helper()
	p, err := Open(pid, nil)
	must.Succeed(t, err)
	t.Cleanup(p.Close)
	return p
}

func TestWaitEndsWithItsContext(t *testing.T) {
	p := open(t, sleeper(t).Process.Pid)
	cause := errors.New("no more patience")
	for name, c := range map[string]struct {
		ctx  func() (context.Context, func())
		want error
	}{
		"deadline": {func() (context.Context, func()) {
			ctx, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
			return ctx, stop
		}, context.DeadlineExceeded},
		"cancelled meanwhile": {func() (context.Context, func()) {
			ctx, stop := context.WithCancelCause(t.Context())
			time.AfterFunc(10*time.Millisecond, func() { stop(cause) })
			return ctx, func() {}
		}, cause},
		"cancelled before": {func() (context.Context, func()) {
			ctx, stop := context.WithCancelCause(t.Context())
			stop(cause)
			return ctx, func() {}
		}, cause},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, stop := c.ctx()
			defer stop()
			if err := p.Wait(ctx); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if p.Ended() {
		t.Error("it has not ended")
	}
	if err := p.Kill(t.Context()); err != nil { // after waits that were cut short
		t.Error(err)
	}
}

func TestZombieAndReaped(t *testing.T) {
	cmd := sleeper(t)
	p := open(t, cmd.Process.Pid)
	must.Succeed(t, p.Kill(t.Context()))
	if !p.Ended() {
		t.Error("a zombie has ended")
	}
	cmd.Wait()
	if !p.Ended() {
		t.Error("a reaped process has ended")
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, ErrEnded) {
		t.Errorf("signal to a reaped process: %v", err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(done); err != nil {
		t.Errorf("the end counts, even where ctx has ended: %v", err)
	}
	if _, err := Open(cmd.Process.Pid, nil); !errors.Is(err, ErrEnded) {
		t.Errorf("open of a reaped process: %v", err)
	}
}

func TestOpenAsksWhoItIs(t *testing.T) {
	pid := sleeper(t).Process.Pid
	if _, err := Open(pid, func() bool { return false }); !errors.Is(err, ErrEnded) {
		t.Errorf("another process under that pid: %v", err)
	}
	p, err := Open(pid, func() bool { return true })
	must.Succeed(t, err)
	p.Close()
}

func TestCloseEndsWait(t *testing.T) {
	p := open(t, sleeper(t).Process.Pid)
	done := make(chan error, 1)
	go func() { done <- p.Wait(context.Background()) }()
	p.Close()
	if err := <-done; err == nil {
		t.Error("a closed process was waited for")
	}
}
