// Package spec turns what the kubelet asked for (a CRI config) and what the
// image says (its OCI config) into an OCI runtime spec.
//
// Build, PodInit and the Validate functions are pure: the same input gives the
// same output on every machine, with no file opened and no system call. All that
// they must know of the machine is in Host and Input. The functions that do look
// at the machine are together in host.go.
package spec

import (
	"fmt"
	"maps"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Host is what the rules must know of the machine. ProbeHost fills it, once; Now tells
// what changes.
type Host struct {
	// CgroupV2 says that the unified hierarchy is the only one.
	CgroupV2 bool
	// SwapSupported says that swap of a cgroup can be limited.
	SwapSupported bool
	// HugetlbSupported says that there is a hugetlb controller. Without one,
	// hugepage limits are left out: the kubelet always sends some.
	HugetlbSupported bool
	// MinOOMScoreAdj is the least oom_score_adj that a process started from
	// here may have. Lower values are raised to it.
	MinOOMScoreAdj int
	// CPUs and Mems are the processors and memory nodes that a container can have, as
	// cpusets list them; empty: not known. They are of the time of Now.
	CPUs, Mems string
	// PageSizes are those of the kernel's huge pages, such as 2MB; nil: not known.
	PageSizes []string
	// Controllers and CgroupFiles are those of cgroup v2: what a cgroup can be limited by.
	// Of a controller that no cgroup has yet there are no files.
	Controllers, CgroupFiles []string
	// KnownCaps are the capabilities that the kernel knows and that the daemon
	// itself may give, named CAP_X; nil for all that have a name. Privileged
	// containers get them all.
	KnownCaps []string
	// SeccompSupported says that the kernel and the OCI runtime can filter system calls.
	SeccompSupported bool
	// NoX32 says that the kernel is known to lack the x32 ABI of amd64.
	NoX32 bool
	// AppArmorEnabled and SELinuxEnabled say which of them the kernel enforces.
	AppArmorEnabled, SELinuxEnabled bool
	// AppArmorDefault is the name of a loaded profile that stands for
	// RuntimeDefault; empty if there is none.
	AppArmorDefault string
	// RecursiveReadOnly says that the kernel and the OCI runtime know "rro".
	RecursiveReadOnly bool
	// MappedMounts says that the kernel and the OCI runtime know idmapped mounts.
	MappedMounts bool
	// ExecLimit bounds arguments and environment, in bytes; 0: what is usual.
	ExecLimit int
	// NodeName is HOSTNAME in containers of pods without a hostname.
	NodeName string
}

// Namespaces are the files of namespaces to join. An empty one stands for the
// host's if the config says NODE, otherwise for a new one of the container's
// own. UTS follows the network: the CRI has no mode for it. With a User the others
// are to belong to it.
type Namespaces struct{ Net, IPC, UTS, PID, User string }

// Input is all that the spec of one container is made of.
type Input struct {
	Host

	ID        string // of the container
	Container *runtimeapi.ContainerConfig
	Sandbox   *runtimeapi.PodSandboxConfig
	Image     ocispec.ImageConfig
	// Rootfs is the absolute path of the prepared root file system.
	Rootfs string
	// User comes from FindUser.
	User specs.User

	Namespaces Namespaces
	// CgroupsPath is the OCI cgroupsPath: /a/b for cgroupfs, slice:prefix:name
	// for systemd.
	CgroupsPath string

	// Shm, Hosts, ResolvConf and Hostname are host paths to bind over /dev/shm,
	// /etc/hosts, /etc/resolv.conf and /etc/hostname; empty for none. A CRI
	// mount of the same path wins.
	Shm, Hosts, ResolvConf, Hostname string

	// ImageMounts gives the host path of each CRI mount that names an image, by
	// its index in Container.Mounts, sub path included.
	ImageMounts map[int]string
	// ImageVolumes are the volumes of the image that have to be mounted: host path
	// by path in the container. See the function of this name.
	ImageVolumes map[string]string
	// Devices come from ResolveDevices.
	Devices []Device
	// HostDevices come from the function of this name; only privileged
	// containers get them.
	HostDevices []Device
	// SeccompProfile comes from ReadSeccompProfile.
	SeccompProfile []byte
}

// Result is the spec and what was decided on the way to it.
type Result struct {
	Spec *specs.Spec
	// User is who the first process runs as, for ContainerStatus.
	User *runtimeapi.LinuxContainerUser
	// Warnings are deviations from the letter of the request that the machine
	// forces, each worth one line of log.
	Warnings []string
}

// Build makes the spec of a container that Validate has passed. Errors name
// the field at fault.
func Build(in Input) (*Result, error) {
	c := in.Container
	sc := c.GetLinux().GetSecurityContext()
	b := &builder{Input: in, sc: sc}
	b.spec = &specs.Spec{
		Version:     specs.Version,
		Root:        &specs.Root{Path: in.Rootfs, Readonly: sc.GetReadonlyRootfs()},
		Process:     &specs.Process{User: in.User, Terminal: c.GetTty(), NoNewPrivileges: sc.GetNoNewPrivs()},
		Annotations: maps.Clone(c.GetAnnotations()),
		Linux:       &specs.Linux{CgroupsPath: in.CgroupsPath, Resources: &specs.LinuxResources{}},
	}
	// Only the annotations of the container: those of the pod come from whoever
	// may create pods, and OCI runtimes take orders from annotations.

	// Seccomp rules depend on the capabilities; devices are rules within the
	// resources.
	for _, step := range []func() error{
		b.process, b.capabilities, b.lsm, b.seccomp,
		b.namespaces, b.userns, b.resources, b.devices, b.mounts,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return &Result{Spec: b.spec, User: StatusUser(b.spec), Warnings: b.warnings}, nil
}

// Check refuses what Build would refuse because of what the machine is. It needs nothing of
// the image.
func Check(in Input) error {
	b := &builder{Input: in, sc: in.Container.GetLinux().GetSecurityContext()}
	b.spec = &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
	for _, step := range []func() error{
		b.capabilities, b.lsm, b.checkSeccomp, b.resources, b.mountSupport,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// StatusUser is who the first process of a spec runs as, for ContainerStatus.
func StatusUser(s *specs.Spec) *runtimeapi.LinuxContainerUser {
	u := s.Process.User
	user := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		user.SupplementalGroups = append(user.SupplementalGroups, int64(g))
	}
	return user
}

// builder is what the steps of Build share. Each step owns some fields of the
// spec and no other step writes them.
type builder struct {
	Input
	sc       *runtimeapi.LinuxContainerSecurityContext
	spec     *specs.Spec
	warnings []string
}

func (b *builder) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}
