package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/dirs"
	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Names under the root; blobsName and the two files are the image layout's.
const (
	blobsName      = "blobs"
	refsName       = "refs"
	ingestName     = "ingest"
	pendingName    = "pending"
	quarantineName = "quarantine"
)

var errClosed = kind.Errorf(kind.Closing, "the image store is closed")

// Store is an image store. It is safe for concurrent use. Close ends it.
//
// Readers take no lock that is held over disk operations: List, Get, Usage and
// Stats answer from view and from counters. Calls that change something wait for
// mu, and thereby for each other's disk operations.
type Store struct {
	o        Options
	registry registry.Config
	ctx      context.Context // of all downloads; ended by Close
	cancel   context.CancelFunc
	work     sync.WaitGroup // downloads and the collector
	wake     chan struct{}  // of the collector
	pinned   map[string]bool

	count   counters
	view    atomic.Pointer[view] // replaced by publishLocked
	running pulls
	holds   holds // its lock is taken after mu

	mu        sync.Mutex // held over disk operations
	closed    bool
	refs      map[string]*loaded              // by refRecord.Ref; the same as refs/
	layers    map[digest.Digest]bool          // of images
	proven    map[digest.Digest]digest.Digest // what a layer's blob is once uncompressed
	downloads map[string]*download            // by partName
	slots     map[string]chan struct{}        // by registry; see slotsLocked
	sizes     map[digest.Digest]int64         // of all blobs that have their names
	outdated  error                           // why a derived file could not be written
}

// view is what there is to read of the images. It is never changed.
type view struct {
	images []Image        // sorted by id
	byID   map[string]int // index into images
	byRef  map[string]int
}

// holds counts the running calls that need a blob or a layer, so that nothing
// collects it meanwhile.
type holds struct {
	mu sync.Mutex
	n  map[digest.Digest]int
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
	o.Downloads = cmp.Or(o.Downloads, 6)
	o.ProgressTimeout = cmp.Or(o.ProgressTimeout, 5*time.Minute)
	o.MinRate = cmp.Or(o.MinRate, 1024)
	o.PullTimeout = cmp.Or(o.PullTimeout, 12*time.Hour)
	o.StaleIngest = cmp.Or(o.StaleIngest, 24*time.Hour)
	o.ProgressEvery = cmp.Or(o.ProgressEvery, time.Second)
	o.VerifierTimeout = cmp.Or(o.VerifierTimeout, 10*time.Second)
	s := &Store{
		o:         o,
		wake:      make(chan struct{}, 1),
		pinned:    map[string]bool{},
		running:   pulls{m: map[*progress]struct{}{}},
		holds:     holds{n: map[digest.Digest]int{}},
		refs:      map[string]*loaded{},
		downloads: map[string]*download{},
		slots:     map[string]chan struct{}{},
		sizes:     map[digest.Digest]int64{},
	}
	s.registry = registry.Config{
		Dir:             o.RegistryConfigDir,
		Log:             o.Log,
		ProgressTimeout: o.ProgressTimeout,
		MinRate:         o.MinRate,
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
	blobs := filepath.Join(blobsName, string(digest.Canonical))
	return dirs.MakeAll(s.o.Log, s.o.Root, blobs, refsName, ingestName, pendingName, quarantineName)
}

// Close cancels what runs and waits for it.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.work.Wait()
	return nil
}

// background runs f, which ends with s.ctx. Close waits for it.
func (s *Store) background(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.work.Go(f)
	}
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
	s.cleanPending()
	if err := s.measure(); err != nil {
		return err
	}
	s.publishLocked()
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

// List gives all images, sorted by id.
func (s *Store) List() []Image { return slices.Clone(s.view.Load().images) }

// Get finds an image by "name", "name:tag", "name@digest", "sha256:id", the id
// alone, or an unambiguous prefix of it. A name wins over a prefix.
func (s *Store) Get(ref string) (Image, bool) {
	v := s.view.Load()
	i, ok := v.find(ref)
	if !ok {
		return Image{}, false
	}
	return v.images[i], true
}

// find gives an index into images.
func (v *view) find(ref string) (int, bool) {
	if i, ok := v.byID[ref]; ok {
		return i, true
	}
	if !strings.HasPrefix(ref, "sha256:") {
		if n, err := parse(ref); err == nil {
			if i, ok := v.byRef[n.String()]; ok {
				return i, true
			}
		}
		ref = "sha256:" + ref
	}
	if len(ref) == len("sha256:") {
		return 0, false
	}
	match := func(img Image) bool { return strings.HasPrefix(img.ID, ref) }
	i := slices.IndexFunc(v.images, match)
	if i < 0 || slices.ContainsFunc(v.images[i+1:], match) {
		return 0, false
	}
	return i, true
}

// Spec reads the config of an image, for what Image has not.
func (s *Store) Spec(img Image) (c Spec, err error) {
	b, err := s.readBlob(ocispec.Descriptor{Digest: digest.Digest(img.ID)}, maxConfig)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	return c, err
}

// Usage is what the blobs take. It is kept up to date, not computed.
func (s *Store) Usage() Usage { return s.count.usage() }

// Remove removes an image, found as by Get, with all its references. It returns
// the diff ids that no other image of the store has and no running pull needs.
// Removing what is not there is no error.
func (s *Store) Remove(ref string) ([]digest.Digest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img, ok := s.Get(ref)
	if !ok {
		return nil, nil
	}
	err := s.removeRefsLocked(img)
	s.publishLocked()
	if err != nil {
		return nil, fmt.Errorf("cannot remove image %s: %w", img.ID, err)
	}
	s.o.Log.Info("image removed", "id", img.ID, "tags", img.RepoTags)
	var free []digest.Digest
	for _, d := range img.DiffIDs {
		if !s.layers[d] && !s.holds.has(d) && !slices.Contains(free, d) {
			free = append(free, d)
		}
	}
	return free, nil
}

// ifUnneeded calls f if no image, pull or holder needs the layer, and has those
// that are about to hold it wait for f, which must not call the store.
func (s *Store) ifUnneeded(diffID digest.Digest, f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.layers[diffID] {
		return nil
	}
	return s.holds.ifNone(diffID, f)
}

// isProven says whether a layer's blob is known to be this once uncompressed: it
// was when it was unpacked, or an image says so that was pulled before.
func (s *Store) isProven(blob, diffID digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proven[blob] == diffID
}

func (s *Store) prove(blob, diffID digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven[blob] = diffID
}

// hold keeps blobs and layers from being collected until release. It waits for
// the removal of a single one that is under way.
func (s *Store) hold(l []digest.Digest) {
	s.holds.mu.Lock()
	defer s.holds.mu.Unlock()
	for _, d := range l {
		s.holds.n[d]++
	}
}

func (s *Store) release(l []digest.Digest) {
	s.holds.mu.Lock()
	defer s.holds.mu.Unlock()
	for _, d := range l {
		if s.holds.n[d]--; s.holds.n[d] == 0 {
			delete(s.holds.n, d)
		}
	}
	if len(l) > 0 {
		s.kick() // a pull that failed leaves blobs that nothing names
	}
}

func (h *holds) has(d digest.Digest) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.n[d] > 0
}

// ifNone calls f if no call holds d. Calls that are about to hold anything wait.
func (h *holds) ifNone(d digest.Digest, f func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n[d] > 0 {
		return nil
	}
	return f()
}
