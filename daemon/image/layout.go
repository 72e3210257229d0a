package image

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// nameOfImage is the annotation by which archives tell containerd and Docker a
// full name; ocispec.AnnotationRefName is the one of image layouts.
const nameOfImage = "io.containerd.image.name"

// writeIndexLocked writes index.json for tools that read image layouts: an entry for
// each reference, but a digest only where no tag leads to the image. It names
// the manifests of this platform, as the others of an index are not here, and
// tools stumble over what is missing.
func (s *Store) writeIndexLocked() {
	x := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{}, // not null
	}
	hasTag := map[digest.Digest]bool{}
	for _, l := range s.refs {
		if l.tagged() {
			hasTag[l.Manifest.Digest] = true
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(s.refs)) {
		l := s.refs[ref]
		if l.tagged() || !hasTag[l.Manifest.Digest] {
			d := l.Manifest
			d.Annotations = map[string]string{ocispec.AnnotationRefName: ref, nameOfImage: ref}
			x.Manifests = append(x.Manifests, d)
		}
	}
	s.outdated = nil
	s.deriveLocked(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	s.deriveLocked(ocispec.ImageIndexFile, x)
}

// refreshIndexLocked is the collector's: it tries again what could not be written.
func (s *Store) refreshIndexLocked() error {
	if s.outdated != nil {
		s.writeIndexLocked()
	}
	return s.outdated
}

// deriveLocked writes a derived file atomically, if it differs. It is not synced:
// Open writes it again. Nothing here reads it, so a failure, as on a full disk,
// is logged, and stops neither a start nor the removal of an image.
func (s *Store) deriveLocked(name string, v any) {
	path := filepath.Join(s.o.Root, name)
	b, err := json.Marshal(v)
	if err == nil {
		err = replace(path, b)
	}
	if err != nil {
		s.o.Log.Warn("a file for tools that read image layouts is out of date, trying again",
			"path", path, "error", err)
		s.outdated = err
	}
}

func replace(path string, b []byte) error {
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		if err := os.RemoveAll(path); err != nil { // a rename would not replace a directory
			return err
		}
	}
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	return record.ReplaceFile(path, b, 0o644, false)
}
