package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// download is one blob on its way into the store, shared by all pulls that want
// it. It writes a file in ingest/, which readers follow as it grows, so that
// unpacking neither waits for the end nor slows the transfer down.
//
//	started -> verified -> done     readers see the end of the blob at verified,
//	        \-> failed     pulls go on at done: the blob is on the disk and has its name
type download struct {
	desc   ocispec.Descriptor
	name   string // of its file in ingest/; see ingestName
	cancel context.CancelFunc
	ended  chan struct{} // closed after the last change

	users int // guarded by Store.mu; at 0 it is cancelled, and nobody may join

	mu       sync.Mutex
	change   sync.Cond
	f        *os.File // open while there are users
	n        int64    // bytes in f that may be read
	verified bool
	err      error
	had      int64  // bytes that f had from an earlier attempt
	trouble  string // what went wrong and is being tried again; empty once bytes come
	mirrored bool   // a mirror is asked, whose content another host may correct
	queued   bool   // others had to go first
	started  bool   // it has its turn
}

// Waiting in both of these ends with ctx, which broadcasts through wake.
func (d *download) wake() {
	d.mu.Lock()
	d.change.Broadcast()
	d.mu.Unlock()
}

func (d *download) update(f func()) {
	d.mu.Lock()
	f()
	d.change.Broadcast()
	d.mu.Unlock()
}

// turn waits until the download has begun in earnest, or is over.
func (d *download) turn(ctx context.Context) {
	defer context.AfterFunc(ctx, d.wake)()
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
		stop := context.AfterFunc(r.ctx, d.wake)
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
// the blob is in the store. joined says that somebody else started it. The
// caller leaves it in the end.
//
// Those of one registry share a download. What another registry sends, and how
// slowly, is no business of this one's images: anybody may name its digests.
func (s *Store) join(ctx context.Context, r *registry, desc ocispec.Descriptor) (d *download, joined bool, err error) {
	name := partName(r.domain, desc)
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, false, errClosed
		}
		if s.hasBlob(desc) {
			s.mu.Unlock()
			return nil, false, nil
		}
		d := s.downloads[name]
		if d == nil {
			d = s.start(r, desc, name)
			s.mu.Unlock()
			return d, false, nil
		}
		if d.users > 0 {
			d.users++
			s.mu.Unlock()
			s.count.shared.Add(1)
			return d, true, nil
		}
		s.mu.Unlock()
		select {
		case <-d.ended:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

func (s *Store) leave(d *download) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.users--; d.users == 0 {
		d.cancel()
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.f != nil && d.over() {
			d.f.Close()
			d.f = nil
		}
	}
}

// over says whether run has ended; then the last user closes f, else run does.
func (d *download) over() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

// start is called with mu held. The download belongs to no single pull: it
// ends when all have left, or with the store.
func (s *Store) start(r *registry, desc ocispec.Descriptor, name string) *download {
	ctx, cancel := context.WithCancel(s.ctx)
	d := &download{desc: desc, name: name, cancel: cancel, ended: make(chan struct{}), users: 1}
	d.change.L = &d.mu
	s.downloads[name] = d
	slots := s.slotsOf(r.domain)
	s.work.Go(func() {
		err := s.run(ctx, r, d, slots)
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.downloads, name)
		s.kick() // those who wanted the blob may have gone
		d.update(func() {
			d.err = err
			if d.users == 0 && d.f != nil {
				d.f.Close()
				d.f = nil
			}
			close(d.ended)
		})
	})
	return d
}

// partName is what a partial download is called: by the blob, the registry that
// it comes from, and the size that its manifest says. A wrong one of these does
// not spoil what somebody else has begun.
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

// slotsOf gives what a download from a registry takes its turn by. Each registry
// has its own, so that a slow one keeps nobody else waiting. mu is held.
func (s *Store) slotsOf(domain string) chan struct{} {
	if s.slots[domain] == nil {
		s.slots[domain] = make(chan struct{}, s.o.Downloads)
	}
	return s.slots[domain]
}

func (s *Store) run(ctx context.Context, r *registry, d *download, slots chan struct{}) error {
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
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		os.RemoveAll(path) // not ours
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	h := d.desc.Digest.Algorithm().Hash()
	n, err := io.Copy(h, io.LimitReader(f, d.desc.Size))
	if err == nil {
		err = f.Truncate(n) // to the size at most; a partial blob is never longer
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("cannot resume %s: %w", path, err)
	}
	d.update(func() { d.f, d.n, d.had, d.started = f, n, n, true })
	w := &blobWriter{d: d, f: f, hash: h, off: n, count: &s.count}
	s.count.resumed.Add(uint64(n))
	err = s.transfer(ctx, r, w)
	if err == nil {
		err = s.finish(w, path)
	}
	if errors.Is(err, ErrCorrupt) {
		for _, mirror := range w.mirrors {
			r.down.Store(mirror, true) // at least one of them lied
		}
	}
	if errors.Is(err, ErrCorrupt) || full(err) {
		// Resuming would not help, or the room is needed by others.
		os.Remove(path)
	}
	return err
}

// finish verifies the blob, puts it on the disk and gives it its name.
func (s *Store) finish(w *blobWriter, path string) error {
	d := w.d
	if got := digest.NewDigest(d.desc.Digest.Algorithm(), w.hash); got != d.desc.Digest {
		return fmt.Errorf("%w: %d bytes with digest %s came for %s", ErrCorrupt, w.off, got, d.desc.Digest)
	}
	d.update(func() { d.verified = true })
	// Synced before it has a name, as the name says that it is verified; this
	// goes on beside other downloads and the unpacking.
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("cannot sync a blob: %w", err)
	}
	return s.adopt(path, d.desc.Digest, d.desc.Size)
}

// blobWriter appends to a download's file.
type blobWriter struct {
	d     *download
	f     *os.File
	hash  hash.Hash
	off   int64
	count *counters
	// mirrors are the hosts asked, as in down, without the registry itself.
	mirrors []string
}

func (w *blobWriter) Write(b []byte) (int, error) {
	n, err := w.f.WriteAt(b, w.off)
	w.hash.Write(b[:n])
	w.off += int64(n)
	w.count.bytes.Add(uint64(n))
	w.d.update(func() { w.d.n, w.d.trouble = w.off, "" })
	if err != nil {
		err = &diskError{err}
	}
	return n, err
}

// diskError is a failure of this machine's disk, which no other host helps.
type diskError struct{ err error }

func (e *diskError) Error() string { return "cannot store a blob: " + e.err.Error() }
func (e *diskError) Unwrap() error { return e.err }

// enough is the progress after which a broken connection is not counted.
const enough = 16 << 10

// transfer brings the rest of the blob, from wherever it is to be had.
func (s *Store) transfer(ctx context.Context, r *registry, w *blobWriter) error {
	var errs []error
	candidates := r.candidates(docker.HostCapabilityPull)
	for i, h := range candidates {
		if i < len(candidates)-1 && w.off < w.d.desc.Size {
			w.mirrors = append(w.mirrors, addressOf(h))
			w.d.update(func() { w.d.mirrored = true })
		}
		for failures := 0; w.off < w.d.desc.Size; {
			before := w.off
			err := s.attempt(ctx, r, h, w)
			if err == nil {
				continue // the loop's condition decides
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s.count.retries.Add(1)
			if _, ok := errors.AsType[*diskError](err); ok {
				return err
			}
			if w.off-before >= enough {
				failures = 0
				continue
			}
			failures++
			wait, ok := r.again(h, err, failures)
			if !ok || errors.Is(err, errTooSlow) {
				errs = append(errs, err)
				break
			}
			w.d.update(func() { w.d.trouble = told(err).Error() })
			if err := pause(ctx, wait); err != nil {
				return err
			}
		}
		if w.off == w.d.desc.Size {
			return nil
		}
	}
	return lastOf(errs, r.domain)
}

var errTooSlow = errors.New("too slow")

// attempt is one request for the rest of the blob.
func (s *Store) attempt(ctx context.Context, r *registry, h docker.RegistryHost, w *blobWriter) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer func() { // at whatever it was
		if cause := context.Cause(ctx); err != nil && errors.Is(cause, errTooSlow) {
			err = cause
		}
	}()
	size := w.d.desc.Size
	header := http.Header{"Accept-Encoding": {"identity"}} // the bytes as they are
	if w.off > 0 {
		// With its end: some registries do not know the open form.
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", w.off, size-1))
	}
	var came tally
	defer s.watch(&came, w.d.desc.Digest, cancel)()
	resp, err := r.do(ctx, h, http.MethodGet, header, "blobs", w.d.desc.Digest.String())
	if err != nil {
		if e, ok := errors.AsType[*statusError](err); ok && e.status == http.StatusRequestedRangeNotSatisfiable {
			err = fmt.Errorf("%w: %s is shorter than the manifest says: %w", ErrCorrupt, w.d.desc.Digest, err)
		}
		return err
	}
	defer resp.Body.Close()
	body := io.Reader(resp.Body)
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if !strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", w.off)) {
			return fmt.Errorf("%w: %s sent the range %q, asked for %d-", ErrCorrupt, h.Host, resp.Header.Get("Content-Range"), w.off)
		}
	case http.StatusOK:
		plain, err := decode(resp, size)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, h.Host, err)
		}
		body = plain
		if resp.ContentLength >= 0 && resp.ContentLength != size && plain == resp.Body {
			return fmt.Errorf("%w: %s has %d bytes for %s, the manifest says %d", ErrCorrupt, h.Host, resp.ContentLength, w.d.desc.Digest, size)
		}
		// It does not know ranges: what is here already comes again.
		if _, err := io.CopyN(&came, body, w.off); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnavailable, h.Host, err)
		}
	default:
		return fmt.Errorf("%w: %s answered %s", ErrUnavailable, h.Host, resp.Status)
	}
	body = io.TeeReader(io.LimitReader(body, size-w.off), &came)
	if _, err = io.CopyBuffer(w, body, make([]byte, 64<<10)); err == nil && w.off < size {
		err = io.ErrUnexpectedEOF
	}
	if _, ok := errors.AsType[*diskError](err); err == nil || ok {
		return err
	}
	return fmt.Errorf("%w: %s broke off at %d of %d bytes: %w", ErrUnavailable, h.Host, w.off, size, err)
}

// tally counts what is written to it.
type tally struct{ atomic.Int64 }

func (t *tally) Write(b []byte) (int, error) {
	t.Add(int64(len(b)))
	return len(b), nil
}

// watchSteps is how many times a period watch looks.
const watchSteps = 10

// watch cancels an attempt that is not fast enough; call what it returns in the
// end. What came counts, also what was here already and is thrown away. One that
// stands still is noticed a period after its last bytes, or a step later.
func (s *Store) watch(came *tally, of digest.Digest, cancel context.CancelCauseFunc) (stop func()) {
	period := s.o.ProgressTimeout
	least := max(1, int64(period.Seconds()*float64(s.o.MinRate)))
	quit := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(max(1, period/watchSteps))
		defer tick.Stop()
		for past := []int64{0}; ; { // a step apart, the newest last
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			past = append(past, came.Load())
			if len(past) <= watchSteps {
				continue
			}
			if n := past[watchSteps] - past[0]; n < least {
				cancel(fmt.Errorf("%w: %w: %d bytes of %s in %s", ErrUnavailable, errTooSlow, n, of, period))
				return
			}
			past = past[1:]
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// doubtful says whether what came may be wrong and another attempt right: a
// partial blob may have been damaged on the disk, a mirror may have lied.
func (d *download) doubtful() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.had > 0 || d.mirrored
}

// flow is how far a download is.
type flow struct {
	n, had  int64
	waiting bool // for its turn
	started bool
	trouble string
}

func (d *download) progress() flow {
	d.mu.Lock()
	defer d.mu.Unlock()
	return flow{d.n, d.had, d.queued && !d.started, d.started, d.trouble}
}
