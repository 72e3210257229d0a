package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// smallPrefix is of files in ingest/ that are written at one go.
const smallPrefix = "small-"

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.o.Root, blobsName, d.Algorithm().String(), d.Encoded())
}

// hasBlob trusts the name and the size: a blob gets its name when it is
// verified and on the disk.
func (s *Store) hasBlob(d ocispec.Descriptor) bool {
	st, err := os.Lstat(s.blobPath(d.Digest))
	return err == nil && st.Mode().IsRegular() && st.Size() == d.Size
}

// hasAll says whether the config and all layers are here.
func (s *Store) hasAll(m *ocispec.Manifest) bool {
	return s.hasBlob(m.Config) && !slices.ContainsFunc(m.Layers, func(d ocispec.Descriptor) bool { return !s.hasBlob(d) })
}

// addBlob stores a small blob that is verified already.
func (s *Store) addBlob(d ocispec.Descriptor, b []byte) error {
	if old, err := s.readBlob(d, int64(len(b))+1); err == nil && len(old) == len(b) {
		return nil // and one that was damaged is replaced
	}
	f, err := os.CreateTemp(filepath.Join(s.o.Root, ingestName), smallPrefix)
	if err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	defer os.Remove(f.Name()) // gone already if all went well
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	return s.adopt(f.Name(), d.Digest, int64(len(b)))
}

// adopt gives a blob its name. It is verified and synced.
func (s *Store) adopt(path string, d digest.Digest, size int64) error {
	to := s.blobPath(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	err := os.Rename(path, to)
	if err != nil && s.removeBlob(to, d) == nil {
		err = os.Rename(path, to) // a directory was in the way
	}
	if err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	s.account(d, size)
	return nil
}

// account notes the size of a blob that has its name now. It keeps the sizes, as
// what is subtracted later has to be what was added. mu is held.
func (s *Store) account(d digest.Digest, size int64) {
	s.unaccount(d)
	s.sizes[d] = size
	s.usage.Bytes += uint64(size)
	s.usage.Inodes++
}

func (s *Store) unaccount(d digest.Digest) {
	if size, ok := s.sizes[d]; ok {
		delete(s.sizes, d)
		s.usage.Bytes -= uint64(size)
		s.usage.Inodes--
	}
}

// removeBlob removes a blob, whatever has its name. mu is held.
func (s *Store) removeBlob(path string, d digest.Digest) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	s.unaccount(d)
	return nil
}

// measure counts what is there.
func (s *Store) measure() error {
	return s.eachBlob(func(path string, d digest.Digest) error {
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		s.account(d, st.Size())
		return nil
	})
}

// eachBlob calls f for every file among the blobs, and joins its errors.
func (s *Store) eachBlob(f func(path string, d digest.Digest) error) error {
	root := filepath.Join(s.o.Root, blobsName)
	algorithms, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range algorithms {
		if !a.IsDir() {
			continue // not ours
		}
		files, err := os.ReadDir(filepath.Join(root, a.Name()))
		if err != nil {
			errs = append(errs, err)
		}
		for _, e := range files {
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name())
			if err := f(filepath.Join(root, a.Name(), e.Name()), d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// dropIfDamaged removes a blob whose content is not what its name says.
func (s *Store) dropIfDamaged(d ocispec.Descriptor) bool {
	path := s.blobPath(d.Digest)
	f, err := os.Open(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	got, err := d.Digest.Algorithm().FromReader(f)
	if err == nil && got == d.Digest {
		return false
	}
	s.o.Log.Error("blob damaged on the disk, removed", "blob", d.Digest, "content", got, "error", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	read, err := f.Stat()
	if now, nerr := os.Lstat(path); err == nil && nerr == nil && !os.SameFile(read, now) {
		return true // whoever saw it before has brought a good one
	}
	return s.removeBlob(path, d.Digest) == nil
}

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
			s.o.Log.Warn("cannot remove unused blobs, trying again", "in", wait, "error", err)
			again.Reset(wait)
			wait = min(2*wait, longest)
			continue
		}
		again.Reset(s.o.StaleIngest)
		wait = first
	}
}

// resumes says whether an interrupted pull, or one that runs, is to bring the
// blob. mu is held.
func (s *Store) resumes(d digest.Digest) bool {
	for _, p := range s.pending {
		if !p.over && slices.Contains(p.Blobs, d) {
			return true
		}
	}
	return false
}

func (s *Store) collect() error {
	needed := func(d digest.Digest) bool { // mu is held
		for _, l := range s.refs {
			if slices.Contains(l.blobs, d) {
				return true
			}
		}
		return s.held[d] > 0 || s.resumes(d)
	}
	rerr := s.dropKept()
	s.mu.Lock()
	rerr = errors.Join(rerr, s.dropStalePending(), s.forgetRemoval(), s.refreshIndex())
	named := map[digest.Digest]bool{}
	for _, l := range s.refs {
		for _, d := range l.blobs {
			named[d] = true
		}
	}
	s.mu.Unlock()
	count := 0
	err := s.eachBlob(func(path string, d digest.Digest) error {
		if named[d] {
			return nil // or not any more: whoever took the name has called for another run
		}
		// One at a time, so that nobody waits long for the lock; and decided
		// with it held, so that no pull can take the blob for present.
		s.mu.Lock()
		defer s.mu.Unlock()
		if needed(d) {
			return nil
		}
		before := s.usage.Bytes
		if err := s.removeBlob(path, d); err != nil {
			return err
		}
		count++
		s.count.collected.Add(1)
		s.count.freed.Add(before - s.usage.Bytes)
		return nil
	})
	if count > 0 {
		s.o.Log.Info("unused blobs removed", "blobs", count)
	}
	return errors.Join(rerr, err, s.collectIngest())
}

// collectIngest removes partial downloads that no pull goes on with.
func (s *Store) collectIngest() error {
	dir := filepath.Join(s.o.Root, ingestName)
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range files {
		if strings.HasPrefix(e.Name(), smallPrefix) {
			continue // its writer removes it
		}
		s.mu.Lock()
		if s.downloads[e.Name()] == nil && !s.resumes(blobOfPart(e.Name())) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}
