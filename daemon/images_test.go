package daemon

import (
	"testing"

	"github.com/holdfast-cri/holdfast/daemon/image"
)

// A kubelet creates a container by the image's id, and says what the user wrote: users look for
// that repository in the status of their pods.
func TestDigestReference(t *testing.T) {
	const digest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	img := image.Image{
		ID:          "sha256:id",
		RepoDigests: []string{"docker.io/library/app" + digest, "mirror.test:5000/team/app" + digest},
	}
	for named, want := range map[string]string{
		"mirror.test:5000/team/app":            img.RepoDigests[1],
		"mirror.test:5000/team/app:1":          img.RepoDigests[1],
		"mirror.test:5000/team/app:1" + digest: img.RepoDigests[1],
		"app":                                  img.RepoDigests[0],
		"mirror.test:5000/team/ap":             img.RepoDigests[0],
		img.ID:                                 img.RepoDigests[0],
		"/an/archive.tar":                      img.RepoDigests[0],
		"":                                     img.RepoDigests[0],
	} {
		if got := digestReference(img, named); got != want {
			t.Errorf("%q: got %s, want %s", named, got, want)
		}
	}
	if got := digestReference(image.Image{ID: "sha256:id"}, "app"); got != "sha256:id" {
		t.Errorf("without a digest it is %s", got)
	}
}
