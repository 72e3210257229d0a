package spec

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	modePod       = runtimeapi.NamespaceMode_POD
	modeContainer = runtimeapi.NamespaceMode_CONTAINER
	modeNode      = runtimeapi.NamespaceMode_NODE
	modeTarget    = runtimeapi.NamespaceMode_TARGET
)

// PIDMode says which PID namespace a container gets: a new one (CONTAINER), the
// node's (NODE), that of the pod's init (POD) or of another container (TARGET).
// A container that says POD has what its pod says, where CONTAINER means that
// each has its own.
//
// Configs without namespace options get CONTAINER, as the kubelet's pods do by
// default. Read to the letter, the zero value of the CRI's enum would share a
// namespace, and with it an init process, that nobody asked for.
func PIDMode(c *runtimeapi.ContainerConfig, s *runtimeapi.PodSandboxConfig) runtimeapi.NamespaceMode {
	pod := s.GetLinux().GetSecurityContext().GetNamespaceOptions()
	own := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch {
	case own == nil && pod == nil:
		return modeContainer
	case own == nil, own.GetPid() == modePod && pod != nil:
		return pod.GetPid()
	}
	return own.GetPid()
}

// namespaces decides what is joined, made or left as the host's. Network and
// IPC are the pod's in any case: crictl users name no modes in the container.
func (b *builder) namespaces() error {
	pod := b.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions()
	own := b.sc.GetNamespaceOptions()

	pid := PIDMode(b.Container, b.Sandbox)
	if pid == modeTarget && b.Namespaces.PID == "" {
		return invalid(fieldContext+"namespace_options.target_id", "container %q does not run", own.GetTargetId())
	}
	paths := b.Namespaces
	if pid == modeContainer {
		paths.PID = ""
	}
	b.spec.Linux.Namespaces = joinOrMake(paths, pod.GetNetwork(), pod.GetIpc(), b.utsMode(), pid)

	if makesNew(b.spec, specs.UTSNamespace) {
		b.spec.Hostname = b.Sandbox.GetHostname()
	}
	// A private cgroup namespace hides the node's hierarchy. Version 1 has no
	// use for one, and privileged containers are given the node's view.
	if b.CgroupV2 && !b.sc.GetPrivileged() {
		b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return nil
}

// utsMode says whose the hostname is. It follows the network, but for a pod that has
// a name of its own in the node's network.
func (b *builder) utsMode() runtimeapi.NamespaceMode {
	if name := b.Sandbox.GetHostname(); name != "" && name != b.NodeName {
		return modePod
	}
	return b.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork()
}

func joinOrMake(paths Namespaces, network, ipc, uts, pid runtimeapi.NamespaceMode) []specs.LinuxNamespace {
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	for _, n := range []struct {
		kind specs.LinuxNamespaceType
		path string
		mode runtimeapi.NamespaceMode
	}{
		{specs.NetworkNamespace, paths.Net, network},
		{specs.IPCNamespace, paths.IPC, ipc},
		{specs.UTSNamespace, paths.UTS, uts},
		{specs.PIDNamespace, paths.PID, pid},
	} {
		if n.mode != modeNode {
			list = append(list, specs.LinuxNamespace{Type: n.kind, Path: n.path})
		}
	}
	return list
}

func makesNew(s *specs.Spec, kind specs.LinuxNamespaceType) bool {
	for _, n := range s.Linux.Namespaces {
		if n.Type == kind {
			return n.Path == ""
		}
	}
	return false
}
