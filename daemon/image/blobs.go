package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/holdfast-cri/holdfast/proto/record"
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
	missing := func(d ocispec.Descriptor) bool { return !s.hasBlob(d) }
	return s.hasBlob(m.Config) && !slices.ContainsFunc(m.Layers, missing)
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
	if err != nil && s.removeBlobLocked(to, d) == nil {
		err = os.Rename(path, to) // a directory was in the way
	}
	if err != nil {
		return fmt.Errorf("cannot store a blob: %w", err)
	}
	s.accountLocked(d, size)
	return nil
}

// accountLocked notes the size of a blob that has its name now, or -1 of one that
// has it no more. Sizes are kept, as what is subtracted later has to be what was
// added.
func (s *Store) accountLocked(d digest.Digest, size int64) {
	if old, ok := s.sizes[d]; ok {
		delete(s.sizes, d)
		s.count.blobBytes.Add(-old)
		s.count.blobs.Add(-1)
	}
	if size >= 0 {
		s.sizes[d] = size
		s.count.blobBytes.Add(size)
		s.count.blobs.Add(1)
	}
}

// removeBlobLocked removes a blob, whatever has its name.
func (s *Store) removeBlobLocked(path string, d digest.Digest) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	s.accountLocked(d, -1)
	return nil
}

// measure counts what is there. It is part of Open.
func (s *Store) measure() error {
	return s.eachBlob(func(path string, d digest.Digest) error {
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		s.accountLocked(d, st.Size())
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
		return true // another pull has noticed, and brought a good one
	}
	return s.removeBlobLocked(path, d.Digest) == nil
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

// syncBlobNames puts the names of blobs on the disk; their content is.
func (s *Store) syncBlobNames() error {
	algorithms, err := os.ReadDir(filepath.Join(s.o.Root, blobsName))
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !a.IsDir() {
			continue // not ours; a fifo would block the open
		}
		if err := record.SyncDir(filepath.Join(s.o.Root, blobsName, a.Name())); err != nil {
			return fmt.Errorf("cannot sync the blobs: %w", err)
		}
	}
	return nil
}
