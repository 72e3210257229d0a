package spec

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mounts lists the kernel's file systems first, then everything that is bound,
// parents before children. A CRI mount takes the place of any other at its
// path; one over /dev or /sys takes the place of all default mounts below too.
func (b *builder) mounts() error {
	wanted, err := b.criMounts()
	if err != nil {
		return err
	}
	taken := func(dst string) bool {
		return slices.ContainsFunc(wanted, func(m specs.Mount) bool { return m.Destination == dst })
	}
	covered := func(dst string) bool {
		return taken(dst) || (strings.HasPrefix(dst, "/dev/") && taken("/dev")) ||
			(strings.HasPrefix(dst, "/sys/") && taken("/sys"))
	}
	var list []specs.Mount
	for _, m := range b.kernelMounts() {
		if !covered(m.Destination) {
			list = append(list, m)
		}
	}
	var bound []specs.Mount
	for _, m := range slices.Concat(b.podMounts(), b.movedDevices()) {
		if !taken(m.Destination) {
			bound = append(bound, m)
		}
	}
	bound = append(bound, wanted...)
	slices.SortStableFunc(bound, func(x, y specs.Mount) int {
		return strings.Count(x.Destination, "/") - strings.Count(y.Destination, "/")
	})
	b.spec.Mounts = append(list, bound...)
	if !b.sc.GetPrivileged() {
		// As given: an empty list is what the kubelet sends for an unmasked
		// /proc, so it cannot stand for a default.
		b.spec.Linux.MaskedPaths = b.sc.GetMaskedPaths()
		b.spec.Linux.ReadonlyPaths = b.sc.GetReadonlyPaths()
	}
	return nil
}

func (b *builder) kernelMounts() []specs.Mount {
	rw := "ro"
	if b.sc.GetPrivileged() {
		rw = "rw"
	}
	list := []specs.Mount{
		procMount,
		devMount,
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", rw}},
	}
	const tty = 5 // the group of this name, everywhere
	userns := Userns(b.Sandbox)
	if userns == nil || mapped(userns.GetGids(), tty) {
		list[2].Options = append(list[2].Options, fmt.Sprintf("gid=%d", tty))
	}
	if userns != nil && b.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == modeNode {
		// A sysfs shows a network, and this one's is not of the user namespace.
		list[4] = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys",
			Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", b.readOnly(rw)}}
	}
	cgroup := specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
		Options: []string{"nosuid", "noexec", "nodev", "relatime", rw}}
	if b.CgroupV2 && b.sc.GetPrivileged() {
		// Without a cgroup namespace a fresh mount would be the node's own
		// superblock and reset its options, nsdelegate among them. A bind
		// mount shows the same and touches nothing.
		cgroup = specs.Mount{Destination: "/sys/fs/cgroup", Type: "bind", Source: "/sys/fs/cgroup",
			Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", rw}}
	}
	list = append(list, cgroup)
	if b.shm() == "" {
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}})
	}
	return list
}

// readOnly makes ro count for the mounts below too, where that is possible.
func (b *builder) readOnly(rw string) string {
	if rw == "ro" && b.RecursiveReadOnly {
		return "rro"
	}
	return rw
}

var (
	procMount = specs.Mount{Destination: "/proc", Type: "proc", Source: "proc",
		Options: []string{"nosuid", "noexec", "nodev"}}
	devMount = specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs",
		Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}}
)

// shm is the host path of /dev/shm, which belongs to the IPC namespace.
func (b *builder) shm() string {
	if b.Shm == "" && b.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == modeNode {
		return "/dev/shm"
	}
	return b.Shm
}

// podMounts are the files of the pod and the volumes of the image.
func (b *builder) podMounts() []specs.Mount {
	var list []specs.Mount
	if src := b.shm(); src != "" {
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: src,
			Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"}})
	}
	rw := "rw"
	if b.sc.GetReadonlyRootfs() {
		rw = "ro"
	}
	for _, f := range []struct{ dst, src string }{
		{"/etc/hosts", b.Hosts},
		{"/etc/resolv.conf", b.ResolvConf},
		{"/etc/hostname", b.Hostname},
	} {
		if f.src != "" {
			list = append(list, specs.Mount{Destination: f.dst, Type: "bind", Source: f.src,
				Options: []string{"rbind", "rprivate", rw}})
		}
	}
	for _, dst := range slices.Sorted(maps.Keys(b.ImageVolumes)) {
		list = append(list, specs.Mount{Destination: dst, Type: "bind", Source: b.ImageVolumes[dst],
			Options: []string{"rbind", "rprivate", "rw"}})
	}
	return list
}

// ImageVolumes gives a function that says what becomes of a volume that the image
// declares at a path of the container: whether its directory is wanted, and
// whether it is to be mounted, which it is on a read-only root and in a volume of
// the pod.
//
// It is not wanted where it would hide, or undo the protection of, what others
// mount: the root itself, the file systems of the kernel, the files of the pod,
// the CRI's own mounts, and all that is below one that is read-only.
func ImageVolumes(c *runtimeapi.ContainerConfig) func(dst string) (wanted, mounted bool) {
	writable := map[string]bool{}
	for _, m := range c.GetMounts() {
		writable[path.Clean(m.GetContainerPath())] = !m.GetReadonly()
	}
	readOnlyRoot := c.GetLinux().GetSecurityContext().GetReadonlyRootfs()
	return func(dst string) (wanted, mounted bool) {
		dst = path.Join("/", dst)
		if _, exact := writable[dst]; exact || slices.Contains(podFiles, dst) {
			return false, false
		}
		for dir := dst; dir != "/"; dir = path.Dir(dir) {
			if w, ok := writable[dir]; ok {
				return w, w
			}
			if slices.Contains(kernelTrees, dir) {
				return false, false
			}
		}
		return dst != "/", readOnlyRoot
	}
}

var (
	kernelTrees = []string{"/proc", "/sys", "/dev"}
	podFiles    = []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname"}
)

// mountSupport refuses mounts that cannot be had.
func (b *builder) mountSupport() error {
	for i, m := range b.Container.GetMounts() {
		field := fmt.Sprintf("config.mounts[%d].", i)
		switch {
		case m.GetRecursiveReadOnly() && !b.RecursiveReadOnly:
			return unsupported(field+"recursive_read_only", "needs Linux 5.12 and an OCI runtime that knows rro")
		case len(m.GetUidMappings()) > 0 && m.GetImage() == nil && !b.MappedMounts:
			return unsupported(field+"uidMappings", "needs Linux 5.12 and an OCI runtime that knows idmapped mounts")
		}
	}
	return nil
}

func (b *builder) criMounts() ([]specs.Mount, error) {
	if err := b.mountSupport(); err != nil {
		return nil, err
	}
	var list []specs.Mount
	for i, m := range b.Container.GetMounts() {
		field := fmt.Sprintf("config.mounts[%d].", i)
		src := m.GetHostPath()
		if m.GetImage() != nil {
			if src = b.ImageMounts[i]; src == "" {
				return nil, unsupported(field+"image", "image %q is not mounted on the host", m.GetImage().GetImage())
			}
		}
		mount := specs.Mount{
			Destination: path.Clean(m.GetContainerPath()),
			Type:        "bind",
			Source:      src,
			Options:     bindOptions(m),
		}
		if len(m.GetUidMappings()) > 0 && m.GetImage() == nil { // images are mounted with mapped owners
			mount.UIDMappings, mount.GIDMappings = mappings(m.GetUidMappings()), mappings(m.GetGidMappings())
		}
		list = append(list, mount)
		b.propagate(m.GetPropagation())
	}
	return list, nil
}

// bindOptions takes a mount that Validate has passed.
func bindOptions(m *runtimeapi.Mount) []string {
	opts := []string{"rbind", "rprivate", "rw"}
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		opts[1] = "rslave"
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		opts[1] = "rshared"
	}
	switch {
	case m.GetRecursiveReadOnly():
		opts[2] = "rro"
	case m.GetReadonly() || m.GetImage() != nil:
		opts[2] = "ro"
	}
	return append(opts, m.GetMountOptions()...)
}

// propagate opens the container's root for what its mounts need: a mount below
// a private root can neither receive nor send. The widest need counts.
func (b *builder) propagate(p runtimeapi.MountPropagation) {
	root := &b.spec.Linux.RootfsPropagation
	switch {
	case p == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		*root = "rshared"
	case p == runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER && *root == "":
		*root = "rslave"
	}
}
