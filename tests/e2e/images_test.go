package e2e

import (
	"os"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// An image has one id everywhere, survives a restart, and leaves nothing when
// it is removed.
func TestImages(t *testing.T) {
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"data/": "", "data/file": "hello"})
	if err != nil {
		t.Fatal(err)
	}
	const ref = "registry.test/tests/data:1"
	digest, err := n.Registry.Push(ref, ocispec.ImageConfig{User: "7:8"}, layer)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	image := func(ref string) *cri.Image {
		t.Helper()
		r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Image
	}
	if i := image(ref); i != nil {
		t.Errorf("an image that was never pulled is there: %v", i)
	}
	id := n.Pull(ref)
	byDigest := "registry.test/tests/data@" + digest.String()
	if again := n.Pull(byDigest); again != id {
		t.Errorf("the same image has the ids %s and %s", id, again)
	}
	n.Restart()
	for _, name := range []string{ref, byDigest, id} {
		i := image(name)
		if i == nil || i.Id != id {
			t.Fatalf("ImageStatus of %s gives %v, want id %s", name, i, id)
		}
		if !strings.Contains(strings.Join(i.RepoTags, " "), ref) || !strings.Contains(strings.Join(i.RepoDigests, " "), digest.String()) {
			t.Errorf("the image is known as %v and %v", i.RepoTags, i.RepoDigests)
		}
		if i.Uid.GetValue() != 7 || i.Size == 0 {
			t.Errorf("the image has the user %v and %d bytes", i.Uid, i.Size)
		}
	}

	box := image(harness.Image)
	pod := n.RunPod("images")
	c := pod.Run("box", []string{"sleep", "1000"})
	if s := c.Status(); s.ImageId != box.Id || s.GetImage().GetImage() != harness.Image {
		t.Errorf("the container says image %q, id %s; want %s, %s", s.GetImage().GetImage(), s.ImageId, harness.Image, box.Id)
	}

	r, err := n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
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
	if i := image(byDigest); i != nil {
		t.Errorf("a removed image is still there: %v", i)
	}
	pod.Remove()
	n.CheckClean()
}
