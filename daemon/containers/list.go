package containers

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Everything here answers from memory: the kubelet lists once a second. Only the
// verbose part of a status reads files.

// Select gives the containers that a filter, which may be nil, lets through.
func (m *Manager) Select(f *runtimeapi.ContainerFilter) []*Container {
	return slices.DeleteFunc(m.All(), func(c *Container) bool {
		rec := c.Record()
		return rec.Phase == records.ContainerCreating || // whoever asked for it has not got it yet
			!strings.HasPrefix(rec.ID, f.GetId()) ||
			!strings.HasPrefix(rec.PodID, f.GetPodSandboxId()) ||
			f.GetState() != nil && f.GetState().GetState() != c.Seen().State() ||
			!Matches(f.GetLabelSelector(), rec.Config.M.GetLabels())
	})
}

// List lists the containers that a filter, which may be nil, lets through.
func (m *Manager) List(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	list := []*runtimeapi.Container{}
	for _, c := range m.Select(f) {
		rec := c.Record()
		cfg := rec.Config.M
		list = append(list, &runtimeapi.Container{
			Id:           rec.ID,
			PodSandboxId: rec.PodID,
			Metadata:     cfg.GetMetadata(),
			Image:        ImageOf(cfg),
			ImageRef:     rec.ImageRef,
			ImageId:      rec.ImageID,
			State:        c.Seen().State(),
			CreatedAt:    rec.CreatedAt.UnixNano(),
			Labels:       cfg.GetLabels(),
			Annotations:  cfg.GetAnnotations(),
		})
	}
	return list
}

// ImageOf is the image as whoever made the pod named it: a kubelet creates by id,
// and says beside it what the user wrote.
func ImageOf(cfg *runtimeapi.ContainerConfig) *runtimeapi.ImageSpec {
	name := cfg.GetImage().GetUserSpecifiedImage()
	if name == "" {
		return cfg.GetImage()
	}
	named := proto.Clone(cfg.GetImage()).(*runtimeapi.ImageSpec)
	named.Image = name
	return named
}

// Matches says whether labels have all that a selector asks for.
func Matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Status tells all about a container; with verbose also what the CRI has no field
// for.
func (m *Manager) Status(id string, verbose bool) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := m.Find(id)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: c.status()}
	if verbose {
		resp.Info, err = InfoJSON(c.Info())
	}
	return resp, err
}

// Statuses tells all about the containers of a pod, the newest first: a kubelet takes the
// first of a name for its last attempt.
func (m *Manager) Statuses(podID string) []*runtimeapi.ContainerStatus {
	list := []*runtimeapi.ContainerStatus{}
	for _, c := range m.Of(podID) {
		if c.Record().Phase != records.ContainerCreating {
			list = append(list, c.status())
		}
	}
	slices.SortFunc(list, func(a, b *runtimeapi.ContainerStatus) int { return cmp.Compare(b.CreatedAt, a.CreatedAt) })
	return list
}

func (c *Container) status() *runtimeapi.ContainerStatus {
	rec, s := c.Record(), c.Seen()
	cfg := rec.Config.M
	status := &runtimeapi.ContainerStatus{
		Id:          rec.ID,
		Metadata:    cfg.GetMetadata(),
		State:       s.State(),
		CreatedAt:   rec.CreatedAt.UnixNano(),
		Image:       ImageOf(cfg),
		ImageRef:    rec.ImageRef,
		ImageId:     rec.ImageID,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Mounts:      mounts(rec),
		LogPath:     rec.LogPath,
		StopSignal:  rec.StopSignal,
		Resources:   &runtimeapi.ContainerResources{Linux: cfg.GetLinux().GetResources()},
		User:        &runtimeapi.ContainerUser{Linux: rec.User.M},
	}
	started := s.StartedAt
	if e := s.Exit; e != nil {
		if !e.StartedAt.IsZero() {
			started = e.StartedAt
		}
		status.FinishedAt, status.ExitCode = e.ExitedAt.UnixNano(), int32(e.Code)
		status.Reason, status.Message = e.Reason, e.Message
	}
	if !started.IsZero() {
		status.StartedAt = started.UnixNano()
	}
	return status
}

// mounts are those asked for, each image with what it stood for: its id, which is the
// digest that a pull has answered with.
func mounts(rec *records.Container) []*runtimeapi.Mount {
	mounts := rec.Config.M.GetMounts()
	if len(rec.ImageMounts) == 0 {
		return mounts
	}
	mounts = slices.Clone(mounts)
	for _, im := range rec.ImageMounts {
		if im.Index < 0 || im.Index >= len(mounts) {
			continue // a record that was edited
		}
		m := proto.Clone(mounts[im.Index]).(*runtimeapi.Mount)
		m.Image.ImageRef = im.ImageID
		mounts[im.Index] = m
	}
	return mounts
}

// Info is the verbose part of a status.
func (c *Container) Info() map[string]any {
	rec, s := c.Record(), c.Seen()
	info := map[string]any{
		"sandboxId":      rec.PodID,
		"pid":            s.Init.PID,
		"shim":           c.ShimInfo(),
		"config":         rec.Config,
		"runtimeHandler": rec.Handler,
		"imageId":        rec.ImageID,
		"layers":         rec.Layers,
		"logPath":        rec.LogPath,
		"exit":           s.Exit,
		"cgroupsPath":    rec.CgroupsPath,
		"bootId":         rec.BootID,
		"rootfs":         c.dir.Path(rundir.RootfsName),
	}
	if rec.Restored != "" {
		info["restoredFrom"] = rec.Restored
	}
	if s.Exit != nil {
		info["pid"] = 0
	}
	if s := c.Spec(); s != nil {
		info["runtimeSpec"] = s
	}
	return info
}

// Spec is the OCI spec as its file says, with the resources of the last update; nil if it
// cannot be read.
func (c *Container) Spec() json.RawMessage {
	b, err := c.dir.ReadSpec()
	if err != nil {
		return nil
	}
	u, err := c.dir.ReadUpdate()
	if err != nil {
		return b // there was none
	}
	updated, err := withUpdate(b, u)
	if err != nil {
		c.m.Log.Warn("cannot show the resources of an update", "container", c.ID(), "error", err)
		return b
	}
	return updated
}

// withUpdate sets in a spec what an update has set in the kernel. What the update does not
// name, such as the rules for devices, stays.
func withUpdate(b []byte, u rundir.Update) ([]byte, error) {
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	if err := json.Unmarshal(u.Resources, s.Linux.Resources); err != nil {
		return nil, err
	}
	if s.Process != nil {
		s.Process.OOMScoreAdj = &u.OOMScoreAdj[1]
	}
	return json.Marshal(&s)
}

// ShimInfo is what a person needs to find a shim.
func (c *Container) ShimInfo() map[string]any {
	alive, _ := c.m.Shims.Alive(c.dir)
	info := map[string]any{
		"dir":    c.dir,
		"socket": c.dir.Path(rundir.SocketName),
		"alive":  alive,
	}
	if alive {
		if p, err := c.m.Shims.Find(c.dir); err == nil {
			info["pid"] = p.PID
		}
	}
	return info
}

// InfoJSON makes the verbose part of an answer: one JSON object under "info", as
// users of crictl inspect expect.
func InfoJSON(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return map[string]string{"info": string(b)}, nil
}

// InUse says whether a container, or what is left of one, needs a layer.
func (m *Manager) InUse(layer digest.Digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, list := range []map[string]*Container{m.all, m.owed} {
		for _, c := range list {
			if c.Record().Uses(layer) {
				return true
			}
		}
	}
	return false
}
