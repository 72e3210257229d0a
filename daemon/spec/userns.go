package spec

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const fieldUserns = fieldContext + "namespace_options.userns_options"

// Userns gives the mappings of the user namespace that a pod has of its own, one
// each for uids and gids, both from id 0 on; nil if it has none.
//
// The CRI's text has POD for options that are missing, and its enum has it for a
// mode that is. No client means that: a pod without options is in the host's.
func Userns(s *runtimeapi.PodSandboxConfig) *runtimeapi.UserNamespace {
	return podUserns(s.GetLinux().GetSecurityContext().GetNamespaceOptions())
}

func podUserns(o *runtimeapi.NamespaceOption) *runtimeapi.UserNamespace {
	if u := o.GetUsernsOptions(); u != nil && u.GetMode() == modePod {
		return u
	}
	return nil
}

// validateUserns takes one mapping for each kind, as all runtimes do: a file
// system is mapped by it as a whole.
func validateUserns(field string, u *runtimeapi.UserNamespace) error {
	field += "userns_options."
	lists := []struct {
		name string
		maps []*runtimeapi.IDMapping
	}{{"uids", u.GetUids()}, {"gids", u.GetGids()}}
	switch {
	case u == nil:
		return nil
	case u.GetMode() == modeNode:
		for _, l := range lists {
			if len(l.maps) > 0 {
				return invalid(field+l.name, "is set, and mode is NODE")
			}
		}
		return nil
	case u.GetMode() != modePod:
		return invalid(field+"mode", "%s is not possible here", u.GetMode())
	}
	for _, l := range lists {
		if len(l.maps) != 1 {
			return invalid(field+l.name, "has %d mappings, and exactly one is possible", len(l.maps))
		}
		if err := validateMappings(field+l.name, l.maps); err != nil {
			return err
		}
		if id := l.maps[0].GetContainerId(); id != 0 {
			return invalid(field+l.name+"[0].container_id", "is %d, which leaves the id 0 of the containers unmapped",
				id)
		}
	}
	return nil
}

// validateMappings checks what the kernel would refuse: user_namespaces(7).
func validateMappings(field string, maps []*runtimeapi.IDMapping) error {
	for i, m := range maps {
		field := fmt.Sprintf("%s[%d].", field, i)
		n := uint64(m.GetLength())
		if n == 0 {
			return invalid(field+"length", "is 0")
		}
		// The last id of 32 bits is none: it stands for "no change".
		if uint64(m.GetHostId())+n > math.MaxUint32 || uint64(m.GetContainerId())+n > math.MaxUint32 {
			return invalid(field+"length", "%d ids do not fit between %d or %d and the last id",
				n, m.GetHostId(), m.GetContainerId())
		}
		overlaps := func(a, b uint32, length uint32) bool {
			return uint64(a) < uint64(b)+uint64(length) && uint64(b) < uint64(a)+n
		}
		if slices.ContainsFunc(maps[:i], func(o *runtimeapi.IDMapping) bool {
			return overlaps(m.GetHostId(), o.GetHostId(), o.GetLength()) ||
				overlaps(m.GetContainerId(), o.GetContainerId(), o.GetLength())
		}) {
			return invalid(field+"length", "the ids overlap with those of an earlier mapping")
		}
	}
	return nil
}

// validateImageOwners: an image that is mounted as a volume has the owners that
// the root file systems of its pod have.
func validateImageOwners(mounts []*runtimeapi.Mount, pod *runtimeapi.UserNamespace) error {
	for i, m := range mounts {
		own := &runtimeapi.UserNamespace{Uids: m.GetUidMappings(), Gids: m.GetGidMappings()}
		if m.GetImage() != nil && len(own.GetUids())+len(own.GetGids()) > 0 && !proto.Equal(own, pod) {
			field := fmt.Sprintf("config.mounts[%d].uidMappings", i)
			return invalid(field, "are not those of the pod, with which images are mounted")
		}
	}
	return nil
}

// validateUsernsModes: what belongs to the host's user namespace gives a root of
// another one no rights, not even to mount its file system.
func validateUsernsModes(field string, o *runtimeapi.NamespaceOption) error {
	if podUserns(o) == nil {
		return nil
	}
	for _, n := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"pid", o.GetPid()}, {"ipc", o.GetIpc()}} {
		if n.mode == modeNode {
			return invalid(field+n.name, "NODE is not possible with a user namespace of the pod's own")
		}
	}
	return nil
}

// sameUserns says whether a container asks for what its pod has. None at all is
// the pod's, as crictl users write it.
func sameUserns(own, pod *runtimeapi.NamespaceOption) bool {
	if own.GetUsernsOptions() == nil {
		return true
	}
	return proto.Equal(podUserns(own), podUserns(pod))
}

// userns puts the container into the user namespace of its pod.
func (b *builder) userns() error {
	u := Userns(b.Sandbox)
	if u == nil {
		return nil
	}
	ns := specs.LinuxNamespace{Type: specs.UserNamespace, Path: b.Namespaces.User}
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, ns)
	if ns.Path == "" {
		b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = mappings(u.GetUids()), mappings(u.GetGids())
	}
	// Those of the user namespace itself can only be set by a process in it.
	b.spec.Linux.Sysctl = maps.Clone(b.Sandbox.GetLinux().GetSysctls())
	maps.DeleteFunc(b.spec.Linux.Sysctl, func(name, _ string) bool { return sysctlNamespace(name) != "user" })
	// The kernel would say EINVAL to the OCI runtime, and nobody would know why.
	who := b.spec.Process.User
	if !mapped(u.GetUids(), who.UID) {
		return invalid(fieldUserns+".uids", "has no id for user %d, as whom the container is to run", who.UID)
	}
	for _, gid := range append([]uint32{who.GID}, who.AdditionalGids...) {
		if !mapped(u.GetGids(), gid) {
			return invalid(fieldUserns+".gids", "has no id for group %d, in which the container is to run", gid)
		}
	}
	return nil
}

func mapped(maps []*runtimeapi.IDMapping, id uint32) bool {
	return slices.ContainsFunc(maps, func(m *runtimeapi.IDMapping) bool {
		return id >= m.GetContainerId() && id-m.GetContainerId() < m.GetLength()
	})
}

func mappings(maps []*runtimeapi.IDMapping) []specs.LinuxIDMapping {
	var list []specs.LinuxIDMapping
	for _, m := range maps {
		list = append(list, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(),
			Size: m.GetLength()})
	}
	return list
}
