// Package sessions has exec, attach and port-forward through the libraries that
// kubectl is made of. It is a module of its own, so that they are no dependency of
// Holdfast.
package sessions

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

const patience = 3 * time.Minute

// both runs a test over each of the protocols of current clients.
func both(t *testing.T, f func(t *testing.T, protocol string)) {
	for _, protocol := range []string{"SPDY", "WebSocket"} {
		t.Run(protocol, func(t *testing.T) { f(t, protocol) })
	}
}

// execURL asks for a command in a container.
func execURL(t *testing.T, c *harness.Container, r *cri.ExecRequest) string {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r.ContainerId = c.ID
	resp, err := c.N.Runtime.Exec(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Url
}

// executor is a client for the address of a session.
func executor(t *testing.T, protocol, address string) remotecommand.Executor {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	var e remotecommand.Executor
	if protocol == "SPDY" {
		e, err = remotecommand.NewSPDYExecutor(&rest.Config{}, "POST", u)
	} else {
		e, err = remotecommand.NewWebSocketExecutor(&rest.Config{}, "GET", address)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// restarts kills the daemon again and again, until stop is called, and at least once.
func restarts(n *harness.Node) (stop func() int) {
	quit, count := make(chan struct{}), make(chan int)
	go func() {
		times := 0
		for {
			n.Kill()
			n.Start()
			times++
			select {
			case <-quit:
				count <- times
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return sync.OnceValue(func() int { close(quit); return <-count })
}

// size is how much is copied: 1 GiB in a drill.
func size() int64 {
	if os.Getenv("HOLDFAST_DRILL") != "" {
		return 1 << 30
	}
	return 64 << 20
}

// noise gives n bytes that are not the same anywhere, and hashes them.
type noise struct {
	block []byte
	at    int
	left  int64
	hash  hash.Hash
}

func newNoise(n int64) *noise {
	s := &noise{block: make([]byte, 1<<20+7), left: n, hash: sha256.New()}
	rand.Read(s.block)
	return s
}

func (s *noise) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), s.left)], s.block[s.at:])
	s.at = (s.at + n) % len(s.block)
	s.left -= int64(n)
	s.hash.Write(p[:n])
	return n, nil
}

func (s *noise) sum() string { return fmt.Sprintf("%x", s.hash.Sum(nil)) }

// wantCode fails unless a command has ended with the code.
func wantCode(t *testing.T, err error, code int) {
	t.Helper()
	var exit interface{ ExitStatus() int }
	switch {
	case err == nil && code == 0:
	case !errors.As(err, &exit) || exit.ExitStatus() != code:
		t.Errorf("the command ended with %v, want exit code %d", err, code)
	}
}

// stream runs a session to its end.
func stream(e remotecommand.Executor, o remotecommand.StreamOptions) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	return e.StreamWithContext(ctx, o)
}

// A command's output, errors and exit code, and what it is told on its input.
func TestExec(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("exec").Run("exec", []string{"sleep", "1000"})
	both(t, func(t *testing.T, protocol string) {
		var out, errs strings.Builder
		e := executor(t, protocol, execURL(t, c.With(t), &cri.ExecRequest{
			Cmd:    []string{"sh", "-c", "cat; echo err >&2; exit 42"},
			Stdin:  true,
			Stdout: true,
			Stderr: true,
		}))
		err := stream(e, remotecommand.StreamOptions{Stdin: strings.NewReader("in\n"), Stdout: &out, Stderr: &errs})
		wantCode(t, err, 42)
		if out.String() != "in\n" || errs.String() != "err\n" {
			t.Errorf("stdout %q, stderr %q", out.String(), errs.String())
		}
	})
}

// Much goes through a command and comes back, while the daemon dies again and again.
func TestCopyThroughExec(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("copy").Run("copy", []string{"sleep", "1000"})
	both(t, func(t *testing.T, protocol string) {
		e := executor(t, protocol, execURL(t, c.With(t), &cri.ExecRequest{Cmd: []string{"cat"}, Stdin: true,
			Stdout: true}))
		stop := restarts(n)
		defer stop()
		in, out := newNoise(size()), sha256.New()
		start := time.Now()
		err := stream(e, remotecommand.StreamOptions{Stdin: in, Stdout: out})
		took := time.Since(start)
		wantCode(t, err, 0)
		if got := fmt.Sprintf("%x", out.Sum(nil)); got != in.sum() {
			t.Errorf("what came back has the hash %s, want %s", got, in.sum())
		}
		t.Logf("%d MiB there and back in %v, with %d restarts", size()>>20, took, stop())
	})
}

// Attach: the container's own streams.
func TestAttach(t *testing.T) {
	n := harness.New(t)
	both(t, func(t *testing.T, protocol string) {
		p := n.With(t).RunPod("attach-" + strings.ToLower(protocol))
		c := p.Run("attach", []string{"sh", "-c", "read x; echo got $x; echo err >&2; exit 3"},
			func(cfg *cri.ContainerConfig) { cfg.Stdin, cfg.StdinOnce = true, true })
		ctx, cancel := harness.Deadline()
		defer cancel()
		resp, err := n.Runtime.Attach(ctx, &cri.AttachRequest{ContainerId: c.ID, Stdin: true, Stdout: true,
			Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		var out, errs strings.Builder
		e := executor(t, protocol, resp.Url)
		err = stream(e, remotecommand.StreamOptions{Stdin: strings.NewReader("word\n"), Stdout: &out, Stderr: &errs})
		if err != nil || out.String() != "got word\n" || errs.String() != "err\n" {
			t.Errorf("stdout %q, stderr %q, %v", out.String(), errs.String(), err)
		}
		if s := c.WaitExited(patience); s.ExitCode != 3 {
			t.Errorf("exit code %d", s.ExitCode)
		}
	})
}
