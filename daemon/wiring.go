package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/cdi"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/nri"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/pods"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/stats"
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

func (r roots) Mount(ctx context.Context, layers []digest.Digest, dir, target string, pod *records.Pod,
	label string) error {
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
	return treeError(r.layers.Mount(ctx, layers, dir, target, m, label))
}

func (r roots) CheckRelabel(path string) error { return rootfs.CheckRelabel(path) }

func (r roots) Relabel(ctx context.Context, path, label string) error {
	return rootfs.Relabel(ctx, path, label)
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

func (r roots) Volumes(ctx context.Context, root string, names []string, owner records.Owner, at string,
	use func(dst string) (wanted, mounted bool)) (map[string]string, error) {
	return rootfs.Volumes(ctx, root, names, owner.UID, owner.GID, at, use)
}

func (r roots) Diff(ctx context.Context, dir string, w io.Writer) error {
	return treeError(rootfs.Diff(ctx, dir, w, r.layers.Limits))
}

func (r roots) Restore(ctx context.Context, layers []digest.Digest, dir string, streams ...io.Reader) error {
	return treeError(r.layers.Restore(ctx, layers, dir, streams...))
}

// treeError gives an error about a tree of files its kind.
func treeError(err error) error {
	switch {
	case errors.Is(err, rootfs.ErrNoDiff):
		return kind.As(kind.State, err)
	case errors.Is(err, rootfs.ErrBadLayer):
		return kind.As(kind.Invalid, err)
	}
	return kind.As(kind.Unavailable, err)
}

// trees is pods.Trees.
type trees struct{ layers *rootfs.Store }

func (t trees) Diff(ctx context.Context, dir string, w io.Writer) error {
	return treeError(rootfs.Archive(ctx, dir, w, t.layers.Limits))
}

func (t trees) Apply(ctx context.Context, dir string, r io.Reader) error {
	return treeError(rootfs.Extract(ctx, dir, r, t.layers.Limits))
}

func (r roots) OpenLayer(layer digest.Digest) (*os.File, error) { return r.layers.OpenLayer(layer) }

func (r roots) PinPID(p rundir.Process, path string) error { return containers.PinPID(p, path) }

// cdiDevices is containers.CDI.
type cdiDevices struct{ *cdi.Store }

func (c cdiDevices) Find(devices []spec.CDIDevice) (containers.Edits, error) {
	list := make([]cdi.Device, len(devices))
	for i, d := range devices {
		list[i] = cdi.Device(d)
	}
	return c.Store.Find(list)
}

// openCDI gives no interface where there are no such devices.
func (d *Daemon) openCDI() containers.CDI {
	if len(d.cfg.CDIDirs) == 0 {
		return nil
	}
	return cdiDevices{cdi.New(d.cfg.CDIDirs)}
}

// cgroups is containers.Cgroups.
type cgroups struct{ *placement.Manager }

func (c cgroups) Systemd() bool { return c.Driver() == placement.Systemd }

func (c cgroups) Of(cgroupsPath string) containers.Cgroup { return c.ContainerCgroups(cgroupsPath) }

func (c cgroups) OfShim(id string) containers.Cgroup { return c.ShimCgroups(id) }

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

// statsNode is stats.Node.
type statsNode struct{ d *Daemon }

func (n statsNode) Container(id string) (stats.Container, error) {
	c, err := n.d.Containers.Find(id)
	if err != nil {
		return stats.Container{}, err
	}
	return n.container(c), nil
}

func (n statsNode) Containers(f *runtimeapi.ContainerStatsFilter) (list []stats.Container) {
	for _, c := range n.d.Containers.Select(&runtimeapi.ContainerFilter{
		Id:            f.GetId(),
		PodSandboxId:  f.GetPodSandboxId(),
		LabelSelector: f.GetLabelSelector(),
	}) {
		list = append(list, n.container(c))
	}
	return list
}

func (n statsNode) container(c *containers.Container) stats.Container {
	rec, seen := c.Record(), c.Seen()
	s := stats.Container{
		ID:      rec.ID,
		Config:  rec.Config.M,
		Image:   containers.ImageOf(rec.Config.M).GetImage(),
		Layer:   c.Layer(),
		Created: rec.CreatedAt,
		Start:   seen.StartedAt,
		Running: seen.State() == runtimeapi.ContainerState_CONTAINER_RUNNING,
	}
	if seen.Exit == nil {
		s.Cgroup, s.Init = n.d.cgroups.ContainerCgroup(rec.CgroupsPath), seen.Init.PID
	}
	return s
}

func (n statsNode) Pod(id string) (stats.Pod, error) {
	p, err := n.d.Pods.Find(id)
	if err != nil {
		return stats.Pod{}, err
	}
	return n.pod(p, n.Containers(&runtimeapi.ContainerStatsFilter{PodSandboxId: p.ID()})), nil
}

func (n statsNode) Pods(f *runtimeapi.PodSandboxStatsFilter) (list []stats.Pod) {
	of := map[string][]stats.Container{}
	for _, c := range n.d.Containers.Select(nil) {
		of[c.Record().PodID] = append(of[c.Record().PodID], n.container(c))
	}
	for _, p := range n.d.Pods.Select(&runtimeapi.PodSandboxFilter{
		Id:            f.GetId(),
		LabelSelector: f.GetLabelSelector(),
	}) {
		list = append(list, n.pod(p, of[p.ID()]))
	}
	return list
}

func (n statsNode) pod(p *pods.Pod, list []stats.Container) stats.Pod {
	rec := p.Record()
	return stats.Pod{
		ID:         rec.ID,
		Config:     rec.Config.M,
		Cgroup:     n.d.cgroups.PodCgroup(rec.Config.M.GetLinux().GetCgroupParent(), rec.ID),
		Netns:      rec.Namespaces.Net,
		Created:    rec.CreatedAt,
		Ready:      p.Ready() == nil,
		Containers: list,
	}
}

// measureLayer is stats.Options.Measure.
func measureLayer(ctx context.Context, dir string) (bytes, inodes uint64, err error) {
	u, err := rootfs.Measure(ctx, dir)
	return u.Bytes, u.Inodes, err
}

// nriOptions say what plugins can do.
func (d *Daemon) nriOptions(host spec.Host) nri.Options {
	return nri.Options{
		Config:           d.cfg.NRI,
		SwapSupported:    host.SwapSupported,
		HugetlbSupported: host.HugetlbSupported,
		InjectDevices:    d.injectDevices,
		Update: func(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources) error {
			return d.Containers.UpdateAsPluginWants(ctx, id, r)
		},
		Evict: func(ctx context.Context, id string) error { return d.Containers.Stop(ctx, id, 0) },
		Go:    d.background,
		Log:   d.log,
	}
}

// injectDevices adds devices of the CDI to a spec, which a plugin names.
func (d *Daemon) injectDevices(s *specs.Spec, names []string) error {
	devices := make([]spec.CDIDevice, len(names))
	for i, name := range names {
		devices[i] = spec.CDIDevice{Field: "CDI_devices of an NRI plugin", Name: name}
	}
	edits, err := d.Containers.FindDevices(devices)
	if err != nil {
		return err
	}
	return edits.Apply(s)
}
