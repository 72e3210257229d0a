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
// Records are read when there is something to be collected: mostly there are none.
type pending struct {
	Ref   string          `json:"ref"`
	Blobs []digest.Digest `json:"blobs"`
	Since time.Time       `json:"since"`
}

func (s *Store) pendingPath(ref string) string {
	return filepath.Join(s.o.Root, pendingName, fileName(ref))
}

// eachPending calls f for each record of a pull that runs or was interrupted. One
// that cannot be used has an error. All that f returns is joined.
func (s *Store) eachPending(f func(path string, p pending, err error) error) error {
	files, err := os.ReadDir(filepath.Join(s.o.Root, pendingName))
	for _, e := range files {
		var p pending
		path := filepath.Join(s.o.Root, pendingName, e.Name())
		rerr := record.Read(path, &p)
		if rerr == nil && path != s.pendingPath(p.Ref) {
			rerr = record.ErrDamaged
		}
		if ferr := f(path, p, rerr); ferr != nil && !errors.Is(ferr, fs.ErrNotExist) {
			err = errors.Join(err, ferr)
		}
	}
	return err
}

// cleanPending is part of Open. A record that cannot be used costs a download.
func (s *Store) cleanPending() {
	err := s.eachPending(func(path string, p pending, err error) error {
		l := s.refs[p.Ref]
		switch {
		case err == nil && (l == nil || !slices.Contains(p.Blobs, l.Target.Digest)):
			return nil
		case err != nil && !strings.HasPrefix(filepath.Base(path), "."): // else it was being written
			s.o.Log.Warn("record of an interrupted pull dropped", "record", path, "error", err)
		}
		if err == nil { // of a pull that had come to its end, but for the disk
			if err := record.SyncDir(filepath.Join(s.o.Root, refsName)); err != nil {
				return err
			}
		}
		return os.RemoveAll(path)
	})
	if err != nil {
		s.o.Log.Warn("cannot read the records of interrupted pulls, they begin anew", "error", err)
	}
}

// beginPending notes that a pull is going to fetch blobs. It is not synced: a
// power cut may cost what was fetched, not more.
func (s *Store) beginPending(ref string, blobs []digest.Digest) error {
	return record.Write(s.pendingPath(ref), pending{Ref: ref, Blobs: blobs, Since: time.Now().UTC()}, false)
}

// endPending is called after the reference was written, if it ever is. What cannot
// be removed goes when it is stale.
func (s *Store) endPending(ref string, err error) {
	interruptions := []error{ErrUnavailable, context.Canceled, context.DeadlineExceeded, errClosed}
	if !slices.ContainsFunc(interruptions, func(i error) bool { return errors.Is(err, i) }) {
		os.Remove(s.pendingPath(ref))
	}
}

// resumable says whether an interrupted pull is to go on with a blob.
func (s *Store) resumable(d digest.Digest) (found bool) {
	s.eachPending(func(_ string, p pending, err error) error {
		found = found || err == nil && slices.Contains(p.Blobs, d)
		return nil
	})
	return found
}

// full says whether something failed because the disk is full.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// makeRoom lets go of all that is kept on speculation. What pulls that run need is
// held.
func (s *Store) makeRoom() {
	s.eachPending(func(path string, _ pending, _ error) error { return os.Remove(path) })
	s.kick()
}

// old says whether so much has passed since t, or the clock was set back by that.
func old(t time.Time, age time.Duration) bool { return time.Since(t).Abs() >= age }

// dropStalePending forgets interrupted pulls that were not repeated in time.
func (s *Store) dropStalePending() error {
	return s.eachPending(func(path string, p pending, err error) error {
		if err != nil || !old(p.Since, s.o.StaleIngest) {
			return nil // or it is being written
		}
		return os.Remove(path)
	})
}

// leaveRoom forgets the interrupted pull that began first, if what all of them have left takes
// more than is free, and less than a quarter of the disk is: no image shows it, so a kubelet under
// disk pressure, which begins at 15 %, cannot remove it. The collector looks again after that. What
// pulls that run need is held.
func (s *Store) leaveRoom(left int64) error {
	var st syscall.Statfs_t
	err := syscall.Statfs(filepath.Join(s.o.Root, ingestName), &st)
	if err != nil || st.Bavail > st.Blocks/4 || uint64(left) <= st.Bavail*uint64(st.Bsize) {
		return err
	}
	oldest, since := "", time.Time{}
	err = s.eachPending(func(path string, p pending, err error) error {
		idle := slices.ContainsFunc(p.Blobs, func(d digest.Digest) bool { return !s.holds.has(d) })
		if err == nil && idle && (oldest == "" || p.Since.Before(since)) {
			oldest, since = path, p.Since
		}
		return nil
	})
	if oldest == "" {
		return err
	}
	s.o.Log.Info("interrupted pulls have left more than is free, the oldest is forgotten", "record", oldest)
	s.kick()
	return errors.Join(err, os.Remove(oldest))
}
