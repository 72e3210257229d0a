package image

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// logEvery is how many updates of the record there are per line in the log.
const logEvery = 10

// progress is how far one pull is. A nil one is not looked at.
type progress struct {
	mu    sync.Mutex
	p     rundir.Pull // without what the layers tell
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

// is says what the pull is at, before it has come to the layers.
func (g *progress) is(phase rundir.PullPhase) {
	if g != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.p.Phase = phase
	}
}

// needs says what the image is made of.
func (g *progress) needs(layers []ocispec.Descriptor) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.p.Phase = rundir.PullDownloading
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

// flows says that a layer comes by this download.
func (g *progress) flows(d *download) {
	g.change(d.desc.Digest, func(l *part) {
		l.d, l.here = d, false
		if now := d.progress(); now.started && !l.hadKnown {
			l.had, l.hadKnown = now.n, true
		}
	})
}

// stopped says that the layer's download failed.
func (g *progress) stopped(d digest.Digest) {
	g.change(d, func(l *part) {
		l.look()
		l.d = nil
	})
}

// has says that a layer is in the store, or not needed there.
func (g *progress) has(d digest.Digest) {
	g.change(d, func(l *part) {
		l.here = true
		if !l.hadKnown {
			l.had, l.hadKnown = l.size, true
		}
	})
}

// ended says that a layer is complete, or that it cannot be had.
func (g *progress) ended(d digest.Digest, complete bool) {
	g.change(d, func(l *part) {
		l.look()
		l.d = nil
		l.here, l.done = complete, complete
	})
}

// look gives what is here of a layer.
func (l *part) look() (n int64, waiting bool, trouble string) {
	if l.d == nil {
		if l.here {
			n = l.size
		}
		return n, false, ""
	}
	now := l.d.progress()
	switch {
	case now.started && !l.hadKnown:
		l.had, l.hadKnown = now.had, true
	case now.started:
		l.had = min(l.had, now.n) // a partial blob was no good, and it comes anew
	}
	return now.n, now.waiting, now.trouble
}

func (g *progress) now() rundir.Pull {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.p
	var flowing, waiting int
	for _, l := range g.parts {
		n, waits, trouble := l.look()
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
		p.Phase = rundir.PullUnpacking
	case flowing > 0 && flowing == waiting:
		p.Phase = rundir.PullWaiting
	}
	return p
}

// self is in all records of this process.
var self = sync.OnceValue(func() rundir.Process {
	p, _ := rundir.FindProcess(os.Getpid()) // without /proc nobody knows us
	return p
})

// follow makes a pull known to whoever looks, until stop is called: in Stats, in
// the log, and in a record.
func (s *Store) follow(asked, name, pod string) (g *progress, stop func()) {
	g = &progress{news: make(chan struct{}, 1), p: rundir.Pull{Ref: name, Asked: asked, Pod: pod, Since: time.Now().UTC(), Phase: rundir.PullResolving, Daemon: self()}}
	s.mu.Lock()
	s.running[g] = struct{}{}
	s.mu.Unlock()
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() { s.report(g, quit) })
	return g, func() {
		close(quit)
		done.Wait()
		s.mu.Lock()
		delete(s.running, g)
		s.mu.Unlock()
	}
}

// report tells about a pull until quit is closed.
func (s *Store) report(g *progress, quit <-chan struct{}) {
	var path string
	if s.o.ProgressDir != "" {
		path = filepath.Join(s.o.ProgressDir, fmt.Sprintf("%d-%d.json", os.Getpid(), s.serial.Add(1)))
		defer os.Remove(path)
	}
	tick := time.NewTicker(s.o.ProgressEvery)
	defer tick.Stop()
	type point struct {
		at   time.Time
		came int64
	}
	last := []point{{time.Now(), 0}} // at most logEvery updates ago
	for n := 0; ; {
		p := g.now()
		now := point{time.Now(), p.Bytes - p.PresentBytes}
		if d := now.at.Sub(last[0].at); d > 0 {
			p.Rate = max(0, int64(float64(now.came-last[0].came)/d.Seconds()))
		}
		last = append(last[max(0, len(last)-logEvery+1):], now)
		if path != "" {
			// Nobody has to look at it, so a failure is no reason to stop.
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

func (s *Store) logProgress(p rundir.Pull) {
	args := []any{"image", p.Ref, "phase", p.Phase}
	if p.Pod != "" {
		args = append(args, "pod", p.Pod)
	}
	if p.TotalBytes > 0 {
		args = append(args, "percent", p.Bytes*100/p.TotalBytes, "bytes", p.Bytes, "of", p.TotalBytes, "present", p.PresentBytes,
			"layers", p.Layers, "ofLayers", p.TotalLayers, "bytesPerSecond", p.Rate)
	}
	if p.Trouble != "" {
		args = append(args, "trouble", p.Trouble)
	}
	s.o.Log.Info("pulling image", append(args, "since", time.Since(p.Since).Round(time.Second))...)
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
