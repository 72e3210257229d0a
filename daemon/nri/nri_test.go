package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func (n *node) mustCreate(t *testing.T, c *container) {
	t.Helper()
	if _, err := n.CreateContainer(t.Context(), c, newSpec()); err != nil {
		t.Fatal(err)
	}
}

// A plugin hears of a life in its order, and of nothing twice.
func TestLife(t *testing.T) {
	n := open(t, nil, nil)
	p := n.connect(t, &plugin{})
	ctx := t.Context()
	pod, c := newPod("pod"), newContainer("c")
	must.Succeed(t, n.RunPodSandbox(ctx, pod))
	n.mustCreate(t, c)
	n.PostCreateContainer(ctx, c)
	must.Succeed(t, n.StartContainer(ctx, c))
	n.PostStartContainer(ctx, running(c))
	if _, err := n.UpdateContainer(ctx, c, &runtimeapi.LinuxContainerResources{}); err != nil {
		t.Fatal(err)
	}
	n.PostUpdateContainer(ctx, c)
	must.Succeed(t, n.UpdatePodSandbox(ctx, pod, nil, nil))
	n.PostUpdatePodSandbox(ctx, pod)
	for range 2 {
		n.StopContainer(ctx, exited(c))
	}
	n.StopPodSandbox(ctx, pod)
	for range 2 {
		n.RemoveContainer(ctx, c)
		n.RemovePodSandbox(ctx, pod)
	}
	same(t, "calls", p.calls(), []string{
		"RunPodSandbox pod", "CreateContainer c", "PostCreateContainer c", "StartContainer c", "PostStartContainer c",
		"UpdateContainer c", "PostUpdateContainer c", "UpdatePodSandbox pod", "PostUpdatePodSandbox pod",
		"StopContainer c", "StopPodSandbox pod", "RemoveContainer c", "RemovePodSandbox pod",
	})
}

// What is refused was told, so its end is told too, and it can be tried again.
func TestRefused(t *testing.T) {
	n := open(t, nil, nil)
	var fails sync.Map
	p := n.connect(t, &plugin{call: func(call string) error {
		if _, ok := fails.Load(call); ok {
			return errors.New("not here")
		}
		return nil
	}})
	ctx := t.Context()
	pod, c := newPod("pod"), newContainer("c")
	create := func() error {
		_, err := n.CreateContainer(ctx, c, newSpec())
		return err
	}
	for _, step := range []struct {
		call   string
		do     func() error
		undo   func()
		undone []string
	}{
		{
			"RunPodSandbox",
			func() error { return n.RunPodSandbox(ctx, pod) },
			func() { n.RemovePodSandbox(ctx, pod) },
			[]string{"StopPodSandbox pod", "RemovePodSandbox pod"},
		},
		{"CreateContainer", create, func() { n.RemoveContainer(ctx, c) }, []string{"StopContainer c",
			"RemoveContainer c"}},
		{"StartContainer", func() error { return n.StartContainer(ctx, c) }, func() {}, nil},
		{"UpdateContainer", func() error { _, err := n.UpdateContainer(ctx, c, nil); return err }, func() {}, nil},
		{"UpdatePodSandbox", func() error { return n.UpdatePodSandbox(ctx, pod, nil, nil) }, func() {}, nil},
	} {
		fails.Store(step.call, true)
		err := step.do()
		if !errors.Is(err, kind.Unavailable) || !strings.Contains(err.Error(), step.call) ||
			!strings.Contains(err.Error(), "not here") {
			t.Errorf("%s: %v", step.call, err)
		}
		p.calls()
		step.undo()
		same(t, "after "+step.call, p.calls(), step.undone)
		fails.Delete(step.call)
		if err := step.do(); err != nil {
			t.Errorf("%s again: %v", step.call, err)
		}
	}
}

// An error of a call that only tells of something changes nothing.
func TestIgnoredErrors(t *testing.T) {
	n := open(t, nil, nil)
	p := n.connect(t, &plugin{call: func(call string) error {
		if call == "RunPodSandbox" || call == "CreateContainer" {
			return nil
		}
		return errors.New("no")
	}})
	ctx := t.Context()
	pod, c := newPod("pod"), newContainer("c")
	must.Succeed(t, n.RunPodSandbox(ctx, pod))
	n.mustCreate(t, c)
	n.PostCreateContainer(ctx, c)
	n.PostStartContainer(ctx, c)
	n.RemoveContainer(ctx, c)
	n.RemovePodSandbox(ctx, pod)
	if got := len(p.calls()); got != 8 {
		t.Errorf("%d calls, want 8", got)
	}
}

// A plugin that comes is told of all that an earlier daemon left, and of what is being
// created, but not of what has ended.
func TestSynchronize(t *testing.T) {
	n := open(t, nil, func(n *node) {
		n.Adopt([]*pod{newPod("pod"), newPod("other")},
			[]*container{newContainer("created"), running(newContainer("running")), exited(newContainer("exited"))})
	})
	n.mustCreate(t, newContainer("creating"))
	p := n.connect(t, &plugin{})
	pods, containers := p.ids()
	same(t, "pods", pods, []string{"other", "pod"})
	same(t, "containers", containers, []string{"created", "creating", "running"})
	for _, c := range p.containers {
		if got := c.GetArgs(); !slices.Equal(got, []string{"sleep"}) {
			t.Errorf("%s: args %v", c.Id, got)
		}
	}
	n.StopContainer(t.Context(), exited(newContainer("exited"))) // was told by whoever saw it
	n.RemoveContainer(t.Context(), newContainer("exited"))
	n.RemoveContainer(t.Context(), newContainer("unknown"))
	same(t, "calls", p.calls(), []string{"RemoveContainer exited"})
}

// Plugins come while containers are created: each is told of each container, once.
func TestNobodyIsMissed(t *testing.T) {
	const creators, each, comers = 4, 25, 5
	n := open(t, nil, nil)
	n.connect(t, &plugin{}) // so that creations have somebody to wait for
	var work sync.WaitGroup
	for i := range creators {
		work.Go(func() {
			for j := range each {
				c := newContainer(fmt.Sprintf("%d-%d", i, j))
				if _, err := n.CreateContainer(t.Context(), c, newSpec()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var plugins []*plugin
	for range comers {
		plugins = append(plugins, n.connect(t, &plugin{}))
	}
	work.Wait()
	for i, p := range plugins {
		_, known := p.ids()
		for _, call := range p.calls() {
			known = append(known, strings.TrimPrefix(call, "CreateContainer "))
		}
		slices.Sort(known)
		if len(known) != creators*each || len(slices.Compact(known)) != creators*each {
			t.Errorf("plugin %d knows of %d containers, want %d", i, len(known), creators*each)
		}
	}
}

// A plugin that does not answer in time, or goes, is dropped, and the call goes on.
func TestDropped(t *testing.T) {
	for _, call := range []string{"RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer"} {
		for _, dies := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s dies=%v", call, dies), func(t *testing.T) {
				limit := 2 * time.Second // of the calls that are answered, too
				if dies {
					limit = time.Minute // nobody waits for one that goes
				}
				n := open(t, func(o *Options) { o.RequestTimeout = limit }, nil)
				p := &plugin{}
				release := make(chan struct{})
				p.call = func(got string) error {
					if got != call {
						return nil
					}
					if dies {
						go p.stub.Stop()
					}
					<-release
					return nil
				}
				n.connect(t, p)
				t.Cleanup(func() { close(release) }) // before the plugin is stopped
				ctx, pod, c := t.Context(), newPod("pod"), newContainer("c")
				if err := n.RunPodSandbox(ctx, pod); err != nil {
					t.Error(err)
				}
				n.mustCreate(t, c)
				if err := n.StartContainer(ctx, c); err != nil {
					t.Error(err)
				}
				n.StopContainer(ctx, c)
				<-p.gone
				n.RemoveContainer(ctx, c)
				if n.any() {
					t.Error("the plugin is still served")
				}
				calls := p.calls()
				if last := calls[len(calls)-1]; !strings.HasPrefix(last, call) {
					t.Errorf("the plugin was called after %s: %v", call, calls)
				}
			})
		}
	}
}

// One that does not take in what there is, is never served. Nobody else waits longer.
func TestHangsAtFirst(t *testing.T) {
	n := open(t, func(o *Options) { o.RegistrationTimeout = 2 * time.Second }, nil) // of the next one, too
	release := make(chan struct{})
	reached := make(chan struct{})
	p := &plugin{sync: func() []*api.ContainerUpdate {
		close(reached)
		<-release
		return nil
	}}
	n.join(t, p)
	t.Cleanup(func() { close(release) })
	<-reached
	n.mustCreate(t, newContainer("c")) // waits for the gate
	<-p.gone
	same(t, "calls", p.calls(), []string(nil))
	_, containers := n.connect(t, &plugin{}).ids()
	same(t, "containers of the next one", containers, []string{"c"})
}

func resources(shares uint64) *api.LinuxContainerUpdate {
	return &api.LinuxContainerUpdate{Resources: &api.LinuxResources{Cpu: &api.LinuxCPU{Shares: api.UInt64(shares)}}}
}

// Plugins have containers changed: when they come, in their answers, and unasked.
func TestUpdates(t *testing.T) {
	n := open(t, nil, nil)
	p := n.connect(t, &plugin{
		sync: func() []*api.ContainerUpdate {
			return []*api.ContainerUpdate{{ContainerId: "first", Linux: resources(1)}}
		},
		create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			return nil, []*api.ContainerUpdate{{ContainerId: "second", Linux: resources(2)}}
		},
		change: func(*api.LinuxResources) []*api.ContainerUpdate {
			return []*api.ContainerUpdate{
				{ContainerId: "third", Linux: resources(3)},
				{ContainerId: "c", Linux: resources(5)},
			}
		},
	})
	c := newContainer("c")
	n.mustCreate(t, c)
	asked := &runtimeapi.LinuxContainerResources{CpuShares: 4, MemoryLimitInBytes: 1 << 20}
	got, err := n.UpdateContainer(t.Context(), c, asked)
	if err != nil || got.GetCpuShares() != 5 || got.GetMemoryLimitInBytes() != 1<<20 {
		t.Errorf("the container is to have %v, %v", got, err)
	}
	failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{{ContainerId: "fourth", Linux: resources(4)}})
	if err != nil || len(failed) > 0 {
		t.Errorf("unasked: %v, %v", failed, err)
	}
	n.work.Wait()
	n.mu.Lock()
	for id, shares := range map[string]int64{"first": 1, "second": 2, "third": 3, "fourth": 4} {
		if got := n.updates[id].GetCpuShares(); got != shares {
			t.Errorf("%s got %d shares, want %d", id, got, shares)
		}
	}
	n.fail = kind.Errorf(kind.NotFound, "no such container")
	n.mu.Unlock()
	failed, err = p.stub.UpdateContainers([]*api.ContainerUpdate{
		{ContainerId: "gone", Linux: resources(1)},
		{ContainerId: "too", Linux: resources(1), IgnoreFailure: true},
	})
	if err == nil && (len(failed) != 1 || failed[0].ContainerId != "gone") {
		t.Errorf("updates that fail: %v, %v", failed, err)
	}
}

// Plugins in the directory are there before anybody is served, and get their config.
func TestLaunched(t *testing.T) {
	self, err := os.Executable()
	must.Succeed(t, err)
	n := open(t, func(o *Options) {
		for path, content := range map[string]string{
			filepath.Join(o.PluginDir, "10-mine"):      "#!/bin/sh\nexec " + self + "\n",
			filepath.Join(o.ConfigDir, "10-mine.conf"): "written",
		} {
			err := os.MkdirAll(filepath.Dir(path), 0o755)
			if err == nil {
				err = os.WriteFile(path, []byte(content), 0o755)
			}
			must.Succeed(t, err)
		}
	}, nil)
	s := newSpec()
	if _, err := n.CreateContainer(t.Context(), newContainer("c"), s); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(s.Process.Env, "CONFIG=written") {
		t.Errorf("the environment is %v", s.Process.Env)
	}
}

func TestSocket(t *testing.T) {
	n := open(t, nil, nil)
	for path, mode := range map[string]os.FileMode{n.socket: 0o600, filepath.Dir(n.socket): 0o700} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want %v", path, st.Mode(), err, mode)
		}
	}
	// Another daemon leaves it alone, and goes on without.
	open(t, func(o *Options) { o.Socket = n.socket }, nil)
	n.connect(t, &plugin{})
	n.Close()
	if _, err := net.Dial("unix", n.socket); err == nil {
		t.Error("it is served after the end")
	}
	// What a killed daemon left is replaced; what is no socket stays.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket, Net: "unix"})
	must.Succeed(t, err)
	l.SetUnlinkOnClose(false)
	l.Close()
	open(t, func(o *Options) { o.Socket = n.socket }, nil)
	// A process that is stopped, and to which no more can connect, has it all the same.
	stopped := filepath.Join(t.TempDir(), "stopped")
	listenWithoutRoom(t, stopped)
	if n := open(t, func(o *Options) { o.Socket = stopped }, nil); n.o.Socket != "" {
		t.Error("a socket was taken that another process listens at")
	}
	file := filepath.Join(t.TempDir(), "file")
	must.Succeed(t, os.WriteFile(file, []byte("mine"), 0o600))
	o := n.o
	o.Socket = file
	other, err := New[*pod, *container](o)
	if err == nil {
		err = other.Start()
	}
	if err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("with a file in the place of the socket: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("the file: %q, %v", b, err)
	}
}

// listenWithoutRoom listens at a path, and takes no connection, as many as are made.
func listenWithoutRoom(t *testing.T, path string) {
	t.Helper()
	socket := func() int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		must.Succeed(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	l, at := socket(), &unix.SockaddrUnix{Name: path}
	must.Succeed(t, errors.Join(unix.Bind(l, at), unix.Listen(l, 0)))
	for {
		if err := unix.Connect(socket(), at); err == unix.EAGAIN {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// Turned off it is nil, and does nothing.
func TestOff(t *testing.T) {
	n, err := New[*pod, *container](Options{Config: Config{Disable: true}})
	if n != nil || err != nil {
		t.Fatalf("%v, %v", n, err)
	}
	ctx, pod, c := context.Background(), newPod("pod"), newContainer("c")
	n.Adopt(nil, nil)
	r := &runtimeapi.LinuxContainerResources{CpuShares: 3}
	now, cerr := n.CreateContainer(ctx, c, newSpec())
	got, uerr := n.UpdateContainer(ctx, c, r)
	if now != nil || got != r {
		t.Errorf("%v, %v", now, got)
	}
	if err := errors.Join(n.Start(), n.RunPodSandbox(ctx, pod), cerr, n.StartContainer(ctx, c), uerr,
		n.UpdatePodSandbox(ctx, pod, nil, nil)); err != nil {
		t.Error(err)
	}
	n.PostCreateContainer(ctx, c)
	n.PostStartContainer(ctx, c)
	n.PostUpdateContainer(ctx, c)
	n.StopContainer(ctx, c)
	n.RemoveContainer(ctx, c)
	n.PostUpdatePodSandbox(ctx, pod)
	n.StopPodSandbox(ctx, pod)
	n.RemovePodSandbox(ctx, pod)
	n.Close()
}
