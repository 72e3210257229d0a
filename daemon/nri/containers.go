package nri

import (
	"context"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CreateContainer has plugins change the spec of a container that is about to be
// created. It gives the resources that a request for what they are now would have; nil
// if none changed them. After an error, and after a creation that fails later,
// RemoveContainer is due. The caller holds no lock of a container: plugins may want others
// changed first.
func (n *Plugins[P, C]) CreateContainer(ctx context.Context, c C,
	s *specs.Spec) (*runtimeapi.LinuxContainerResources, error) {
	if n == nil {
		return nil, nil
	}
	resp, err := n.create(ctx, c, s)
	if err != nil || resp == nil {
		return nil, err
	}
	n.apply(ctx, resp.GetUpdate())
	asked := c.Record().Config.M.GetLinux().GetResources()
	now := fromPlugin(resp.GetAdjust().GetLinux().GetResources(), asked)
	if score := resp.GetAdjust().GetLinux().GetOomScoreAdj(); score != nil {
		now.OomScoreAdj = score.GetValue()
	}
	if asked == nil && proto.Size(now) == 0 || proto.Equal(now, asked) {
		return nil, nil
	}
	return now, nil
}

// create gives the answers of all plugins in one; nil if there is no plugin.
func (n *Plugins[P, C]) create(ctx context.Context, c C, s *specs.Spec) (*api.CreateContainerResponse, error) {
	defer n.enter()()
	rec := c.Record()
	n.containers[rec.ID] = &known[C]{of: c, spec: s}
	if !n.any() {
		return nil, nil
	}
	resp, err := n.lib.CreateContainer(lasting(ctx), &api.CreateContainerRequest{
		Pod:       n.podOfLocked(rec.PodID),
		Container: containerMessage(c, s),
	})
	if err != nil {
		return nil, refused("CreateContainer", "container", rec.ID, err)
	}
	if err := n.adjust(s, rec.ID, resp.GetAdjust()); err != nil {
		return nil, err
	}
	n.evictLater(resp.GetEvict())
	return resp, nil
}

// podOfLocked is the pod of a container. The caller is in.
func (n *Plugins[P, C]) podOfLocked(id string) *api.PodSandbox {
	if p := n.pods[id]; p != nil {
		return podMessage(p.of)
	}
	return &api.PodSandbox{Id: id}
}

// PostCreateContainer tells of a container that is created.
func (n *Plugins[P, C]) PostCreateContainer(ctx context.Context, c C) {
	if n == nil {
		return
	}
	defer n.enter()()
	if k := n.containers[c.Record().ID]; k != nil {
		k.spec = nil
	}
	n.log(n.tellLocked("PostCreateContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		return n.lib.PostCreateContainer(lasting(ctx), &api.PostCreateContainerRequest{Pod: p, Container: m})
	}))
}

// StartContainer tells of a container that is about to be started. An error keeps it
// from that.
func (n *Plugins[P, C]) StartContainer(ctx context.Context, c C) error {
	if n == nil {
		return nil
	}
	defer n.enter()()
	return n.tellLocked("StartContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		return n.lib.StartContainer(lasting(ctx), &api.StartContainerRequest{Pod: p, Container: m})
	})
}

// PostStartContainer tells of a container that was started.
func (n *Plugins[P, C]) PostStartContainer(ctx context.Context, c C) {
	if n == nil {
		return
	}
	defer n.enter()()
	n.log(n.tellLocked("PostStartContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		return n.lib.PostStartContainer(lasting(ctx), &api.PostStartContainerRequest{Pod: p, Container: m})
	}))
}

// tellLocked makes one call about a container that plugins know. The caller is in.
func (n *Plugins[P, C]) tellLocked(call string, c C, f func(*api.PodSandbox, *api.Container) error) error {
	rec := c.Record()
	if n.containers[rec.ID] == nil || !n.any() {
		return nil
	}
	return refused(call, "container", rec.ID, f(n.podOfLocked(rec.PodID), containerMessage(c, nil)))
}

// UpdateContainer lets plugins change limits that a container is about to get. It gives
// those that it is to have; an error keeps it from any.
func (n *Plugins[P, C]) UpdateContainer(ctx context.Context, c C,
	r *runtimeapi.LinuxContainerResources) (*runtimeapi.LinuxContainerResources, error) {
	if n == nil {
		return r, nil
	}
	defer n.enter()()
	err := n.tellLocked("UpdateContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		resp, err := n.lib.UpdateContainer(lasting(ctx), &api.UpdateContainerRequest{
			Pod:            p,
			Container:      m,
			LinuxResources: toPlugin(r),
		})
		if err != nil {
			return err
		}
		updates := resp.GetUpdate() // that of this container is the last one; nil if no plugin cares
		if last := len(updates) - 1; last >= 0 {
			if own := updates[last].GetLinux().GetResources(); own != nil {
				r = fromPlugin(own, r)
			}
			n.applyLater(updates[:last]) // the caller holds the lock of this container
		}
		n.evictLater(resp.GetEvict())
		return nil
	})
	return r, err
}

// PostUpdateContainer tells that it has them.
func (n *Plugins[P, C]) PostUpdateContainer(ctx context.Context, c C) {
	if n == nil {
		return
	}
	defer n.enter()()
	n.log(n.tellLocked("PostUpdateContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		return n.lib.PostUpdateContainer(lasting(ctx), &api.PostUpdateContainerRequest{Pod: p, Container: m})
	}))
}

// StopContainer tells, once, of a container that has ended.
func (n *Plugins[P, C]) StopContainer(ctx context.Context, c C) {
	if n == nil {
		return
	}
	defer n.enter()()
	n.stopLocked(ctx, c)
}

func (n *Plugins[P, C]) stopLocked(ctx context.Context, c C) {
	k := n.containers[c.Record().ID]
	if k == nil || k.stopped {
		return
	}
	k.stopped = true
	n.log(n.tellLocked("StopContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		resp, err := n.lib.StopContainer(lasting(ctx), &api.StopContainerRequest{Pod: p, Container: m})
		n.applyLater(resp.GetUpdate())
		return err
	}))
}

// RemoveContainer tells of a container that goes, or whose creation failed. It does
// nothing for one that was not told of.
func (n *Plugins[P, C]) RemoveContainer(ctx context.Context, c C) {
	if n == nil {
		return
	}
	defer n.enter()()
	n.stopLocked(ctx, c)
	n.log(n.tellLocked("RemoveContainer", c, func(p *api.PodSandbox, m *api.Container) error {
		return n.lib.RemoveContainer(lasting(ctx), &api.RemoveContainerRequest{Pod: p, Container: m})
	}))
	delete(n.containers, c.Record().ID)
}
