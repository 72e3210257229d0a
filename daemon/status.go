package daemon

import (
	"encoding/json"
	"maps"
	"os"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Everything here answers from memory: the kubelet lists once a second.

func (r *podRecord) state() runtimeapi.PodSandboxState {
	if podIsReady(r) != nil {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

// podState is the state of a pod. One whose init has ended is not ready: no
// container can be started in it. An init that is removed was never used. The
// caller holds Daemon.mu.
func (d *Daemon) podState(r *podRecord) runtimeapi.PodSandboxState {
	if c := d.containers[r.ID]; c != nil && c.seen.Load().exit != nil && c.rec.Load().Phase != containerRemoving {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return r.state()
}

func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// matchesID takes a prefix, as users of crictl do; the empty one matches all.
func matchesID(filter, id string) bool { return strings.HasPrefix(id, filter) }

// ListPods lists the pods that a filter, which may be nil, lets through.
func (d *Daemon) ListPods(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*runtimeapi.PodSandbox, 0, len(d.pods))
	for id, p := range d.pods {
		rec := p.rec.Load()
		state := d.podState(rec)
		cfg := rec.Config.M
		if !matchesID(f.GetId(), id) || f.GetState() != nil && f.GetState().GetState() != state || !matches(f.GetLabelSelector(), cfg.GetLabels()) {
			continue
		}
		list = append(list, &runtimeapi.PodSandbox{Id: id, Metadata: cfg.GetMetadata(), State: state, CreatedAt: rec.CreatedAt.UnixNano(),
			Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(), RuntimeHandler: rec.Handler})
	}
	return list
}

// PodStatus tells all about a pod; with verbose also what the CRI has no field for.
func (d *Daemon) PodStatus(id string, verbose bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	p, err := d.pod(id)
	if err != nil {
		return nil, err
	}
	rec := p.rec.Load()
	cfg := rec.Config.M
	d.mu.Lock()
	state := d.podState(rec)
	d.mu.Unlock()
	status := &runtimeapi.PodSandboxStatus{Id: id, Metadata: cfg.GetMetadata(), State: state, CreatedAt: rec.CreatedAt.UnixNano(),
		Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(), RuntimeHandler: rec.Handler,
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()}}}
	status.Network = &runtimeapi.PodSandboxNetworkStatus{}
	if ips := rec.ips(); state == runtimeapi.PodSandboxState_SANDBOX_READY && len(ips) > 0 {
		status.Network.Ip = ips[0]
		for _, ip := range ips[1:] {
			status.Network.AdditionalIps = append(status.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
		}
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: status}
	if verbose {
		info := map[string]any{"sandboxId": id, "phase": rec.Phase, "namespaces": rec.Namespaces, "network": rec.Network,
			"runtimeHandler": rec.Handler, "config": rec.Config, "bootId": rec.BootID, "pid": 0}
		if c := d.initOf(id); c != nil {
			info["pid"] = c.seen.Load().status.Init.PID
			info["shim"] = d.shimInfo(id)
		}
		resp.Info, err = infoJSON(info)
	}
	return resp, err
}

// ListContainers lists the containers that a filter, which may be nil, lets through.
func (d *Daemon) ListContainers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*runtimeapi.Container, 0, len(d.containers))
	for id, c := range d.containers {
		rec := c.rec.Load()
		state := c.seen.Load().state()
		cfg := rec.Config.M
		if rec.Init || !matchesID(f.GetId(), id) || !matchesID(f.GetPodSandboxId(), rec.PodID) ||
			f.GetState() != nil && f.GetState().GetState() != state || !matches(f.GetLabelSelector(), cfg.GetLabels()) {
			continue
		}
		list = append(list, &runtimeapi.Container{Id: id, PodSandboxId: rec.PodID, Metadata: cfg.GetMetadata(), Image: cfg.GetImage(),
			ImageRef: rec.ImageRef, ImageId: rec.ImageID, State: state, CreatedAt: rec.CreatedAt.UnixNano(),
			Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations()})
	}
	return list
}

// ContainerStatus tells all about a container.
func (d *Daemon) ContainerStatus(id string, verbose bool) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := d.container(id)
	if err != nil {
		return nil, err
	}
	rec, s := c.rec.Load(), c.seen.Load()
	cfg := rec.Config.M
	status := &runtimeapi.ContainerStatus{Id: id, Metadata: cfg.GetMetadata(), State: s.state(), CreatedAt: rec.CreatedAt.UnixNano(),
		Image: cfg.GetImage(), ImageRef: rec.ImageRef, ImageId: rec.ImageID, Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(),
		Mounts: rec.mounts(), LogPath: rec.LogPath, StopSignal: rec.StopSignal,
		Resources: &runtimeapi.ContainerResources{Linux: cfg.GetLinux().GetResources()},
		User:      &runtimeapi.ContainerUser{Linux: rec.User.M}}
	if !s.status.StartedAt.IsZero() {
		status.StartedAt = s.status.StartedAt.UnixNano()
	}
	if e := s.exit; e != nil {
		if !e.StartedAt.IsZero() {
			status.StartedAt = e.StartedAt.UnixNano()
		}
		status.FinishedAt, status.ExitCode = e.ExitedAt.UnixNano(), int32(e.Code)
		status.Reason, status.Message = e.Reason, e.Message
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: status}
	if verbose {
		info := map[string]any{"sandboxId": rec.PodID, "pid": s.status.Init.PID, "shim": d.shimInfo(id), "config": rec.Config,
			"runtimeHandler": rec.Handler, "imageId": rec.ImageID, "layers": rec.Layers, "logPath": rec.LogPath, "exit": s.exit,
			"cgroupsPath": rec.CgroupsPath, "bootId": rec.BootID, "rootfs": d.runDir(id).Path(rundir.RootfsName)}
		if s.exit != nil {
			info["pid"] = 0
		}
		if b, err := readSpec(d.runDir(id)); err == nil {
			info["runtimeSpec"] = b
		}
		resp.Info, err = infoJSON(info)
	}
	return resp, err
}

// mounts are those asked for, each image with the id that it stood for.
func (r *containerRecord) mounts() []*runtimeapi.Mount {
	mounts := r.Config.M.GetMounts()
	if len(r.ImageMounts) == 0 {
		return mounts
	}
	mounts = slices.Clone(mounts)
	for _, im := range r.ImageMounts {
		if im.Index < 0 || im.Index >= len(mounts) {
			continue // a record that was edited
		}
		m := proto.Clone(mounts[im.Index]).(*runtimeapi.Mount)
		m.Image.ImageRef = im.ImageID
		mounts[im.Index] = m
	}
	return mounts
}

// shimInfo is what a person needs to find a shim.
func (d *Daemon) shimInfo(id string) map[string]any {
	dir := d.runDir(id)
	held, _ := dir.Held()
	info := map[string]any{"dir": dir, "socket": dir.Path(rundir.SocketName), "alive": held}
	if held {
		if p, err := shims.Find(dir); err == nil {
			info["pid"] = p.PID
		}
	}
	return info
}

// infoJSON makes the verbose part of an answer: one JSON object under "info", as
// users of crictl inspect expect.
func infoJSON(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return map[string]string{"info": string(b)}, nil
}

// Info is the verbose part of Status.
func (d *Daemon) Info() (map[string]string, error) {
	d.mu.Lock()
	pods, containers := len(d.pods), len(d.containers)
	d.mu.Unlock()
	cfg := d.cfg
	config, err := json.Marshal(map[string]any{"rootDir": cfg.Root, "stateDir": cfg.State, "defaultRuntime": cfg.DefaultRuntime,
		"runtimes": slices.Sorted(maps.Keys(cfg.Runtimes)), "cgroupDriver": d.cgroups.Driver(), "cniConfDir": cfg.CNIConfDir, "cniBinDirs": cfg.CNIBinDirs,
		"registryConfigDir": cfg.RegistryConfigDir, "pauseMode": cfg.PauseMode,
		"keepBlobs": !cfg.DropLayerBlobs, "pinnedImages": cfg.PinnedImages, "imageVerifierDir": cfg.ImageVerifierDir})
	if err != nil {
		return nil, err
	}
	counts, err := json.Marshal(map[string]any{"pods": pods, "containers": containers, "images": len(d.images.List())})
	if err != nil {
		return nil, err
	}
	return map[string]string{"config": string(config), "counts": string(counts)}, nil
}

func readSpec(dir rundir.Dir) (json.RawMessage, error) {
	b, err := os.ReadFile(dir.Path(rundir.SpecName))
	if err == nil && !json.Valid(b) {
		err = record.ErrDamaged
	}
	return b, err
}
