package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/content/oci"
)

// variety fills a store with images of all kinds and gives the manifests'
// digests by the references that lead to them.
func variety(t testing.TB, s *Store, h *hub) map[string]string {
	t.Helper()
	layer := func(seed uint64, typ types.MediaType) v1.Layer { return layerOf(t, "file", 1000, seed, typ) }
	digestOf := func(img v1.Image) string {
		d, err := img.Digest()
		check(t, err)
		return d.String()
	}
	app := imageOf(
		t,
		"app",
		layer(1, types.OCILayer),
		layer(2, types.OCILayerZStd),
		layer(3, types.OCIUncompressedLayer),
	)
	docker := mutate.MediaType(
		mutate.ConfigMediaType(imageOf(t, "docker", layer(4, types.DockerLayer)), types.DockerConfigJSON),
		types.DockerManifestSchema2,
	)
	untagged := imageOf(t, "untagged", layer(5, types.OCILayer))
	here := imageOf(t, "here", layer(6, types.OCILayer))
	elsewhere := imageOf(t, "elsewhere", layer(7, types.OCILayer))
	index := mutate.AppendManifests(
		mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{
			Add:        elsewhere,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}},
		},
		mutate.IndexAddendum{
			Add:        here,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}},
		},
	)
	h.push(t, "team/untagged:x", untagged)
	want := map[string]string{
		h.push(t, "team/app:1", app):                    digestOf(app),
		h.push(t, "team/app:latest", app):               digestOf(app),
		h.push(t, "other/app:1", docker):                digestOf(docker),
		h.push(t, "multi:1", index):                     digestOf(here),
		h.host + "/team/untagged@" + digestOf(untagged): digestOf(untagged),
	}
	var k sink
	for ref := range want {
		mustPull(t, s, k.request(ref))
	}
	// That one has a name already.
	mustPull(t, s, k.request(h.host+"/team/app@"+digestOf(app)))
	return want
}

// The layout, as crane and oras read it.
func TestLayoutForCraneAndOras(t *testing.T) {
	s := openAt(t, t.TempDir())
	h := newHub(t)
	want := variety(t, s, h)
	look := func() {
		t.Helper()
		verify(t, s)
		got := map[string]string{}
		for _, d := range entriesOf(t, s.o.Root) {
			got[d.Annotations[ocispec.AnnotationRefName]] = d.Digest.String()
		}
		for ref, d := range want {
			if got[ref] != d {
				t.Errorf("%s is %q, want %s", ref, got[ref], d)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%v, want %v", got, want)
		}
		o, err := oci.NewFromFS(t.Context(), os.DirFS(s.o.Root))
		check(t, err)
		for ref, d := range want {
			copied, err := oras.Copy(t.Context(), o, ref, memory.New(), "", oras.DefaultCopyOptions)
			if err != nil || copied.Digest.String() != d {
				t.Errorf("oras: %s: %s, want %s: %v", ref, copied.Digest, d, err)
			}
		}
	}
	look()

	moved := imageOf(t, "moved", layerOf(t, "file", 1000, 8, types.OCILayer))
	ref := h.push(t, "team/app:1", moved)
	var k sink
	mustPull(t, s, k.request(ref))
	d, err := moved.Digest()
	check(t, err)
	want[ref] = d.String()
	look()

	gone := h.host + "/multi:1"
	if _, err := s.Remove(gone); err != nil {
		t.Fatal(err)
	}
	delete(want, gone)
	look()
}

func entriesOf(t testing.TB, root string) []ocispec.Descriptor {
	t.Helper()
	x, err := oci.NewFromFS(t.Context(), os.DirFS(root))
	check(t, err)
	var l []ocispec.Descriptor
	err = x.Tags(t.Context(), "", func(tags []string) error {
		for _, tag := range tags {
			d, err := x.Resolve(t.Context(), tag)
			if err != nil {
				return err
			}
			l = append(l, d)
		}
		return nil
	})
	check(t, err)
	return l
}

// Whoever reads while images are pulled finds every image that is named.
func TestLayoutDuringPulls(t *testing.T) {
	s := openAt(t, t.TempDir())
	h := newHub(t)
	var refs []string
	for i := range 20 {
		refs = append(
			refs,
			h.push(t, "app:"+string(rune('a'+i)), imageOf(t, "x", layerOf(t, "f", 1000, uint64(i), types.OCILayer))),
		)
	}
	pulled := make(chan error, 1)
	go func() {
		var k sink
		var err error
		for _, ref := range refs {
			_, perr := s.Pull(t.Context(), k.request(ref))
			err = errors.Join(err, perr)
		}
		pulled <- err
	}()
	reads := 0
	for done := false; !done; reads++ {
		select {
		case err := <-pulled:
			check(t, err)
			done = true
		default:
		}
		p, err := layout.FromPath(s.o.Root)
		check(t, err)
		x, err := p.ImageIndex()
		check(t, err)
		check(t, validate.Index(x, validate.Fast))
	}
	if n := len(entriesOf(t, s.o.Root)); n != len(refs) {
		t.Errorf("%d images", n)
	}
	t.Logf("read %d times", reads)
}

// The program itself, where there is one: it has a parser of its own.
func TestLayoutForSkopeo(t *testing.T) {
	program, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("needs skopeo; hack/deps.sh test installs Debian's")
	}
	s := openAt(t, t.TempDir())
	want := variety(t, s, newHub(t))
	skopeo := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), program, args...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		return string(out) + stderr.String(), err
	}
	for ref, digest := range want {
		name := "oci:" + s.o.Root + ":" + ref
		out, err := skopeo("inspect", "--format", "{{.Digest}}", name)
		if err != nil && strings.Contains(ref, "/other/") && strings.Contains(out, "no descriptor found") {
			t.Logf("this skopeo takes no manifests of Docker's own type out of a layout")
			continue
		}
		if err != nil || strings.TrimSpace(out) != digest {
			t.Errorf("inspect %s: %s, want %s: %v", ref, out, digest, err)
		}
		to := t.TempDir()
		if out, err := skopeo("--insecure-policy", "copy", "--quiet", name, "dir:"+to); err != nil {
			t.Errorf("copy %s: %v: %s", ref, err, out)
		}
		files, err := filepath.Glob(filepath.Join(to, "*"))
		if err != nil || len(files) < 4 {
			t.Errorf("copied %v: %v", files, err)
		}
	}
	if out, err := skopeo("inspect", "oci:"+s.o.Root+":none"); err == nil {
		t.Errorf("an image that is not there: %s", out)
	}
}
