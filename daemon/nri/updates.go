package nri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/nri/pkg/api"
)

// applyTimeout bounds what plugins want changed after one call.
const applyTimeout = 10 * time.Second

// updateContainers is a plugin that wants containers changed, unasked.
func (n *Plugins[P, C]) updateContainers(ctx context.Context, updates []*api.ContainerUpdate,
) ([]*api.ContainerUpdate, error) {
	failed := n.apply(ctx, updates)
	if len(failed) > 0 {
		return failed, fmt.Errorf("cannot update %d of %d containers; the log of the runtime says why",
			len(failed), len(updates))
	}
	return nil, nil
}

// apply changes containers as plugins want, and gives the updates that failed. The
// caller is not in, and holds no lock of a container.
func (n *Plugins[P, C]) apply(ctx context.Context, updates []*api.ContainerUpdate) (failed []*api.ContainerUpdate) {
	ctx, cancel := context.WithTimeout(lasting(ctx), applyTimeout)
	defer cancel()
	for _, u := range updates {
		if u.GetLinux().GetResources() == nil {
			continue
		}
		err := n.o.Update(ctx, u.GetContainerId(), fromPlugin(u.GetLinux().GetResources(), nil))
		if err == nil {
			continue
		}
		n.o.Log.Warn("cannot change the limits of a container as an NRI plugin wants", "container", u.GetContainerId(),
			"ignored", u.GetIgnoreFailure(), "error", err)
		if !u.GetIgnoreFailure() {
			failed = append(failed, u)
		}
	}
	return failed
}

// applyLater is apply for whoever is in, or holds the lock of a container.
func (n *Plugins[P, C]) applyLater(updates []*api.ContainerUpdate) {
	if len(updates) > 0 {
		n.o.Go(func(ctx context.Context) { n.apply(ctx, updates) })
	}
}

// evictLater ends containers as plugins want.
func (n *Plugins[P, C]) evictLater(evictions []*api.ContainerEviction) {
	for _, e := range evictions {
		n.o.Go(func(ctx context.Context) {
			n.o.Log.Warn("an NRI plugin has a container ended", "container", e.GetContainerId(), "reason",
				e.GetReason())
			if err := n.o.Evict(ctx, e.GetContainerId()); err != nil {
				n.o.Log.Warn("cannot end a container as an NRI plugin wants", "container", e.GetContainerId(), "error",
					err)
			}
		})
	}
}
