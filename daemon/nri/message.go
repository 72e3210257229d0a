package nri

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// The library changes the messages that it is given: nothing in them is shared.

// podMessage is what plugins are told of a pod.
func podMessage(p Pod) *api.PodSandbox {
	rec := p.Record()
	cfg, linux := rec.Config.M, rec.Config.M.GetLinux()
	return &api.PodSandbox{
		Id:             rec.ID,
		Name:           cfg.GetMetadata().GetName(),
		Uid:            cfg.GetMetadata().GetUid(),
		Namespace:      cfg.GetMetadata().GetNamespace(),
		Labels:         maps.Clone(cfg.GetLabels()),
		Annotations:    maps.Clone(cfg.GetAnnotations()),
		RuntimeHandler: rec.Handler,
		Pid:            uint32(p.PID()),
		Ips:            slices.Clone(rec.IPs()),
		Linux: &api.LinuxPodSandbox{
			PodOverhead:  toPlugin(linux.GetOverhead()),
			PodResources: toPlugin(linux.GetResources()),
			CgroupParent: linux.GetCgroupParent(),
			Namespaces:   namespaces(rec),
		},
	}
}

// namespaces are those of a pod that are there still.
func namespaces(rec *records.Pod) (list []*api.LinuxNamespace) {
	if rec.Phase == records.PodStopped || rec.Phase == records.PodRemoved || !records.ThisBoot(rec.BootID) {
		return nil
	}
	for _, ns := range []struct {
		kind specs.LinuxNamespaceType
		path string
	}{
		{specs.NetworkNamespace, rec.Namespaces.Net},
		{specs.IPCNamespace, rec.Namespaces.IPC},
		{specs.UTSNamespace, rec.Namespaces.UTS},
		{specs.UserNamespace, rec.Namespaces.User},
		{specs.PIDNamespace, rec.PIDNamespace},
	} {
		if ns.path != "" {
			list = append(list, &api.LinuxNamespace{Type: string(ns.kind), Path: ns.path})
		}
	}
	return list
}

// containerMessage is what plugins are told of a container. Without s its spec is that
// of the file.
func containerMessage(c Container, s *specs.Spec) *api.Container {
	rec, cfg := c.Record(), c.Record().Config.M
	if s == nil {
		s = new(specs.Spec)
		if err := json.Unmarshal(c.Spec(), s); err != nil {
			s = new(specs.Spec) // the rest is better than nothing
		}
	}
	m := &api.Container{
		Id:           rec.ID,
		PodSandboxId: rec.PodID,
		Name:         cfg.GetMetadata().GetName(),
		Labels:       maps.Clone(cfg.GetLabels()),
		Annotations:  maps.Clone(cfg.GetAnnotations()),
		Mounts:       api.FromOCIMounts(s.Mounts),
		Hooks:        api.FromOCIHooks(s.Hooks),
		CreatedAt:    rec.CreatedAt.UnixNano(),
		Image:        image(rec),
		Linux:        &api.LinuxContainer{SeccompProfile: seccomp(cfg)},
	}
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	maps.Copy(m.Annotations, s.Annotations)
	for _, d := range cfg.GetCDIDevices() {
		m.CDIDevices = append(m.CDIDevices, &api.CDIDevice{Name: d.GetName()})
	}
	addState(m, c.Seen())
	addProcess(m, s.Process)
	addLinux(m.Linux, s.Linux)
	return m
}

func addState(m *api.Container, seen *records.Seen) {
	m.State = api.ContainerState_CONTAINER_CREATED
	if !seen.StartedAt.IsZero() {
		m.StartedAt = seen.StartedAt.UnixNano()
	}
	switch e := seen.Exit; {
	case e != nil:
		m.State = api.ContainerState_CONTAINER_STOPPED
		m.FinishedAt, m.ExitCode = e.ExitedAt.UnixNano(), int32(e.Code)
		m.StatusReason, m.StatusMessage = e.Reason, e.Message
		if m.StartedAt == 0 && e.StartedAt.After(time.Time{}) {
			m.StartedAt = e.StartedAt.UnixNano()
		}
	case seen.State() == runtimeapi.ContainerState_CONTAINER_RUNNING:
		m.State = api.ContainerState_CONTAINER_RUNNING
		m.Pid = uint32(seen.Init.PID)
	}
}

func addProcess(m *api.Container, p *specs.Process) {
	if p == nil {
		return
	}
	m.Args, m.Env = slices.Clone(p.Args), slices.Clone(p.Env)
	for _, l := range p.Rlimits {
		m.Rlimits = append(m.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
	}
	m.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: slices.Clone(p.User.AdditionalGids)}
	m.Linux.OomScoreAdj = api.Int(p.OOMScoreAdj)
	m.Linux.IoPriority = api.FromOCILinuxIOPriority(p.IOPriority)
	if p.Scheduler != nil {
		m.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
	}
}

func addLinux(m *api.LinuxContainer, l *specs.Linux) {
	if l == nil {
		return
	}
	m.Namespaces = api.FromOCILinuxNamespaces(l.Namespaces)
	m.Devices = api.FromOCILinuxDevices(l.Devices)
	m.Resources = api.FromOCILinuxResources(l.Resources, nil)
	m.CgroupsPath = l.CgroupsPath
	m.NetDevices = api.FromOCILinuxNetDevices(l.NetDevices)
	m.Sysctl = maps.Clone(l.Sysctl)
	if l.Seccomp != nil {
		m.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
	}
	if r := l.IntelRdt; r != nil {
		m.Rdt = &api.LinuxRdt{
			ClosId:           api.String(r.ClosID),
			Schemata:         api.RepeatedString(r.Schemata),
			EnableMonitoring: api.Bool(r.EnableMonitoring),
		}
	}
}

// image is that of a container: the name that the user wrote, where it is known.
func image(rec *records.Container) *api.Image {
	asked := rec.Config.M.GetImage()
	i := &api.Image{Name: asked.GetUserSpecifiedImage(), ConfigDigest: rec.ImageID}
	if i.Name == "" {
		i.Name = asked.GetImage()
	}
	if _, digest, ok := strings.Cut(rec.ImageRef, "@"); ok {
		i.Digest = digest
	}
	return i
}

func seccomp(cfg *runtimeapi.ContainerConfig) *api.SecurityProfile {
	p := cfg.GetLinux().GetSecurityContext().GetSeccomp()
	if p == nil {
		return nil
	}
	return &api.SecurityProfile{
		ProfileType:  api.SecurityProfile_ProfileType(p.GetProfileType()),
		LocalhostRef: p.GetLocalhostRef(),
	}
}
