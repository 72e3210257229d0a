package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/rundir"
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
	sum := sha256.Sum256([]byte(ref))
	return filepath.Join(s.o.Root, pendingName, hex.EncodeToString(sum[:])+".json")
}

// loadPending is part of Open. A record that cannot be used costs a download.
func (s *Store) loadPending() {
	files, err := os.ReadDir(filepath.Join(s.o.Root, pendingName))
	for _, f := range files {
		var p pending
		path := filepath.Join(s.o.Root, pendingName, f.Name())
		if err := rundir.ReadRecord(path, &p); err != nil || path != s.pendingPath(p.Ref) {
			s.o.Log.Warn("record of an interrupted pull dropped", "record", path, "error", err)
			os.Remove(path)
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
	if err := rundir.WriteRecord(s.pendingPath(ref), p, false); err != nil {
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
	if p.pulls > 0 {
		return
	}
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	interrupted := errors.Is(err, ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errClosed)
	if !interrupted || full {
		s.dropPending(ref)
	}
	if full { // others wait for room: nothing is kept on speculation
		for other, q := range s.pending {
			if q.pulls == 0 {
				s.dropPending(other)
			}
		}
		s.hungry = true
		s.kick()
	}
}

// dropPending is called with mu held.
func (s *Store) dropPending(ref string) {
	if err := os.Remove(s.pendingPath(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.o.Log.Warn("cannot remove the record of a pull", "image", ref, "error", err)
		return // as the file, so the map
	}
	delete(s.pending, ref)
}

// dropStalePending forgets pulls that nobody came back for. mu is held.
func (s *Store) dropStalePending() {
	for ref, p := range s.pending {
		if p.pulls == 0 && time.Since(p.Since) >= s.o.StaleIngest {
			s.dropPending(ref)
		}
	}
}
