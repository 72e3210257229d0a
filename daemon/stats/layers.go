package stats

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// minPeriod is the least time from one round of measurements to the next.
	minPeriod = 10 * time.Second
	// rest is how many times as long as the last round took nothing is measured: large
	// layers cost two percent of a processor at most.
	rest = 50
	// interest is for how long after a call layers are measured.
	interest = 2 * time.Minute
	// walkLimit bounds the measurement of one layer.
	walkLimit = time.Minute
)

// layers is what writable layers took when they were measured last.
type layers struct {
	wake chan struct{} // there is something new to do; never closed

	mu    sync.Mutex
	known map[string]layer // by the id of the container
	disk  disk
	last  time.Time // when somebody asked
}

// layer is one measurement.
type layer struct {
	at            time.Time
	bytes, inodes uint64
	final         bool // the container had ended before: nothing changes any more
}

// disk is the file system of the layers.
type disk struct {
	at                       time.Time // zero: nothing is known
	device                   string
	bytes, inodes, freeNodes uint64
}

func newLayers() layers { return layers{wake: make(chan struct{}, 1), known: map[string]layer{}} }

// get gives the last measurement.
func (l *layers) get(id string) (layer, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	one, ok := l.known[id]
	return one, ok
}

func (l *layers) diskNow() disk {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.disk
}

// asked says that somebody wants to know, so that measuring goes on.
func (l *layers) asked() {
	l.mu.Lock()
	slept := time.Since(l.last) > interest
	l.last = time.Now()
	l.mu.Unlock()
	if slept {
		l.poke()
	}
}

func (l *layers) wanted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(l.last) <= interest
}

func (l *layers) poke() {
	select {
	case l.wake <- struct{}{}:
	default: // it is about to wake up anyway
	}
}

// Added says that there is a container more. Its layer is measured at once, so that
// there are figures of it from the beginning.
func (c *Collector) Added() { c.layers.poke() }

// Run measures layers until ctx ends: new ones at once, the others again and again for as
// long as somebody asks. Without calls and new containers it sleeps.
func (c *Collector) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	again := time.Now() // when those that have been measured are due
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.layers.wake:
		case <-timer.C:
		}
		all := c.layers.wanted() && !time.Now().Before(again)
		start := time.Now()
		if !c.round(ctx, all) {
			return
		}
		if all {
			again = time.Now().Add(max(minPeriod, rest*time.Since(start)))
		}
		if c.layers.wanted() {
			timer.Reset(time.Until(again))
		}
	}
}

// round measures the layers that never were, or all whose container may have changed
// them. A disk may stand still for as long as it likes: the goroutine that waits for it
// then is left alone when ctx ends, and the result is false.
func (c *Collector) round(ctx context.Context, all bool) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.measureAll(ctx, all)
	}()
	select {
	case <-done:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

func (c *Collector) measureAll(ctx context.Context, all bool) {
	l := &c.layers
	here := c.Node.Containers(nil)
	ids := map[string]bool{}
	for _, one := range here {
		ids[one.ID] = true
		old, measured := l.get(one.ID)
		if measured && (!all || old.final) || ctx.Err() != nil {
			continue
		}
		now, ok := c.measure(ctx, &one, old)
		if !ok {
			continue
		}
		l.mu.Lock()
		l.known[one.ID] = now
		l.mu.Unlock()
	}
	now := diskOf(c.Root)
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.at.After(l.disk.at) {
		l.disk = now
	}
	maps.DeleteFunc(l.known, func(id string, _ layer) bool { return !ids[id] })
}

// measure measures a layer. Of one that cannot be measured to its end the figures are
// those of the part that was, or of an earlier measurement if that says more.
func (c *Collector) measure(ctx context.Context, one *Container, old layer) (layer, bool) {
	limited, cancel := context.WithTimeout(ctx, walkLimit)
	defer cancel()
	now := layer{at: time.Now(), final: one.Cgroup == ""}
	var err error
	if now.bytes, now.inodes, err = c.Measure(limited, one.Layer); err == nil {
		return now, true
	}
	c.Log.Debug("cannot measure the writable layer of a container", "container", one.ID, "error", err)
	if ctx.Err() != nil || now.inodes == 0 {
		return layer{}, false // the daemon ends, or the container is being removed
	}
	now.bytes, now.inodes = max(now.bytes, old.bytes), max(now.inodes, old.inodes)
	return now, true
}

func diskOf(root string) (d disk) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if unix.Stat(root, &st) != nil || unix.Statfs(root, &fs) != nil {
		return d
	}
	return disk{
		at:        time.Now(),
		device:    deviceOf(fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))),
		bytes:     fs.Blocks * uint64(fs.Bsize),
		inodes:    fs.Files,
		freeNodes: fs.Ffree,
	}
}
