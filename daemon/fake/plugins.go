package fake

import (
	"context"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/pods"
)

// Plugins notes the calls that plugins get.
type Plugins struct {
	// Adjust, if not nil, changes the spec of a container.
	Adjust func(c *containers.Container, s *specs.Spec)

	mu    sync.Mutex
	told  []string
	fails map[string]error
	ended map[string]bool // pods and containers whose end was told
}

// Fail has a call return an error until it is told to work again.
func (p *Plugins) Fail(call string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fails == nil {
		p.fails = map[string]error{}
	}
	p.fails[call] = err
}

func (p *Plugins) note(call, name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = append(p.told, call+" "+name)
	return p.fails[call]
}

// noteEnd notes the first of all calls that tell of the end of something.
func (p *Plugins) noteEnd(call, id, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended == nil {
		p.ended = map[string]bool{}
	}
	if !p.ended[id] {
		p.told = append(p.told, call+" "+name)
	}
	p.ended[id] = true
}

// Told is the calls since the last time, each with the name of its pod or container.
func (p *Plugins) Told() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	told := p.told
	p.told = nil
	return told
}

func nameOf(c *containers.Container) string { return c.Record().Config.M.GetMetadata().GetName() }

// RunPodSandbox is noted, as the calls that follow.
func (p *Plugins) RunPodSandbox(_ context.Context, pod *pods.Pod) error {
	return p.note("RunPodSandbox", pod.Record().Config.M.GetMetadata().GetName())
}

// StopPodSandbox is noted once.
func (p *Plugins) StopPodSandbox(_ context.Context, pod *pods.Pod) {
	p.noteEnd("StopPodSandbox", pod.ID(), pod.Record().Config.M.GetMetadata().GetName())
}

// RemovePodSandbox is noted, as the end if that was not told before.
func (p *Plugins) RemovePodSandbox(ctx context.Context, pod *pods.Pod) {
	p.StopPodSandbox(ctx, pod)
	p.note("RemovePodSandbox", pod.Record().Config.M.GetMetadata().GetName())
}

// UpdatePodSandbox is noted.
func (p *Plugins) UpdatePodSandbox(_ context.Context, pod *pods.Pod, _, _ *runtimeapi.LinuxContainerResources) error {
	return p.note("UpdatePodSandbox", pod.Record().Config.M.GetMetadata().GetName())
}

// PostUpdatePodSandbox is noted.
func (p *Plugins) PostUpdatePodSandbox(_ context.Context, pod *pods.Pod) {
	p.note("PostUpdatePodSandbox", pod.Record().Config.M.GetMetadata().GetName())
}

// CreateContainer is noted.
func (p *Plugins) CreateContainer(_ context.Context, c *containers.Container,
	s *specs.Spec) (*runtimeapi.LinuxContainerResources, error) {
	if p.Adjust != nil {
		p.Adjust(c, s)
	}
	return nil, p.note("CreateContainer", nameOf(c))
}

// PostCreateContainer is noted.
func (p *Plugins) PostCreateContainer(_ context.Context, c *containers.Container) {
	p.note("PostCreateContainer", nameOf(c))
}

// StartContainer is noted.
func (p *Plugins) StartContainer(_ context.Context, c *containers.Container) error {
	return p.note("StartContainer", nameOf(c))
}

// PostStartContainer is noted.
func (p *Plugins) PostStartContainer(_ context.Context, c *containers.Container) {
	p.note("PostStartContainer", nameOf(c))
}

// UpdateContainer changes nothing.
func (p *Plugins) UpdateContainer(_ context.Context, c *containers.Container,
	r *runtimeapi.LinuxContainerResources) (*runtimeapi.LinuxContainerResources, error) {
	return r, p.note("UpdateContainer", nameOf(c))
}

// PostUpdateContainer is noted.
func (p *Plugins) PostUpdateContainer(_ context.Context, c *containers.Container) {
	p.note("PostUpdateContainer", nameOf(c))
}

// StopContainer is noted once.
func (p *Plugins) StopContainer(_ context.Context, c *containers.Container) {
	p.noteEnd("StopContainer", c.ID(), nameOf(c))
}

// RemoveContainer is noted, as the end if that was not told before.
func (p *Plugins) RemoveContainer(ctx context.Context, c *containers.Container) {
	p.StopContainer(ctx, c)
	p.note("RemoveContainer", nameOf(c))
}
