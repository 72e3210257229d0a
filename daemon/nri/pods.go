package nri

import (
	"context"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RunPodSandbox tells of a pod that is about to be ready. After an error
// RemovePodSandbox is due as well.
func (n *Plugins[P, C]) RunPodSandbox(ctx context.Context, p P) error {
	if n == nil {
		return nil
	}
	defer n.enter()()
	id := p.Record().ID
	n.pods[id] = &known[P]{of: p}
	if !n.any() {
		return nil
	}
	err := n.lib.RunPodSandbox(lasting(ctx), &api.RunPodSandboxRequest{Pod: podMessage(p)})
	return refused("RunPodSandbox", "pod", id, err)
}

// StopPodSandbox tells, once, of a pod whose containers have ended and whose network
// is still there.
func (n *Plugins[P, C]) StopPodSandbox(ctx context.Context, p P) {
	if n == nil {
		return
	}
	defer n.enter()()
	n.stopPodLocked(ctx, p.Record().ID)
}

func (n *Plugins[P, C]) stopPodLocked(ctx context.Context, id string) {
	p := n.pods[id]
	if p == nil || p.stopped {
		return
	}
	p.stopped = true
	if n.any() {
		err := n.lib.StopPodSandbox(lasting(ctx), &api.StopPodSandboxRequest{Pod: podMessage(p.of)})
		n.log(refused("StopPodSandbox", "pod", id, err))
	}
}

// RemovePodSandbox tells of the end of a pod, or of a creation that failed. It does
// nothing for one that was not told of.
func (n *Plugins[P, C]) RemovePodSandbox(ctx context.Context, p P) {
	if n == nil {
		return
	}
	defer n.enter()()
	id := p.Record().ID
	if n.pods[id] == nil {
		return
	}
	n.stopPodLocked(ctx, id)
	delete(n.pods, id)
	if n.any() {
		err := n.lib.RemovePodSandbox(lasting(ctx), &api.RemovePodSandboxRequest{Pod: podMessage(p)})
		n.log(refused("RemovePodSandbox", "pod", id, err))
	}
}

// UpdatePodSandbox tells of limits of a pod that are about to change. An error keeps
// them from it.
func (n *Plugins[P, C]) UpdatePodSandbox(ctx context.Context, p P,
	overhead, resources *runtimeapi.LinuxContainerResources) error {
	if n == nil {
		return nil
	}
	defer n.enter()()
	if !n.any() {
		return nil
	}
	_, err := n.lib.UpdatePodSandbox(lasting(ctx), &api.UpdatePodSandboxRequest{
		Pod:                    podMessage(p),
		OverheadLinuxResources: toPlugin(overhead),
		LinuxResources:         toPlugin(resources),
	})
	return refused("UpdatePodSandbox", "pod", p.Record().ID, err)
}

// PostUpdatePodSandbox tells that they have changed.
func (n *Plugins[P, C]) PostUpdatePodSandbox(ctx context.Context, p P) {
	if n == nil {
		return
	}
	defer n.enter()()
	if n.any() {
		err := n.lib.PostUpdatePodSandbox(lasting(ctx), &api.PostUpdatePodSandboxRequest{Pod: podMessage(p)})
		n.log(refused("PostUpdatePodSandbox", "pod", p.Record().ID, err))
	}
}
