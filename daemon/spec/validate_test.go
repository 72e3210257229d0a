package spec

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

func TestValidate(t *testing.T) {
	type (
		config = runtimeapi.ContainerConfig
		mount  = runtimeapi.Mount
	)
	const private, slave = runtimeapi.MountPropagation_PROPAGATION_PRIVATE, runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	mounts := func(m *mount) func(*config) { return func(c *config) { c.Mounts = []*mount{m} } }
	context := func(f func(*runtimeapi.LinuxContainerSecurityContext)) func(*config) {
		return func(c *config) { f(c.Linux.SecurityContext) }
	}
	namespaces := func(o *runtimeapi.NamespaceOption) func(*config) {
		return context(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.NamespaceOptions = o })
	}
	resources := func(r *runtimeapi.LinuxContainerResources) func(*config) {
		return func(c *config) { c.Linux.Resources = r }
	}
	device := func(d *runtimeapi.Device) func(*config) {
		return func(c *config) { c.Devices = []*runtimeapi.Device{d} }
	}
	env := func(key, value string) func(*config) {
		return func(c *config) { c.Envs = []*runtimeapi.KeyValue{{Key: key, Value: []byte(value)}} }
	}
	const ns = fieldContext + "namespace_options."
	for _, tt := range []struct {
		name   string
		change func(*config)
		kind   error // nil: valid
		field  string
	}{
		{name: "valid", change: func(*config) {}},
		{"no linux section", func(c *config) { c.Linux = nil }, nil, ""},
		{"no metadata", func(c *config) { c.Metadata = nil }, kind.Invalid, "config.metadata.name"},
		{"no image", func(c *config) { c.Image = nil }, kind.Invalid, "config.image.image"},
		{"huge", func(c *config) { c.Labels = map[string]string{"a": strings.Repeat("x", maxConfig)} }, kind.Invalid, "config"},
		{"windows", func(c *config) { c.Windows = &runtimeapi.WindowsContainerConfig{} }, kind.Unsupported, "config.windows"},
		{"CDI", func(c *config) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v/c=d"}} }, kind.Unsupported, "config.CDI_devices"},
		{"CDI annotation", func(c *config) { c.Annotations = map[string]string{"cdi.k8s.io/d": "v/c=d"} },
			kind.Unsupported, "config.annotations[cdi.k8s.io/d]"},
		{"signal", func(c *config) { c.StopSignal = 66 }, kind.Invalid, "config.stop_signal"},

		{"zero byte in args", func(c *config) { c.Args = []string{"a", "b\x00"} }, kind.Invalid, "config.args[1]"},
		{"long command", func(c *config) { c.Command = []string{strings.Repeat("x", maxString)} }, kind.Invalid, "config.command[0]"},
		{"env without key", env("", "v"), kind.Invalid, "config.envs[0].key"},
		{"env key with =", env("a=b", "v"), kind.Invalid, "config.envs[0].key"},
		{"env with zero byte", env("a", "\x00"), kind.Invalid, "config.envs[0]"},
		{"env not UTF-8", env("a", "\xff"), kind.Unsupported, "config.envs[0].value"},
		{"relative working dir", func(c *config) { c.WorkingDir = "a" }, kind.Invalid, "config.working_dir"},

		{"log path", func(c *config) { c.LogPath = "c/0.log" }, nil, ""},
		{"absolute log path", func(c *config) { c.LogPath = "/c/0.log" }, kind.Invalid, "config.log_path"},
		{"escaping log path", func(c *config) { c.LogPath = "c/../../0.log" }, kind.Invalid, "config.log_path"},
		{"log path of a directory", func(c *config) { c.LogPath = "./" }, kind.Invalid, "config.log_path"},

		{"mount", mounts(&mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"nosuid", "nodev", "noexec"}}), nil, ""},
		{"mount without container path", mounts(&mount{HostPath: "/a"}), kind.Invalid, "config.mounts[0].container_path"},
		{"relative container path", mounts(&mount{HostPath: "/a", ContainerPath: "b"}), kind.Invalid, "config.mounts[0].container_path"},
		{"mount over the root", mounts(&mount{HostPath: "/a", ContainerPath: "/b/.."}), kind.Invalid, "config.mounts[0].container_path"},
		{"mount without host path", mounts(&mount{ContainerPath: "/b"}), kind.Invalid, "config.mounts[0].host_path"},
		{"image and host path", mounts(&mount{HostPath: "/a", ContainerPath: "/b", Image: &runtimeapi.ImageSpec{Image: "i"}, Readonly: true}), kind.Invalid, "config.mounts[0].host_path"},
		{"image without name", mounts(&mount{ContainerPath: "/b", Image: &runtimeapi.ImageSpec{}}), kind.Invalid, "config.mounts[0].image.image"},
		{"image with propagation", mounts(&mount{ContainerPath: "/b", Image: &runtimeapi.ImageSpec{Image: "i"}, Readonly: true, Propagation: slave}), kind.Invalid, "config.mounts[0].propagation"},
		{"escaping sub path", mounts(&mount{ContainerPath: "/b", Image: &runtimeapi.ImageSpec{Image: "i"}, ImageSubPath: "../x", Readonly: true}), kind.Invalid, "config.mounts[0].image_sub_path"},
		{"writable image", mounts(&mount{ContainerPath: "/b", Image: &runtimeapi.ImageSpec{Image: "i"}}), kind.Invalid, "config.mounts[0].readonly"},
		{"sub path without image", mounts(&mount{HostPath: "/a", ContainerPath: "/b", ImageSubPath: "x"}), kind.Invalid, "config.mounts[0].image_sub_path"},
		{"unknown propagation", mounts(&mount{HostPath: "/a", ContainerPath: "/b", Propagation: 3}), kind.Invalid, "config.mounts[0].propagation"},
		{"rro", mounts(&mount{HostPath: "/a", ContainerPath: "/b", Readonly: true, RecursiveReadOnly: true, Propagation: private}), nil, ""},
		{"rro and writable", mounts(&mount{HostPath: "/a", ContainerPath: "/b", RecursiveReadOnly: true}), kind.Invalid, "config.mounts[0].recursive_read_only"},
		{"rro and slave", mounts(&mount{HostPath: "/a", ContainerPath: "/b", Readonly: true, RecursiveReadOnly: true, Propagation: slave}), kind.Invalid, "config.mounts[0].recursive_read_only"},
		{"idmap", mounts(&mount{HostPath: "/a", ContainerPath: "/b", UidMappings: []*runtimeapi.IDMapping{{}}}), kind.Invalid, "config.mounts[0].uidMappings"},
		{"other option", mounts(&mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"suid"}}), kind.Invalid, "config.mounts[0].mount_options"},

		{"device", device(&runtimeapi.Device{HostPath: "/dev/null", Permissions: "rm"}), nil, ""},
		{"relative device", device(&runtimeapi.Device{HostPath: "null"}), kind.Invalid, "config.devices[0].host_path"},
		{"relative device path", device(&runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "x"}), kind.Invalid, "config.devices[0].container_path"},
		{"device permissions", device(&runtimeapi.Device{HostPath: "/dev/null", Permissions: "rx"}), kind.Invalid, "config.devices[0].permissions"},

		{"privileged in a pod that is not", context(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Privileged = true }), kind.Invalid, fieldContext + "privileged"},
		{"masked path", context(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.MaskedPaths = []string{"a"} }), kind.Invalid, fieldContext + "masked_paths[0]"},
		{"group alone", context(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsGroup = &runtimeapi.Int64Value{} }), kind.Invalid, fieldContext + "run_as_group"},
		{"username with group", context(func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUsername = "a:b" }), kind.Invalid, fieldUsername},
		{"SELinux", context(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SelinuxOptions = &runtimeapi.SELinuxOption{Role: "a:b"}
		}), kind.Invalid, fieldContext + "selinux_options.role"},
		{"AppArmor", context(func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Apparmor = &runtimeapi.SecurityProfile{ProfileType: profileLocalhost}
		}), kind.Invalid, fieldApparmor + ".localhost_ref"},

		{"target", namespaces(&runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "x"}), nil, ""},
		{"no target", namespaces(&runtimeapi.NamespaceOption{Pid: modeTarget}), kind.Invalid, ns + "target_id"},
		{"network target", namespaces(&runtimeapi.NamespaceOption{Network: modeTarget}), kind.Invalid, ns + "network"},
		{"ipc container", namespaces(&runtimeapi.NamespaceOption{Ipc: modeContainer}), kind.Invalid, ns + "ipc"},
		{"unknown mode", namespaces(&runtimeapi.NamespaceOption{Pid: 4}), kind.Invalid, ns + "pid"},
		{"node in a pod that is not", namespaces(&runtimeapi.NamespaceOption{Pid: modeNode}), kind.Invalid, ns + "pid"},
		{"node network in a pod that is not", namespaces(&runtimeapi.NamespaceOption{Network: modeNode}), kind.Invalid, ns + "network"},
		{"host user namespace", namespaces(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: modeNode}}), nil, ""},
		{"user namespace", namespaces(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: modePod}}), kind.Invalid, ns + "userns_options.uids"},
		{"user namespace of the container", namespaces(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: modeContainer}}), kind.Invalid, ns + "userns_options.mode"},

		{"negative shares", resources(&runtimeapi.LinuxContainerResources{CpuShares: -1}), kind.Invalid, fieldResources + ".cpu_shares"},
		{"no quota", resources(&runtimeapi.LinuxContainerResources{CpuQuota: -1, MemorySwapLimitInBytes: -1}), nil, ""},
		{"negative quota", resources(&runtimeapi.LinuxContainerResources{CpuQuota: -2}), kind.Invalid, fieldResources + ".cpu_quota"},
		{"small quota", resources(&runtimeapi.LinuxContainerResources{CpuQuota: 999}), kind.Invalid, fieldResources + ".cpu_quota"},
		{"long period", resources(&runtimeapi.LinuxContainerResources{CpuPeriod: 1000001}), kind.Invalid, fieldResources + ".cpu_period"},
		{"negative memory", resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1}), kind.Invalid, fieldResources + ".memory_limit_in_bytes"},
		{"swap alone", resources(&runtimeapi.LinuxContainerResources{MemorySwapLimitInBytes: 5}), kind.Invalid, fieldResources + ".memory_swap_limit_in_bytes"},
		{"swap below memory", resources(&runtimeapi.LinuxContainerResources{MemorySwapLimitInBytes: 5, MemoryLimitInBytes: 6}), kind.Invalid, fieldResources + ".memory_swap_limit_in_bytes"},
		{"oom", resources(&runtimeapi.LinuxContainerResources{OomScoreAdj: 1001}), kind.Invalid, fieldResources + ".oom_score_adj"},
		{"cpus", resources(&runtimeapi.LinuxContainerResources{CpusetCpus: "0-3,8"}), nil, ""},
		{"bad cpus", resources(&runtimeapi.LinuxContainerResources{CpusetCpus: "3-0"}), kind.Invalid, fieldResources + ".cpuset_cpus"},
		{"bad mems", resources(&runtimeapi.LinuxContainerResources{CpusetMems: "0,"}), kind.Invalid, fieldResources + ".cpuset_mems"},
		{"page size", resources(&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2M"}}}), kind.Invalid, fieldResources + ".hugepage_limits[0].page_size"},
		{"unified", resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "1"}}), kind.Invalid, fieldResources + ".unified"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := container()
			tt.change(c)
			err := Validate(c, sandbox())
			if tt.kind == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantField(t, err, tt.kind, tt.field)
		})
	}
	wantField(t, Validate(nil, nil), kind.Invalid, "config")
}

func TestValidateSandbox(t *testing.T) {
	type config = runtimeapi.PodSandboxConfig
	sysctl := func(name string, node bool) func(*config) {
		return func(s *config) {
			s.Linux.Sysctls = map[string]string{name: "1"}
			if node {
				s.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: modeNode, Ipc: modeNode}
			}
		}
	}
	port := func(p *runtimeapi.PortMapping) func(*config) {
		return func(s *config) { s.PortMappings = []*runtimeapi.PortMapping{p} }
	}
	context := func(sc *runtimeapi.LinuxSandboxSecurityContext) func(*config) {
		return func(s *config) { s.Linux.SecurityContext = sc }
	}
	dns := func(d *runtimeapi.DNSConfig) func(*config) { return func(s *config) { s.DnsConfig = d } }
	hostname := func(h string) func(*config) { return func(s *config) { s.Hostname = h } }
	for _, tt := range []struct {
		name   string
		change func(*config)
		kind   error
		field  string
	}{
		{name: "valid", change: func(*config) {}},
		{"minimal", func(s *config) { *s = config{Metadata: s.Metadata} }, nil, ""},
		{"no metadata", func(s *config) { s.Metadata = nil }, kind.Invalid, "config.metadata.name"},
		{"long name", func(s *config) { s.Metadata.Name = strings.Repeat("x", maxName+1) }, kind.Invalid, "config.metadata.name"},
		{"no namespace", func(s *config) { s.Metadata.Namespace = "" }, kind.Invalid, "config.metadata.namespace"},
		{"no uid", func(s *config) { s.Metadata.Uid = "" }, kind.Invalid, "config.metadata.uid"},
		{"huge", func(s *config) { s.Annotations = map[string]string{"a": strings.Repeat("x", maxConfig)} }, kind.Invalid, "config"},
		{"windows", func(s *config) { s.Windows = &runtimeapi.WindowsPodSandboxConfig{} }, kind.Unsupported, "config.windows"},

		{"qualified hostname", hostname("a-1.B.example"), nil, ""},
		{"hostname of 64", hostname(strings.Repeat("a", 64)), nil, ""},
		{"hostname of 65", hostname(strings.Repeat("a", 65)), kind.Invalid, "config.hostname"},
		{"hostname with a line", hostname("a\n127.0.0.1 b"), kind.Invalid, "config.hostname"},
		{"hostname with a dash", hostname("-a"), kind.Invalid, "config.hostname"},
		{"hostname with an empty label", hostname("a..b"), kind.Invalid, "config.hostname"},

		{"relative log directory", func(s *config) { s.LogDirectory = "a" }, kind.Invalid, "config.log_directory"},
		{"escaping log directory", func(s *config) { s.LogDirectory = "/a/../b" }, kind.Invalid, "config.log_directory"},

		{"dns", dns(&runtimeapi.DNSConfig{Servers: []string{"10.0.0.1", "fe80::1%eth0"}, Searches: []string{".", "a.b."}, Options: []string{"ndots:5"}}), nil, ""},
		{"dns server", dns(&runtimeapi.DNSConfig{Servers: []string{"10.0.0.1", "name"}}), kind.Invalid, "config.dns_config.servers[1]"},
		{"dns search", dns(&runtimeapi.DNSConfig{Searches: []string{"a b"}}), kind.Invalid, "config.dns_config.searches[0]"},
		{"dns option", dns(&runtimeapi.DNSConfig{Options: []string{"a\nnameserver 1.1.1.1"}}), kind.Invalid, "config.dns_config.options[0]"},

		{"port", port(&runtimeapi.PortMapping{ContainerPort: 80, HostPort: 8080, HostIp: "::1", Protocol: runtimeapi.Protocol_SCTP}), nil, ""},
		{"no host port", port(&runtimeapi.PortMapping{ContainerPort: 80}), nil, ""},
		{"container port", port(&runtimeapi.PortMapping{ContainerPort: 65536}), kind.Invalid, "config.port_mappings[0].container_port"},
		{"host port", port(&runtimeapi.PortMapping{ContainerPort: 1, HostPort: -1}), kind.Invalid, "config.port_mappings[0].host_port"},
		{"host port to nowhere", port(&runtimeapi.PortMapping{HostPort: 80}), kind.Invalid, "config.port_mappings[0].container_port"},
		{"protocol", port(&runtimeapi.PortMapping{ContainerPort: 1, Protocol: 3}), kind.Invalid, "config.port_mappings[0].protocol"},
		{"host ip", port(&runtimeapi.PortMapping{ContainerPort: 1, HostIp: "localhost"}), kind.Invalid, "config.port_mappings[0].host_ip"},

		{"cgroup parent", func(s *config) { s.Linux.CgroupParent = "/kubepods/../.." }, kind.Invalid, "config.linux.cgroup_parent"},
		{"overhead", func(s *config) { s.Linux.Overhead = &runtimeapi.LinuxContainerResources{CpuShares: -1} }, kind.Invalid, "config.linux.overhead.cpu_shares"},

		{"group alone", context(&runtimeapi.LinuxSandboxSecurityContext{RunAsGroup: &runtimeapi.Int64Value{Value: 1}}), kind.Invalid, fieldContext + "run_as_group"},
		{"negative user", context(&runtimeapi.LinuxSandboxSecurityContext{RunAsUser: &runtimeapi.Int64Value{Value: -1}}), kind.Invalid, fieldContext + "run_as_user"},
		{"pid target", context(&runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "x"}}), kind.Invalid, fieldContext + "namespace_options.pid"},
		{"user namespace", context(&runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{}}}), kind.Invalid, fieldContext + "namespace_options.userns_options.uids"},
		{"user namespace target", context(&runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: modeTarget}}}), kind.Invalid, fieldContext + "namespace_options.userns_options.mode"},
		{"seccomp", context(&runtimeapi.LinuxSandboxSecurityContext{Seccomp: &runtimeapi.SecurityProfile{ProfileType: 5}}), kind.Invalid, fieldSeccomp + ".profile_type"},

		{"sysctl of the network", sysctl("net.ipv4.ip_unprivileged_port_start", false), nil, ""},
		{"sysctl with slashes", sysctl("net/ipv4/conf/eth0.1/forwarding", false), nil, ""},
		{"sysctl of ipc", sysctl("kernel.shm_rmid_forced", false), nil, ""},
		{"sysctl of the node's network", sysctl("net.core.somaxconn", true), kind.Invalid, "config.linux.sysctls[net.core.somaxconn]"},
		{"sysctl of the node's ipc", sysctl("fs.mqueue.msg_max", true), kind.Invalid, "config.linux.sysctls[fs.mqueue.msg_max]"},
		{"sysctl of the node", sysctl("kernel.panic", false), kind.Invalid, "config.linux.sysctls[kernel.panic]"},
		{"sysctl that escapes", sysctl("net/../kernel/panic", false), kind.Invalid, "config.linux.sysctls[net/../kernel/panic]"},
		{"sysctl with an empty part", sysctl("net..x", false), kind.Invalid, "config.linux.sysctls[net..x]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := sandbox()
			tt.change(s)
			err := ValidateSandbox(s)
			if tt.kind == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantField(t, err, tt.kind, tt.field)
		})
	}
	wantField(t, ValidateSandbox(nil), kind.Invalid, "config")
}
