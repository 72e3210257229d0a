package stats

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// node has containers, and a disk that the test plays.
type node struct {
	Node

	mu         sync.Mutex
	containers []Container
	pods       []Pod
	size       map[string]uint64 // by the directory of the layer
	walks      map[string]int
	err        error
	frozen     chan struct{} // nil: it is not
}

func (n *node) Containers(*runtimeapi.ContainerStatsFilter) []Container {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]Container(nil), n.containers...)
}

func (n *node) Pods(*runtimeapi.PodSandboxStatsFilter) []Pod { return n.pods }

func (n *node) Container(id string) (Container, error) { return Container{ID: id}, nil }

func (n *node) measure(_ context.Context, dir string) (bytes, inodes uint64, err error) {
	n.mu.Lock()
	frozen := n.frozen
	n.mu.Unlock()
	if frozen != nil {
		<-frozen
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.walks[dir]++
	return n.size[dir], 1, n.err
}

// set changes the node.
func (n *node) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

func (n *node) walked(dir string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.walks[dir]
}

// layerOf is what a call tells of a layer; -1: nothing.
func layerOf(t *testing.T, c *Collector, id string) int {
	t.Helper()
	s, err := c.Container(id)
	must.Succeed(t, err)
	if s.WritableLayer == nil {
		return -1
	}
	if s.WritableLayer.FsId.Mountpoint != "/root" || s.WritableLayer.Timestamp == 0 {
		t.Errorf("got %v", s.WritableLayer)
	}
	return int(s.WritableLayer.UsedBytes.Value)
}

// bubble runs a test with a collector in the time of synctest.
func bubble(t *testing.T, f func(t *testing.T, n *node, c *Collector, stop context.CancelFunc)) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{
			containers: []Container{{ID: "a", Layer: "/a", Cgroup: "/none"}},
			size:       map[string]uint64{"/a": 10},
			walks:      map[string]int{},
		}
		c := New(Options{Node: n, Root: "/root", Measure: n.measure, Log: slog.New(slog.DiscardHandler)})
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		ended := make(chan struct{})
		go func() { defer close(ended); c.Run(ctx) }()
		synctest.Wait()
		f(t, n, c, stop)
		stop()
		<-ended
	})
}

// Layers are measured at once, and again for as long as somebody wants to know.
func TestLayers(t *testing.T) {
	bubble(t, func(t *testing.T, n *node, c *Collector, _ context.CancelFunc) {
		n.set(func() {
			n.containers = append(n.containers, Container{ID: "b", Layer: "/b", Cgroup: "/none"})
			n.size["/b"] = 20
		})
		time.Sleep(time.Hour)
		if n.walked("/a") != 1 || n.walked("/b") != 0 {
			t.Errorf("nobody asks, and there were %v walks", n.walks)
		}
		c.Added()
		synctest.Wait()
		if n.walked("/a") != 1 || n.walked("/b") != 1 {
			t.Errorf("with a container more there were %v walks", n.walks)
		}
		if layerOf(t, c, "a") != 10 || layerOf(t, c, "b") != 20 {
			t.Errorf("got %d, %d", layerOf(t, c, "a"), layerOf(t, c, "b"))
		}
		n.set(func() { n.size["/a"] = 11 })
		time.Sleep(minPeriod)
		synctest.Wait()
		if got := layerOf(t, c, "a"); got != 11 {
			t.Errorf("a while later it is %d, want 11", got)
		}
		time.Sleep(time.Hour)
		before := n.walked("/a")
		if most := int(interest/minPeriod) + 4; before < 3 || before > most {
			t.Errorf("there were %d walks, want 3 to %d", before, most)
		}
		// Nothing changes any more after the end, and what is gone is forgotten.
		n.set(func() {
			n.containers = []Container{{ID: "a", Layer: "/a"}}
			n.size["/a"] = 12
		})
		for range 10 {
			layerOf(t, c, "a")
			time.Sleep(time.Minute)
		}
		if got, walks := layerOf(t, c, "a"), n.walked("/a")-before; got != 12 || walks != 1 {
			t.Errorf("after the end it is %d, want 12, after %d walks, want 1", got, walks)
		}
		if got := layerOf(t, c, "b"); got != -1 {
			t.Errorf("what is gone has %d", got)
		}
	})
}

// A disk that stands still holds up neither calls nor the end of the daemon.
func TestLayersOnFrozenDisk(t *testing.T) {
	bubble(t, func(t *testing.T, n *node, c *Collector, stop context.CancelFunc) {
		n.set(func() { n.frozen = make(chan struct{}); n.size["/a"] = 99 })
		for range 10 {
			if got := layerOf(t, c, "a"); got != 10 {
				t.Errorf("got %d, want what was measured before", got)
			}
			time.Sleep(minPeriod)
		}
		stop()
		synctest.Wait()
		close(n.frozen)
	})
}

// Of a layer that is not measured to its end there is what is known at least.
func TestLayersInPart(t *testing.T) {
	bubble(t, func(t *testing.T, n *node, c *Collector, _ context.CancelFunc) {
		for _, step := range []struct {
			size uint64
			err  error
			want int
		}{{50, nil, 50}, {40, errors.New("too much"), 50}, {60, errors.New("too much"), 60}, {5, nil, 5}} {
			n.set(func() { n.size["/a"], n.err = step.size, step.err })
			layerOf(t, c, "a")
			time.Sleep(2 * minPeriod)
			synctest.Wait()
			if got := layerOf(t, c, "a"); got != step.want {
				t.Errorf("%d bytes, %v: got %d, want %d", step.size, step.err, got, step.want)
			}
		}
	})
}

// Only what runs is listed; a container that is asked for by its id is told of in any state.
func TestListHasWhatRuns(t *testing.T) {
	n := &node{containers: []Container{
		{ID: "created", Cgroup: "/none"},
		{ID: "running", Cgroup: "/none", Running: true},
		{ID: "ended"},
	}}
	c := New(Options{Node: n, Log: slog.New(slog.DiscardHandler)})
	list, err := c.Containers(t.Context(), nil)
	if err != nil || len(list) != 1 || list[0].Attributes.Id != "running" {
		t.Errorf("got %v, %v", list, err)
	}
	for _, one := range n.containers {
		if s, err := c.Container(one.ID); err != nil || s.Attributes.Id != one.ID {
			t.Errorf("%s: got %v, %v", one.ID, s, err)
		}
	}
}

// A pod that was stopped may share its cgroup with the next attempt: it has no metrics.
func TestMetricsOfReadyPods(t *testing.T) {
	n := &node{pods: []Pod{{ID: "stopped", Cgroup: "/none"}, {ID: "ready", Cgroup: "/none", Ready: true}}}
	list, err := New(Options{Node: n, Log: slog.New(slog.DiscardHandler)}).Metrics(t.Context())
	if err != nil || len(list) != 1 || list[0].PodSandboxId != "ready" {
		t.Errorf("got %v, %v", list, err)
	}
}
