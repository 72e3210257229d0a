package pods

import (
	"context"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Update notes other resources and overhead of a pod that is ready. The pod's cgroup is
// the kubelet's, which has set its limits before it says so; one of our own has none.
// What is nil stays as it is.
func (m *Manager) Update(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) error {
	if err := spec.ValidatePodResources("overhead", r.GetOverhead()); err != nil {
		return err
	}
	if err := spec.ValidatePodResources("resources", r.GetResources()); err != nil {
		return err
	}
	p, err := m.Find(r.GetPodSandboxId())
	if err != nil {
		return err
	}
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return err
	}
	defer p.op.Unlock()
	if err := p.Ready(); err != nil {
		return err
	}
	cfg := proto.Clone(p.Record().Config.M).(*runtimeapi.PodSandboxConfig)
	if cfg.Linux == nil {
		cfg.Linux = &runtimeapi.LinuxPodSandboxConfig{}
	}
	if r.GetOverhead() != nil {
		cfg.Linux.Overhead = r.GetOverhead()
	}
	if r.GetResources() != nil {
		cfg.Linux.Resources = r.GetResources()
	}
	config, err := records.Encoded(cfg)
	if err != nil {
		return err
	}
	if err := m.Plugins.UpdatePodSandbox(ctx, p, r.GetOverhead(), r.GetResources()); err != nil {
		return err
	}
	if err := p.save(false, func(r *records.Pod) { r.Config = config }); err != nil {
		return err
	}
	m.Plugins.PostUpdatePodSandbox(ctx, p)
	return step.Reach(step.PodUpdated)
}
