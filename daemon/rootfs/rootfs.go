// Package rootfs keeps unpacked layers and makes root file systems of them.
//
// Every layer is extracted alone, into a directory named by its diff id, and
// shared by all images that have it:
//
//	ALGORITHM/HEX/diff        its files, ready to be a lower directory of overlayfs
//	ALGORITHM/HEX/layer.json  a record about it
//	ALGORITHM/HEX/synced      a mark: all of it is on the disk
//	tmp/                      what is being extracted or deleted; emptied at start
//
// A layer appears by one rename and disappears by one, so a process that is
// killed leaves nothing but garbage in tmp.
package rootfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/dirs"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// ErrNoLayer says that a layer is not unpacked here.
var ErrNoLayer = errors.New("layer not unpacked")

// ErrBadLayer is wrapped by every error about the content of a layer: not a tar
// archive, an entry that leaves the root, another digest, beyond the limits.
var ErrBadLayer = errors.New("bad layer")

// Limits protect the disk from a layer made to fill it.
type Limits struct {
	Bytes   int64 // of the tar stream, and of all files in it, holes included
	Entries int64 // in the tar stream
}

// DefaultLimits are above any layer that is meant to be one.
var DefaultLimits = Limits{Bytes: 512 << 30, Entries: 32 << 20}

// Usage is what layers take on the file system.
type Usage struct{ Bytes, Inodes uint64 }

const (
	diffName   = "diff"
	recordName = "layer.json"
	syncedName = "synced"
	tmpName    = "tmp"
	emptyName  = "empty" // the lower directory of an image without layers
)

// record is layer.json.
type layerRecord struct {
	DiffID digest.Digest `json:"diffId"`
	Bytes  uint64        `json:"bytes"`
	Inodes uint64        `json:"inodes"`
	BootID string        `json:"bootId"` // of the boot that unpacked it
	// Implied are the directories that the archive has files in, but no entry
	// for. What they look like is up to the layers below (see implied.go).
	Implied names `json:"implied,omitempty"`

	abridged bool // Implied is left out, as it is long; see Store.full
}

// Store keeps one directory per layer. It is safe for concurrent use. One
// process at a time may have a directory open. Close ends it.
type Store struct {
	// Limits may be changed before the first Apply.
	Limits Limits

	dir string
	log *slog.Logger

	background sync.WaitGroup // deletions and the syncer; Close waits
	wake       chan struct{}  // of the syncer; closed by Close
	closing    chan struct{}  // closed by Close
	discarded  atomic.Uint64

	mu       sync.Mutex
	closed   bool
	layers   map[digest.Digest]*layerRecord
	flights  map[digest.Digest]chan struct{} // closed when an Apply ends
	unsynced []*layerRecord                  // also of layers that are gone meanwhile
	usage    Usage
}

// Open loads the layers under dir, making it if needed. A layer that cannot be
// used, or that may have lost data because the machine went down before it was
// on the disk, is removed. It fails only if dir cannot be made or read.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.Default()
	}
	s := &Store{
		Limits:  DefaultLimits,
		dir:     dir,
		log:     log,
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		layers:  map[digest.Digest]*layerRecord{},
		flights: map[digest.Digest]chan struct{}{},
	}
	if err := s.makeDirs(); err != nil {
		return nil, fmt.Errorf("cannot open the layers: %w", err)
	}
	garbage, err := os.ReadDir(filepath.Join(dir, tmpName))
	if err != nil {
		return nil, fmt.Errorf("cannot open the layers: %w", err)
	}
	used := sync.OnceValue(layersInUse)
	for _, e := range garbage {
		if name, ok := strings.CutPrefix(e.Name(), usedPrefix); ok {
			if hex, _, _ := strings.Cut(name, "-"); used()(hex) {
				continue
			}
		}
		s.deleteLater(filepath.Join(dir, tmpName, e.Name()))
	}
	strange, err := os.ReadDir(filepath.Join(dir, emptyName))
	for _, e := range strange { // it would be in each image without layers
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, emptyName, e.Name())))
	}
	if err != nil {
		log.Warn("the empty layer is not empty", "error", err)
	}
	if err := s.load(used); err != nil {
		return nil, fmt.Errorf("cannot open the layers: %w", err)
	}
	synced, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the layers: %w", err)
	}
	s.background.Go(func() { s.syncer(synced) })
	s.kick()
	return s, nil
}

// makeDirs makes the directories that are missing. 0700: the path is of no use
// to others; containers see the overlay.
func (s *Store) makeDirs() error {
	for _, name := range []string{tmpName, emptyName, string(digest.Canonical)} {
		moved, err := dirs.Make(s.dir, name)
		if moved != "" {
			s.log.Error("a file was in the place of a directory of the layers", "directory", name, "moved", moved)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// usedPrefix is of names in tmp, used-HEX-TIME: a damaged layer that a container
// runs on. It stays until that is gone, and another is unpacked for those that
// come; which may be damaged as well.
const usedPrefix = "used-"

var (
	layerInOptions = regexp.MustCompile(`/([a-z0-9]+)/([0-9a-f]{32,})/` + diffName)
	// A mount of so many layers that their names had to go; see mountClassic.
	nameless = regexp.MustCompile(`lowerdir\+?=` + fdPrefix + `\d+(:|,|$)`)
)

// LayersAt are the layers of the root file system that is mounted at target, as
// far as its mount tells. It is for a container whose records are lost.
func LayersAt(target string) (layers []digest.Digest) {
	mounts, _ := mountinfo.GetMounts(mountinfo.SingleEntryFilter(target))
	for _, m := range mounts {
		for _, l := range layerInOptions.FindAllStringSubmatch(m.VFSOptions, -1) {
			layers = append(layers, digest.NewDigestFromEncoded(digest.Algorithm(l[1]), l[2]))
		}
	}
	return layers
}

// layersInUse finds the layers that something mounted has among its lower
// directories, and tells for each, by its digest without the algorithm. Where it
// cannot find out, all are.
func layersInUse() func(hex string) bool {
	used := map[string]bool{}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return func(string) bool { return true }
	}
	for _, m := range mounts {
		if nameless.MatchString(m.VFSOptions) {
			return func(string) bool { return true }
		}
		for _, l := range layerInOptions.FindAllStringSubmatch(m.VFSOptions, -1) {
			used[l[2]] = true
		}
	}
	return func(hex string) bool { return used[hex] }
}

func (s *Store) load(used func() func(string) bool) error {
	algorithms, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !digest.Algorithm(a.Name()).Available() || !a.IsDir() {
			continue
		}
		layers, err := os.ReadDir(filepath.Join(s.dir, a.Name()))
		if err != nil {
			return err
		}
		for _, e := range layers {
			s.loadLayer(digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name()), used)
		}
	}
	return nil
}

func (s *Store) loadLayer(d digest.Digest, used func() func(string) bool) {
	var r layerRecord
	dir := s.layerDir(d)
	err := record.Read(filepath.Join(dir, recordName), &r)
	if err == nil && r.DiffID != d {
		err = fmt.Errorf("the record is about %s", r.DiffID)
	}
	if err == nil && !s.intact(&r) {
		err = errors.New("it has no files")
	}
	_, notSynced := os.Lstat(filepath.Join(dir, syncedName))
	if err == nil && notSynced != nil && r.BootID != rundir.BootID() {
		err = errors.New("the machine went down before it was on the disk")
	}
	if err != nil {
		s.log.Warn("layer removed, it has to be unpacked again", "layer", d, "error", err)
		kept := fmt.Sprint(usedPrefix, d.Encoded(), "-", time.Now().UnixNano())
		if used()(d.Encoded()) && os.Rename(dir, filepath.Join(s.dir, tmpName, kept)) == nil {
			return
		}
		s.discard(dir)
		return
	}
	s.note(&r, notSynced == nil)
}

// Close waits for the work in the background: syncs and deletions. What it
// does not see through, the next Open does.
func (s *Store) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.wake)
		close(s.closing)
	}
	s.mu.Unlock()
	s.background.Wait()
	return nil
}

func (s *Store) layerDir(d digest.Digest) string {
	return filepath.Join(s.dir, d.Algorithm().String(), d.Encoded())
}

// Has says whether the layer is unpacked.
func (s *Store) Has(diffID digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.has(diffID)
}

// has looks also at the disk, from where a person may have removed the layer.
// mu is held.
func (s *Store) has(diffID digest.Digest) bool {
	r, ok := s.layers[diffID]
	if ok && !s.intact(r) {
		s.log.Error("layer is gone, it has to be unpacked again", "layer", diffID)
		s.discard(s.layerDir(diffID)) // what is left of it
		s.forget(r)
		ok = false
	}
	return ok
}

// intact says whether a layer has files, if it has to; not whether it has all.
func (s *Store) intact(r *layerRecord) bool {
	f, err := os.OpenFile(filepath.Join(s.layerDir(r.DiffID), diffName), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		// Nothing is known of a layer when this process or machine is short of
		// something, and containers may run on it.
		return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM)
	}
	defer f.Close()
	if r.Inodes <= 1 {
		return true
	}
	_, err = f.Readdirnames(1)
	return err == nil
}

// note puts a layer on the books. mu is held, or the caller is Open.
func (s *Store) note(r *layerRecord, synced bool) {
	r.abridge()
	s.layers[r.DiffID] = r
	s.usage.Bytes += r.Bytes
	s.usage.Inodes += r.Inodes
	if !synced {
		s.unsynced = append(s.unsynced, r)
	}
}

// forget takes a layer off the books. mu is held.
func (s *Store) forget(r *layerRecord) {
	delete(s.layers, r.DiffID)
	s.usage.Bytes -= r.Bytes
	s.usage.Inodes -= r.Inodes
}

// List gives all unpacked layers, sorted.
func (s *Store) List() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := make([]digest.Digest, 0, len(s.layers))
	for d := range s.layers {
		l = append(l, d)
	}
	slices.Sort(l)
	return l
}

// Count is how many layers are unpacked.
func (s *Store) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.layers)
}

// Usage is cheap: it is kept up to date, not computed.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage
}

// Apply unpacks a layer from its uncompressed tar stream, reading it to its
// end. Concurrent calls for the same layer share one; a layer that is there
// already is no error, and its stream is not read. Reads from the stream must
// end when ctx does.
func (s *Store) Apply(ctx context.Context, diffID digest.Digest, stream io.Reader) error {
	if err := diffID.Validate(); err != nil {
		return fmt.Errorf("cannot unpack layer %q: %w: %w", diffID, ErrBadLayer, err)
	}
	for {
		s.mu.Lock()
		have := s.has(diffID)
		other := s.flights[diffID]
		if !have && other == nil {
			break // locked
		}
		s.mu.Unlock()
		if have {
			return nil
		}
		select {
		case <-other:
			// If the other one failed, it may be for reasons of its own, such
			// as its stream; this call has one too.
		case <-ctx.Done():
			return fmt.Errorf("cannot unpack layer %s: %w", diffID, ctx.Err())
		}
	}
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("cannot unpack layer %s: the store is closed", diffID)
	}
	done := make(chan struct{})
	s.flights[diffID] = done
	s.mu.Unlock()

	r, err := s.unpack(ctx, diffID, stream)

	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.flights, diffID)
	close(done)
	if err != nil {
		return fmt.Errorf("cannot unpack layer %s: %w", diffID, err)
	}
	s.note(&r, false)
	s.kick()
	return nil
}

// unpack makes the layer's directory. The caller makes sure that there is one
// at a time per layer.
func (s *Store) unpack(ctx context.Context, diffID digest.Digest, stream io.Reader) (r layerRecord, err error) {
	if err := s.makeDirs(); err != nil {
		return r, err
	}
	tmp, err := os.MkdirTemp(filepath.Join(s.dir, tmpName), "unpack-")
	if err != nil {
		return r, err
	}
	defer func() {
		if err != nil && os.RemoveAll(tmp) != nil {
			s.deleteLater(tmp)
		}
	}()
	trash := filepath.Join(tmp, "trash")
	diff := filepath.Join(tmp, diffName)
	if err := errors.Join(os.Mkdir(trash, 0o700), os.Mkdir(diff, 0o755)); err != nil {
		return r, err
	}
	// The umask may have taken bits away.
	if err := os.Chmod(diff, 0o755); err != nil {
		return r, err
	}
	r, err = extract(ctx, diff, trash, diffID, stream, s.Limits)
	if err != nil {
		return r, err
	}
	if err := os.RemoveAll(trash); err != nil {
		return r, err
	}
	if err := record.Write(filepath.Join(tmp, recordName), r, false); err != nil {
		return r, err
	}
	dir := s.layerDir(diffID)
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return r, err
	}
	err = os.Rename(tmp, dir)
	if err != nil && s.discard(dir) == nil { // something that is no layer was in its place
		err = os.Rename(tmp, dir)
	}
	return r, err
}

// Remove removes a layer; one that is not there is no error. The caller knows
// that no mount uses it. The space is freed in the background.
func (s *Store) Remove(diffID digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.layers[diffID]
	if !ok {
		return nil
	}
	if err := s.discard(s.layerDir(diffID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove layer %s: %w", diffID, err)
	}
	s.forget(r)
	return nil
}

// discard takes a layer's directory away at once and deletes it later.
func (s *Store) discard(dir string) error {
	// By its own name and a number: a rename works on a full disk too, where
	// making a directory does not.
	tmp := filepath.Join(s.dir, tmpName, fmt.Sprintf("remove-%s-%d-%d", filepath.Base(dir), time.Now().UnixNano(), s.discarded.Add(1)))
	if err := os.Rename(dir, tmp); err != nil {
		return err
	}
	s.deleteLater(tmp)
	return nil
}

func (s *Store) deleteLater(path string) {
	s.background.Go(func() {
		const first, longest = 100 * time.Millisecond, 10 * time.Minute
		for wait := first; ; wait = min(2*wait, longest) {
			err := os.RemoveAll(path)
			if err == nil {
				return
			}
			s.log.Warn("cannot delete, trying again", "path", path, "in", wait, "error", err)
			select {
			case <-time.After(wait):
			case <-s.closing:
				return // the next Open tries again
			}
		}
	})
}

// kick wakes the syncer. The caller holds mu, or is Open.
func (s *Store) kick() {
	if s.closed {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default: // awake already
	}
}

// syncer puts layers on the disk and marks them. One syncfs serves all layers
// that were unpacked before it began, and nobody waits for it. dir was opened before
// this process wrote any: a later one is not told of what failed until then.
func (s *Store) syncer(dir *os.File) {
	defer dir.Close()
	for range s.wake {
		s.mu.Lock()
		todo := s.unsynced
		s.unsynced = nil
		s.mu.Unlock()
		if len(todo) == 0 {
			continue
		}
		if err := unix.Syncfs(int(dir.Fd())); err != nil {
			// Not tried again: the kernel says once that something could not be
			// written, and then takes it for written.
			s.log.Error("cannot sync layers, they have to be unpacked again after a reboot", "layers", len(todo), "error", err)
			continue
		}
		if err := s.mark(todo); err != nil {
			s.mu.Lock()
			s.unsynced = append(s.unsynced, todo...) // with the next ones
			s.mu.Unlock()
			s.log.Error("cannot mark layers as synced, a power cut would lose them", "layers", len(todo), "error", err)
		}
	}
}

// mark marks those of the layers that are still there; one that was unpacked anew
// meanwhile is another.
func (s *Store) mark(todo []*layerRecord) (err error) {
	for _, r := range todo {
		s.mu.Lock()
		if s.layers[r.DiffID] == r { // under the lock: Remove may not take it away in between
			err = cmp.Or(err, os.WriteFile(filepath.Join(s.layerDir(r.DiffID), syncedName), nil, 0o600))
		}
		s.mu.Unlock()
	}
	return err
}
