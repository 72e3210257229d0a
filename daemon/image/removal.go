package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// removalName is the record of the removal under way. There is one at a time,
// as Store.mu is held meanwhile.
const removalName = "removing.json"

// removal makes the removal of an image with several references one step: where
// the process is killed between two of them, the next Open removes the others.
type removal struct {
	ID   string      `json:"id"`
	Refs []refRecord `json:"refs"`
}

// removeRefsLocked removes the records of an image, tags first: where the removal
// cannot be written down, as on a full disk, an image that is half removed
// has lost its name, not its digest, and can be removed again.
func (s *Store) removeRefsLocked(img Image) error {
	r := removal{ID: img.ID}
	for _, ref := range slices.Concat(img.RepoTags, img.RepoDigests) {
		r.Refs = append(r.Refs, s.refs[ref].refRecord)
	}
	path := filepath.Join(s.o.Root, removalName)
	if len(r.Refs) > 1 {
		if err := record.Write(path, r, false); err != nil {
			s.o.Log.Warn("cannot write down a removal: a crash may leave some of the names", "id", img.ID, "error", err)
		}
		// Also after an error: the caller knows of it, and a reference that
		// stays may be pulled again as it is.
		defer s.forgetRemovalLocked()
	}
	defer s.kick()
	for _, rec := range r.Refs {
		if err := os.Remove(s.recordPath(rec.Ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(s.refs, rec.Ref)
	}
	return nil
}

// forgetRemovalLocked removes the record: with mu held, no removal is under way.
// Where it fails the collector tries again.
func (s *Store) forgetRemovalLocked() error {
	err := os.Remove(filepath.Join(s.o.Root, removalName))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

// finishRemoval does what a killed process had begun. It is part of Open.
func (s *Store) finishRemoval() {
	path := filepath.Join(s.o.Root, removalName)
	var r removal
	err := record.Read(path, &r)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	for _, rec := range r.Refs {
		// One that was pulled since is another one.
		if l := s.refs[rec.Ref]; l != nil && l.PulledAt.Equal(rec.PulledAt) && l.Target.Digest == rec.Target.Digest {
			err = errors.Join(err, os.Remove(s.recordPath(rec.Ref)))
			delete(s.refs, rec.Ref)
		}
	}
	if err = errors.Join(err, os.RemoveAll(path)); err != nil {
		s.o.Log.Warn("cannot finish the removal of an image that was cut short, some of its names may be left",
			"id", r.ID, "error", err)
		return
	}
	s.o.Log.Info("finished the removal of an image that was cut short", "id", r.ID)
}
