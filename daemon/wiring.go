package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// What pods and containers ask of the other parts, in their words.

// inUse says whether a container needs a layer.
func (d *Daemon) inUse(layer digest.Digest) bool { return d.Containers.InUse(layer) }

// roots is containers.Roots.
type roots struct {
	layers *rootfs.Store
	ways   rootfs.Ways
}

func (r roots) Mount(ctx context.Context, layers []digest.Digest, dir, target string, pod *records.Pod) error {
	var m *rootfs.IDMap
	if u := pod.Userns(); u != nil {
		m = &rootfs.IDMap{
			Userns:  pod.Namespaces.User,
			HostUID: u.UIDs.HostID,
			UIDs:    u.UIDs.Length,
			HostGID: u.GIDs.HostID,
			GIDs:    u.GIDs.Length,
		}
	}
	return r.layers.Mount(ctx, layers, dir, target, m)
}

func (r roots) Unmount(target string) error { return rootfs.Unmount(target) }

func (r roots) UnmountBelow(dir string) error { return rootfs.UnmountBelow(dir) }

func (r roots) OpenWay(id, root string, owner records.Owner) (string, error) {
	return r.ways.Open(id, root, owner.GID)
}

func (r roots) CloseWay(id string) error { return r.ways.Close(id) }

func (r roots) RemoveWay(id string) error { return r.ways.Remove(id) }

func (r roots) Tmpfs(path, options string) error { return rootfs.Tmpfs(path, options) }

func (r roots) Disarm(target string) error { return rootfs.Disarm(target) }

func (r roots) Bind(root, name, at string) error { return rootfs.Bind(root, name, at) }

func (r roots) Volumes(root string, names []string, owner records.Owner, at string,
	use func(dst string) (wanted, mounted bool)) (map[string]string, error) {
	return rootfs.Volumes(root, names, owner.UID, owner.GID, at, use)
}

func (r roots) PinPID(p rundir.Process, path string) error { return containers.PinPID(p, path) }

// cgroups is containers.Cgroups.
type cgroups struct{ *placement.Manager }

func (c cgroups) Systemd() bool { return c.Driver() == placement.Systemd }

func (c cgroups) Of(cgroupsPath string) containers.Cgroup { return c.ContainerCgroups(cgroupsPath) }

func (c cgroups) Recorded(paths map[string]string) containers.Cgroup { return cgroup.Set(paths) }

// networkOfPods is pods.Network.
type networkOfPods struct{ *network.Network }

func (n networkOfPods) CreateNamespaces(id string, w records.Want) (records.Namespaces, error) {
	ns, err := n.Network.CreateNamespaces(id, w)
	return ns, sysctlError(err)
}

func (n networkOfPods) SetInterfaceSysctls(netns string, w records.Want) error {
	return sysctlError(n.Network.SetInterfaceSysctls(netns, w))
}

func sysctlError(err error) error {
	if errors.Is(err, network.ErrSysctl) {
		return kind.As(kind.Invalid, fmt.Errorf("config.linux.sysctls: %w", err))
	}
	return kind.As(kind.Unavailable, err)
}
