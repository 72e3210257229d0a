package image

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// parse turns a name as users write it into its full form: with a registry, a
// repository, and a tag or a digest. A tag beside a digest means nothing.
func parse(ref string) (reference.Named, error) {
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrInvalidReference, ref, err)
	}
	return n, nil
}

// Repository gives the full name of the repository in a name as users write it; empty: it is no
// name of an image.
func Repository(ref string) string {
	n, err := parse(ref)
	if err != nil {
		return ""
	}
	return n.Name()
}

// refRecord is the truth about one reference: refs/HASH.json.
type refRecord struct {
	Ref string `json:"ref"` // name:tag or name@digest, in full
	// Target is what the registry has under the name; Manifest is the one of
	// this platform. They are the same if the target is no index.
	Target   ocispec.Descriptor `json:"target"`
	Manifest ocispec.Descriptor `json:"manifest"`
	PulledAt time.Time          `json:"pulledAt"`
	// LayersDropped says that the blobs of the layers are not kept.
	LayersDropped bool `json:"layersDropped,omitempty"`
}

// tagged says whether it is name:tag.
func (r refRecord) tagged() bool { return !strings.Contains(r.Ref, "@") }

// loaded is a record with what its blobs say.
type loaded struct {
	refRecord
	manifest *ocispec.Manifest
	config   ocispec.Image
	blobs    []digest.Digest // all that the reference needs
	synced   bool            // its name is on the disk: not known of one that was found at the start
}

func (l *loaded) id() string { return l.manifest.Config.Digest.String() }

func (s *Store) loadRecord(path string) (*loaded, error) {
	var r refRecord
	if err := record.Read(path, &r); err != nil {
		return nil, err
	}
	if want := s.recordPath(r.Ref); path != want {
		return nil, fmt.Errorf("the record of %s belongs at %s", r.Ref, want)
	}
	if name, err := parse(r.Ref); err != nil || name.String() != r.Ref {
		return nil, fmt.Errorf("%w: %q is no full name", ErrCorrupt, r.Ref)
	}
	return s.loadBlobs(r)
}

// loadBlobs reads what a record points to and checks that all of it is there.
func (s *Store) loadBlobs(r refRecord) (*loaded, error) {
	if err := checkDescriptor(r.Target); err != nil {
		return nil, err
	}
	b, err := s.readBlob(r.Manifest, registry.MaxManifest)
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(b, r.Manifest.MediaType)
	if err != nil {
		return nil, err
	}
	if doc.manifest == nil {
		return nil, fmt.Errorf("%w: %s is an index", ErrCorrupt, r.Manifest.Digest)
	}
	l := &loaded{refRecord: r, manifest: doc.manifest}
	l.blobs = blobsOf(r.Target.Digest, r.Manifest.Digest, doc.manifest)
	if b, err = s.readBlob(l.manifest.Config, maxConfig); err != nil {
		return nil, err
	}
	if l.config, err = parseConfig(b, l.manifest); err != nil {
		return nil, err
	}
	needed := append([]ocispec.Descriptor{r.Target}, l.manifest.Layers...)
	if r.LayersDropped {
		needed = needed[:1]
		l.blobs = blobsOf(r.Target.Digest, r.Manifest.Digest, &ocispec.Manifest{Config: l.manifest.Config})
	}
	for _, d := range needed {
		if !s.hasBlob(d) {
			return nil, fmt.Errorf("%w: blob %s is missing or has another size", ErrCorrupt, d.Digest)
		}
	}
	return l, nil
}

// dropKeptLocked lets go of layers that were kept when the setting was another. The
// collector calls it, not Open: a full disk is no reason not to start.
func (s *Store) dropKeptLocked() error {
	for ref, l := range s.refs {
		if l.LayersDropped || !s.o.DropLayers {
			continue
		}
		r := l.refRecord
		r.LayersDropped = true
		fresh, err := s.loadBlobs(r)
		if err != nil {
			return err
		}
		// On the disk before a blob goes, or the record would miss it.
		if err := record.Write(s.recordPath(ref), r, true); err != nil {
			return err
		}
		s.refs[ref] = fresh
	}
	return nil
}

// quarantine takes a record away so that it can be looked at, and never harms.
func (s *Store) quarantine(path string, cause error) {
	name := fmt.Sprintf("%s.%d", filepath.Base(path), time.Now().UnixNano())
	to := filepath.Join(s.o.Root, quarantineName, name)
	if err := os.Rename(path, to); err != nil {
		cause = fmt.Errorf("%w; and it stays where it is: %w", cause, err)
	}
	s.o.Log.Error("image reference quarantined, the image has to be pulled again",
		"record", path, "moved", to, "error", cause)
}

func (s *Store) recordPath(ref string) string {
	return filepath.Join(s.o.Root, refsName, fileName(ref))
}

// fileName is of the records about a reference, which may be longer than a name.
func fileName(ref string) string { return digest.FromString(ref).Encoded() + ".json" }

// commit makes a reference point to an image whose blobs are all on the disk.
// The digest goes first, so that a tag that moved never leaves an image that
// has no name at all.
func (s *Store) commit(name reference.Named, target, manifest ocispec.Descriptor) (Image, error) {
	names := []string{reference.TrimNamed(name).Name() + "@" + target.Digest.String()}
	if t, ok := name.(reference.Tagged); ok {
		names = append(names, reference.TrimNamed(name).Name()+":"+t.Tag())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return Image{}, errClosed
	}
	err := s.writeRecordsLocked(names, refRecord{
		Target:        target,
		Manifest:      manifest,
		PulledAt:      time.Now().UTC(),
		LayersDropped: s.o.DropLayers,
	})
	s.publishLocked() // also after an error: what has a record is listed, and can be removed
	if err != nil {
		return Image{}, err
	}
	for _, ref := range names { // are whole, and need nothing that an earlier pull left
		os.Remove(s.pendingPath(ref))
	}
	img, _ := s.Get(names[len(names)-1])
	return img, nil
}

// writeRecordsLocked puts a record of an image under each name that has none
// like it yet. Where it fails, there are no new names; an old one may mean the new
// image, whose blobs are all here.
func (s *Store) writeRecordsLocked(names []string, r refRecord) error {
	img, err := s.loadBlobs(r)
	if err != nil {
		return err
	}
	var added []string
	unsynced := false
	for _, ref := range names {
		l, path := *img, s.recordPath(ref)
		l.Ref = ref
		if s.refs[ref].means(r) && record.Read(path, &refRecord{}) == nil { // else it was damaged behind our back
			unsynced = unsynced || !s.refs[ref].synced
			continue
		}
		if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
			s.quarantine(path, errors.New("it is not a file")) // a rename would not replace it
		}
		if s.refs[ref] == nil {
			added = append(added, ref)
		}
		if err := record.Write(path, l.refRecord, true); err != nil {
			for _, ref := range added {
				os.Remove(s.recordPath(ref))
				delete(s.refs, ref)
			}
			return err
		}
		l.synced = true
		s.refs[ref] = &l
	}
	if !unsynced || len(added) > 0 { // a record that is written takes along the names beside it
		return nil
	}
	if err := record.SyncDir(filepath.Join(s.o.Root, refsName)); err != nil {
		return err
	}
	for _, ref := range names {
		s.refs[ref].synced = true
	}
	return nil
}

// means says whether l is what a record says. l may be nil.
func (l *loaded) means(r refRecord) bool {
	return l != nil && l.Target.Digest == r.Target.Digest && l.Manifest.Digest == r.Manifest.Digest &&
		l.LayersDropped == r.LayersDropped
}

// publishLocked derives from the records what is read of them: the view, what
// layers are of use, and index.json.
func (s *Store) publishLocked() {
	byID := map[string][]*loaded{}
	for _, l := range s.refs {
		byID[l.id()] = append(byID[l.id()], l)
	}
	v := &view{images: make([]Image, 0, len(byID)), byID: map[string]int{}, byRef: map[string]int{}}
	s.layers, s.proven = map[digest.Digest]bool{}, map[digest.Digest]digest.Digest{}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		refs := byID[id]
		slices.SortFunc(refs, func(a, b *loaded) int { return strings.Compare(a.Ref, b.Ref) })
		v.byID[id] = len(v.images)
		for _, l := range refs {
			v.byRef[l.Ref] = len(v.images)
			for i, d := range l.manifest.Layers {
				s.layers[l.config.RootFS.DiffIDs[i]] = true
				s.proven[d.Digest] = l.config.RootFS.DiffIDs[i]
			}
		}
		v.images = append(v.images, s.imageOf(refs))
	}
	s.view.Store(v)
	s.writeIndexLocked()
}

// imageOf makes one image of the references that have the same config.
func (s *Store) imageOf(refs []*loaded) Image {
	c, m := refs[0].config, refs[0].manifest
	img := Image{
		ID:       refs[0].id(),
		Size:     uint64(m.Config.Size),
		Config:   c.Config,
		Platform: c.Platform,
		DiffIDs:  c.RootFS.DiffIDs,

		Annotations: m.Annotations,
	}
	if c.Created != nil {
		img.Created = *c.Created
	}
	for _, d := range m.Layers {
		img.Size += uint64(d.Size)
	}
	for _, l := range refs {
		if l.tagged() {
			img.RepoTags = append(img.RepoTags, l.Ref)
		} else {
			img.RepoDigests = append(img.RepoDigests, l.Ref)
		}
		img.Pinned = img.Pinned || s.pinned[l.Ref]
	}
	return img
}

// target is what a name stands for in the store.
func (s *Store) target(name reference.Named) (ocispec.Descriptor, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.refs[name.String()]
	if !ok {
		return ocispec.Descriptor{}, false
	}
	return l.Target, true
}

// holdImage finds an image and holds all of it.
func (s *Store) holdImage(ref string) (img Image, m *ocispec.Manifest, held []digest.Digest, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img, ok := s.Get(ref)
	if !ok {
		return img, nil, nil, ErrNotFound
	}
	l := s.refs[slices.Concat(img.RepoDigests, img.RepoTags)[0]]
	held = slices.Concat(blobsOf(l.Target.Digest, l.Manifest.Digest, l.manifest), img.DiffIDs)
	s.hold(held)
	return img, l.manifest, held, nil
}
