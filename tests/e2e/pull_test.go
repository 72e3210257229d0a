package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// holdfastctl pulls as the kubelet does, and says why it cannot.
func TestPullCommand(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	const ref = "registry.test/tests/pulled:1"
	layer := [2]string{"file", rand.Text()}
	push(t, n, ref, layer)
	pull := func(ref string) (string, error) {
		ctx, cancel := harness.Deadline()
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "pull", "--address",
			n.Socket, ref)
		out, err := cmd.Output() // on stderr it says how far it is, if the pull takes a while
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			out = exit.Stderr
		}
		return strings.TrimSpace(string(out)), err
	}
	out, err := pull(ref)
	if want := n.Pull(ref); err != nil || out != want {
		t.Errorf("%q, %v; want %s", out, err, want)
	}
	if out, err := pull("registry.test/tests/none:1"); err == nil || !strings.Contains(out, "NotFound") ||
		!strings.Contains(out, "tests/none") {
		t.Errorf("an image that is nowhere: %q, %v", out, err)
	}
	// It says how far it is; and when it goes, the pull goes with it.
	push(t, n, "registry.test/tests/stuck:1", layer)
	layers := layersOf(t, n, ref) // or the layer would be here already
	removeImage(t, n, ref)
	harness.Eventually(t, patience, "the layer is gone", func() bool { return !exists(layers[0]) })
	blocked, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	n.Registry.Break(func(r *http.Request) bool {
		if strings.Contains(r.URL.Path, "stuck/blobs/") {
			select {
			case blocked <- struct{}{}:
			default:
			}
			<-r.Context().Done()
			select {
			case ended <- struct{}{}:
			default:
			}
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "pull", "--address",
		n.Socket, "registry.test/tests/stuck:1")
	said, err := os.Create(n.Path("said"))
	check(t, err)
	defer said.Close()
	cmd.Stderr = said
	check(t, cmd.Start())
	<-blocked
	harness.Eventually(t, patience, "holdfastctl says how far it is", func() bool {
		b, err := os.ReadFile(said.Name())
		return err == nil && strings.Contains(string(b), "0 B of ") && strings.Contains(string(b), "0 of 1 layers")
	})
	cancel()
	cmd.Wait()
	<-ended
	n.Registry.Break(nil)
	harness.Eventually(t, patience, "its record is gone", func() bool {
		l, err := os.ReadDir(filepath.Join(n.State, records.PullsName))
		return err == nil && len(l) == 0
	})
}

// Whoever interrupts holdfastctl calls the pull off; a daemon that goes is told
// apart from a registry that does; and what a killed daemon pulled can be seen.
func TestPullInterrupted(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	s := newSlow(t, n, "slow.test")
	const ref = "slow.test/tests/slow:1"
	if _, err := n.Registry.Push(ref, ocispec.ImageConfig{}, randomLayers(t, 1, 512<<10)...); err != nil {
		t.Fatal(err)
	}
	ctl := func(args ...string) *exec.Cmd {
		return exec.CommandContext(t.Context(), filepath.Join(n.Bin, "holdfastctl"), append([]string{"--state",
			n.State}, args...)...)
	}
	// pull gives what it said and its exit code, after something was done to it.
	pull := func(then func(*exec.Cmd)) (string, int) {
		t.Helper()
		s.idle(t)
		cmd := ctl("pull", "--address", n.Socket, ref)
		said, err := os.Create(n.Path("said"))
		check(t, err)
		defer said.Close()
		cmd.Stderr = said
		check(t, cmd.Start())
		s.send(1)
		then(cmd)
		cmd.Wait()
		b, err := os.ReadFile(said.Name())
		if err != nil || strings.ContainsAny(string(b), "\r\x1b") {
			t.Errorf("%q, %v", b, err)
		}
		return string(b), cmd.ProcessState.ExitCode()
	}

	said, code := pull(func(cmd *exec.Cmd) { cmd.Process.Signal(syscall.SIGINT) })
	if code != 130 || !strings.Contains(said, "called off") {
		t.Errorf("interrupted: exit code %d, %s", code, said)
	}
	harness.Eventually(t, patience, "the daemon's pull has ended", func() bool {
		out, err := ctl("pulls", "--json").Output()
		return err == nil && strings.TrimSpace(string(out)) == "[]"
	})

	// A shutdown waits for no pull, and tells why it ended. The end of the daemon
	// itself is not measured: the disk has a say in that.
	var took time.Duration
	said, code = pull(func(cmd *exec.Cmd) {
		began, ended := time.Now(), make(chan struct{})
		go func() {
			defer close(ended)
			cmd.Wait()
			took = time.Since(began)
		}()
		n.Stop()
		<-ended
	})
	if code != 1 || !strings.Contains(said, "the daemon has ended meanwhile") ||
		!strings.Contains(said, "shutting down") || took > 8*time.Second {
		t.Errorf("a shutdown: exit code %d after %s, %s", code, took, said)
	}
	n.Start()

	said, code = pull(func(*exec.Cmd) { n.Kill() })
	if code != 1 || !strings.Contains(said, "the daemon has ended meanwhile") {
		t.Errorf("the daemon went: exit code %d, %s", code, said)
	}
	if out, err := ctl("pulls").CombinedOutput(); err != nil || !strings.Contains(string(out), ref) ||
		!strings.Contains(string(out), "has died") {
		t.Errorf("a dead daemon's pulls: %v\n%s", err, out)
	}
	if out, err := ctl("pull", "--address", n.Socket, ref).CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "the daemon does not run") {
		t.Errorf("without a daemon: %v\n%s", err, out)
	}
	n.Start()
	if out, err := ctl("pulls", "--json").Output(); err != nil || strings.TrimSpace(string(out)) != "[]" {
		t.Errorf("after the start: %v\n%s", err, out)
	}
	s.hurry()
	if out, err := ctl("pull", "--address", n.Socket, ref).Output(); err != nil ||
		!strings.HasPrefix(string(out), "sha256:") {
		t.Errorf("in the end: %v\n%s", err, out)
	}
}
