package pods_test

import (
	"errors"
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// The containers of a pod end before it, for plugins too.
func TestPluginsOfALife(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	b.Run(t, id, fake.ContainerConfig("c"))
	b.Plugins.Told()
	for range 2 {
		must.Succeed(t, b.Pods.Stop(t.Context(), id))
	}
	if got, want := b.Plugins.Told(), []string{"StopContainer c", "StopPodSandbox pod"}; !slices.Equal(got, want) {
		t.Errorf("the stop told %v, want %v", got, want)
	}
	b.remove(id)
	if got, want := b.Plugins.Told(), []string{"RemoveContainer c", "RemovePodSandbox pod"}; !slices.Equal(got, want) {
		t.Errorf("the removal told %v, want %v", got, want)
	}
}

// A plugin that refuses a pod leaves nothing of it, and the call can be repeated.
func TestPluginRefusesPod(t *testing.T) {
	b := newBed(t)
	no := kind.Errorf(kind.Unavailable, "no")
	b.Plugins.Fail("RunPodSandbox", no)
	if _, err := b.Pods.Run(t.Context(), fake.PodConfig("pod"), ""); !errors.Is(err, no) {
		t.Errorf("run: %v", err)
	}
	want := []string{"RunPodSandbox pod", "StopPodSandbox pod", "RemovePodSandbox pod"}
	if got := b.Plugins.Told(); !slices.Equal(got, want) {
		t.Errorf("plugins were told %v, want %v", got, want)
	}
	b.clean()
	b.Plugins.Fail("RunPodSandbox", nil)
	b.remove(b.RunPod(t, "pod"))
}

// A plugin is told of other limits of a pod, and may refuse them.
func TestPluginsOfAnUpdate(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	no := kind.Errorf(kind.Unavailable, "no")
	b.Plugins.Told()
	b.Plugins.Fail("UpdatePodSandbox", no)
	update := func(shares int64) error {
		return b.Pods.Update(t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: id,
			Resources:    &runtimeapi.LinuxContainerResources{CpuShares: shares},
		})
	}
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	shares := func() int64 { return p.Record().Config.M.GetLinux().GetResources().GetCpuShares() }
	if err := update(100); !errors.Is(err, no) || shares() != 0 {
		t.Errorf("refused: %v, %d shares", err, shares())
	}
	b.Plugins.Fail("UpdatePodSandbox", nil)
	if err := update(200); err != nil || shares() != 200 {
		t.Errorf("not refused: %v, %d shares", err, shares())
	}
	want := []string{"UpdatePodSandbox pod", "UpdatePodSandbox pod", "PostUpdatePodSandbox pod"}
	if got := b.Plugins.Told(); !slices.Equal(got, want) {
		t.Errorf("plugins were told %v, want %v", got, want)
	}
}
