// Package stats tells what containers and pods use, in the messages of the CRI, and as
// the metrics that the kubelet knows from cAdvisor.
//
// All comes from files of the kernel when it is asked for, and no shim is: cgroups, the
// network namespaces of pods, /proc. None of these waits for a disk. What writable layers
// take does, so it is measured in the background (layers.go), and a call gets what was
// measured last. What the kernel does not tell is left out of an answer.
package stats

import (
	"context"
	"log/slog"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Container is what has to be known of a container.
type Container struct {
	ID      string
	Config  *runtimeapi.ContainerConfig
	Image   string // as the user named it
	Layer   string // the directory of its writable layer
	Cgroup  string // its path in every hierarchy; "": it has none, as it has ended
	Init    int    // its first process; 0: none
	Created time.Time
	Start   time.Time // zero: it has not been started
	Running bool
}

// Pod is the same of a pod.
type Pod struct {
	ID         string
	Config     *runtimeapi.PodSandboxConfig
	Cgroup     string // "": it has none of its own
	Netns      string // where its network namespace is pinned; "": it has none of its own
	Created    time.Time
	Ready      bool
	Containers []Container
}

// Node has the pods and containers, and knows how the CRI selects some of them. A filter
// may be nil. It answers from memory.
type Node interface {
	Container(id string) (Container, error)
	Containers(f *runtimeapi.ContainerStatsFilter) []Container
	Pod(id string) (Pod, error)
	Pods(f *runtimeapi.PodSandboxStatsFilter) []Pod
}

// Options are what stats are made of.
type Options struct {
	Node Node
	// Root is the directory that stands for the file system of writable layers.
	Root string
	// Measure counts what is in a directory on a disk, which may take its time.
	Measure func(ctx context.Context, dir string) (bytes, inodes uint64, err error)
	Log     *slog.Logger
}

// Collector answers calls, any number at a time.
type Collector struct {
	Options
	cpu    samples
	layers layers
}

// New makes a collector. Its owner calls Run in the background.
func New(o Options) *Collector {
	return &Collector{Options: o, layers: newLayers()}
}

// Container is ContainerStats of the CRI.
func (c *Collector) Container(id string) (*runtimeapi.ContainerStats, error) {
	one, err := c.Node.Container(id)
	if err != nil {
		return nil, err
	}
	c.layers.asked()
	return c.container(&one), nil
}

// Containers is ListContainerStats of the CRI, which lists what runs. A kubelet looks here for
// the memory that a container uses before it lowers the limit, by the name alone: an earlier
// attempt, without any, would keep it from that.
func (c *Collector) Containers(ctx context.Context, f *runtimeapi.ContainerStatsFilter,
) (list []*runtimeapi.ContainerStats, err error) {
	c.layers.asked()
	for _, one := range c.Node.Containers(f) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if one.Running {
			list = append(list, c.container(&one))
		}
	}
	return list, nil
}

// Pod is PodSandboxStats of the CRI.
func (c *Collector) Pod(id string) (*runtimeapi.PodSandboxStats, error) {
	p, err := c.Node.Pod(id)
	if err != nil {
		return nil, err
	}
	c.layers.asked()
	return c.pod(&p, interfaces([]Pod{p})[p.ID]), nil
}

// Pods is ListPodSandboxStats of the CRI.
func (c *Collector) Pods(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter,
) (list []*runtimeapi.PodSandboxStats, err error) {
	c.layers.asked()
	pods := c.Node.Pods(f)
	links := interfaces(pods)
	for _, p := range pods {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		list = append(list, c.pod(&p, links[p.ID]))
	}
	return list, nil
}
