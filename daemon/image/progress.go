package image

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Stats count since Open.
type Stats struct {
	Pulls        uint64 // that ended well
	FailedPulls  uint64
	RunningPulls int
	Downloads    int    // blobs on their way, or waiting for their turn
	Bytes        uint64 // of layers that came from registries
	ResumedBytes uint64 // of layers that an interrupted download had brought
	Retries      uint64 // requests for layers that had to be repeated
	Unpacked     uint64 // layers
}

// counters are behind Stats.
type counters struct {
	pulls, failed, bytes, resumed, retries, unpacked atomic.Uint64
	running                                          atomic.Int64
}

// Stats is cheap.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	downloads := len(s.downloads)
	s.mu.Unlock()
	return Stats{
		Pulls: s.count.pulls.Load(), FailedPulls: s.count.failed.Load(), RunningPulls: int(s.count.running.Load()), Downloads: downloads,
		Bytes: s.count.bytes.Load(), ResumedBytes: s.count.resumed.Load(), Retries: s.count.retries.Load(), Unpacked: s.count.unpacked.Load(),
	}
}

// logEvery is how many updates of the record there are per line in the log.
const logEvery = 10

// progress is how far the layers of one pull are. A nil one is not looked at.
type progress struct {
	mu      sync.Mutex
	p       rundir.Pull // Bytes are of the layers that are done
	flowing map[digest.Digest]*download
}

func newProgress(asked, name string, layers []ocispec.Descriptor) *progress {
	g := &progress{p: rundir.Pull{Ref: name, Asked: asked, Since: time.Now().UTC()}, flowing: map[digest.Digest]*download{}}
	seen := map[digest.Digest]bool{}
	for _, d := range layers {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			g.p.TotalBytes += d.Size
			g.p.TotalLayers++
		}
	}
	return g
}

// flows says that a layer comes by this download.
func (g *progress) flows(d *download) {
	if g != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.flowing[d.desc.Digest] = d
	}
}

// ended says that a layer is complete, or that its download failed.
func (g *progress) ended(d ocispec.Descriptor, complete bool) {
	if g != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.flowing, d.Digest)
		if complete {
			g.p.Bytes += d.Size
			g.p.Layers++
		}
	}
}

func (g *progress) now() rundir.Pull {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.p
	for _, d := range g.flowing {
		p.Bytes += d.bytes()
	}
	return p
}

// report tells about a pull, in the log and in a record, until stop is called.
func (s *Store) report(g *progress) (stop func()) {
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		var path string
		if s.o.ProgressDir != "" {
			path = filepath.Join(s.o.ProgressDir, fmt.Sprintf("%d-%d.json", os.Getpid(), s.serial.Add(1)))
			defer os.Remove(path)
		}
		tick := time.NewTicker(s.o.ProgressEvery)
		defer tick.Stop()
		type point struct {
			at    time.Time
			bytes int64
		}
		last := []point{{time.Now(), g.now().Bytes}} // at most logEvery updates ago
		for n := 0; ; n++ {
			p := g.now()
			now := point{time.Now(), p.Bytes}
			if d := now.at.Sub(last[0].at); d > 0 {
				p.Rate = max(0, int64(float64(now.bytes-last[0].bytes)/d.Seconds()))
			}
			last = append(last[max(0, len(last)-logEvery+1):], now)
			if path != "" {
				// Nobody has to look at it, so a failure is no reason to stop.
				if err := rundir.WriteRecord(path, p, false); err != nil {
					s.o.Log.Warn("cannot tell how far a pull is", "error", err)
					path = ""
				}
			}
			if n > 0 && n%logEvery == 0 {
				s.o.Log.Info("pulling image", "image", p.Ref, "bytes", p.Bytes, "of", p.TotalBytes, "layers", p.Layers, "ofLayers", p.TotalLayers,
					"bytesPerSecond", p.Rate, "since", time.Since(p.Since).Round(time.Second))
			}
			select {
			case <-tick.C:
			case <-quit:
				return
			}
		}
	})
	return func() {
		close(quit)
		done.Wait()
	}
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
