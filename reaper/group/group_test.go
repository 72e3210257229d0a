package group

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/must"
)

var errStop = errors.New("it took too long")

// TestRun runs shells that leave a process behind in their group. Each keeps the
// pipe open, whose end says that all are gone.
func TestRun(t *testing.T) {
	for name, c := range map[string]struct {
		script  string
		rest    Leftovers
		cancel  bool // once the script has said so
		want    string
		stopped bool // what was left behind was killed
	}{
		"success":        {script: "exit 0", stopped: true},
		"failure":        {script: "exit 7", want: "exit status 7", stopped: true},
		"keeps the rest": {script: "sleep 1000 >&3 & exit 0", rest: Keep},
		"kills the rest": {script: "sleep 1000 >&3 & exit 0", rest: Kill, stopped: true},
		"rest after an error": {
			script: "sleep 1000 >&3 & exit 7", rest: Kill, want: "exit status 7", stopped: true,
		},
		"cancelled": {
			script: "sleep 1000 & echo x >&3; wait", cancel: true, want: "killed after context canceled", stopped: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			pr, pw, err := os.Pipe()
			must.Succeed(t, err)
			defer pr.Close()
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			cmd := exec.Command("sh", "-c", c.script+"\n:")
			cmd.ExtraFiles = []*os.File{pw}
			if c.cancel {
				go func() {
					pr.Read(make([]byte, 1))
					cancel(errStop)
				}()
			}
			err = Run(ctx, cmd, nil, c.rest)
			pw.Close()
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if c.cancel && (!errors.Is(err, context.Canceled) || !errors.Is(err, errStop)) {
				t.Errorf("got %v, want both the end of the context and its cause", err)
			}
			wait := 2 * time.Minute
			if !c.stopped {
				wait = 0
			}
			pr.SetReadDeadline(time.Now().Add(wait))
			var rest bytes.Buffer
			_, err = rest.ReadFrom(pr)
			if (err == nil) != c.stopped {
				t.Errorf("what was left is gone: %v, want %v (%v)", err == nil, c.stopped, err)
			}
			if !c.stopped {
				syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the group lives, so the number is its own
			}
		})
	}
}

func TestRunNotAtAll(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cmd := exec.Command("true")
	if err := Run(ctx, cmd, nil, Keep); !errors.Is(err, context.Canceled) || cmd.Process != nil {
		t.Errorf("got %v, started: %v", err, cmd.Process != nil)
	}
	if err := Run(t.Context(), exec.Command("/nonexistent"), nil, Keep); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestOutputIsBounded(t *testing.T) {
	h := Head{Max: 1 << 20}
	size := 3 * int64(h.Max)
	// By io.Copy, as os/exec does; a short write would end the command.
	n, err := io.Copy(&h, io.LimitReader(zeros{}, size))
	if n != size || err != nil {
		t.Fatal(n, err)
	}
	if len(h.Bytes()) != h.Max {
		t.Errorf("kept %d bytes, want %d", len(h.Bytes()), h.Max)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
