package pods_test

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// What is noted of a pod is on record, and the pod is the same for whoever asks for it
// again.
func TestUpdate(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "updated")
	const mib = 1 << 20
	overhead := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 10 * mib}
	resources := &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 100 * mib}
	for _, r := range []*runtimeapi.UpdatePodSandboxResourcesRequest{{Overhead: overhead}, {Resources: resources}, {}} {
		r.PodSandboxId = id
		must.Succeed(t, b.Pods.Update(t.Context(), r))
	}
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	got := p.Record().Config.M.Linux
	if !proto.Equal(got.Overhead, overhead) || !proto.Equal(got.Resources, resources) {
		t.Errorf("the record has %v", got)
	}
	if got.SecurityContext == nil || b.RunPod(t, "updated") != id {
		t.Errorf("it is another pod now: %v", got)
	}
	// What a kubelet reads of a cgroup v2 without limits, as it is and less the overhead of a pod.
	for _, r := range []*runtimeapi.LinuxContainerResources{
		{MemoryLimitInBytes: -1, CpuQuota: -1, CpuPeriod: 100000, CpuShares: 204},
		{MemoryLimitInBytes: -1 - 128*mib, CpuQuota: -25001, CpuPeriod: 100000, CpuShares: 2},
		{CpuQuota: 500, CpuPeriod: 100000},
	} {
		must.Succeed(t, b.Pods.Update(t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: id,
			Overhead:     overhead,
			Resources:    r,
		}))
		cfg := p.Record().Config.M
		if !proto.Equal(cfg.Linux.Resources, r) {
			t.Errorf("the record has %v, want %v", cfg.Linux.Resources, r)
		}
		must.Succeed(t, spec.ValidateSandbox(cfg)) // a checkpoint is restored with that config
	}
	period := &runtimeapi.LinuxContainerResources{CpuPeriod: 1}
	shares := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1, CpuShares: -1}
	for field, r := range map[string]*runtimeapi.UpdatePodSandboxResourcesRequest{
		"overhead.cpu_period: ":  {PodSandboxId: id, Overhead: period},
		"resources.cpu_period: ": {PodSandboxId: id, Resources: period},
		"resources.cpu_shares: ": {PodSandboxId: id, Resources: shares},
	} {
		if err := b.Pods.Update(t.Context(), r); !errors.Is(err, kind.Invalid) ||
			!strings.HasPrefix(err.Error(), field) {
			t.Errorf("got %v, want one about %s", err, field)
		}
	}
	must.Succeed(t, b.Pods.Stop(t.Context(), id))
	for id, want := range map[string]error{id: kind.State, "missing": kind.NotFound} {
		err := b.Pods.Update(t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: id})
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	must.Come(t, "the pod to go", func() bool { return b.Pods.Remove(t.Context(), id) == nil })
}
