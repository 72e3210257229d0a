package e2e

import (
	"context"
	"crypto/rand"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// holdfastctl pulls as the kubelet does, and says why it cannot.
func TestPullCommand(t *testing.T) {
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"file": rand.Text()})
	if err != nil {
		t.Fatal(err)
	}
	const ref = "registry.test/tests/pulled:1"
	if _, err := n.Registry.Push(ref, ocispec.ImageConfig{}, layer); err != nil {
		t.Fatal(err)
	}
	pull := func(ref string) (string, error) {
		ctx, cancel := harness.Deadline()
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "pull", "--address", n.Socket, ref)
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	out, err := pull(ref)
	if want := n.Pull(ref); err != nil || out != want {
		t.Errorf("%q, %v; want %s", out, err, want)
	}
	if out, err := pull("registry.test/tests/none:1"); err == nil || !strings.Contains(out, "NotFound") || !strings.Contains(out, "tests/none") {
		t.Errorf("an image that is nowhere: %q, %v", out, err)
	}
	// It says how far it is; and when it goes, the pull goes with it.
	if _, err := n.Registry.Push("registry.test/tests/stuck:1", ocispec.ImageConfig{}, layer); err != nil {
		t.Fatal(err)
	}
	layers := layersOf(t, n, ref) // or the layer would be here already
	removeImage(t, n, ref)
	eventually(t, "the layer is gone", func() bool { return !exists(layers[0]) })
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
	cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "pull", "--address", n.Socket, "registry.test/tests/stuck:1")
	said, err := os.Create(n.Path("said"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-blocked
	eventually(t, "holdfastctl says how far it is", func() bool {
		b, err := os.ReadFile(said.Name())
		return err == nil && strings.HasPrefix(string(b), "0 B of ") && strings.Contains(string(b), "0 of 1 layers")
	})
	cancel()
	cmd.Wait()
	<-ended
	n.Registry.Break(nil)
	eventually(t, "its record is gone", func() bool {
		l, err := os.ReadDir(filepath.Join(n.State, rundir.PullsName))
		return err == nil && len(l) == 0
	})
}
