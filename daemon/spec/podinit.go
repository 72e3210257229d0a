package spec

import (
	"cmp"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodInitInput is what the spec of a pod's init process is made of.
type PodInitInput struct {
	Host

	ID      string
	Sandbox *runtimeapi.PodSandboxConfig
	// Rootfs is its own and read-only. The OCI runtime makes /proc and /dev in
	// it where they are missing.
	Rootfs string
	// Namespaces to join. PID is not looked at: this process makes the one that
	// the pod shares, unless the pod uses the node's.
	Namespaces  Namespaces
	CgroupsPath string
}

// podInitOOM makes the process the last of its pod that the kernel would pick:
// with it the PID namespace of all containers ends.
const podInitOOM = -998

// nobody runs it where the pod names no user: it needs no rights at all.
const nobody = 65535

// PodInit makes the spec of the process that keeps the PID namespace of a pod
// and reaps its orphans, for a config that ValidateSandbox has passed.
func PodInit(in PodInitInput) (*specs.Spec, error) {
	b := &builder{
		Input: Input{Host: in.Host, Sandbox: in.Sandbox, Namespaces: in.Namespaces},
		sc:    &runtimeapi.LinuxContainerSecurityContext{},
	}
	in.Namespaces.PID = ""
	opts := in.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions()
	pid := opts.GetPid()
	if pid != modeNode {
		pid = modePod
	}
	b.spec = &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: in.Rootfs, Readonly: true},
		Process: &specs.Process{
			Args:            []string{"/pause"},
			Cwd:             "/",
			Env:             []string{"PATH=" + defaultPath},
			User:            podInitUser(in.Sandbox),
			Capabilities:    &specs.LinuxCapabilities{},
			NoNewPrivileges: true,
			OOMScoreAdj:     b.clampOOM(podInitOOM),
		},
		Mounts: []specs.Mount{procMount, devMount},
		Linux: &specs.Linux{
			CgroupsPath: in.CgroupsPath,
			Namespaces:  joinOrMake(in.Namespaces, opts.GetNetwork(), opts.GetIpc(), b.utsMode(), pid),
			// The least share of CPU: it sleeps.
			Resources: &specs.LinuxResources{
				CPU:     &specs.LinuxCPU{Shares: new(uint64(2))},
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
		},
	}
	if err := b.userns(); err != nil {
		return nil, err
	}
	if in.CgroupV2 {
		b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if makesNew(b.spec, specs.UTSNamespace) {
		b.spec.Hostname = cmp.Or(in.Sandbox.GetHostname(), in.NodeName)
	}
	if b.SeccompSupported {
		if err := b.seccompDefault(); err != nil {
			return nil, err
		}
	}
	return b.spec, nil
}

func podInitUser(s *runtimeapi.PodSandboxConfig) specs.User {
	u := specs.User{UID: nobody, GID: nobody}
	if m := Userns(s); m != nil && !(mapped(m.GetUids(), nobody) && mapped(m.GetGids(), nobody)) {
		u = specs.User{} // no rights for the host either
	}
	sc := s.GetLinux().GetSecurityContext()
	if v := sc.GetRunAsUser(); v != nil {
		u.UID = uint32(v.GetValue())
	}
	if v := sc.GetRunAsGroup(); v != nil {
		u.GID = uint32(v.GetValue())
	}
	return u
}

// What the kubelet masks in containers by default.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
		"/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)
