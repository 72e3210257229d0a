package spec

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	private = cri.MountPropagation_PROPAGATION_PRIVATE
	slave   = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER

	nsField = fieldContext + "namespace_options."
)

// Short names for the tables.
type (
	config     = cri.ContainerConfig
	podConfig  = cri.PodSandboxConfig
	secContext = cri.LinuxContainerSecurityContext
)

type changeContainer = func(*config)

func withMount(m *cri.Mount) changeContainer {
	return func(c *config) { c.Mounts = []*cri.Mount{m} }
}

func inContext(f func(*secContext)) changeContainer {
	return func(c *config) { f(c.Linux.SecurityContext) }
}

func inNamespaces(o *cri.NamespaceOption) changeContainer {
	return inContext(func(sc *secContext) { sc.NamespaceOptions = o })
}

func withResources(r *cri.LinuxContainerResources) changeContainer {
	return func(c *config) { c.Linux.Resources = r }
}

func withDevice(d *cri.Device) changeContainer {
	return func(c *config) { c.Devices = []*cri.Device{d} }
}

func withEnv(key, value string) changeContainer {
	return func(c *config) {
		c.Envs = []*cri.KeyValue{{Key: key, Value: []byte(value)}}
	}
}

var containerCases = []struct {
	name   string
	change changeContainer
	kind   error // nil: valid
	field  string
}{
	{name: "valid", change: func(*config) {}},
	{"no linux section", func(c *config) { c.Linux = nil }, nil, ""},
	{"no metadata", func(c *config) { c.Metadata = nil }, kind.Invalid, "config.metadata.name"},
	{"no image", func(c *config) { c.Image = nil }, kind.Invalid, "config.image.image"},
	{"huge", func(c *config) { c.Labels = map[string]string{"a": strings.Repeat("x", maxContainer)} },
		kind.Invalid, "config"},
	{"windows", func(c *config) { c.Windows = &cri.WindowsContainerConfig{} }, kind.Unsupported, "config.windows"},
	{"CDI", func(c *config) { c.CDIDevices = []*cri.CDIDevice{{Name: "v/c=d"}} }, nil, ""},
	{"CDI without a name", func(c *config) { c.CDIDevices = []*cri.CDIDevice{{Name: "v/c=d"}, {}} },
		kind.Invalid, "config.CDI_devices[1].name"},
	{"CDI without a class", func(c *config) { c.CDIDevices = []*cri.CDIDevice{{Name: "v=d"}} },
		kind.Invalid, "config.CDI_devices[0].name"},
	{"CDI annotation", func(c *config) { c.Annotations = map[string]string{"cdi.k8s.io/d": "v/c=d,v/c=e"} }, nil, ""},
	{"CDI annotation without a device", func(c *config) { c.Annotations = map[string]string{"cdi.k8s.io/d": ""} },
		kind.Invalid, "config.annotations[cdi.k8s.io/d]"},
	{"CDI annotation with a space",
		func(c *config) { c.Annotations = map[string]string{"cdi.k8s.io/d": "v/c=d, v/c=e"} },
		kind.Invalid, "config.annotations[cdi.k8s.io/d]"},
	{"signal", func(c *config) { c.StopSignal = 66 }, kind.Invalid, "config.stop_signal"},

	{"zero byte in args", func(c *config) { c.Args = []string{"a", "b\x00"} }, kind.Invalid, "config.args[1]"},
	{"long command", func(c *config) { c.Command = []string{strings.Repeat("x", maxString)} },
		kind.Invalid, "config.command[0]"},
	{"env without key", withEnv("", "v"), kind.Invalid, "config.envs[0].key"},
	{"env key with =", withEnv("a=b", "v"), kind.Invalid, "config.envs[0].key"},
	{"env with zero byte", withEnv("a", "\x00"), kind.Invalid, "config.envs[0]"},
	{"env not UTF-8", withEnv("a", "\xff"), kind.Unsupported, "config.envs[0].value"},
	{"working dir with a zero byte", func(c *config) { c.WorkingDir = "/a\x00" },
		kind.Invalid, "config.working_dir"},
	{"relative working dir", func(c *config) { c.WorkingDir = "a" }, kind.Invalid, "config.working_dir"},

	{"log path", func(c *config) { c.LogPath = "c/0.log" }, nil, ""},
	{"absolute log path", func(c *config) { c.LogPath = "/c/0.log" }, kind.Invalid, "config.log_path"},
	{"escaping log path", func(c *config) { c.LogPath = "c/../../0.log" }, kind.Invalid, "config.log_path"},
	{"log path with a line", func(c *config) { c.LogPath = "c\n0.log" }, kind.Invalid, "config.log_path"},
	{"log path that is not clean", func(c *config) { c.LogPath = "c//0.log" }, kind.Invalid, "config.log_path"},
	{"log path of a directory", func(c *config) { c.LogPath = "./" }, kind.Invalid, "config.log_path"},

	{
		"mount",
		withMount(
			&cri.Mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"nosuid", "nodev", "noexec"}},
		),
		nil,
		"",
	},
	{"mount without container path", withMount(&cri.Mount{HostPath: "/a"}),
		kind.Invalid, "config.mounts[0].container_path"},
	{"relative container path", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "b"}),
		kind.Invalid, "config.mounts[0].container_path"},
	{"mount over the root", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "/b/.."}),
		kind.Invalid, "config.mounts[0].container_path"},
	{"mount without host path", withMount(&cri.Mount{ContainerPath: "/b"}),
		kind.Invalid, "config.mounts[0].host_path"},
	{
		"image and host path",
		withMount(
			&cri.Mount{HostPath: "/a", ContainerPath: "/b", Image: &cri.ImageSpec{Image: "i"},
				Readonly: true},
		),
		kind.Invalid,
		"config.mounts[0].host_path",
	},
	{"image without name", withMount(&cri.Mount{ContainerPath: "/b", Image: &cri.ImageSpec{}}),
		kind.Invalid, "config.mounts[0].image.image"},
	{
		"image with propagation",
		withMount(
			&cri.Mount{ContainerPath: "/b", Image: &cri.ImageSpec{Image: "i"}, Readonly: true,
				Propagation: slave},
		),
		kind.Invalid,
		"config.mounts[0].propagation",
	},
	{
		"escaping sub path",
		withMount(
			&cri.Mount{
				ContainerPath: "/b",
				Image:         &cri.ImageSpec{Image: "i"},
				ImageSubPath:  "../x",
				Readonly:      true,
			},
		),
		kind.Invalid,
		"config.mounts[0].image_sub_path",
	},
	{"writable image", withMount(&cri.Mount{ContainerPath: "/b", Image: &cri.ImageSpec{Image: "i"}}),
		kind.Invalid, "config.mounts[0].readonly"},
	{"sub path without image", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "/b", ImageSubPath: "x"}),
		kind.Invalid, "config.mounts[0].image_sub_path"},
	{"unknown propagation", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "/b", Propagation: 3}),
		kind.Invalid, "config.mounts[0].propagation"},
	{
		"rro",
		withMount(
			&cri.Mount{
				HostPath:          "/a",
				ContainerPath:     "/b",
				Readonly:          true,
				RecursiveReadOnly: true,
				Propagation:       private,
			},
		),
		nil,
		"",
	},
	{"rro and writable", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "/b", RecursiveReadOnly: true}),
		kind.Invalid, "config.mounts[0].recursive_read_only"},
	{
		"rro and slave",
		withMount(
			&cri.Mount{HostPath: "/a", ContainerPath: "/b", Readonly: true, RecursiveReadOnly: true,
				Propagation: slave},
		),
		kind.Invalid,
		"config.mounts[0].recursive_read_only",
	},
	{"idmap", withMount(&cri.Mount{HostPath: "/a", ContainerPath: "/b", UidMappings: []*cri.IDMapping{{}}}),
		kind.Invalid, "config.mounts[0].uidMappings"},
	{"removing options", withMount(
		&cri.Mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"suid", "dev", "exec",
			"noatime"}}), nil, ""},
	{"option of another field", withMount(
		&cri.Mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"suid", "ro"}}),
		kind.Invalid, "config.mounts[0].mount_options[1]"},
	{"contradicting options", withMount(
		&cri.Mount{HostPath: "/a", ContainerPath: "/b", MountOptions: []string{"exec", "nodev", "noexec"}}),
		kind.Invalid, "config.mounts[0].mount_options"},

	{"device", withDevice(&cri.Device{HostPath: "/dev/null", Permissions: "rm"}), nil, ""},
	{"relative device", withDevice(&cri.Device{HostPath: "null"}), kind.Invalid, "config.devices[0].host_path"},
	{"relative device path", withDevice(&cri.Device{HostPath: "/dev/null", ContainerPath: "x"}),
		kind.Invalid, "config.devices[0].container_path"},
	{"device permissions", withDevice(&cri.Device{HostPath: "/dev/null", Permissions: "rx"}),
		kind.Invalid, "config.devices[0].permissions"},

	{"privileged in a pod that is not", inContext(func(sc *secContext) { sc.Privileged = true }),
		kind.Invalid, fieldContext + "privileged"},
	{"masked path", inContext(func(sc *secContext) { sc.MaskedPaths = []string{"a"} }),
		kind.Invalid, fieldContext + "masked_paths[0]"},
	{"group alone", inContext(func(sc *secContext) { sc.RunAsGroup = &cri.Int64Value{} }),
		kind.Invalid, fieldContext + "run_as_group"},
	{"username with group", inContext(func(sc *secContext) { sc.RunAsUsername = "a:b" }),
		kind.Invalid, fieldUsername},
	{"SELinux", inContext(func(sc *secContext) { sc.SelinuxOptions = &cri.SELinuxOption{Role: "a:b"} }),
		kind.Invalid, fieldContext + "selinux_options.role"},
	{"AppArmor", inContext(func(sc *secContext) {
		sc.Apparmor = &cri.SecurityProfile{ProfileType: profileLocalhost}
	}), kind.Invalid, fieldApparmor + ".localhost_ref"},

	{"target", inNamespaces(&cri.NamespaceOption{Pid: modeTarget, TargetId: "x"}), nil, ""},
	{"no target", inNamespaces(&cri.NamespaceOption{Pid: modeTarget}), kind.Invalid, nsField + "target_id"},
	{"network target", inNamespaces(&cri.NamespaceOption{Network: modeTarget}), kind.Invalid, nsField + "network"},
	{"ipc container", inNamespaces(&cri.NamespaceOption{Ipc: modeContainer}), kind.Invalid, nsField + "ipc"},
	{"unknown mode", inNamespaces(&cri.NamespaceOption{Pid: 4}), kind.Invalid, nsField + "pid"},
	{"node in a pod that is not", inNamespaces(&cri.NamespaceOption{Pid: modeNode}), kind.Invalid, nsField + "pid"},
	{"node network in a pod that is not", inNamespaces(&cri.NamespaceOption{Network: modeNode}),
		kind.Invalid, nsField + "network"},
	{"host user namespace", inNamespaces(&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeNode}}),
		nil, ""},
	{"user namespace", inNamespaces(&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modePod}}),
		kind.Invalid, nsField + "userns_options.uids"},
	{
		"user namespace of the container",
		inNamespaces(&cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeContainer}}),
		kind.Invalid,
		nsField + "userns_options.mode",
	},

	{"many shares", withResources(&cri.LinuxContainerResources{CpuShares: maxShares + 1}),
		kind.Invalid, "config.linux.resources.cpu_shares"},
	{"negative shares", withResources(&cri.LinuxContainerResources{CpuShares: -1}),
		kind.Invalid, fieldResources + ".cpu_shares"},
	{"no quota", withResources(&cri.LinuxContainerResources{CpuQuota: -1, MemorySwapLimitInBytes: -1}), nil, ""},
	{"negative quota", withResources(&cri.LinuxContainerResources{CpuQuota: -2}),
		kind.Invalid, fieldResources + ".cpu_quota"},
	{"small quota", withResources(&cri.LinuxContainerResources{CpuQuota: 999}),
		kind.Invalid, fieldResources + ".cpu_quota"},
	{"long period", withResources(&cri.LinuxContainerResources{CpuPeriod: 1000001}),
		kind.Invalid, fieldResources + ".cpu_period"},
	{"negative memory", withResources(&cri.LinuxContainerResources{MemoryLimitInBytes: -1}),
		kind.Invalid, fieldResources + ".memory_limit_in_bytes"},
	{"swap alone", withResources(&cri.LinuxContainerResources{MemorySwapLimitInBytes: 5}),
		kind.Invalid, fieldResources + ".memory_swap_limit_in_bytes"},
	{
		"swap below memory",
		withResources(&cri.LinuxContainerResources{MemorySwapLimitInBytes: 5, MemoryLimitInBytes: 6}),
		kind.Invalid,
		fieldResources + ".memory_swap_limit_in_bytes",
	},
	{"oom", withResources(&cri.LinuxContainerResources{OomScoreAdj: 1001}),
		kind.Invalid, fieldResources + ".oom_score_adj"},
	{"cpus", withResources(&cri.LinuxContainerResources{CpusetCpus: "0-3,8"}), nil, ""},
	{"bad cpus", withResources(&cri.LinuxContainerResources{CpusetCpus: "3-0"}),
		kind.Invalid, fieldResources + ".cpuset_cpus"},
	{"bad mems", withResources(&cri.LinuxContainerResources{CpusetMems: "0,"}),
		kind.Invalid, fieldResources + ".cpuset_mems"},
	{"page size", withResources(&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2M"}}}),
		kind.Invalid, fieldResources + ".hugepage_limits[0].page_size"},
	{"unified", withResources(&cri.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "1"}}),
		kind.Invalid, fieldResources + ".unified"},
}

func TestValidate(t *testing.T) {
	for _, tt := range containerCases {
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

type changePod = func(*podConfig)

func withSysctl(name string, node bool) changePod {
	return func(s *podConfig) {
		s.Linux.Sysctls = map[string]string{name: "1"}
		if node {
			s.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: modeNode, Ipc: modeNode}
		}
	}
}

func withPort(p *cri.PortMapping) changePod {
	return func(s *podConfig) { s.PortMappings = []*cri.PortMapping{p} }
}

func inPodContext(sc *cri.LinuxSandboxSecurityContext) changePod {
	return func(s *podConfig) { s.Linux.SecurityContext = sc }
}

func withDNS(d *cri.DNSConfig) changePod { return func(s *podConfig) { s.DnsConfig = d } }

func withHostname(h string) changePod { return func(s *podConfig) { s.Hostname = h } }

var podCases = []struct {
	name   string
	change changePod
	kind   error // nil: valid
	field  string
}{
	{name: "valid", change: func(*podConfig) {}},
	{"minimal", func(s *podConfig) { *s = cri.PodSandboxConfig{Metadata: s.Metadata} }, nil, ""},
	{"no metadata", func(s *podConfig) { s.Metadata = nil }, kind.Invalid, "config.metadata.name"},
	{"long name", func(s *podConfig) { s.Metadata.Name = strings.Repeat("x", maxName+1) },
		kind.Invalid, "config.metadata.name"},
	{"name with a semicolon", func(s *podConfig) { s.Metadata.Name = "a;K8S_POD_NAME=b" },
		kind.Invalid, "config.metadata.name"},
	{"no namespace", func(s *podConfig) { s.Metadata.Namespace = "" }, kind.Invalid, "config.metadata.namespace"},
	{"no uid", func(s *podConfig) { s.Metadata.Uid = "" }, kind.Invalid, "config.metadata.uid"},
	{"huge", func(s *podConfig) { s.Annotations = map[string]string{"a": strings.Repeat("x", maxConfig)} },
		kind.Invalid, "config"},
	{"windows", func(s *podConfig) { s.Windows = &cri.WindowsPodSandboxConfig{} },
		kind.Unsupported, "config.windows"},

	{"qualified hostname", withHostname("a-1.B.example"), nil, ""},
	{"hostname of 64", withHostname(strings.Repeat("a", 64)), nil, ""},
	{"hostname of 65", withHostname(strings.Repeat("a", 65)), kind.Invalid, "config.hostname"},
	{"hostname that ends with a dot", withHostname("a.svc."), nil, ""}, // a kubelet without a cluster domain
	{"hostname that is a dot", withHostname("."), kind.Invalid, "config.hostname"},
	{"hostname with a line", withHostname("a\n127.0.0.1 b"), kind.Invalid, "config.hostname"},
	{"hostname with a dash", withHostname("-a"), kind.Invalid, "config.hostname"},
	{"hostname with an empty label", withHostname("a..b"), kind.Invalid, "config.hostname"},

	{"relative log directory", func(s *podConfig) { s.LogDirectory = "a" }, kind.Invalid, "config.log_directory"},
	{"escaping log directory", func(s *podConfig) { s.LogDirectory = "/a/../b" },
		kind.Invalid, "config.log_directory"},

	{
		"dns",
		withDNS(
			&cri.DNSConfig{
				Servers:  []string{"10.0.0.1", "fe80::1%eth0"},
				Searches: []string{".", "a.b."},
				Options:  []string{"ndots:5"},
			},
		),
		nil,
		"",
	},
	{"dns server", withDNS(&cri.DNSConfig{Servers: []string{"10.0.0.1", "name"}}),
		kind.Invalid, "config.dns_config.servers[1]"},
	{"dns search", withDNS(&cri.DNSConfig{Searches: []string{"a b"}}), kind.Invalid, "config.dns_config.searches[0]"},
	{"dns option", withDNS(&cri.DNSConfig{Options: []string{"a\nnameserver 1.1.1.1"}}),
		kind.Invalid, "config.dns_config.options[0]"},

	{
		"port",
		withPort(
			&cri.PortMapping{ContainerPort: 80, HostPort: 8080, HostIp: "::1",
				Protocol: cri.Protocol_SCTP},
		),
		nil,
		"",
	},
	{"no host port", withPort(&cri.PortMapping{ContainerPort: 80}), nil, ""},
	{"container port", withPort(&cri.PortMapping{ContainerPort: 65536}),
		kind.Invalid, "config.port_mappings[0].container_port"},
	{"host port", withPort(&cri.PortMapping{ContainerPort: 1, HostPort: -1}),
		kind.Invalid, "config.port_mappings[0].host_port"},
	{"host port to nowhere", withPort(&cri.PortMapping{HostPort: 80}),
		kind.Invalid, "config.port_mappings[0].container_port"},
	{"protocol", withPort(&cri.PortMapping{ContainerPort: 1, Protocol: 3}),
		kind.Invalid, "config.port_mappings[0].protocol"},
	{"host ip", withPort(&cri.PortMapping{ContainerPort: 1, HostIp: "localhost"}),
		kind.Invalid, "config.port_mappings[0].host_ip"},

	{"cgroup parent", func(s *podConfig) { s.Linux.CgroupParent = "/kubepods/../.." },
		kind.Invalid, "config.linux.cgroup_parent"},
	{"overhead", func(s *podConfig) { s.Linux.Overhead = &cri.LinuxContainerResources{CpuShares: -1} },
		kind.Invalid, "config.linux.overhead.cpu_shares"},

	{"group alone", inPodContext(&cri.LinuxSandboxSecurityContext{RunAsGroup: &cri.Int64Value{Value: 1}}),
		kind.Invalid, fieldContext + "run_as_group"},
	{"negative user", inPodContext(&cri.LinuxSandboxSecurityContext{RunAsUser: &cri.Int64Value{Value: -1}}),
		kind.Invalid, fieldContext + "run_as_user"},
	{
		"pid target",
		inPodContext(
			&cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: modeTarget, TargetId: "x"},
			},
		),
		kind.Invalid,
		fieldContext + "namespace_options.pid",
	},
	{
		"user namespace",
		inPodContext(
			&cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{}},
			},
		),
		kind.Invalid,
		fieldContext + "namespace_options.userns_options.uids",
	},
	{
		"user namespace target",
		inPodContext(
			&cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: modeTarget}},
			},
		),
		kind.Invalid,
		fieldContext + "namespace_options.userns_options.mode",
	},
	{"seccomp", inPodContext(&cri.LinuxSandboxSecurityContext{Seccomp: &cri.SecurityProfile{ProfileType: 5}}),
		kind.Invalid, fieldSeccomp + ".profile_type"},

	{"sysctl of the network", withSysctl("net.ipv4.ip_unprivileged_port_start", false), nil, ""},
	{"sysctl with slashes", withSysctl("net/ipv4/conf/eth0.1/forwarding", false), nil, ""},
	{"sysctl of ipc", withSysctl("kernel.shm_rmid_forced", false), nil, ""},
	{"sysctl of the node's network", withSysctl("net.core.somaxconn", true),
		kind.Invalid, "config.linux.sysctls[net.core.somaxconn]"},
	{"sysctl of the node's ipc", withSysctl("fs.mqueue.msg_max", true),
		kind.Invalid, "config.linux.sysctls[fs.mqueue.msg_max]"},
	{"sysctl of the node's name", withSysctl("kernel.domainname", true),
		kind.Invalid, "config.linux.sysctls[kernel.domainname]"},
	{"sysctl of the user namespace", func(s *podConfig) {
		withSysctl("user.max_inotify_watches", false)(s)
		s.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: modePod,
			Uids: idMap(0, 5, 1), Gids: idMap(0, 5, 1)}
	}, nil, ""},
	{"sysctl of the node's user namespace", withSysctl("user.max_inotify_watches", false),
		kind.Invalid, "config.linux.sysctls[user.max_inotify_watches]"},
	{"sysctl with two values", func(s *podConfig) { s.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1\n2"} },
		kind.Invalid, "config.linux.sysctls[net.core.somaxconn]"},
	{"sysctl of the node", withSysctl("kernel.panic", false), kind.Invalid, "config.linux.sysctls[kernel.panic]"},
	{"sysctl that escapes", withSysctl("net/../kernel/panic", false),
		kind.Invalid, "config.linux.sysctls[net/../kernel/panic]"},
	{"sysctl with an empty part", withSysctl("net..x", false), kind.Invalid, "config.linux.sysctls[net..x]"},
}

func TestValidateSandbox(t *testing.T) {
	for _, tt := range podCases {
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
