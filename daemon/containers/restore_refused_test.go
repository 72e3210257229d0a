package containers

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// restored is the spec of a container, of the checkpoint or as a request wants it.
func restored(edit func(*specs.Spec)) *specs.Spec {
	s := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	if edit != nil {
		edit(s)
	}
	return s
}

// A request that is not what the checkpoint was made of is refused by its field.
func TestRestoreRefuses(t *testing.T) {
	const context = "config.linux.security_context."
	bind := func(s *specs.Spec) {
		s.Mounts = []specs.Mount{{Destination: "/m", Type: "bind", Source: "/", Options: []string{"bind"}}}
	}
	user := func(uid uint32) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Process.User.UID = uid }
	}
	for _, c := range []struct {
		field     string
		was, want func(*specs.Spec)
	}{
		{"", nil, nil},
		{"", bind, bind},
		{"config.tty", func(s *specs.Spec) { s.Process.Terminal = true }, nil},
		{"config.mounts", bind, nil},
		{"config.mounts", nil, bind},
		{context + "namespace_options", nil, func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.IPCNamespace}}
		}},
		{"", func(s *specs.Spec) { s.Process.User.UID = 1 }, nil}, // the request is for root
		{context + "run_as_user", func(s *specs.Spec) { s.Process.User.UID = 1 }, user(2)},
		{context + "run_as_group", func(s *specs.Spec) { s.Process.User.UID, s.Process.User.GID = 2, 1 }, user(2)},
		{context + "supplemental_groups", func(s *specs.Spec) {
			s.Process.User.UID, s.Process.User.AdditionalGids = 2, []uint32{1}
		}, user(2)},
		{context + "capabilities", func(s *specs.Spec) {
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}
		}, nil},
		{context + "no_new_privs", nil, func(s *specs.Spec) { s.Process.NoNewPrivileges = true }},
		{context + "seccomp", nil, func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{} }},
		{context + "apparmor", nil, func(s *specs.Spec) { s.Process.ApparmorProfile = "a" }},
	} {
		o := &origin{info: &checkpoint.Info{Spec: *restored(c.was)}}
		err := o.fits(restored(c.want))
		if c.field == "" && err == nil {
			continue
		}
		if c.field == "" || !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("got %v, want one about %q", err, c.field)
		}
	}
}

// checkpointImages has one image, which says that it is a checkpoint, with a layer that is
// none.
type checkpointImages struct {
	Images
	Roots
	layer string
}

func (i checkpointImages) Hold(context.Context, string, string, string) (Image, func(), error) {
	return Image{Checkpoint: "c", Layers: []digest.Digest{"a"}}, func() {}, nil
}

func (i checkpointImages) OpenLayer(digest.Digest) (*os.File, error) { return os.Open(i.layer) }

func TestRestoreOfNoCheckpoint(t *testing.T) {
	have := checkpointImages{layer: t.TempDir()}
	m := &Manager{Options: Options{Images: have, Roots: have, RestoreImages: true}}
	cfg := &runtimeapi.ContainerConfig{Image: &runtimeapi.ImageSpec{Image: "image"}}
	const field = "config.image.image: "
	_, _, _, err := m.holdImage(t.Context(), cfg, nil, nil)
	if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), field) {
		t.Errorf("an image without the checkpoint that it says it is: %v", err)
	}
	_, _, err = m.holdBase(t.Context(), "config.image.image", checkpoint.Config{ImageRef: "image"})
	if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), field) {
		t.Errorf("a checkpoint of a checkpoint: %v", err)
	}
}
