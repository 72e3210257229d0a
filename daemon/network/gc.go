package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

const (
	// gcTimeout bounds a garbage collection, and with it how long the first ADD
	// and DEL of a daemon may wait.
	gcTimeout = 30 * time.Second

	gcLock = ".gc" // no pod has this name, see idPattern
)

// HoldForGC keeps every ADD and DEL waiting until the returned function, which
// has to be called once, has ended: plugins would take a pod that was attached
// meanwhile for one that is gone. No other plugin may have been started before.
//
// That function has the plugins of the network in force give back what belongs
// to none of the pods whose ids are given. With collect false it only waits for
// plugins that still do so for an earlier daemon, which was killed.
func (n *Network) HoldForGC() (finish func(ctx context.Context, pods []string, collect bool) error) {
	for range maxPlugins {
		n.runs <- struct{}{}
	}
	return func(ctx context.Context, pods []string, collect bool) error {
		r := &run{net: n, path: n.lockFile(gcLock)}
		defer func() {
			for range maxPlugins - 1 {
				<-n.runs
			}
			r.end()
		}()
		if _, err := os.Lstat(r.path); !collect && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, gcTimeout)
		defer cancel()
		if err := r.acquire(ctx); err != nil {
			return err
		}
		if collect {
			if err := n.collect(ctx, r, pods); err != nil {
				return err
			}
		}
		return r.remove()
	}
}

func (n *Network) collect(ctx context.Context, r *run, pods []string) error {
	c, err := n.current()
	if err != nil {
		return err
	}
	valid := []types.GCAttachment{} // plugins get an empty list, not null
	for _, id := range pods {
		valid = append(valid, types.GCAttachment{ContainerID: id, IfName: ifName})
	}
	if err := n.cni(r).GCNetworkList(ctx, c.list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		return fmt.Errorf("network %q: %w", c.list.Name, err)
	}
	n.log.Info("the plugins gave back what belongs to no pod (CNI GC)", "network", c.list.Name, "pods", len(pods))
	return nil
}
