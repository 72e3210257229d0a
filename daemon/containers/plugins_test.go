package containers_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// told compares the calls since the last time.
func (b *bed) told(want ...string) {
	b.t.Helper()
	if got := b.Plugins.Told(); !slices.Equal(got, want) {
		b.t.Errorf("plugins were told %v, want %v", got, want)
	}
}

// Plugins are told of each step in its order, and can change the spec.
func TestPluginsOfALife(t *testing.T) {
	b := newBed(t)
	b.Plugins.Told()
	b.Plugins.Adjust = func(c *containers.Container, s *specs.Spec) {
		if _, err := b.Containers.Find(c.ID()); !errors.Is(err, kind.NotFound) {
			t.Errorf("the container is known before plugins have seen it: %v", err)
		}
		s.Annotations = map[string]string{"by": "a plugin"}
		s.Linux.CgroupsPath += "-moved"
	}
	id := b.create("c")
	c, err := b.Containers.Find(id)
	check(t, err)
	path, err := b.Cgroups.ContainerPath("", b.podID, id)
	check(t, err)
	if got := c.Record().CgroupsPath; got != path+"-moved" {
		t.Errorf("the record has the cgroup %s", got)
	}
	b.told("CreateContainer c", "PostCreateContainer c")
	for range 2 {
		check(t, b.Containers.Start(t.Context(), id))
	}
	check(t, b.Containers.Update(t.Context(), id, &runtimeapi.LinuxContainerResources{CpuShares: 100}))
	b.told("StartContainer c", "PostStartContainer c", "UpdateContainer c", "PostUpdateContainer c")
	check(t, b.Containers.UpdateAsPluginWants(t.Context(), id, &runtimeapi.LinuxContainerResources{CpuShares: 200}))
	// Of what is refused they are not told.
	invalid := &runtimeapi.LinuxContainerResources{CpuQuota: 1}
	if err := b.Containers.Update(t.Context(), id, invalid); !errors.Is(err, kind.Invalid) {
		t.Errorf("an invalid update: %v", err)
	}
	check(t, b.Containers.Stop(t.Context(), id, 0))
	if err := b.Containers.Update(t.Context(), id, invalid); !errors.Is(err, kind.State) {
		t.Errorf("an update of one that has ended: %v", err)
	}
	b.told("StopContainer c")
	b.remove(id)
	b.told("RemoveContainer c")
}

// The end of a container is told although nobody has asked for it.
func TestPluginsOfAnEnd(t *testing.T) {
	b := newBed(t)
	id := b.create("c", "true")
	b.Plugins.Told()
	check(t, b.Containers.Start(t.Context(), id))
	must.Come(t, "the end is told", func() bool { return slices.Contains(b.Plugins.Told(), "StopContainer c") })
}

// A plugin's error is that of the call, which leaves nothing and can be repeated.
func TestPluginsFail(t *testing.T) {
	b := newBed(t)
	no := kind.Errorf(kind.Unavailable, "no")
	b.Plugins.Told()
	b.Plugins.Fail("CreateContainer", no)
	if _, err := b.Containers.Create(t.Context(), b.pod(), fake.ContainerConfig("c"), nil); !errors.Is(err, no) {
		t.Errorf("create: %v", err)
	}
	b.told("CreateContainer c", "StopContainer c", "RemoveContainer c")
	if got := b.Containers.Of(b.podID); len(got) > 0 || b.Images.Held() > 0 {
		t.Errorf("left: %v, %d images held", got, b.Images.Held())
	}
	b.Plugins.Fail("CreateContainer", nil)
	id := b.create("c")
	b.Plugins.Fail("StartContainer", no)
	if err := b.Containers.Start(t.Context(), id); !errors.Is(err, no) || b.Status(t, id).State != created {
		t.Errorf("start: %v, %s", err, b.Status(t, id).State)
	}
	b.Plugins.Fail("StartContainer", nil)
	check(t, b.Containers.Start(t.Context(), id))
	b.Plugins.Fail("UpdateContainer", no)
	r := &runtimeapi.LinuxContainerResources{CpuShares: 100}
	if err := b.Containers.Update(t.Context(), id, r); !errors.Is(err, no) {
		t.Errorf("update: %v", err)
	}
	if got := b.Status(t, id).Resources.Linux.GetCpuShares(); got != 0 {
		t.Errorf("a refused update has set %d shares", got)
	}
	b.remove(id)
}
