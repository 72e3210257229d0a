package records

import runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

// A pod may have a user namespace: root in it is a user without rights on the
// host. The kubelet picks the ids, a range of its own for each pod. The kernel
// maps the owners of all that the pod's containers see: their roots and images
// (daemon/rootfs), the volumes of the kubelet (the OCI runtime, as the mounts
// say), and what the pod itself brings belongs to its root on the host.

// Userns is the user namespace that the pod wants; nil if it is the host's.
func (p *Pod) Userns() *Userns {
	u := p.Config.M.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u == nil || u.GetMode() != runtimeapi.NamespaceMode_POD || len(u.GetUids()) == 0 || len(u.GetGids()) == 0 {
		return nil
	}
	one := func(m *runtimeapi.IDMapping) IDMap { return IDMap{HostID: m.GetHostId(), Length: m.GetLength()} }
	return &Userns{UIDs: one(u.GetUids()[0]), GIDs: one(u.GetGids()[0])}
}

// Owner is who owns a file, as the host sees it.
type Owner struct{ UID, GID int }

// Root is root of the pod: the host's, or who that is in the user namespace.
func (p *Pod) Root() Owner {
	if u := p.Userns(); u != nil {
		return Owner{int(u.UIDs.HostID), int(u.GIDs.HostID)}
	}
	return Owner{}
}
