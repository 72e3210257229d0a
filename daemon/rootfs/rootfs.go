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
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/dirs"
	"github.com/holdfast-cri/holdfast/daemon/mounts"
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

// Usage is what layers, or other trees, take on the file system.
type Usage struct{ Bytes, Inodes uint64 }

const (
	diffName   = "diff"
	recordName = "layer.json"
	syncedName = "synced"
	tmpName    = "tmp"
	emptyName  = "empty" // the lower directory of an image without layers
)

// layerRecord is layer.json. In memory it never changes.
type layerRecord struct {
	DiffID digest.Digest `json:"diffId"`
	Bytes  uint64        `json:"bytes"`
	Inodes uint64        `json:"inodes"`
	BootID string        `json:"bootId"` // of the boot that unpacked it
	// Implied are the directories that the archive has files in, but no entry
	// for. What they look like is up to the layers below (see implied.go).
	Implied []name `json:"implied,omitempty"`
	long    bool   // Implied is on the disk only
}

// Store keeps one directory per layer. It is safe for concurrent use. One
// process at a time may have a directory open. Close ends it.
//
// List, Count and Usage answer from memory. They never wait for the disk: mu is
// not held over anything that does. Who changes the directory of a layer holds
// that layer.
type Store struct {
	// Limits may be changed before the first Apply.
	Limits Limits

	dir string
	log *slog.Logger

	background sync.WaitGroup  // deletions and syncs; Close waits
	closing    context.Context // ends with Close: no deletion is tried again
	close      context.CancelFunc
	disk       *os.File // dir, open for syncs; closed by Close
	discarded  atomic.Uint64
	deleting   sync.Mutex // held by the one deletion that goes on: each has an fd for each level of its tree

	mu       sync.Mutex
	syncing  bool // sync runs
	layers   map[digest.Digest]*layerRecord
	held     map[digest.Digest]chan struct{} // closed when the layer is released
	unsynced []*layerRecord                  // also of layers that are gone meanwhile
	usage    Usage
}

// Open loads the layers under dir, making it if needed. A layer that cannot be
// used, or that may have lost data because the machine went down before it was
// on the disk, is removed. It fails only if dir cannot be made or read.
func Open(dir string, log *slog.Logger) (*Store, error) {
	s := &Store{
		Limits: DefaultLimits,
		dir:    dir,
		log:    log,
		layers: map[digest.Digest]*layerRecord{},
		held:   map[digest.Digest]chan struct{}{},
	}
	s.closing, s.close = context.WithCancel(context.Background())
	err := s.load()
	if err == nil {
		s.disk, err = os.Open(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the layers: %w", err)
	}
	s.syncLocked() // nobody else has the store yet
	return s, nil
}

// makeDirs makes the directories that are missing. 0700: the path is of no use
// to others; containers see the overlay.
func (s *Store) makeDirs() error {
	return dirs.MakeAll(s.log, s.dir, tmpName, emptyName, string(digest.Canonical))
}

var (
	// What is before the layer is the directory of all layers, where there is a name of it.
	layerInOptions = regexp.MustCompile(`([^=:,]*)/([a-z0-9]+)/([0-9a-f]{32,})/` + diffName)
	// A mount of so many layers that their names had to go; see mountClassic.
	nameless = regexp.MustCompile(`lowerdir=` + fdPrefix + `\d+(:|,|$)`)
)

// LayersAt are the layers of the root file system that is mounted at target, as
// far as its mount tells. It is for a container whose records are lost.
func LayersAt(target string) (layers []digest.Digest) {
	table, _ := mounts.Read(mounts.Self) // what cannot be read tells nothing
	for _, m := range table {
		if m.Point == target {
			some, _ := LayersIn(m.FSOptions)
			layers = append(layers, some...)
		}
	}
	return layers
}

// LayersIn are the layers that the options of an overlay mount tell; not all: there are
// more, whose names it does not have.
func LayersIn(options string) (layers []digest.Digest, all bool) {
	for _, l := range layerInOptions.FindAllStringSubmatch(options, -1) {
		layers = append(layers, digest.NewDigestFromEncoded(digest.Algorithm(l[2]), l[3]))
	}
	return layers, !nameless.MatchString(options)
}

// usedLayers gives a function that says whether something mounted may have a
// layer, by its digest without the algorithm, among its lower directories.
func (s *Store) usedLayers() func(hex string) bool {
	table, err := mounts.Read(mounts.Self)
	all := err == nil
	used := map[string]bool{}
	others := map[string]bool{} // directories, of another daemon's layers
	for _, m := range table {
		if m.Kind != "overlay" {
			continue
		}
		all = all && !nameless.MatchString(m.FSOptions)
		for _, l := range layerInOptions.FindAllStringSubmatch(m.FSOptions, -1) {
			dir := l[1]
			if _, known := others[dir]; !known {
				others[dir] = s.isOther(dir)
			}
			if !others[dir] {
				used[l[3]] = true
			}
		}
	}
	return func(hex string) bool { return !all || used[hex] }
}

// isOther says whether a directory of layers, as an overlay names it, is there and not this store's.
func (s *Store) isOther(dir string) bool {
	if strings.HasPrefix(dir, fdPrefix) || strings.Contains(dir, `\`) {
		return false // nobody knows
	}
	there, err := os.Stat(dir)
	if err != nil {
		return false
	}
	own, err := os.Stat(s.dir)
	return err == nil && !os.SameFile(there, own)
}

// load reads the records of all layers. A damaged layer goes, and so does what is
// in tmp, but for layers that a container runs on: these stay in tmp until that is
// gone, and another is unpacked for those that come, which may be damaged as well.
func (s *Store) load() error {
	if err := s.makeDirs(); err != nil {
		return err
	}
	used := sync.OnceValue(s.usedLayers)
	garbage, err := os.ReadDir(filepath.Join(s.dir, tmpName))
	if err != nil {
		return err
	}
	for _, e := range garbage {
		if hex, _, _ := strings.Cut(e.Name(), "-"); !used()(hex) {
			s.deleteLater(filepath.Join(s.dir, tmpName, e.Name()))
		}
	}
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
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name())
			err := s.loadLayer(d)
			if err == nil {
				continue
			}
			s.log.Warn("layer removed, it has to be unpacked again", "layer", d, "error", err)
			trash, err := s.setAside(s.layerDir(d))
			if err != nil {
				s.log.Error("cannot remove a layer", "layer", d, "error", err)
			} else if !used()(d.Encoded()) {
				s.deleteLater(trash)
			}
		}
	}
	return nil
}

// loadLayer says why a layer cannot be used.
func (s *Store) loadLayer(d digest.Digest) error {
	var r layerRecord
	dir := s.layerDir(d)
	if err := record.Read(filepath.Join(dir, recordName), &r); err != nil {
		return err
	}
	_, notSynced := os.Lstat(filepath.Join(dir, syncedName))
	switch {
	case r.DiffID != d:
		return fmt.Errorf("the record is about %s", r.DiffID)
	case !s.onDisk(&r):
		return errors.New("it has no files")
	case notSynced != nil && r.BootID != rundir.BootID():
		return errors.New("the machine went down before it was on the disk")
	}
	s.noteLocked(&r, notSynced == nil) // nobody else has the store yet
	return nil
}

// Close waits for the work in the background: syncs and deletions. What it
// does not see through, the next Open does.
func (s *Store) Close() error {
	s.close()
	s.background.Wait()
	s.disk.Close()
	return nil
}

func (s *Store) layerDir(d digest.Digest) string {
	return filepath.Join(s.dir, d.Algorithm().String(), d.Encoded())
}

// get gives the record of a layer, nil if it is not unpacked.
func (s *Store) get(diffID digest.Digest) *layerRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.layers[diffID]
}

// Has says whether the layer is unpacked, and still on the disk, from where a
// person may have removed it. What is left of such a layer is removed.
func (s *Store) Has(diffID digest.Digest) bool {
	r := s.get(diffID)
	if r == nil || s.onDisk(r) {
		return r != nil
	}
	release, _ := s.hold(context.Background(), diffID)
	defer release()
	return s.hasHeld(diffID)
}

// hasHeld is Has for the holder of the layer.
func (s *Store) hasHeld(diffID digest.Digest) bool {
	r := s.get(diffID)
	if r == nil || s.onDisk(r) {
		return r != nil
	}
	s.log.Error("layer is gone, it has to be unpacked again", "layer", diffID)
	s.discard(s.layerDir(diffID)) // what is left of it
	s.forget(r)
	return false
}

// onDisk says whether a layer has files, if it has to; not whether it has all.
func (s *Store) onDisk(r *layerRecord) bool {
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

// noteLocked puts a layer on the books.
func (s *Store) noteLocked(r *layerRecord, synced bool) {
	if r.long = sizeOf(r.Implied) > maxKept; r.long {
		r.Implied = nil
	}
	s.layers[r.DiffID] = r
	s.usage.Bytes += r.Bytes
	s.usage.Inodes += r.Inodes
	if !synced {
		s.unsynced = append(s.unsynced, r)
	}
}

// forget takes a layer off the books.
func (s *Store) forget(r *layerRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.layers, r.DiffID)
	s.usage.Bytes -= r.Bytes
	s.usage.Inodes -= r.Inodes
}

// List gives all unpacked layers, sorted, from memory.
func (s *Store) List() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.layers))
}

// Count is how many layers are unpacked, from memory.
func (s *Store) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.layers)
}

// Usage is kept up to date in memory, not computed.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage
}

// hold waits until nobody else changes the directory of a layer. It fails only
// if ctx ends first.
func (s *Store) hold(ctx context.Context, diffID digest.Digest) (release func(), err error) {
	for {
		s.mu.Lock()
		other, busy := s.held[diffID]
		if !busy {
			break // locked
		}
		s.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer s.mu.Unlock()
	done := make(chan struct{})
	s.held[diffID] = done
	return func() {
		s.mu.Lock()
		delete(s.held, diffID)
		s.mu.Unlock()
		close(done)
	}, nil
}

// Apply unpacks a layer from its uncompressed tar stream, reading it to its
// end. Concurrent calls for the same layer share one, unless that fails: it may
// be for reasons of its own. A layer that is there already is no error, and its
// stream is not read. Reads from the stream must end when ctx does.
func (s *Store) Apply(ctx context.Context, diffID digest.Digest, stream io.Reader) error {
	if err := diffID.Validate(); err != nil {
		return fmt.Errorf("cannot unpack layer %q: %w: %w", diffID, ErrBadLayer, err)
	}
	if err := s.apply(ctx, diffID, stream); err != nil {
		return fmt.Errorf("cannot unpack layer %s: %w", diffID, err)
	}
	return nil
}

func (s *Store) apply(ctx context.Context, diffID digest.Digest, stream io.Reader) error {
	release, err := s.hold(ctx, diffID)
	if err != nil {
		return err
	}
	defer release()
	if s.hasHeld(diffID) {
		return nil
	}
	r, err := s.unpack(ctx, diffID, stream)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteLocked(&r, false)
	s.syncLocked()
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
	if s.get(diffID) == nil {
		return nil
	}
	release, _ := s.hold(context.Background(), diffID)
	defer release()
	r := s.get(diffID)
	if r == nil {
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
	trash, err := s.setAside(dir)
	if err == nil {
		s.deleteLater(trash)
	}
	return err
}

// setAside moves a layer's directory into tmp and gives its path there. A rename
// works on a full disk too, where making a directory does not.
func (s *Store) setAside(dir string) (string, error) {
	name := fmt.Sprintf("%s-%d-%d", filepath.Base(dir), time.Now().UnixNano(), s.discarded.Add(1))
	trash := filepath.Join(s.dir, tmpName, name)
	return trash, os.Rename(dir, trash)
}

// deleteLater deletes what is in tmp. What the disk refuses is tried again, less and
// less often; what remains at Close is for the next Open.
func (s *Store) deleteLater(path string) {
	s.background.Go(func() {
		const first, longest = 100 * time.Millisecond, 10 * time.Minute
		for wait := first; ; wait = min(2*wait, longest) {
			s.deleting.Lock()
			err := os.RemoveAll(path)
			s.deleting.Unlock()
			if err == nil {
				return
			}
			s.log.Warn("cannot delete, trying again", "path", path, "in", wait, "error", err)
			select {
			case <-time.After(wait):
			case <-s.closing.Done():
				return
			}
		}
	})
}

// syncLocked makes sure that what is not synced will be.
func (s *Store) syncLocked() {
	if !s.syncing {
		s.syncing = true
		s.background.Go(s.sync)
	}
}

// sync puts layers on the disk and marks them. One syncfs serves all layers that
// were unpacked before it began, and nobody waits for it. The directory was opened
// before this process wrote any: a later descriptor is not told of what failed
// until then.
func (s *Store) sync() {
	for {
		s.mu.Lock()
		todo := s.unsynced
		s.unsynced = nil
		s.syncing = len(todo) > 0
		s.mu.Unlock()
		if len(todo) == 0 {
			return
		}
		if err := unix.Syncfs(int(s.disk.Fd())); err != nil {
			// Not tried again: the kernel says once that something could not be
			// written, and then takes it for written.
			s.log.Error("cannot sync layers, they have to be unpacked again after a reboot", "layers", len(todo),
				"error", err)
			continue
		}
		if err := s.mark(todo); err != nil {
			s.log.Error("cannot mark layers as synced, a power cut would lose them", "layers", len(todo), "error", err)
			s.mu.Lock()
			s.unsynced = append(s.unsynced, todo...) // with the next ones
			s.syncing = false
			s.mu.Unlock()
			return
		}
	}
}

// mark marks those of the layers that are still there; one that was unpacked anew
// meanwhile is another.
func (s *Store) mark(todo []*layerRecord) (err error) {
	for _, r := range todo {
		release, _ := s.hold(context.Background(), r.DiffID) // Remove may not take it away in between
		if s.get(r.DiffID) == r {
			err = cmp.Or(err, os.WriteFile(filepath.Join(s.layerDir(r.DiffID), syncedName), nil, 0o600))
		}
		release()
	}
	return err
}
