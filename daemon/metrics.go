package daemon

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/metrics"
)

// Snapshot is what there is to count. It comes from memory: no file is read and
// no shim is asked.
func (d *Daemon) Snapshot() metrics.Snapshot {
	images, layers := d.images.Stats(), d.layers.Usage()
	s := metrics.Snapshot{
		Pods:       map[string]int{"ready": 0, "notready": 0},
		Containers: map[string]int{"created": 0, "running": 0, "exited": 0},

		Pulls: images.Pulls, Running: images.Running, Downloads: images.Downloads,
		Bytes: images.Bytes, ResumedBytes: images.ResumedBytes, Retries: images.Retries, Shared: images.Shared, Unpacked: images.Unpacked,

		Images: images.Images, Blobs: images.Usage.Inodes, BlobBytes: images.Usage.Bytes,
		Collected: images.Collected, FreedBytes: images.FreedBytes,
		Layers: d.layers.Count(), LayerBytes: layers.Bytes, LayerInodes: layers.Inodes,
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.pods {
		if d.podState(p.rec.Load()) == runtimeapi.PodSandboxState_SANDBOX_READY {
			s.Pods["ready"]++
		} else {
			s.Pods["notready"]++
		}
	}
	for _, c := range d.containers {
		if c.rec.Load().Init {
			continue
		}
		switch c.seen.Load().state() {
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
