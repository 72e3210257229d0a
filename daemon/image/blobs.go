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

// addBlob stores a small blob that is verified already.
func (s *Store) addBlob(d ocispec.Descriptor, b []byte) error {
	if s.hasBlob(d) {
		return nil
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
	s.forget(to)
	if err := os.Rename(path, to); err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	s.usage.Bytes += uint64(size)
	s.usage.Inodes++
	return nil
}

// forget takes a blob that is going to be removed or replaced out of the
// account. mu is held.
func (s *Store) forget(path string) {
	if st, err := os.Lstat(path); err == nil {
		s.usage.Bytes -= uint64(st.Size())
		s.usage.Inodes--
	}
}

// measure counts what is there.
func (s *Store) measure() error {
	return s.eachBlob(func(path string, d digest.Digest) error {
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		s.usage.Bytes += uint64(st.Size())
		s.usage.Inodes++
		return nil
	})
}

// eachBlob calls f for every file among the blobs.
func (s *Store) eachBlob(f func(path string, d digest.Digest) error) error {
	root := filepath.Join(s.o.Root, blobsName)
	algorithms, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		files, err := os.ReadDir(filepath.Join(root, a.Name()))
		if err != nil {
			return err
		}
		for _, e := range files {
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), e.Name())
			if err := f(filepath.Join(root, a.Name(), e.Name()), d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// dropIfDamaged removes a blob whose content is not what its name says.
func (s *Store) dropIfDamaged(d ocispec.Descriptor) bool {
	f, err := os.Open(s.blobPath(d.Digest))
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
	s.forget(s.blobPath(d.Digest))
	return os.Remove(s.blobPath(d.Digest)) == nil
}

// kick wakes the collector.
func (s *Store) kick() {
	select {
	case s.wake <- struct{}{}:
	default: // awake already
	}
}

// collector removes what nothing refers to: after Open, a removal, a pull.
func (s *Store) collector() {
	for {
		select {
		case <-s.wake:
		case <-s.ctx.Done():
			return
		}
		if err := s.collect(); err != nil {
			s.o.Log.Warn("cannot remove unused blobs", "error", err)
		}
	}
}

func (s *Store) collect() error {
	needed := func(d digest.Digest) bool { // mu is held
		if s.held[d] > 0 || s.downloads[d] != nil {
			return true
		}
		for _, l := range s.refs {
			if slices.Contains(l.blobs, d) {
				return true
			}
		}
		for _, p := range s.pending {
			if slices.Contains(p.Blobs, d) {
				return true
			}
		}
		return false
	}
	s.mu.Lock()
	s.dropStalePending()
	stale := s.o.StaleIngest
	if s.hungry {
		s.hungry, stale = false, 0
	}
	s.mu.Unlock()
	count := 0
	err := s.eachBlob(func(path string, d digest.Digest) error {
		// One at a time, so that nobody waits long for the lock; and decided
		// with it held, so that no pull can take the blob for present.
		s.mu.Lock()
		defer s.mu.Unlock()
		if needed(d) {
			return nil
		}
		s.forget(path)
		count++
		return os.Remove(path)
	})
	if count > 0 {
		s.o.Log.Info("unused blobs removed", "blobs", count)
	}
	return errors.Join(err, s.collectIngest(stale))
}

// collectIngest removes partial downloads of that age that nobody came back for.
func (s *Store) collectIngest(stale time.Duration) error {
	dir := filepath.Join(s.o.Root, ingestName)
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range files {
		st, err := e.Info()
		if err != nil || time.Since(st.ModTime()) < stale || strings.HasPrefix(e.Name(), smallPrefix) {
			continue // small ones are being written, or go with the next start
		}
		d := digest.Digest(strings.Replace(e.Name(), "-", ":", 1))
		s.mu.Lock()
		if s.downloads[d] == nil {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}
