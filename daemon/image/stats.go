package image

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// counters are behind records.ImageStats.
type counters struct {
	bytes, resumed, retries, shared, unpacked, collected, freed atomic.Uint64
	records                                                     atomic.Uint64 // about running pulls, for their names
	downloads, blobs, blobBytes                                 atomic.Int64  // that there are now

	mu    sync.Mutex
	pulls map[string]uint64
}

const (
	resultSuccess = "success"
	resultOther   = "error"
)

// results of a pull that failed; the first that is in the error counts.
var results = []struct {
	err  error
	name string
}{
	{context.Canceled, "canceled"},
	{errClosed, "canceled"},
	{context.DeadlineExceeded, "timeout"},
	{syscall.ENOSPC, "no_space"},
	{syscall.EDQUOT, "no_space"},
	{ErrInvalidReference, "invalid"},
	{ErrRejected, "rejected"},
	{ErrNotFound, "not_found"},
	{ErrUnauthorized, "unauthorized"},
	{ErrUnsupported, "unsupported"},
	{ErrCorrupt, "corrupt"},
	{ErrUnavailable, "unavailable"},
}

func resultOf(err error) string {
	if err == nil {
		return resultSuccess
	}
	for _, r := range results {
		if errors.Is(err, r.err) {
			return r.name
		}
	}
	return resultOther
}

func (c *counters) usage() Usage {
	return Usage{Bytes: uint64(c.blobBytes.Load()), Inodes: uint64(c.blobs.Load())}
}

// pulled counts a pull that ended.
func (c *counters) pulled(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pulls == nil {
		c.pulls = map[string]uint64{}
	}
	c.pulls[resultOf(err)]++
}

// Stats is cheap: nothing is computed, and no file is read.
func (s *Store) Stats() records.ImageStats {
	c := &s.count
	st := records.ImageStats{
		Pulls:        map[string]uint64{resultSuccess: 0, resultOther: 0},
		Running:      s.running.list(),
		Downloads:    int(c.downloads.Load()),
		Bytes:        c.bytes.Load(),
		ResumedBytes: c.resumed.Load(),
		Retries:      c.retries.Load(),
		Shared:       c.shared.Load(),
		Unpacked:     c.unpacked.Load(),
		Images:       len(s.view.Load().images),
		Blobs:        uint64(c.blobs.Load()),
		BlobBytes:    uint64(c.blobBytes.Load()),
		Collected:    c.collected.Load(),
		FreedBytes:   c.freed.Load(),
	}
	for _, r := range results {
		st.Pulls[r.name] = 0
	}
	c.mu.Lock()
	maps.Copy(st.Pulls, c.pulls)
	c.mu.Unlock()
	return st
}
