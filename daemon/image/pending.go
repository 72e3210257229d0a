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
	pulls int             // that run; guarded by Store.mu
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
// power cut may cost what was fetched, not more.
func (s *Store) beginPending(ref string, blobs []digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := pending{Ref: ref, Blobs: blobs, Since: time.Now().UTC(), pulls: s.pending[ref].pulls + 1}
	if err := record.Write(s.pendingPath(ref), p, false); err != nil {
		return err
	}
	s.pending[ref] = p
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
	interruptions := []error{ErrUnavailable, context.Canceled, context.DeadlineExceeded, errClosed}
	interrupted := slices.ContainsFunc(interruptions, func(i error) bool { return errors.Is(err, i) })
	if p.pulls == 0 && !interrupted {
		s.dropPendingLocked(ref)
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
			s.dropPendingLocked(ref)
		}
	}
	s.kick()
}

// dropPendingLocked forgets a pull. Where its file cannot be removed, the next
// start finds it, and forgets it in its time.
func (s *Store) dropPendingLocked(ref string) error {
	delete(s.pending, ref)
	err := os.Remove(s.pendingPath(ref))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

// old says whether so much has passed since t, or the clock was set back by that.
func old(t time.Time, age time.Duration) bool { return time.Since(t).Abs() >= age }

// dropStalePendingLocked forgets pulls that nobody came back for.
func (s *Store) dropStalePendingLocked() error {
	var errs []error
	for ref, p := range s.pending {
		if p.pulls == 0 && old(p.Since, s.o.StaleIngest) {
			errs = append(errs, s.dropPendingLocked(ref))
		}
	}
	return errors.Join(errs...)
}
