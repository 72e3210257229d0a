package daemon

import (
	"encoding/json"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/metrics"
)

// Info is the verbose part of Status.
func (d *Daemon) Info() (map[string]string, error) {
	cfg := d.cfg
	config, err := json.Marshal(map[string]any{
		"rootDir":           cfg.Root,
		"stateDir":          cfg.State,
		"defaultRuntime":    cfg.DefaultRuntime,
		"runtimes":          d.Runtimes.Names(),
		"cgroupDriver":      d.cgroups.Driver(),
		"cniConfDir":        cfg.CNIConfDir,
		"cniBinDirs":        cfg.CNIBinDirs,
		"registryConfigDir": cfg.RegistryConfigDir,
		"pauseMode":         cfg.PauseMode,
		"keepBlobs":         !cfg.DropLayerBlobs,
		"pinnedImages":      cfg.PinnedImages,
		"imageVerifierDir":  cfg.ImageVerifierDir,
	})
	if err != nil {
		return nil, err
	}
	counts, err := json.Marshal(map[string]any{
		"pods":       len(d.Pods.All()),
		"containers": len(d.Containers.All()),
		"images":     len(d.Images.Library.List()),
	})
	if err != nil {
		return nil, err
	}
	host := d.Containers.Host
	security, err := json.Marshal(map[string]any{
		"apparmor":              host.AppArmorEnabled,
		"apparmorDefault":       host.AppArmorDefault,
		"seccomp":               host.SeccompSupported,
		"selinux":               host.SELinuxEnabled,
		"selinuxOptionsIgnored": !host.SELinuxEnabled,
	})
	if err != nil {
		return nil, err
	}
	return map[string]string{"config": string(config), "counts": string(counts), "security": string(security)}, nil
}

// Snapshot is what there is to count. It comes from memory: no file is read and no
// shim is asked.
func (d *Daemon) Snapshot() metrics.Snapshot {
	layers := d.layers.Usage()
	s := metrics.Snapshot{
		ImageStats:  d.Images.Stats(),
		Pods:        map[string]int{"ready": 0, "notready": 0},
		Containers:  map[string]int{"created": 0, "running": 0, "exited": 0},
		Layers:      d.layers.Count(),
		LayerBytes:  layers.Bytes,
		LayerInodes: layers.Inodes,
	}
	for _, p := range d.Pods.All() {
		if p.Ready() == nil {
			s.Pods["ready"]++
		} else {
			s.Pods["notready"]++
		}
	}
	for _, c := range d.Containers.All() {
		switch c.Seen().State() {
		case runtimeapi.ContainerState_CONTAINER_EXITED:
			s.Containers["exited"]++
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			s.Containers["running"]++
		default:
			s.Containers["created"]++
		}
	}
	return s
}
