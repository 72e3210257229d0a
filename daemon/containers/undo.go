package containers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// What is left of a checkpoint is of two kinds. A container may be frozen: until that is
// undone, no other checkpoint of it is made. Files may be left in a directory that somebody
// named, which may be out of reach: that holds nothing back, and is tried again for as long
// as there is the container.

const (
	// maxLeftover bounds the files that one container remembers.
	maxLeftover = 256
	// dropTimeout bounds how long anybody waits for directories that somebody named.
	dropTimeout = 2 * time.Second
)

// End lets go of the container, which runs. Files of a checkpoint that is not kept are
// removed. What cannot be undone now is undone in the background; then nothing is kept, and
// the error says why.
func (s *Snapshot) End(keep bool) error {
	c := s.c
	ctx, cancel := context.WithTimeout(context.Background(), thawTimeout)
	defer cancel()
	var files []records.File
	if rec := c.Record(); rec.Checkpoint != nil {
		files = endedFiles(rec.Checkpoint, keep)
	}
	err := c.undoCheckpointLocked(ctx, keep)
	c.interrupt.Store(nil)
	c.op.Unlock()
	over, ferr := false, err
	if err == nil {
		// Those of earlier checkpoints are for the background.
		over, ferr = c.dropLeft(ctx, files)
	}
	if ferr != nil {
		c.m.Log.Error("a checkpoint is not cleared away yet; trying again", "container", c.ID(), "error", ferr)
	}
	if !over {
		c.m.EndCheckpoint(c)
	}
	return err
}

// endedFiles are the files of a checkpoint that is over.
func endedFiles(c *records.Checkpoint, keep bool) []records.File {
	files := slices.Clone(c.Files)
	for i := range files {
		files[i].Kept = keep
	}
	return files
}

// undoCheckpointLocked makes sure that the container runs and that nothing but perhaps files
// elsewhere is left of a checkpoint, and notes that. The caller holds op.
func (c *Container) undoCheckpointLocked(ctx context.Context, keep bool) error {
	var errs []error
	if c.Seen().Exit == nil {
		err := c.call(ctx, func() error { return c.client.Thaw(ctx, thawTimeout) })
		if err != nil && !c.readExit() {
			errs = append(errs, err)
		}
	}
	errs = append(errs, os.RemoveAll(c.checkpointDir()))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	rec := c.Record()
	if rec.Checkpoint == nil {
		return nil
	}
	left := slices.Concat(rec.Leftover, endedFiles(rec.Checkpoint, keep))
	left = left[max(0, len(left)-maxLeftover):]
	// It has to be on the disk: the next daemon would remove the files of a checkpoint that
	// somebody was told of.
	return c.save(func(r *records.Container) { r.Checkpoint, r.Leftover = nil, left })
}

// removeFiles removes files that are not to be there, and gives those that may be left. Whoever
// looks into a directory that does not answer stays there, one for each file, and is waited for
// no longer than dropTimeout.
func (m *Manager) removeFiles(list []records.File) (left []records.File, err error) {
	var answers []<-chan singleflight.Result
	for _, f := range list {
		answers = append(answers, m.leftovers.DoChan(fmt.Sprint(f), func() (any, error) {
			return nil, checkpoint.Remove(f)
		}))
	}
	late, cancel := context.WithTimeout(context.Background(), dropTimeout)
	defer cancel()
	for i, f := range list {
		if ferr := answered(late, f, answers[i]); ferr != nil {
			left, err = append(left, f), errors.Join(err, ferr)
		}
	}
	return left, err
}

// answered waits for an answer until ctx ends, and takes one that is there then.
func answered(ctx context.Context, f records.File, answer <-chan singleflight.Result) error {
	select {
	case r := <-answer:
		return r.Err
	case <-ctx.Done():
	}
	select {
	case r := <-answer:
		return r.Err
	default:
		return fmt.Errorf("the directory of %.200q does not answer", f.Path)
	}
}

// EndCheckpoint undoes in the background a checkpoint that an earlier daemon, or an earlier
// call, has left. Its caller got no answer.
func (m *Manager) EndCheckpoint(c *Container) {
	if !c.undoing.CompareAndSwap(false, true) {
		return // whoever does it goes on until nothing is left
	}
	m.Go(func(ctx context.Context) {
		const first, last = 50 * time.Millisecond, 10 * time.Second
		for wait := first; ; wait = min(2*wait, last) {
			over, err := c.endCheckpoint(ctx)
			if over || ctx.Err() != nil {
				return
			}
			if err != nil {
				m.Log.Warn("a checkpoint that was cut short is not undone yet", "container", c.ID(), "error", err)
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
	})
}

// endCheckpoint is one attempt of EndCheckpoint. It says whether there is nothing left to do.
func (c *Container) endCheckpoint(ctx context.Context) (over bool, err error) {
	files, err := c.thawLeft(ctx)
	over, ferr := c.dropLeft(ctx, files)
	return over, errors.Join(err, ferr)
}

// dropLeft removes files that are not to be there. It says whether nothing is to be done any
// more. The caller does not hold op, for which others would wait.
func (c *Container) dropLeft(ctx context.Context, files []records.File) (over bool, err error) {
	left, err := c.m.removeFiles(files)
	over, nerr := c.forgetFiles(ctx, files, left)
	return over, errors.Join(err, nerr)
}

// thawLeft undoes all but the files of a checkpoint, and gives these.
func (c *Container) thawLeft(ctx context.Context) (files []records.File, err error) {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return nil, err
	}
	defer c.op.Unlock()
	if rec := c.Record(); rec.Checkpoint != nil && rec.Phase != records.ContainerRemoving {
		ctx, cancel := context.WithTimeout(ctx, thawTimeout)
		defer cancel()
		err = c.undoCheckpointLocked(ctx, false)
	}
	return c.Record().Leftover, err
}

// forgetFiles writes down that of some files only those that are left may be there. It says
// whether nothing is to be done any more.
func (c *Container) forgetFiles(ctx context.Context, files, left []records.File) (over bool, err error) {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return false, err
	}
	defer c.op.Unlock()
	rec := c.Record()
	if over = c.removed || rec.Phase == records.ContainerRemoving; over {
		return true, nil // dropFiles has them
	}
	still := slices.DeleteFunc(slices.Clone(rec.Leftover), func(f records.File) bool {
		return slices.Contains(files, f) && !slices.Contains(left, f)
	})
	if len(still) < len(rec.Leftover) {
		if err := c.save(func(r *records.Container) { r.Leftover = still }); err != nil {
			return false, err
		}
	}
	over = rec.Checkpoint == nil && len(still) == 0
	if over {
		c.undoing.Store(false)
	}
	return over, nil
}

// dropFiles removes the files of checkpoints of a container that goes. Those that cannot be
// removed now stay: nothing remembers them any more.
func (c *Container) dropFiles() {
	rec := c.Record()
	list := slices.Clone(rec.Leftover)
	if rec.Checkpoint != nil {
		list = append(list, rec.Checkpoint.Files...)
	}
	if _, err := c.m.removeFiles(list); err != nil {
		c.m.Log.Error("files of a checkpoint are left", "container", c.ID(), "error", err)
	}
}
