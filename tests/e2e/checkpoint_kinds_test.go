package e2e

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

const checkpointImage = "registry.test/tests/saved:1"

// pushCheckpoint makes an image of an archive, as CRI-O has them.
func pushCheckpoint(t *testing.T, n *harness.Node, archive string) {
	t.Helper()
	f, err := os.Open(archive)
	check(t, err)
	defer f.Close()
	files := map[string]string{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		check(t, err)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		b, err := io.ReadAll(r)
		check(t, err)
		files[h.Name] = string(b)
	}
	layer, err := harness.MakeLayer(files)
	check(t, err)
	_, err = n.Registry.PushAnnotated(checkpointImage, ocispec.ImageConfig{},
		map[string]string{"io.kubernetes.cri-o.annotations.checkpoint.name": "counter"}, layer)
	check(t, err)
	n.Pull(checkpointImage)
	n.Mark()
}

// TestRestoreFromImage makes a container of an image that is a checkpoint, where the node
// restores such images, and of none where it does not.
func TestRestoreFromImage(t *testing.T) {
	needCRIU(t)
	for _, on := range []bool{false, true} {
		var o harness.Options
		if on {
			o.Config = "[checkpoint]\nrestore_images = true\n"
		}
		n := harness.New(t, o)
		p := n.RunPod("images")
		c := p.Run("counter", []string{"sh", "-c", counter})
		goesOn(t, c)
		archive := filepath.Join(t.TempDir(), "a.tar")
		check(t, checkpointTo(n, c.ID, archive))
		all := counts(t, c)
		c.Remove()
		pushCheckpoint(t, n, archive)
		cfg := harness.ContainerConfig("restored", nil)
		cfg.Image.Image = checkpointImage
		if !on {
			ctx, cancel := harness.Deadline()
			_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
				PodSandboxId: p.ID, Config: cfg, SandboxConfig: p.Config})
			cancel()
			wantError(t, err, codes.FailedPrecondition, "checkpoint.restore_images")
			continue
		}
		r := p.Create("restored", nil, func(cfg *cri.ContainerConfig) { cfg.Image.Image = checkpointImage })
		r.Start()
		goesOn(t, r)
		again := counts(t, r)
		inOrder(t, again)
		if again[0] < 3 || again[0] > all[len(all)-1]+1 {
			t.Errorf("it goes on with %d, the checkpoint was made at %d or before", again[0], all[len(all)-1])
		}
		if out := r.Output("cat", "/written"); out != "written\n" {
			t.Errorf("its file says %q", out)
		}
		n.RemoveAllPods()
		n.CheckClean()
	}
}

// TestCheckpointKinds saves containers of which it is not plain that they can be: each is
// saved and restored, or refused with a reason, and goes on.
func TestCheckpointKinds(t *testing.T) {
	needCRIU(t)
	n := harness.New(t)
	shared := func(p *cri.PodSandboxConfig) {
		p.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}}
	}
	inPod := func(cfg *cri.ContainerConfig) {
		cfg.Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}}}
	}
	for name, x := range map[string]struct {
		pod  func(*cri.PodSandboxConfig)
		edit func(*cri.ContainerConfig)
		can  bool
	}{
		"terminal":   {func(*cri.PodSandboxConfig) {}, func(cfg *cri.ContainerConfig) { cfg.Tty = true }, true},
		"stdin":      {func(*cri.PodSandboxConfig) {}, func(cfg *cri.ContainerConfig) { cfg.Stdin = true }, true},
		"shared pid": {shared, inPod, false},
	} {
		p := n.RunPod("kinds", x.pod)
		c := p.Run("c", []string{"sh", "-c", "while :; do echo x; sleep 0.05; done"}, x.edit)
		c.WaitLog(patience, "x")
		archive := filepath.Join(t.TempDir(), "a.tar")
		err := checkpointTo(n, c.ID, archive)
		if x.can {
			check(t, err)
		} else {
			wantError(t, err, codes.FailedPrecondition, "PID namespace")
		}
		before := len(c.Log())
		harness.Eventually(t, patience, name+" goes on", func() bool { return len(c.Log()) > before+2 })
		if x.can {
			r := p.Create("r", nil, x.edit, func(cfg *cri.ContainerConfig) { cfg.Image.Image = archive })
			r.Start()
			r.WaitLog(patience, "x")
		}
		p.Remove()
	}
	n.CheckClean()
}
