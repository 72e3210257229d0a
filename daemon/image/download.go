package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
)

// download is one blob on its way into the store, shared by all pulls that want
// it. It writes a file in ingest/, which readers follow as it grows, so that
// unpacking neither waits for the end nor slows the transfer down.
//
//	queued -> started -> verified -> ended    readers see the end of the blob at verified,
//	                 \-> failed, ended        pulls go on at ended: the blob is on the disk
//	                                          and has its name
type download struct {
	desc   ocispec.Descriptor
	name   string // of its file in ingest/; see partName
	cancel context.CancelFunc
	ended  chan struct{} // closed after the last change

	users int // guarded by Store.mu; at 0 it is cancelled, and nobody may join

	mu       sync.Mutex // never held over disk operations
	change   sync.Cond
	f        *os.File // open while there are users; closed by the last one, or by run
	n        int64    // bytes in f that may be read
	verified bool
	err      error
	had      int64  // bytes that f had from an earlier attempt
	trouble  string // what went wrong and is being tried again; empty once bytes come
	mirrored bool   // a mirror is asked, whose content another host may correct
	queued   bool   // others had to go first
	started  bool   // it has its turn
}

// broadcast wakes all that wait for a change, so that they look at their contexts.
func (d *download) broadcast() { d.update(func() {}) }

func (d *download) update(f func()) {
	d.mu.Lock()
	f()
	d.change.Broadcast()
	d.mu.Unlock()
}

// waitStarted waits until the download has its turn, or is over, or ctx is.
func (d *download) waitStarted(ctx context.Context) {
	defer context.AfterFunc(ctx, d.broadcast)()
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.started && d.err == nil && ctx.Err() == nil {
		d.change.Wait()
	}
}

// follower reads a download from its beginning to its verified end.
type follower struct {
	ctx context.Context
	d   *download
	off int64
}

func (r *follower) Read(p []byte) (int, error) {
	d := r.d
	d.mu.Lock()
	if r.off >= d.n || d.err != nil {
		stop := context.AfterFunc(r.ctx, d.broadcast)
		for r.off >= d.n && d.err == nil && !d.verified && r.ctx.Err() == nil {
			d.change.Wait()
		}
		stop()
	}
	n, err, f := d.n, d.err, d.f
	d.mu.Unlock()
	switch {
	case r.ctx.Err() != nil:
		return 0, r.ctx.Err()
	case err != nil:
		return 0, err
	case r.off >= n:
		return 0, io.EOF
	}
	m, err := f.ReadAt(p[:min(int64(len(p)), n-r.off)], r.off)
	r.off += int64(m)
	if m > 0 {
		err = nil
	}
	return m, err
}

// wait waits until the blob is in the store for good.
func (d *download) wait(ctx context.Context) error {
	select {
	case <-d.ended:
		return d.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join gives the download of a blob, starting it if there is none, or nil if
// the blob is in the store. joined says that another pull started it. The caller
// leaves it in the end.
//
// Pulls from one registry share a download. Those from another registry do not:
// it may name the same digest, and send something else, or send it slowly.
func (s *Store) join(ctx context.Context, r *registry.Repository, desc ocispec.Descriptor) (
	d *download, joined bool, err error) {
	for {
		s.mu.Lock()
		switch d = s.downloads[partName(r.Domain(), desc)]; {
		case s.closed:
			err = errClosed
		case s.hasBlob(desc):
			d = nil
		case d == nil:
			d = s.startLocked(r, desc)
		case d.users > 0:
			d.users++
			joined = true
			s.count.shared.Add(1)
		default: // it was given up; another may begin once it has ended
			s.mu.Unlock()
			select {
			case <-d.ended:
				continue
			case <-ctx.Done():
				return nil, false, ctx.Err()
			}
		}
		s.mu.Unlock()
		return d, joined, err
	}
}

func (s *Store) leave(d *download) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.users--; d.users > 0 {
		return
	}
	d.cancel()
	if d.over() {
		d.closeFile()
	}
}

// over says whether run has ended.
func (d *download) over() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

// closeFile closes f once there are neither users nor run.
func (d *download) closeFile() {
	var f *os.File
	d.update(func() { f, d.f = d.f, nil })
	if f != nil {
		f.Close()
	}
}

// startLocked starts a download with one user. It belongs to no single pull: it
// ends when all have left, or with the store.
func (s *Store) startLocked(r *registry.Repository, desc ocispec.Descriptor) *download {
	ctx, cancel := context.WithCancel(s.ctx)
	d := &download{
		desc:   desc,
		name:   partName(r.Domain(), desc),
		cancel: cancel,
		ended:  make(chan struct{}),
		users:  1,
	}
	d.change.L = &d.mu
	s.downloads[d.name] = d
	s.count.downloads.Add(1)
	slots := s.slotsLocked(r.Domain())
	s.work.Go(func() {
		err := s.run(ctx, r, d, slots)
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.downloads, d.name)
		s.count.downloads.Add(-1)
		s.kick() // the pulls that needed the blob may have ended
		d.update(func() {
			d.err = err
			close(d.ended)
		})
		if d.users == 0 {
			d.closeFile()
		}
	})
	return d
}

// partName is what a partial download is called: by the blob, the registry that
// it comes from, and the size that its manifest says. A manifest with a wrong size
// does not spoil the download of another one.
func partName(domain string, d ocispec.Descriptor) string {
	sum := sha256.Sum256([]byte(domain))
	return fmt.Sprintf("%s-%s-%x-%d", d.Digest.Algorithm(), d.Digest.Encoded(), sum[:6], d.Size)
}

// blobOfPart is the blob that a partial download of this name is of, or something
// that no blob is called.
func blobOfPart(name string) digest.Digest {
	algorithm, rest, _ := strings.Cut(name, "-")
	hex, _, _ := strings.Cut(rest, "-")
	return digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
}

// slotsLocked gives what a download from a registry takes its turn by. Each
// registry has its own, so that a slow one keeps nobody else waiting.
func (s *Store) slotsLocked(domain string) chan struct{} {
	if s.slots[domain] == nil {
		s.slots[domain] = make(chan struct{}, s.o.Downloads)
	}
	return s.slots[domain]
}

// run brings the blob, from the registry to its name in the store.
func (s *Store) run(ctx context.Context, r *registry.Repository, d *download, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
	default:
		d.update(func() { d.queued = true })
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer func() { <-slots }()
	path := filepath.Join(s.o.Root, ingestName, d.name)
	w, err := s.openPart(d, path)
	if err != nil {
		return err
	}
	err = r.Download(ctx, d.desc, w.n, w)
	if err == nil {
		err = s.finish(w, path)
	}
	if errors.Is(err, ErrCorrupt) {
		r.Distrust(w.mirrors) // at least one of them lied
	}
	if errors.Is(err, ErrCorrupt) || full(err) {
		// Resuming would not help, or the room is needed by others.
		os.Remove(path)
	}
	return err
}

// openPart opens the file of a download, with what an earlier one has left there.
func (s *Store) openPart(d *download, path string) (*blobWriter, error) {
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		os.RemoveAll(path) // not ours
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot store a blob: %w", err)
	}
	h := d.desc.Digest.Algorithm().Hash()
	n, err := io.Copy(h, io.LimitReader(f, d.desc.Size))
	if err == nil {
		err = f.Truncate(n) // to the size at most; a partial blob is never longer
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot resume %s: %w", path, err)
	}
	s.count.resumed.Add(uint64(n))
	d.update(func() { d.f, d.n, d.had, d.started = f, n, n, true })
	return &blobWriter{d: d, f: f, hash: h, n: n, count: &s.count}, nil
}

// finish verifies the blob, puts it on the disk and gives it its name.
func (s *Store) finish(w *blobWriter, path string) error {
	d := w.d
	if got := digest.NewDigest(d.desc.Digest.Algorithm(), w.hash); got != d.desc.Digest {
		return fmt.Errorf("%w: %d bytes with digest %s came for %s", ErrCorrupt, w.n, got, d.desc.Digest)
	}
	d.update(func() { d.verified = true })
	// Synced before it has a name, as the name says that it is verified; this
	// goes on beside other downloads and the unpacking.
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("cannot sync a blob: %w", err)
	}
	return s.adopt(path, d.desc.Digest, d.desc.Size)
}

// blobWriter appends to a download's file; a registry.Destination.
type blobWriter struct {
	d       *download
	f       *os.File
	hash    hash.Hash
	n       int64 // bytes in f
	count   *counters
	mirrors []string // that were asked
}

func (w *blobWriter) Write(b []byte) (int, error) {
	n, err := w.f.WriteAt(b, w.n)
	w.hash.Write(b[:n])
	w.n += int64(n)
	w.count.bytes.Add(uint64(n))
	w.d.update(func() { w.d.n, w.d.trouble = w.n, "" })
	if err != nil {
		err = fmt.Errorf("cannot store a blob: %w", err)
	}
	return n, err
}

func (w *blobWriter) Asking(address string, mirror bool) {
	if mirror {
		w.mirrors = append(w.mirrors, address)
		w.d.update(func() { w.d.mirrored = true })
	}
}

func (w *blobWriter) Failed(err error) {
	w.count.retries.Add(1)
	w.d.update(func() { w.d.trouble = registry.Printable(err).Error() })
}

// doubtful says whether what came may be wrong and another attempt right: a
// partial blob may have been damaged on the disk, a mirror may have lied.
func (d *download) doubtful() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.had > 0 || d.mirrored
}

// downloadStatus is how far a download is.
type downloadStatus struct {
	n, had  int64
	waiting bool // for its turn
	started bool
	trouble string
}

func (d *download) status() downloadStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	return downloadStatus{d.n, d.had, d.queued && !d.started, d.started, d.trouble}
}
