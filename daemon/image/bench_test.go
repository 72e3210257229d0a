package image

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// fill makes a store of so many images, each with a tag and a digest, a config
// of its own and as many layers, of which no other image has any. The layers
// have names and sizes only: nobody reads them.
func fill(b testing.TB, root string, images, layers int) {
	b.Helper()
	s := &Store{o: Options{Root: root}}
	blobs := filepath.Join(root, blobsName, string(digest.Canonical))
	for _, dir := range []string{blobs, filepath.Join(root, refsName)} {
		check(b, os.MkdirAll(dir, 0o700))
	}
	put := func(mediaType string, content []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
		check(b, os.WriteFile(filepath.Join(blobs, d.Digest.Encoded()), content, 0o600))
		return d
	}
	asJSON := func(v any) []byte {
		content, err := json.Marshal(v)
		check(b, err)
		return content
	}
	for i := range images {
		img := ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
			RootFS:   ocispec.RootFS{Type: "layers"},
			Config:   ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}},
		}
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
		for n := range layers {
			m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayerGzip, fmt.Append(nil, i, "-", n)))
			img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, digest.FromString(fmt.Sprint("diff", i, "-", n)))
		}
		m.Config = put(ocispec.MediaTypeImageConfig, asJSON(img))
		target := put(m.MediaType, asJSON(m))
		name := fmt.Sprintf("registry.test/team/app%d", i)
		for _, ref := range []string{name + ":1", name + "@" + target.Digest.String()} {
			if err := record.Write(
				s.recordPath(ref),
				refRecord{Ref: ref, Target: target, Manifest: target, PulledAt: time.Now()},
				false,
			); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func filled(b *testing.B, images, layers int) *Store {
	b.Helper()
	root := b.TempDir()
	fill(b, root, images, layers)
	s, err := Open(Options{Root: root, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	check(b, err)
	b.Cleanup(func() { s.Close() })
	if n := len(s.List()); n != images {
		b.Fatalf("%d images of %d", n, images)
	}
	return s
}

// The size is that of a large node: 200 images and 10,000 blobs.
func BenchmarkList(b *testing.B) {
	s := filled(b, 200, 48)
	for b.Loop() {
		s.List()
	}
}

func BenchmarkGet(b *testing.B) {
	s := filled(b, 200, 48)
	id := s.List()[100].ID
	for what, ref := range map[string]string{
		"name":   "registry.test/team/app100:1",
		"id":     id,
		"prefix": id[7:20],
		"none":   "registry.test/none:1",
	} {
		b.Run(what, func(b *testing.B) {
			for b.Loop() {
				if _, ok := s.Get(ref); ok == (what == "none") {
					b.Fatal(ok)
				}
			}
		})
	}
}

func BenchmarkUsage(b *testing.B) {
	s := filled(b, 200, 48)
	for b.Loop() {
		s.Usage()
	}
}

func BenchmarkStats(b *testing.B) {
	s := filled(b, 200, 48)
	for b.Loop() {
		s.Stats()
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, n := range []struct{ images, layers int }{{200, 48}, {1000, 10}} {
		b.Run(fmt.Sprintf("%dx%d", n.images, n.layers), func(b *testing.B) {
			root := b.TempDir()
			fill(b, root, n.images, n.layers)
			for b.Loop() {
				s, err := Open(Options{Root: root, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
				check(b, err)
				b.StopTimer()
				s.Close()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkCollect is one run of the collector that finds nothing to do.
func BenchmarkCollect(b *testing.B) {
	for _, n := range []struct{ images, layers int }{{200, 48}, {1000, 10}} {
		b.Run(fmt.Sprintf("%dx%d", n.images, n.layers), func(b *testing.B) {
			s := filled(b, n.images, n.layers)
			for b.Loop() {
				check(b, s.collect())
			}
		})
	}
}

// BenchmarkWants is asked for each layer when an image is removed.
func BenchmarkWants(b *testing.B) {
	s := filled(b, 1000, 10)
	none := digest.FromString("none")
	for b.Loop() {
		needed(s, none)
	}
}
