package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// kick wakes the collector.
func (s *Store) kick() {
	select {
	case s.wake <- struct{}{}:
	default: // awake already
	}
}

// collector removes what nothing refers to: after Open, a removal, a pull, and
// when what they left is stale. What cannot be removed is tried again, less and
// less often.
func (s *Store) collector() {
	const first, longest = 100 * time.Millisecond, 10 * time.Minute
	again := time.NewTimer(0) // the start
	defer again.Stop()
	for wait := first; ; {
		select {
		case <-s.wake:
		case <-again.C:
		case <-s.ctx.Done():
			return
		}
		if err := s.collect(); err != nil {
			s.o.Log.Warn("cannot remove what is not used, trying again", "in", wait, "error", err)
			again.Reset(wait)
			wait = min(2*wait, longest)
			continue
		}
		again.Reset(s.o.StaleIngest)
		wait = first
	}
}

// namedLocked are the blobs that references need.
func (s *Store) namedLocked() map[digest.Digest]bool {
	named := map[digest.Digest]bool{}
	for _, l := range s.refs {
		for _, d := range l.blobs {
			named[d] = true
		}
	}
	return named
}

// collect removes the blobs that no reference, pull or interrupted pull needs, and
// does again what could not be done before.
func (s *Store) collect() error {
	s.mu.Lock()
	errs := []error{s.dropKeptLocked(), s.dropStalePending(), s.forgetRemovalLocked(), s.refreshIndexLocked()}
	named := s.namedLocked()
	s.mu.Unlock()
	removed, left := 0, int64(0) // left: bytes for interrupted pulls
	errs = append(errs, s.collectRecords(), s.eachBlob(func(path string, d digest.Digest) error {
		if named[d] {
			return nil // a blob that has lost its name meanwhile is for the next run
		}
		// The lock is taken for one blob at a time, so that others wait for it briefly.
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.namedLocked()[d] {
			return nil
		}
		// Decided while nobody can hold it, so that no pull takes it for present.
		return s.holds.ifNone(d, func() error {
			size := s.sizes[d]
			if s.resumable(d) { // a pull lets go after it was interrupted
				left += size
				return nil
			}
			if err := s.removeBlobLocked(path, d); err != nil {
				return err
			}
			removed++
			s.count.collected.Add(1)
			s.count.freed.Add(uint64(size))
			return nil
		})
	}))
	if removed > 0 {
		s.o.Log.Info("unused blobs removed", "blobs", removed)
	}
	parts, err := s.collectIngest()
	return errors.Join(append(errs, err, s.leaveRoom(left+parts))...)
}

// collectIngest removes partial downloads that no pull goes on with. It gives the bytes of those
// that wait for one.
func (s *Store) collectIngest() (left int64, err error) {
	dir := filepath.Join(s.o.Root, ingestName)
	files, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, e := range files {
		if strings.HasPrefix(e.Name(), smallPrefix) {
			continue // its writer removes it
		}
		s.mu.Lock()
		d := blobOfPart(e.Name())
		if s.downloads[e.Name()] == nil && !s.holds.has(d) {
			if st, err := e.Info(); err == nil && s.resumable(d) {
				left += st.Size()
			} else {
				errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
		s.mu.Unlock()
	}
	return left, errors.Join(errs...)
}
