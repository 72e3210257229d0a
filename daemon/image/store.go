package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/dirs"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// Names under the root; blobsName and the two files are the image layout's.
const (
	blobsName      = "blobs"
	refsName       = "refs"
	ingestName     = "ingest"
	pendingName    = "pending"
	quarantineName = "quarantine"
)

var errClosed = errors.New("the image store is closed")

// record is the truth about one reference: refs/HASH.json.
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
}

func (l *loaded) id() string { return l.manifest.Config.Digest.String() }

// Store is an image store. It is safe for concurrent use. Close ends it.
type Store struct {
	o      Options
	ctx    context.Context // of all downloads; ended by Close
	cancel context.CancelFunc
	work   sync.WaitGroup // downloads and the collector
	wake   chan struct{}  // of the collector
	count  counters
	serial atomic.Uint64 // of records about running pulls
	pinned map[string]bool

	// records is held while refs/ is changed, which waits for the disk: who lists
	// images waits for mu alone. It is taken before mu.
	records sync.Mutex

	mu        sync.Mutex
	closed    bool               // changed with records held too
	refs      map[string]*loaded // by record.Ref; the same
	images    []Image            // derived from refs by rebuild; sorted by id
	byID      map[string]int     // index into images
	byRef     map[string]int
	layers    map[digest.Digest]bool          // of images
	proven    map[digest.Digest]digest.Digest // what a layer's blob is once uncompressed
	held      map[digest.Digest]int           // blobs and layers that running calls need
	downloads map[string]*download            // by partName
	slots     map[string]chan struct{}        // by registry; see slotsOf
	running   map[*progress]struct{}
	pending   map[string]pending      // by name; see pending.go
	sizes     map[digest.Digest]int64 // of all blobs that have their names; see account
	usage     Usage                   // the sum
	outdated  error                   // why a derived file could not be written
}

// Open loads the store at o.Root, making it if needed. It fails only if an option
// makes no sense or the directories cannot be made or read: a record that cannot
// be used is quarantined. One process at a time may have a root open.
func Open(o Options) (*Store, error) {
	if o.Platform == nil {
		cpuinfo, _ := os.ReadFile("/proc/cpuinfo") // without it, the oldest
		p := machine(string(cpuinfo))
		o.Platform = &p
	}
	o.Log = cmp.Or(o.Log, slog.Default())
	o.Downloads = cmp.Or(o.Downloads, 6)
	o.ProgressTimeout = cmp.Or(o.ProgressTimeout, 5*time.Minute)
	o.MinRate = cmp.Or(o.MinRate, 1024)
	o.StaleIngest = cmp.Or(o.StaleIngest, 24*time.Hour)
	o.ProgressEvery = cmp.Or(o.ProgressEvery, time.Second)
	o.VerifierTimeout = cmp.Or(o.VerifierTimeout, 10*time.Second)
	s := &Store{
		o:         o,
		wake:      make(chan struct{}, 1),
		slots:     map[string]chan struct{}{},
		refs:      map[string]*loaded{},
		held:      map[digest.Digest]int{},
		downloads: map[string]*download{},
		running:   map[*progress]struct{}{},
		pending:   map[string]pending{},
		sizes:     map[digest.Digest]int64{},
		proven:    map[digest.Digest]digest.Digest{},
		pinned:    map[string]bool{},
	}
	for _, ref := range o.Pinned {
		name, err := parse(ref)
		if err != nil {
			return nil, fmt.Errorf("cannot pin an image: %w", err)
		}
		s.pinned[name.String()] = true
	}
	err := s.makeDirs()
	if err == nil {
		err = errors.Join(s.openProgressDir(), s.load())
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the images: %w", err)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.work.Go(s.collector)
	return s, nil
}

// makeDirs makes the directories that are missing.
func (s *Store) makeDirs() error {
	for _, name := range []string{filepath.Join(blobsName, string(digest.Canonical)), refsName, ingestName, pendingName, quarantineName} {
		moved, err := dirs.Make(s.o.Root, name)
		if moved != "" {
			s.o.Log.Error("a file was in the place of a directory of the images", "directory", name, "moved", moved)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Close cancels what runs and waits for it.
func (s *Store) Close() error {
	s.records.Lock()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.records.Unlock()
	s.cancel()
	s.work.Wait()
	return nil
}

func (s *Store) load() error {
	for _, name := range []string{ocispec.ImageIndexFile, ocispec.ImageLayoutFile, removalName} {
		s.removeUnfinished(".", "."+name+".")
	}
	s.removeUnfinished(ingestName, smallPrefix)
	files, err := os.ReadDir(filepath.Join(s.o.Root, refsName))
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(s.o.Root, refsName, f.Name())
		if strings.HasPrefix(f.Name(), ".") {
			os.RemoveAll(path) // of a record that was being written
			continue
		}
		l, err := s.loadRecord(path)
		if err != nil {
			s.quarantine(path, err)
			continue
		}
		s.refs[l.Ref] = l
	}
	s.finishRemoval()
	s.loadPending()
	if err := s.measure(); err != nil {
		return err
	}
	s.rebuild()
	return nil
}

// removeUnfinished removes what was being written below such names. No pattern, as
// Root may have any characters.
func (s *Store) removeUnfinished(dir, prefix string) {
	files, _ := os.ReadDir(filepath.Join(s.o.Root, dir))
	for _, f := range files {
		if strings.HasPrefix(f.Name(), prefix) {
			os.RemoveAll(filepath.Join(s.o.Root, dir, f.Name()))
		}
	}
}

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
	b, err := s.readBlob(r.Manifest, maxManifest)
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
	l := &loaded{refRecord: r, manifest: doc.manifest, blobs: blobsOf(r.Target.Digest, r.Manifest.Digest, doc.manifest)}
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

// dropKept lets go of layers that were kept when the setting was another. It is
// the collector's: a full disk, for one, is no reason not to start.
func (s *Store) dropKept() error {
	if !s.o.DropLayers {
		return nil
	}
	s.records.Lock()
	defer s.records.Unlock()
	for ref, l := range s.refs {
		if l.LayersDropped {
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
		s.mu.Lock()
		s.refs[ref] = fresh
		s.mu.Unlock()
	}
	return nil
}

// quarantine takes a record away so that it can be looked at, and never harms.
func (s *Store) quarantine(path string, cause error) {
	to := filepath.Join(s.o.Root, quarantineName, fmt.Sprintf("%s.%d", filepath.Base(path), time.Now().UnixNano()))
	if err := os.Rename(path, to); err != nil {
		cause = fmt.Errorf("%w; and it stays where it is: %w", cause, err)
	}
	s.o.Log.Error("image reference quarantined, the image has to be pulled again", "record", path, "moved", to, "error", cause)
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
	s.records.Lock()
	defer s.records.Unlock()
	if s.closed {
		return Image{}, errClosed
	}
	fresh, err := s.writeRecords(names, refRecord{Target: target, Manifest: manifest, PulledAt: time.Now().UTC(), LayersDropped: s.o.DropLayers})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range fresh {
		s.refs[l.Ref] = l
	}
	s.rebuild() // also after an error: what has a record is listed, and can be removed
	if err != nil {
		return Image{}, err
	}
	for _, ref := range names { // are whole, and need nothing that an earlier pull left
		if p, ok := s.pending[ref]; ok && p.pulls == 0 {
			s.dropPending(ref)
		}
	}
	return s.images[s.byRef[names[len(names)-1]]], nil
}

// writeRecords puts a record of an image under each name, and gives those that
// were not there yet. Where it fails, the names mean what they did before: it
// gives those that could not be restored. records is held.
func (s *Store) writeRecords(names []string, r refRecord) (fresh []*loaded, err error) {
	img, err := s.loadBlobs(r)
	if err != nil {
		return nil, err
	}
	for _, ref := range names {
		l := *img
		l.Ref = ref
		if old := s.refs[ref]; old != nil && old.Target.Digest == r.Target.Digest && old.Manifest.Digest == r.Manifest.Digest && old.LayersDropped == r.LayersDropped {
			var there refRecord
			if err := record.Read(s.recordPath(ref), &there); err == nil {
				continue
			} // it was damaged behind our back
		}
		if st, err := os.Lstat(s.recordPath(ref)); err == nil && !st.Mode().IsRegular() {
			s.quarantine(s.recordPath(ref), errors.New("it is not a file")) // a rename would not replace it
		}
		if err := record.Write(s.recordPath(ref), l.refRecord, true); err != nil {
			s.restore(ref)
			return slices.DeleteFunc(fresh, func(l *loaded) bool { return s.restore(l.Ref) }), err
		}
		fresh = append(fresh, &l)
	}
	return fresh, nil
}

// restore makes a record what it was before a write that failed: it may be in
// place already, and only its name not on the disk. records is held.
func (s *Store) restore(ref string) bool {
	path := s.recordPath(ref)
	var err error
	if old := s.refs[ref]; old != nil {
		err = record.Write(path, old.refRecord, false)
	} else if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		s.o.Log.Error("cannot restore the record of an image reference, it may be another one after a restart", "record", path, "error", err)
	}
	return err == nil
}

// rebuild derives the images and index.json from the records. mu is held.
func (s *Store) rebuild() {
	byID := map[string][]*loaded{}
	for _, l := range s.refs {
		byID[l.id()] = append(byID[l.id()], l)
	}
	s.images = make([]Image, 0, len(byID))
	s.byID, s.byRef, s.layers = map[string]int{}, map[string]int{}, map[digest.Digest]bool{}
	s.proven = map[digest.Digest]digest.Digest{}
	for id, refs := range byID {
		slices.SortFunc(refs, func(a, b *loaded) int { return strings.Compare(a.Ref, b.Ref) })
		c := refs[0].config
		img := Image{ID: id, Config: c.Config, Platform: c.Platform, DiffIDs: c.RootFS.DiffIDs, Size: uint64(refs[0].manifest.Config.Size)}
		if c.Created != nil {
			img.Created = *c.Created
		}
		for _, d := range refs[0].manifest.Layers {
			img.Size += uint64(d.Size)
		}
		for _, l := range refs {
			for i, d := range l.manifest.Layers {
				s.proven[d.Digest] = l.config.RootFS.DiffIDs[i]
			}
		}
		for _, l := range refs {
			if l.tagged() {
				img.RepoTags = append(img.RepoTags, l.Ref)
			} else {
				img.RepoDigests = append(img.RepoDigests, l.Ref)
			}
			img.Pinned = img.Pinned || s.pinned[l.Ref]
		}
		s.images = append(s.images, img)
	}
	slices.SortFunc(s.images, func(a, b Image) int { return strings.Compare(a.ID, b.ID) })
	for i, img := range s.images {
		s.byID[img.ID] = i
		for _, d := range img.DiffIDs {
			s.layers[d] = true
		}
		for _, l := range byID[img.ID] {
			s.byRef[l.Ref] = i
		}
	}
	s.writeIndex()
}

// nameOfImage is the annotation by which archives tell containerd and Docker a
// full name; ocispec.AnnotationRefName is the one of image layouts.
const nameOfImage = "io.containerd.image.name"

// writeIndex writes index.json for tools that read image layouts: an entry for
// each reference, but a digest only where no tag leads to the image. It names
// the manifests of this platform, as the others of an index are not here, and
// tools stumble over what is missing.
func (s *Store) writeIndex() {
	x := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
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
	s.derive(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	s.derive(ocispec.ImageIndexFile, x)
}

// refreshIndex is the collector's: it tries again what could not be written. mu
// is held.
func (s *Store) refreshIndex() error {
	if s.outdated != nil {
		s.writeIndex()
	}
	return s.outdated
}

// derive writes a derived file atomically, if it differs. It is not synced:
// Open writes it again. Nothing here reads it, so a failure, of a full disk for
// one, is said and stops neither a start nor the removal of an image.
func (s *Store) derive(name string, v any) {
	path := filepath.Join(s.o.Root, name)
	b, err := json.Marshal(v)
	if err == nil {
		err = replace(path, b)
	}
	if err != nil {
		s.o.Log.Warn("a file for tools that read image layouts is out of date, trying again", "path", path, "error", err)
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

// List gives all images, sorted by id.
func (s *Store) List() []Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.images)
}

// Get finds an image by "name", "name:tag", "name@digest", "sha256:id", the id
// alone, or an unambiguous prefix of it. A name wins over a prefix.
func (s *Store) Get(ref string) (Image, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.find(ref)
	if !ok {
		return Image{}, false
	}
	return s.images[i], true
}

// Spec reads the config of an image, for what Image has not.
func (s *Store) Spec(img Image) (c Spec, err error) {
	b, err := s.readBlob(ocispec.Descriptor{Digest: digest.Digest(img.ID)}, maxConfig)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	return c, err
}

// find is Get with mu held; it gives an index into images.
func (s *Store) find(ref string) (int, bool) {
	if i, ok := s.byID[ref]; ok {
		return i, true
	}
	if !strings.HasPrefix(ref, "sha256:") {
		if n, err := parse(ref); err == nil {
			if i, ok := s.byRef[n.String()]; ok {
				return i, true
			}
		}
		ref = "sha256:" + ref
	}
	if len(ref) == len("sha256:") {
		return 0, false
	}
	match := func(img Image) bool { return strings.HasPrefix(img.ID, ref) }
	i := slices.IndexFunc(s.images, match)
	if i < 0 || slices.ContainsFunc(s.images[i+1:], match) {
		return 0, false
	}
	return i, true
}

// Remove removes an image, found as by Get, with all its references. It returns
// the diff ids that no other image of the store has and no running pull wants.
// Removing what is not there is no error.
func (s *Store) Remove(ref string) ([]digest.Digest, error) {
	s.records.Lock()
	defer s.records.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.find(ref)
	if !ok {
		return nil, nil
	}
	img := s.images[i]
	err := s.removeRefs(img)
	s.rebuild()
	if err != nil {
		return nil, fmt.Errorf("cannot remove image %s: %w", img.ID, err)
	}
	s.o.Log.Info("image removed", "id", img.ID, "tags", img.RepoTags)
	var free []digest.Digest
	for _, d := range img.DiffIDs {
		if !s.wants(d) && !slices.Contains(free, d) {
			free = append(free, d)
		}
	}
	return free, nil
}

// Wants says whether an image of the store, or a running pull, has this layer.
func (s *Store) Wants(diffID digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wants(diffID)
}

// IfUnwanted calls f if nothing wants the layer, and has whoever is about to
// want it wait for f, which may not call the store.
func (s *Store) IfUnwanted(diffID digest.Digest, f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wants(diffID) {
		return nil
	}
	return f()
}

// ifUnneeded calls f if no image, pull or holder needs the layer, and has those
// that are about to hold it wait for f.
func (s *Store) ifUnneeded(diffID digest.Digest, f func() error) error {
	return s.IfUnwanted(diffID, f)
}

// background runs f, which ends with s.ctx. Close waits for it.
func (s *Store) background(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.work.Go(f)
	}
}

func (s *Store) wants(diffID digest.Digest) bool {
	return s.held[diffID] > 0 || s.layers[diffID]
}

// isProven says whether a layer's blob is known to be this once uncompressed: it
// was when it was unpacked, or an image says so that was pulled before.
func (s *Store) isProven(blob, diffID digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proven[blob] == diffID
}

func (s *Store) proves(blob, diffID digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven[blob] = diffID
}

// inRepository says whether a blob has come from the same repository.
func (s *Store) inRepository(name reference.Named, d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broughtBy(name.Name())[d]
}

// broughtBy gives what is known to have come from a repository. mu is held.
func (s *Store) broughtBy(repository string) map[digest.Digest]bool {
	known := map[digest.Digest]bool{}
	add := func(ref string, l []digest.Digest) {
		if rest, ok := strings.CutPrefix(ref, repository); ok && (rest[0] == ':' || rest[0] == '@') {
			for _, d := range l {
				known[d] = true
			}
		}
	}
	for ref, l := range s.refs {
		add(ref, l.blobs)
	}
	for ref, p := range s.pending {
		add(ref, p.Had)
	}
	return known
}

// Usage is cheap: it is kept up to date, not computed.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage
}

// hold keeps blobs and layers from being collected until release.
func (s *Store) hold(l []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range l {
		s.held[d]++
	}
}

func (s *Store) release(l []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range l {
		if s.held[d]--; s.held[d] == 0 {
			delete(s.held, d)
		}
	}
	if len(l) > 0 {
		s.kick() // a pull that failed leaves blobs that nothing names
	}
}

// holdImage finds an image and holds all of it.
func (s *Store) holdImage(ref string) (img Image, m *ocispec.Manifest, held []digest.Digest, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.find(ref)
	if !ok {
		return img, nil, nil, ErrNotFound
	}
	img = s.images[i]
	l := s.refs[slices.Concat(img.RepoDigests, img.RepoTags)[0]]
	held = slices.Concat(blobsOf(l.Target.Digest, l.Manifest.Digest, l.manifest), img.DiffIDs)
	for _, d := range held {
		s.held[d]++
	}
	return img, l.manifest, held, nil
}

// readBlob reads a small blob of the store and verifies it.
func (s *Store) readBlob(d ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	path := s.blobPath(d.Digest)
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: blob %s is not a file", ErrCorrupt, d.Digest) // a FIFO would block the open
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read a blob: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("cannot read a blob: %w", err)
	}
	if d.Digest.Algorithm().FromBytes(b) != d.Digest {
		return nil, fmt.Errorf("%w: blob %s has another content", ErrCorrupt, d.Digest)
	}
	return b, nil
}
