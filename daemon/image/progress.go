package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// logEvery is how many updates of the record there are per line in the log.
const logEvery = 10

// progress is how far one pull is. A nil one is not looked at.
type progress struct {
	record string // the file; empty: there is none

	mu    sync.Mutex
	p     records.Pull // without what the layers tell
	parts map[digest.Digest]*part
	news  chan struct{} // something to tell before the next update is due
}

// part is one layer of a pull.
type part struct {
	size int64
	d    *download // it comes by this one; nil: it does not come now
	// had are the bytes that were here when the pull began with the layer. They
	// are not known before the download has its turn.
	had      int64
	hadKnown bool
	here     bool // all its bytes are in the store
	done     bool // and unpacked
}

// setPhase says what the pull is at, before it has come to the layers.
func (g *progress) setPhase(phase records.PullPhase) {
	if g != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.p.Phase = phase
	}
}

// setLayers says what the image is made of.
func (g *progress) setLayers(layers []ocispec.Descriptor) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.p.Phase = records.PullDownloading
	g.parts = map[digest.Digest]*part{}
	for _, d := range layers {
		if g.parts[d.Digest] == nil {
			g.parts[d.Digest] = &part{size: d.Size}
			g.p.TotalBytes += d.Size
		}
	}
	g.p.TotalLayers = len(g.parts)
	g.news <- struct{}{} // has room for it
}

// change changes one layer.
func (g *progress) change(d digest.Digest, f func(*part)) {
	if g != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		f(g.parts[d])
	}
}

// downloading says that a layer comes by this download.
func (g *progress) downloading(d *download) {
	g.change(d.desc.Digest, func(l *part) {
		l.d, l.here = d, false
		if now := d.status(); now.started && !l.hadKnown {
			l.had, l.hadKnown = now.n, true
		}
	})
}

// stopped says that the layer's download failed.
func (g *progress) stopped(d digest.Digest) {
	g.change(d, func(l *part) {
		l.refresh()
		l.d = nil
	})
}

// present says that a layer is in the store, or not needed there.
func (g *progress) present(d digest.Digest) {
	g.change(d, func(l *part) {
		l.here = true
		if !l.hadKnown {
			l.had, l.hadKnown = l.size, true
		}
	})
}

// finished says that a layer is complete, or that it cannot be had.
func (g *progress) finished(d digest.Digest, complete bool) {
	g.change(d, func(l *part) {
		l.refresh()
		l.d = nil
		l.here, l.done = complete, complete
	})
}

// refresh gives what is here of a layer.
func (l *part) refresh() (n int64, waiting bool, trouble string) {
	if l.d == nil {
		if l.here {
			n = l.size
		}
		return n, false, ""
	}
	now := l.d.status()
	switch {
	case now.started && !l.hadKnown:
		l.had, l.hadKnown = now.had, true
	case now.started:
		l.had = min(l.had, now.n) // a partial blob was no good, and it comes anew
	}
	return now.n, now.waiting, now.trouble
}

// snapshot gives all of it, without a Rate.
func (g *progress) snapshot() records.Pull {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.p
	var flowing, waiting int
	for _, l := range g.parts {
		n, waits, trouble := l.refresh()
		p.Bytes += n
		p.PresentBytes += min(l.had, n)
		if l.done {
			p.Layers++
		}
		if n < l.size && l.d != nil {
			flowing++
			if waits {
				waiting++
			}
		}
		if trouble != "" {
			p.Trouble = trouble
		}
	}
	switch {
	case g.parts == nil:
	case p.Bytes == p.TotalBytes:
		p.Phase = records.PullUnpacking
	case flowing > 0 && flowing == waiting:
		p.Phase = records.PullWaiting
	}
	return p
}

// self is in all records of this process.
var self = sync.OnceValue(func() rundir.Process {
	p, _ := rundir.FindProcess(os.Getpid()) // without /proc it is not known
	return p
})

// pulls are those that run.
type pulls struct {
	mu sync.Mutex
	m  map[*progress]struct{}
}

// list gives them, the oldest first.
func (p *pulls) list() (l []records.Pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range p.m {
		l = append(l, g.snapshot())
	}
	slices.SortFunc(l, func(a, b records.Pull) int { return a.Since.Compare(b.Since) })
	return l
}

// follow shows a pull in Stats, in the log and in a record, until stop is called.
func (s *Store) follow(asked, name, pod string) (g *progress, stop func()) {
	g = &progress{news: make(chan struct{}, 1), p: records.Pull{
		Ref:    name,
		Asked:  asked,
		Pod:    pod,
		Since:  time.Now().UTC(),
		Phase:  records.PullResolving,
		Daemon: self(),
	}}
	if s.o.ProgressDir != "" {
		g.record = filepath.Join(s.o.ProgressDir, fmt.Sprintf("%d-%d.json", os.Getpid(), s.count.records.Add(1)))
	}
	s.running.mu.Lock()
	s.running.m[g] = struct{}{}
	s.running.mu.Unlock()
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() { s.report(g, quit) })
	return g, func() {
		close(quit)
		done.Wait()
		s.running.mu.Lock()
		delete(s.running.m, g)
		s.running.mu.Unlock()
		if g.record != "" && os.Remove(g.record) != nil {
			s.kick() // or it was never written
		}
	}
}

// report tells about a pull until quit is closed.
func (s *Store) report(g *progress, quit <-chan struct{}) {
	path := g.record
	tick := time.NewTicker(s.o.ProgressEvery)
	defer tick.Stop()
	type point struct {
		at   time.Time
		came int64
	}
	last := []point{{time.Now(), 0}} // at most logEvery updates ago
	for n := 0; ; {
		p := g.snapshot()
		now := point{time.Now(), p.Bytes - p.PresentBytes}
		if d := now.at.Sub(last[0].at); d > 0 {
			p.Rate = max(0, int64(float64(now.came-last[0].came)/d.Seconds()))
		}
		last = append(last[max(0, len(last)-logEvery+1):], now)
		if path != "" {
			// The record is for people, so a failure is no reason to stop the pull.
			if err := record.Write(path, p, false); err != nil {
				s.o.Log.Warn("cannot tell how far a pull is", "error", err)
				path = ""
			}
		}
		if n == logEvery {
			s.logProgress(p)
			n = 0
		}
		select {
		case <-g.news:
		case <-tick.C:
			n++
		case <-quit:
			return
		}
	}
}

func (s *Store) logProgress(p records.Pull) {
	args := []any{"image", p.Ref, "phase", p.Phase}
	if p.Pod != "" {
		args = append(args, "pod", p.Pod)
	}
	if p.TotalBytes > 0 {
		args = append(args, "percent", p.Bytes*100/p.TotalBytes, "bytes", p.Bytes, "of", p.TotalBytes,
			"present", p.PresentBytes, "layers", p.Layers, "ofLayers", p.TotalLayers, "bytesPerSecond", p.Rate)
	}
	if p.Trouble != "" {
		args = append(args, "trouble", p.Trouble)
	}
	s.o.Log.Info("pulling image", append(args, "since", time.Since(p.Since).Round(time.Second))...)
}

// collectRecords removes records of pulls that have ended, which could not be removed then.
func (s *Store) collectRecords() error {
	if s.o.ProgressDir == "" {
		return nil
	}
	files, err := os.ReadDir(s.o.ProgressDir) // before the look at the pulls: one that begins has no file here
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	runs := map[string]bool{}
	s.running.mu.Lock()
	for g := range s.running.m {
		runs[filepath.Base(g.record)] = true
	}
	s.running.mu.Unlock()
	for _, f := range files {
		name, _, _ := strings.Cut(strings.TrimPrefix(f.Name(), "."), ".json") // or it is being written
		if !runs[name+".json"] {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.o.ProgressDir, f.Name())))
		}
	}
	return err
}

// openProgressDir removes what a killed process left.
func (s *Store) openProgressDir() error {
	if s.o.ProgressDir == "" {
		return nil
	}
	if err := os.RemoveAll(s.o.ProgressDir); err != nil {
		return err
	}
	return os.MkdirAll(s.o.ProgressDir, 0o700)
}
