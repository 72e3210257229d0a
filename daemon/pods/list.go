package pods

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// Everything here answers from memory: the kubelet lists once a second.

// State is the CRI's state of the pod.
func (p *Pod) State() runtimeapi.PodSandboxState {
	if p.Ready() != nil {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

// Select gives the pods that a filter, which may be nil, lets through.
func (m *Manager) Select(f *runtimeapi.PodSandboxFilter) []*Pod {
	return slices.DeleteFunc(m.All(), func(p *Pod) bool {
		rec := p.Record()
		return rec.Phase == records.PodCreating || // whoever asked for it has not got it yet
			!strings.HasPrefix(rec.ID, f.GetId()) ||
			f.GetState() != nil && f.GetState().GetState() != p.State() ||
			!containers.Matches(f.GetLabelSelector(), rec.Config.M.GetLabels())
	})
}

// List lists the pods that a filter, which may be nil, lets through.
func (m *Manager) List(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	list := []*runtimeapi.PodSandbox{}
	for _, p := range m.Select(f) {
		rec := p.Record()
		cfg := rec.Config.M
		list = append(list, &runtimeapi.PodSandbox{
			Id:             rec.ID,
			Metadata:       cfg.GetMetadata(),
			State:          p.State(),
			CreatedAt:      rec.CreatedAt.UnixNano(),
			Labels:         cfg.GetLabels(),
			Annotations:    cfg.GetAnnotations(),
			RuntimeHandler: rec.Handler,
		})
	}
	return list
}

// Status tells all about a pod; with verbose also what the CRI has no field for.
func (m *Manager) Status(id string, verbose bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	p, err := m.Find(id)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: p.status()}
	// No timestamp: with one, a kubelet of 1.37 with the gate EventedPLEG fills only a part of
	// its own status from the list, and runs init containers that have ended again for ever.
	// Without one it asks for each status. Nothing else of it reads the timestamp.
	resp.ContainersStatuses, _ = p.statuses()
	if verbose {
		resp.Info, err = containers.InfoJSON(p.info())
	}
	return resp, err
}

func (p *Pod) status() *runtimeapi.PodSandboxStatus {
	rec, state := p.Record(), p.State()
	cfg := rec.Config.M
	options := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	status := &runtimeapi.PodSandboxStatus{
		Id:             rec.ID,
		Metadata:       cfg.GetMetadata(),
		State:          state,
		CreatedAt:      rec.CreatedAt.UnixNano(),
		Network:        &runtimeapi.PodSandboxNetworkStatus{},
		Linux:          &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: options}},
		Labels:         cfg.GetLabels(),
		Annotations:    cfg.GetAnnotations(),
		RuntimeHandler: rec.Handler,
	}
	ips := rec.IPs()
	if state != runtimeapi.PodSandboxState_SANDBOX_READY || len(ips) == 0 {
		return status
	}
	status.Network.Ip = ips[0]
	for _, ip := range ips[1:] {
		status.Network.AdditionalIps = append(status.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return status
}

// info is the verbose part of a status.
func (p *Pod) info() map[string]any {
	rec := p.Record()
	pid, of := p.process()
	info := map[string]any{
		"sandboxId":      rec.ID,
		"phase":          rec.Phase,
		"namespaces":     rec.Namespaces,
		"network":        rec.Network,
		"runtimeHandler": rec.Handler,
		"config":         rec.Config,
		"bootId":         rec.BootID,
		"debts":          rec.Debts,
		"pid":            pid,
		"pidOf":          of,
		"runtimeSpec":    p.runtimeSpec(),
	}
	if c := p.Init(); c != nil {
		info["shim"] = c.ShimInfo()
	}
	return info
}

// process is one that lives in the namespaces of the pod, for whoever wants to enter
// them, and whose it is: that of the init, or of the oldest container that runs. It is
// 0 if there is none, which is no fault.
func (p *Pod) process() (pid int, of string) {
	if c := p.Init(); c != nil && c.Seen().Exit == nil {
		return c.Seen().Init.PID, "the init of the pod"
	}
	var oldest *containers.Container
	for _, c := range p.m.Containers.Of(p.ID()) {
		if c.Seen().State() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if oldest == nil || c.Record().CreatedAt.Before(oldest.Record().CreatedAt) {
			oldest = c
		}
	}
	if oldest != nil {
		return oldest.Seen().Init.PID, "container " + oldest.ID()
	}
	return 0, "nobody: the pod needs no process of its own, and none of its containers runs; " +
		"its namespaces are pinned at the paths of runtimeSpec.linux.namespaces"
}

// PID is that of process.
func (p *Pod) PID() int {
	pid, _ := p.process()
	return pid
}

// runtimeSpec is the OCI spec of the init, or, for a pod without one, what such a spec
// would say of the pod.
func (p *Pod) runtimeSpec() any {
	if c := p.Init(); c != nil {
		if s := c.Spec(); s != nil {
			return s
		}
	}
	rec := p.Record()
	cfg, n := rec.Config.M, rec.Namespaces
	s := &specs.Spec{
		Version:     specs.Version,
		Hostname:    cfg.GetHostname(),
		Annotations: cfg.GetAnnotations(),
		Linux: &specs.Linux{
			Sysctl:      cfg.GetLinux().GetSysctls(),
			CgroupsPath: cfg.GetLinux().GetCgroupParent(),
		},
	}
	for _, ns := range []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: n.Net},
		{Type: specs.IPCNamespace, Path: n.IPC},
		{Type: specs.UTSNamespace, Path: n.UTS},
		{Type: specs.UserNamespace, Path: n.User},
		{Type: specs.PIDNamespace, Path: rec.PIDNamespace},
	} {
		if ns.Path != "" {
			s.Linux.Namespaces = append(s.Linux.Namespaces, ns)
		}
	}
	return s
}
