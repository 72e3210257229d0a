package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// A stream that cannot be decompressed is corrupt, and says so.
func FuzzDecompress(f *testing.F) {
	raw := layerOf(f, "file", 100, 1, types.OCIUncompressedLayer).(*testLayer).raw
	for _, typ := range []types.MediaType{types.OCIUncompressedLayer, types.OCILayer, types.OCILayerZStd} {
		f.Add(pack(f, raw, typ))
	}
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0, 0}) // a window of 3.75 TiB
	f.Fuzz(func(t *testing.T, b []byte) {
		z, err := decompress(bytes.NewReader(b))
		if err == nil {
			_, err = io.Copy(io.Discard, io.LimitReader(z, 16<<20))
			z.Close()
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("not ErrCorrupt: %v", err)
		}
	})
}

// The memory that a stream may ask for is bounded.
func TestWindow(t *testing.T) {
	for exponent, fine := range map[byte]bool{10: true, 17: true, 18: false, 31: false} {
		// A frame of one empty block; its window is 1<<(10+exponent).
		z, err := decompress(bytes.NewReader([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3, 1, 0, 0}))
		if err == nil {
			_, err = io.Copy(io.Discard, z)
			z.Close()
		}
		if fine && err != nil || !fine && !errors.Is(err, ErrCorrupt) {
			t.Errorf("a window of 1<<%d: %v", 10+exponent, err)
		}
	}
}

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// A document that is taken has nothing in it that could not be used as a path.
func FuzzDocument(f *testing.F) {
	f.Add(
		[]byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json",`+
			`"digest":"`+someDigest+`","size":2},`+
			`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",`+
			`"digest":"`+someDigest+`","size":3}]}`),
		[]byte(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["`+someDigest+`"]}}`),
	)
	f.Add(
		[]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
			`"digest":"`+someDigest+`","size":2,"platform":{"architecture":"amd64","os":"linux"}}]}`),
		[]byte(`{}`),
	)
	f.Add([]byte(`{"schemaVersion":2,"manifests":null,"config":null}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, doc, config []byte) {
		d, err := parseDocument(doc, mediaType(doc, "text/plain"))
		if err != nil {
			return
		}
		if d.index != nil {
			if c, err := choose(
				d.index,
				ocispec.Platform{OS: "linux", Architecture: "amd64"},
			); err == nil &&
				(c.Digest.Validate() != nil || c.Size < 0) {
				t.Fatalf("chose %+v", c)
			}
			return
		}
		for _, l := range append([]ocispec.Descriptor{d.manifest.Config}, d.manifest.Layers...) {
			if l.Digest.Validate() != nil || l.Size < 0 {
				t.Fatalf("took %+v", l)
			}
		}
		if c, err := parseConfig(config, d.manifest); err == nil && len(c.RootFS.DiffIDs) != len(d.manifest.Layers) {
			t.Fatalf("took %+v", c)
		}
	})
}

// The full form of a name is its own full form: records are found by it.
func FuzzReference(f *testing.F) {
	for _, s := range []string{
		"busybox",
		"a/b:c",
		"localhost:5000/x@" + someDigest,
		"[::1]:5000/a:b",
		"a:b@" + someDigest,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parse(s)
		if err != nil {
			if !errors.Is(err, ErrInvalidReference) {
				t.Fatal(err)
			}
			return
		}
		again, err := parse(n.String())
		if err != nil || again.String() != n.String() {
			t.Fatalf("%q is %q, and that %v: %v", s, n, again, err)
		}
		if (refRecord{Ref: n.String()}).tagged() == strings.Contains(s, "@") {
			t.Fatalf("%q is %q, and tagged: %v", s, n, refRecord{Ref: n.String()}.tagged())
		}
	})
}

// A store opens with any record in it, and verifies.
func FuzzRecord(f *testing.F) {
	good := refRecord{
		Ref:      "docker.io/a/b:c",
		Target:   ocispec.Descriptor{Digest: someDigest},
		Manifest: ocispec.Descriptor{Digest: someDigest},
	}
	b, err := json.Marshal(good)
	check(f, err)
	f.Add(b)
	root := "/dev/shm"
	if st, err := os.Stat(root); err != nil || !st.IsDir() {
		root = f.TempDir()
	}
	root, err = os.MkdirTemp(root, "holdfast-fuzz-")
	check(f, err)
	f.Cleanup(func() { os.RemoveAll(root) })

	// Blobs for a record that could be right.
	config := []byte(`{"os":"linux"}`)
	manifest, err := json.Marshal(ocispec.Manifest{Config: ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}})
	check(f, err)
	good.Manifest = ocispec.Descriptor{Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	for _, d := range []digest.Digest{good.Manifest.Digest, "", "sha256:", ":", "sha256:../../../x"} {
		r := good
		r.Target.Digest = d
		r.Target.Size = good.Manifest.Size
		b, err := json.Marshal(r)
		check(f, err)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		defer os.RemoveAll(root)
		var r refRecord
		if !json.Valid(body) || json.Unmarshal(body, &r) != nil {
			return // the envelope's checksum is for that
		}
		blobs := filepath.Join(root, blobsName, string(digest.Canonical))
		if err := errors.Join(
			os.MkdirAll(blobs, 0o700),
			os.MkdirAll(filepath.Join(root, refsName), 0o700),
		); err != nil {
			t.Fatal(err)
		}
		for _, b := range [][]byte{config, manifest} {
			check(t, os.WriteFile(filepath.Join(blobs, digest.FromBytes(b).Encoded()), b, 0o600))
		}
		path := (&Store{o: Options{Root: root}}).recordPath(r.Ref)
		check(t, record.Write(path, json.RawMessage(body), false))
		s := openAt(t, root)
		for _, img := range s.List() {
			if _, err := s.Remove(img.ID); err != nil {
				t.Fatal(err)
			}
			if l := slices.Concat(img.RepoTags, img.RepoDigests); len(l) == 0 {
				t.Fatal("an image without a name")
			}
		}
		s.Close()
	})
}
