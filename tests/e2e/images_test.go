package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// An image has one id everywhere, survives a restart, and leaves nothing when
// it is removed.
func TestImages(t *testing.T) {
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"data/": "", "data/file": "hello"})
	check(t, err)
	const ref = "registry.test/tests/data:1"
	digest, err := n.Registry.Push(ref, ocispec.ImageConfig{User: "7:8"}, layer)
	check(t, err)
	ctx, cancel := harness.Deadline()
	defer cancel()
	if i := imageOf(t, n, ref); i != nil {
		t.Errorf("an image that was never pulled is there: %v", i)
	}
	id := n.Pull(ref)
	byDigest := "registry.test/tests/data@" + digest.String()
	if again := n.Pull(byDigest); again != id {
		t.Errorf("the same image has the ids %s and %s", id, again)
	}
	n.Restart()
	for _, name := range []string{ref, byDigest, id} {
		i := imageOf(t, n, name)
		if i == nil || i.Id != id {
			t.Fatalf("ImageStatus of %s gives %v, want id %s", name, i, id)
		}
		if !strings.Contains(strings.Join(i.RepoTags, " "), ref) ||
			!strings.Contains(strings.Join(i.RepoDigests, " "), digest.String()) {
			t.Errorf("the image is known as %v and %v", i.RepoTags, i.RepoDigests)
		}
		if i.Uid.GetValue() != 7 || i.Size == 0 {
			t.Errorf("the image has the user %v and %d bytes", i.Uid, i.Size)
		}
	}

	box := imageOf(t, n, harness.Image)
	pod := n.RunPod("images")
	c := pod.Run("box", []string{"sleep", "1000"})
	if s := c.Status(); s.ImageId != box.Id || s.GetImage().GetImage() != harness.Image {
		t.Errorf("the container says image %q, id %s; want %s, %s", s.GetImage().GetImage(), s.ImageId, harness.Image,
			box.Id)
	}

	r, err := n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	check(t, err)
	for _, f := range r.ImageFilesystems {
		if _, err := os.Stat(f.GetFsId().GetMountpoint()); err != nil || f.GetUsedBytes().GetValue() == 0 {
			t.Errorf("the image file system is %v: %v", f, err)
		}
	}
	if len(r.ImageFilesystems) == 0 {
		t.Error("there is no image file system")
	}

	if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	if i := imageOf(t, n, byDigest); i != nil {
		t.Errorf("a removed image is still there: %v", i)
	}
	pod.Remove()
	n.CheckClean()
}

// Pulls that fail say why in the way that the kubelet looks at, and images are
// told about in the way that its tools do.
func TestImageErrors(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	ctx, cancel := harness.Deadline()
	defer cancel()
	for host, text := range map[string]string{"down.test": "server = \"http://127.0.0.1:1\"\n",
		"broken.test": "server = 5\n"} {
		dir := n.Path("certs.d/" + host)
		check(t, errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(dir+"/hosts.toml", []byte(text), 0o644)))
	}
	for _, c := range []struct {
		ref  string
		code codes.Code
		text string // the begin of the message
	}{
		{"", codes.InvalidArgument, "image.image: "},
		{"a/UPPER", codes.InvalidArgument, "image.image: "},
		{"registry.test/x:" + strings.Repeat("t", 129), codes.InvalidArgument, "image.image: "},
		{"registry.test/x@sha256:short", codes.InvalidArgument, "image.image: "},
		{strings.Repeat("0", 64), codes.InvalidArgument, "image.image: "},
		{"registry.test/x:" + strings.Repeat("t", 5000), codes.InvalidArgument, "image.image: "},
		{"registry.test/tests/nothing:1", codes.NotFound, "image.image: "},
		// The kubelet sees a name at the begin only with this code.
		{"down.test/x:1", codes.Unknown, "RegistryUnavailable: "},
		{"broken.test/x:1", codes.Unknown, "image.image: "},
	} {
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: c.ref}})
		if s := status.Convert(err); s.Code() != c.code || !strings.HasPrefix(s.Message(), c.text) {
			t.Errorf("%.50q: %v", c.ref, err)
		}
	}
	for _, ref := range []string{"registry.test/none:1", "not valid!", "sha256:" + strings.Repeat("0", 64), "abc"} {
		if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
			t.Errorf("remove %s: %v", ref, err)
		}
		r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil || r.Image != nil {
			t.Errorf("status of %s: %v %v", ref, r, err)
		}
		filter := &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}
		list, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{Filter: filter})
		if err != nil || len(list.Images) != 0 {
			t.Errorf("list of %s: %v %v", ref, list, err)
		}
	}
	r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: harness.Image},
		Verbose: true})
	check(t, err)
	var info struct {
		ChainID   string        `json:"chainID"`
		ImageSpec ocispec.Image `json:"imageSpec"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || len(info.ImageSpec.RootFS.DiffIDs) != 1 ||
		info.ChainID != info.ImageSpec.RootFS.DiffIDs[0].String() || info.ImageSpec.Config.Cmd[0] != "sh" ||
		info.ImageSpec.OS != "linux" {
		t.Errorf("info %v: %v", r.Info, err)
	}
	for name, user := range map[string]string{"named": "app:staff", "root": "", "zero": "0"} {
		ref := "registry.test/tests/" + name + ":1"
		if _, err := n.Registry.Push(ref, ocispec.ImageConfig{User: user}); err != nil {
			t.Fatal(err)
		}
		n.Pull(ref)
		r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil || r.Image == nil {
			t.Fatal(r, err)
		}
		if i := r.Image; i.Username != strings.TrimSuffix(user, ":staff") && user != "0" ||
			(i.Uid != nil) != (user == "0") {
			t.Errorf("%s: user %q, uid %v", name, i.Username, i.Uid)
		}
	}
}
