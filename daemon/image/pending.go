package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// pending is pending/HASH.json: a pull has begun to fetch these blobs. It is
// written before the first of them and goes with the end of the pull, so that
// blobs which no reference names yet outlive an interruption, be it of the
// network or of this process, and are not fetched again. A pull that cannot
// succeed later leaves none; an abandoned one is forgotten after StaleIngest.
type pending struct {
	Ref   string          `json:"ref"`
	Blobs []digest.Digest `json:"blobs"`
	Since time.Time       `json:"since"`
	// Had are those of Blobs that are not to be had by their digest alone, and
	// have come from the repository of this reference; see ours.
	Had   []digest.Digest `json:"had,omitempty"`
	pulls int             // that run; guarded by Store.mu
	over  bool            // it keeps nothing any more, only its file is still there
}

func (s *Store) pendingPath(ref string) string {
	return filepath.Join(s.o.Root, pendingName, fileName(ref))
}

// loadPending is part of Open. A record that cannot be used costs a download.
func (s *Store) loadPending() {
	files, err := os.ReadDir(filepath.Join(s.o.Root, pendingName))
	for _, f := range files {
		var p pending
		path := filepath.Join(s.o.Root, pendingName, f.Name())
		if err := record.Read(path, &p); err != nil || path != s.pendingPath(p.Ref) {
			if !strings.HasPrefix(f.Name(), ".") { // else it was being written
				s.o.Log.Warn("record of an interrupted pull dropped", "record", path, "error", err)
			}
			os.RemoveAll(path)
			continue
		}
		if l := s.refs[p.Ref]; l != nil && slices.Contains(p.Blobs, l.Target.Digest) {
			os.Remove(path) // it had come to its end
			continue
		}
		s.pending[p.Ref] = p
	}
	if err != nil {
		s.o.Log.Warn("cannot read the records of interrupted pulls, they begin anew", "error", err)
	}
}

// beginPending notes that a pull is going to fetch blobs. It is not synced: a
// power cut may cost what was fetched, not more. What is here by an image of the
// same repository stays this pull's, also when that image is removed meanwhile.
func (s *Store) beginPending(name reference.Named, blobs []digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.broughtBy(name.Name())
	had := slices.DeleteFunc(slices.Clone(blobs), func(d digest.Digest) bool { return !known[d] })
	return s.writePending(pending{Ref: name.String(), Blobs: blobs, Since: time.Now().UTC(), Had: had, pulls: s.pending[name.String()].pulls + 1})
}

// notePending notes that a blob has come from the repository of a reference.
func (s *Store) notePending(ref string, d digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.pending[ref]
	if !ok || slices.Contains(p.Had, d) {
		return nil
	}
	p.Had = append(slices.Clone(p.Had), d)
	return s.writePending(p)
}

// writePending is called with mu held.
func (s *Store) writePending(p pending) error {
	path := s.pendingPath(p.Ref)
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		os.RemoveAll(path) // a rename would not replace it
	}
	if err := record.Write(path, p, false); err != nil {
		return err
	}
	s.pending[p.Ref] = p
	return nil
}

// endPending is called once for each beginPending, after the reference was
// written, if it ever is.
func (s *Store) endPending(ref string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pending[ref]
	p.pulls--
	s.pending[ref] = p
	if p.pulls > 0 {
		return
	}
	interrupted := errors.Is(err, ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errClosed)
	if !interrupted {
		s.dropPending(ref)
	}
}

// full says whether something failed because the disk is full.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// makeRoom lets go of all that is kept on speculation.
func (s *Store) makeRoom() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref, p := range s.pending {
		if p.pulls == 0 {
			s.dropPending(ref)
		}
	}
	s.kick()
}

// dropPending is called with mu held. Where the file cannot be removed, the
// collector tries again.
func (s *Store) dropPending(ref string) error {
	if err := os.Remove(s.pendingPath(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p := s.pending[ref]
		p.over = true
		s.pending[ref] = p
		return err
	}
	delete(s.pending, ref)
	return nil
}

// old says whether so much has passed since t, or the clock was set back by that.
func old(t time.Time, age time.Duration) bool { return time.Since(t).Abs() >= age }

// dropStalePending forgets pulls that nobody came back for. mu is held.
func (s *Store) dropStalePending() error {
	var errs []error
	for ref, p := range s.pending {
		if p.pulls == 0 && (p.over || old(p.Since, s.o.StaleIngest)) {
			errs = append(errs, s.dropPending(ref))
		}
	}
	return errors.Join(errs...)
}
