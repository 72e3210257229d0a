package e2e

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// plugin is one of containerd's NRI, as its library makes them.
type plugin struct {
	stub.Stub
	synced chan struct{} // closed when it has taken in what there is
	gone   chan struct{} // closed when the daemon has dropped it, or has ended

	adjust func(*nri.ContainerAdjustment)
	call   func(call string) error // nil: answers at once

	mu         sync.Mutex
	calls      []string // with the id of the container or pod
	pods       []string // that there were, as the containers
	containers []string
}

// connect has a plugin connect, and waits until it has taken in what there is.
func (p *plugin) connect(t *testing.T, n *harness.Node) *plugin {
	t.Helper()
	p.synced, p.gone = make(chan struct{}), make(chan struct{})
	var err error
	p.Stub, err = stub.New(p, stub.WithPluginName("e2e"), stub.WithPluginIdx("10"),
		stub.WithSocketPath(n.NRISocket()), stub.WithOnClose(func() { close(p.gone) }))
	if err == nil {
		err = p.Start(t.Context())
	}
	check(t, err)
	t.Cleanup(p.Stop)
	<-p.synced
	return p
}

func (p *plugin) note(call, id string) error {
	p.mu.Lock()
	p.calls = append(p.calls, call+" "+id)
	p.mu.Unlock()
	if p.call == nil {
		return nil
	}
	return p.call(call)
}

// told compares the calls since the last time.
func (p *plugin) told(t *testing.T, want ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Equal(p.calls, want) {
		t.Errorf("the plugin was told %q, want %q", p.calls, want)
	}
	p.calls = nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*nri.PodSandbox, containers []*nri.Container,
) ([]*nri.ContainerUpdate, error) {
	for _, o := range pods {
		p.pods = append(p.pods, o.Id)
	}
	for _, o := range containers {
		p.containers = append(p.containers, o.Id)
	}
	close(p.synced)
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *nri.PodSandbox) error {
	return p.note("RunPodSandbox", pod.Id)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *nri.PodSandbox) error {
	return p.note("StopPodSandbox", pod.Id)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *nri.PodSandbox) error {
	return p.note("RemovePodSandbox", pod.Id)
}

func (p *plugin) CreateContainer(_ context.Context, _ *nri.PodSandbox, c *nri.Container,
) (*nri.ContainerAdjustment, []*nri.ContainerUpdate, error) {
	a := &nri.ContainerAdjustment{}
	if p.adjust != nil {
		p.adjust(a)
	}
	return a, nil, p.note("CreateContainer", c.Id)
}

func (p *plugin) StartContainer(_ context.Context, _ *nri.PodSandbox, c *nri.Container) error {
	return p.note("StartContainer", c.Id)
}

func (p *plugin) StopContainer(_ context.Context, _ *nri.PodSandbox, c *nri.Container,
) ([]*nri.ContainerUpdate, error) {
	return nil, p.note("StopContainer", c.Id)
}

func (p *plugin) RemoveContainer(_ context.Context, _ *nri.PodSandbox, c *nri.Container) error {
	return p.note("RemoveContainer", c.Id)
}

func sharesOf(id string, shares uint64) []*nri.ContainerUpdate {
	u := &nri.ContainerUpdate{ContainerId: id}
	u.SetLinuxCPUShares(shares)
	return []*nri.ContainerUpdate{u}
}

// patientNRI has a node wait for a plugin that is slow, which shares a process with all tests.
var patientNRI = harness.Options{Config: "plugin_request_timeout = \"1m\"\n"} // in the table [nri]

// What a plugin wants of a container is so, in it and in its status, also after a
// restart. It can have other limits later, unasked.
func TestNRIAdjusts(t *testing.T) {
	t.Parallel()
	n := harness.New(t, patientNRI)
	check(t, os.WriteFile(n.Path("given"), []byte("by a plugin"), 0o644))
	p := (&plugin{adjust: func(a *nri.ContainerAdjustment) {
		a.AddEnv("NEW", "value")
		a.AddMount(&nri.Mount{
			Destination: "/opt/given",
			Source:      n.Path("given"),
			Type:        "bind",
			Options:     []string{"bind", "ro"},
		})
		a.AddAnnotation("example.com/by", "a plugin")
		a.AddDevice(&nri.LinuxDevice{Path: "/dev/nothing", Type: "c", Major: 1, Minor: 3})
		a.SetLinuxCPUShares(512)
		a.SetLinuxMemoryLimit(64 * mib)
	}}).connect(t, n)
	c := n.RunPod("adjusted").Run("c", []string{"sleep", "1000"})
	wantOutput(t, c, "value\n", "sh", "-c", "echo $NEW")
	wantOutput(t, c, "by a plugin", "cat", "/opt/given")
	wantOutput(t, c, "", "sh", "-c", "echo gone >/dev/nothing; cat /dev/nothing")
	checkResources(t, c, c.Info().PID, 64*mib, 512)
	n.Restart()
	checkResources(t, c, c.Info().PID, 64*mib, 512)
	<-p.gone
	p = (&plugin{}).connect(t, n)
	if failed, err := p.UpdateContainers(sharesOf(c.ID, 256)); err != nil || len(failed) > 0 {
		t.Errorf("unasked: %v, %v", failed, err)
	}
	checkResources(t, c, c.Info().PID, 64*mib, 256)
	if failed, err := p.UpdateContainers(sharesOf("unknown", 256)); err == nil && len(failed) == 0 {
		t.Error("an update of a container that is not there succeeds")
	}
}

// A plugin that comes to the next daemon is told of all that there is, and of what
// becomes of it.
func TestNRIAfterRestart(t *testing.T) {
	t.Parallel()
	n := harness.New(t, patientNRI)
	p := (&plugin{}).connect(t, n)
	pod := n.RunPod("pod")
	lives := pod.Run("lives", []string{"sleep", "1000"})
	ends := pod.Run("ends", []string{"sleep", "1000"})
	ends.Stop(0)
	created := pod.Create("created", []string{"sleep", "1000"})
	p.told(t, "RunPodSandbox "+pod.ID, "CreateContainer "+lives.ID, "StartContainer "+lives.ID,
		"CreateContainer "+ends.ID, "StartContainer "+ends.ID, "StopContainer "+ends.ID, "CreateContainer "+created.ID)
	n.Kill()
	<-p.gone
	n.Start()
	p = (&plugin{}).connect(t, n)
	slices.Sort(p.containers)
	want := []string{lives.ID, created.ID}
	slices.Sort(want)
	if !slices.Equal(p.pods, []string{pod.ID}) || !slices.Equal(p.containers, want) {
		t.Errorf("the plugin was told of the pods %q and the containers %q, want %q and %q",
			p.pods, p.containers, []string{pod.ID}, want)
	}
	created.Start()
	created.Stop(0)
	created.Remove()
	p.told(t, "StartContainer "+created.ID, "StopContainer "+created.ID, "RemoveContainer "+created.ID)
	ends.Remove()
	p.told(t, "RemoveContainer "+ends.ID)
	pod.Remove()
	p.told(t, "StopContainer "+lives.ID, "StopPodSandbox "+pod.ID, "RemoveContainer "+lives.ID,
		"RemovePodSandbox "+pod.ID)
	n.CheckClean()
}

// A plugin that hangs or dies in a call is dropped, and the call goes on without it.
func TestNRIPluginFails(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("pod")
	for name, dies := range map[string]bool{"hangs": false, "dies": true} {
		t.Run(name, func(t *testing.T) {
			pod := pod.With(t)
			release := make(chan struct{})
			p := &plugin{adjust: func(a *nri.ContainerAdjustment) { a.AddEnv("NEW", "value") }}
			p.call = func(string) error {
				if dies {
					go p.Stop()
				}
				<-release
				return nil
			}
			p.connect(t, n)
			t.Cleanup(func() { close(release) }) // before the plugin is stopped
			c := pod.Run(name, []string{"sleep", "1000"})
			<-p.gone
			wantOutput(t, c, "\n", "sh", "-c", "echo $NEW")
			p.told(t, "CreateContainer "+c.ID)
			c.Remove()
			p.told(t)
		})
	}
}

// What a plugin refuses fails, leaves nothing, and can be had when it does not any more.
func TestNRIRefuses(t *testing.T) {
	t.Parallel()
	n := harness.New(t, patientNRI)
	var refused sync.Map
	(&plugin{call: func(call string) error {
		if _, ok := refused.Load(call); ok {
			return errors.New("not on this node")
		}
		return nil
	}}).connect(t, n)
	want := func(call string, err error) {
		t.Helper()
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", call, err)
		}
		wantError(t, err, codes.Unavailable, "not on this node")
		refused.Delete(call)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	refused.Store("RunPodSandbox", true)
	_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("pod")})
	want("RunPodSandbox", err)
	n.CheckClean()
	pod := n.RunPod("pod")
	n.Mark()
	refused.Store("CreateContainer", true)
	_, err = n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  pod.ID,
		Config:        harness.ContainerConfig("c", []string{"sleep", "1000"}),
		SandboxConfig: pod.Config,
	})
	want("CreateContainer", err)
	n.CheckClean()
	c := pod.Create("c", []string{"sleep", "1000"})
	refused.Store("StartContainer", true)
	_, err = n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID})
	want("StartContainer", err)
	if got := c.Status().State; got != cri.ContainerState_CONTAINER_CREATED {
		t.Errorf("after a refused start: %s", got)
	}
	c.Start()
	c.Remove()
}
