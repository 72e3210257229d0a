package nri

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
	"github.com/holdfast-cri/holdfast/tests/refusals"
)

// A process that the daemon's part started as a plugin becomes one.
func TestMain(m *testing.M) {
	if os.Getenv(api.PluginNameEnvVar) == "" {
		os.Exit(refusals.Tests{}.Main(m.Run))
	}
	s, err := stub.New(&launched{})
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		os.Exit(1)
	}
}

// launched gives each container its config as a variable.
type launched struct{ config string }

func (l *launched) Configure(_ context.Context, config, _, _ string) (stub.EventMask, error) {
	l.config = config
	return 0, nil
}

func (l *launched) CreateContainer(context.Context, *api.PodSandbox, *api.Container,
) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a := &api.ContainerAdjustment{}
	a.AddEnv("CONFIG", l.config)
	return a, nil, nil
}

type pod struct{ rec *records.Pod }

func (p *pod) Record() *records.Pod { return p.rec }
func (p *pod) PID() int             { return 7 }

func newPod(id string) *pod {
	config, _ := records.Encoded(&runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "name-" + id, Namespace: "ns", Uid: "uid"},
		Labels:   map[string]string{"l": "v"},
	})
	return &pod{&records.Pod{
		ID:         id,
		Config:     config,
		Handler:    "runc",
		BootID:     rundir.BootID(),
		Phase:      records.PodReady,
		Namespaces: records.Namespaces{Net: "/net"},
		Network:    &records.Network{Result: records.Result{IPs: []string{"10.0.0.7"}}},
	}}
}

type container struct {
	rec  *records.Container
	seen records.Seen
}

func (c *container) Record() *records.Container { return c.rec }
func (c *container) Seen() *records.Seen        { return &c.seen }

func (c *container) Spec() json.RawMessage {
	b, _ := json.Marshal(newSpec())
	return b
}

func newContainer(id string) *container {
	config, _ := records.Encoded(&runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "name-" + id},
		Image:    &runtimeapi.ImageSpec{Image: "id", UserSpecifiedImage: "image:1"},
	})
	return &container{rec: &records.Container{
		ID:        id,
		PodID:     "pod",
		Config:    config,
		CreatedAt: time.Unix(1, 0),
		ImageID:   "sha256:config",
		ImageRef:  "image@sha256:manifest",
	}}
}

func running(c *container) *container {
	c.seen.Phase, c.seen.Init.PID = rundir.PhaseRunning, 42
	return c
}

func exited(c *container) *container {
	c.seen.Exit = &rundir.Exit{Code: 3, ExitedAt: time.Unix(9, 0)}
	return c
}

// newSpec is as small as that of a container gets.
func newSpec() *specs.Spec {
	return &specs.Spec{
		Process: &specs.Process{
			Args:    []string{"sleep"},
			Env:     []string{"A=1", "B=2"},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1, Soft: 1}},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/data", Source: "/old"}},
		Linux:  &specs.Linux{CgroupsPath: "/pods/c"},
	}
}

// node is a daemon's part, and what it asked of others.
type node struct {
	*Plugins[*pod, *container]
	socket string

	mu      sync.Mutex
	work    sync.WaitGroup
	updates map[string]*runtimeapi.LinuxContainerResources
	evicted []string
	fail    error // of Update
}

// open starts one in which nothing is known, unless prepare says so.
func open(t *testing.T, change func(*Options), prepare func(*node)) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{socket: filepath.Join(dir, "nri", "nri.sock"), updates: map[string]*runtimeapi.LinuxContainerResources{}}
	o := Options{
		Config: Config{
			Socket:              n.socket,
			PluginDir:           filepath.Join(dir, "plugins"),
			ConfigDir:           filepath.Join(dir, "conf.d"),
			RegistrationTimeout: time.Minute,
			RequestTimeout:      time.Minute,
			Version:             "1.2.3",
		},
		Update: n.update,
		Evict: func(_ context.Context, id string) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.evicted = append(n.evicted, id)
			return nil
		},
		Go:  func(f func(context.Context)) { n.work.Go(func() { f(context.Background()) }) },
		Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	var err error
	if n.Plugins, err = New[*pod, *container](o); err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(n)
	}
	must.Succeed(t, n.Start())
	t.Cleanup(func() {
		n.Close()
		n.work.Wait()
	})
	return n
}

func (n *node) update(_ context.Context, id string, r *runtimeapi.LinuxContainerResources) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.updates[id] = r
	return n.fail
}

// plugin is a real one, which notes what it is told. What is nil answers at once.
type plugin struct {
	stub   stub.Stub
	synced chan struct{} // closed when it has been told of all that there is
	gone   chan struct{} // closed when its connection is

	mu         sync.Mutex
	told       []string
	pods       []*api.PodSandbox
	containers []*api.Container
	last       *api.Container

	sync   func() []*api.ContainerUpdate
	call   func(call string) error
	create func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
	change func(*api.LinuxResources) []*api.ContainerUpdate
}

// connect has a plugin connect, and waits until it is served.
func (n *node) connect(t *testing.T, p *plugin) *plugin {
	t.Helper()
	n.join(t, p)
	<-p.synced
	n.enter()() // waits until the library is done with it
	return p
}

// join has a plugin connect.
func (n *node) join(t *testing.T, p *plugin) {
	t.Helper()
	p.synced, p.gone = make(chan struct{}), make(chan struct{})
	var err error
	p.stub, err = stub.New(p, stub.WithPluginName("test"), stub.WithPluginIdx("10"), stub.WithSocketPath(n.socket),
		stub.WithOnClose(func() { close(p.gone) }))
	if err == nil {
		err = p.stub.Start(t.Context())
	}
	must.Succeed(t, err)
	t.Cleanup(p.stub.Stop)
}

func (p *plugin) note(call, id string) error {
	p.mu.Lock()
	p.told = append(p.told, call+" "+id)
	p.mu.Unlock()
	if p.call == nil {
		return nil
	}
	return p.call(call)
}

// calls are those since the last time.
func (p *plugin) calls() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	told := p.told
	p.told = nil
	return told
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container,
) (updates []*api.ContainerUpdate, err error) {
	p.mu.Lock()
	p.pods, p.containers = pods, containers
	p.mu.Unlock()
	if p.sync != nil {
		updates = p.sync()
	}
	close(p.synced)
	return updates, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RunPodSandbox", pod.Id)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("StopPodSandbox", pod.Id)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RemovePodSandbox", pod.Id)
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.note("UpdatePodSandbox", pod.Id)
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("PostUpdatePodSandbox", pod.Id)
}

func (p *plugin) CreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container,
) (a *api.ContainerAdjustment, updates []*api.ContainerUpdate, err error) {
	p.mu.Lock()
	p.last = c
	p.mu.Unlock()
	if p.create != nil {
		a, updates = p.create(c)
	}
	return a, updates, p.note("CreateContainer", c.Id)
}

func (p *plugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostCreateContainer", c.Id)
}

func (p *plugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("StartContainer", c.Id)
}

func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostStartContainer", c.Id)
}

func (p *plugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, r *api.LinuxResources,
) (updates []*api.ContainerUpdate, err error) {
	if p.change != nil {
		updates = p.change(r)
	}
	return updates, p.note("UpdateContainer", c.Id)
}

func (p *plugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostUpdateContainer", c.Id)
}

func (p *plugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container,
) ([]*api.ContainerUpdate, error) {
	return nil, p.note("StopContainer", c.Id)
}

func (p *plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("RemoveContainer", c.Id)
}

// ids are those that a plugin was told of when it came.
func (p *plugin) ids() (pods, containers []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.pods {
		pods = append(pods, o.Id)
	}
	for _, o := range p.containers {
		containers = append(containers, o.Id)
	}
	slices.Sort(pods)
	slices.Sort(containers)
	return pods, containers
}
