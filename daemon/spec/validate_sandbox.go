package spec

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxHostname is the kernel's bound (HOST_NAME_MAX).
const maxHostname = 64

const hostnamePart = `[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?`

var hostname = regexp.MustCompile(`^` + hostnamePart + `(\.` + hostnamePart + `)*\.?$`)

// maxName is more than Kubernetes allows any name to have (253 bytes). Names end
// up in logs, labels of metrics and error messages.
const maxName = 512

func validateName(field, name string) error {
	switch {
	case name == "":
		return invalid(field, "is empty")
	case len(name) > maxName:
		return invalid(field, "has %d bytes, more than %d", len(name), maxName)
	case strings.ContainsFunc(name, func(r rune) bool { return unicode.IsControl(r) || r == ';' }):
		// CNI plugins are given it as part of a list with this separator, in
		// an environment variable.
		return invalid(field, "%q has a control character or a semicolon in it", name)
	}
	return nil
}

// ValidateSandbox checks all of a pod's config that needs no look at the machine.
// An empty hostname is left to the caller: clients send one also with a network
// namespace, though the CRI excludes it.
func ValidateSandbox(s *runtimeapi.PodSandboxConfig) error {
	if s == nil {
		return invalid("config", "is missing")
	}
	if n := proto.Size(s); n > maxConfig {
		return invalid("config", "has %d bytes, more than %d", n, maxConfig)
	}
	m := s.GetMetadata()
	for _, f := range []struct{ name, value string }{
		{"name", m.GetName()}, {"namespace", m.GetNamespace()}, {"uid", m.GetUid()},
	} {
		if err := validateName("config.metadata."+f.name, f.value); err != nil {
			return err
		}
	}
	if s.GetWindows() != nil {
		return unsupported("config.windows", "is set, and this is Linux")
	}
	if h := s.GetHostname(); h != "" && (len(h) > maxHostname || !hostname.MatchString(h)) {
		return invalid("config.hostname", "%q is not a host name of at most %d bytes", h, maxHostname)
	}
	if dir := s.GetLogDirectory(); dir != "" {
		if err := absolute("config.log_directory", dir); err != nil {
			return err
		}
		if hasDotDot(dir) {
			return invalid("config.log_directory", "%q has a .. in it", dir)
		}
	}
	sc := s.GetLinux().GetSecurityContext()
	return cmp.Or(
		validateDNS(s.GetDnsConfig()),
		validatePorts(s.GetPortMappings()),
		validateCgroupParent(s.GetLinux().GetCgroupParent()),
		validatePodContext(sc),
		validateSysctls(s.GetLinux().GetSysctls(), sc.GetNamespaceOptions()),
		ValidatePodResources("config.linux.overhead", s.GetLinux().GetOverhead()),
		ValidatePodResources("config.linux.resources", s.GetLinux().GetResources()),
	)
}

// validateDNS keeps the lines of resolv.conf apart and its words whole.
func validateDNS(d *runtimeapi.DNSConfig) error {
	for i, ip := range d.GetServers() {
		if _, err := netip.ParseAddr(ip); err != nil {
			return invalid(fmt.Sprintf("config.dns_config.servers[%d]", i), "%q is not an IP address", ip)
		}
	}
	for _, l := range []namedList{
		{"config.dns_config.searches", d.GetSearches()},
		{"config.dns_config.options", d.GetOptions()},
	} {
		for i, w := range l.items {
			if w == "" || strings.ContainsAny(w, " \t\r\n\x00") {
				return invalid(fmt.Sprintf("%s[%d]", l.field, i), "%q is not one word", w)
			}
		}
	}
	return nil
}

func validatePorts(ports []*runtimeapi.PortMapping) error {
	for i, p := range ports {
		field := fmt.Sprintf("config.port_mappings[%d].", i)
		if n := p.GetContainerPort(); n < 0 || n > 65535 {
			return invalid(field+"container_port", "%d is not within 0..65535", n)
		}
		if n := p.GetHostPort(); n < 0 || n > 65535 {
			return invalid(field+"host_port", "%d is not within 0..65535", n)
		}
		if p.GetHostPort() != 0 && p.GetContainerPort() == 0 {
			return invalid(field+"container_port", "is 0, and host_port is %d", p.GetHostPort())
		}
		if _, ok := runtimeapi.Protocol_name[int32(p.GetProtocol())]; !ok {
			return invalid(field+"protocol", "%d is not known", p.GetProtocol())
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return invalid(field+"host_ip", "%q is not an IP address", ip)
			}
		}
	}
	return nil
}

func validateCgroupParent(p string) error {
	if hasDotDot(p) || strings.ContainsAny(p, "\x00\n") {
		return invalid("config.linux.cgroup_parent", "%q is not the path of a cgroup", p)
	}
	return nil
}

func validatePodContext(sc *runtimeapi.LinuxSandboxSecurityContext) error {
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return invalid(fieldContext+"run_as_group", "is set without run_as_user")
	}
	seccomp := sc.GetSeccomp()
	if seccomp == nil {
		seccomp = namedProfile(sc.GetSeccompProfilePath()) //nolint:staticcheck // clients still send it
	}
	return cmp.Or(
		identity(fieldContext, sc.GetRunAsUser(), sc.GetRunAsGroup(),
			sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy()),
		profile(fieldSeccomp, "seccomp_profile_path", seccomp, true),
		profile(fieldApparmor, "", sc.GetApparmor(), false),
		selinuxOptions(fieldContext+"selinux_options", sc.GetSelinuxOptions()),
		namespaceModes(fieldContext+"namespace_options.", sc.GetNamespaceOptions(), false),
	)
}

// sysctlName is one below /proc/sys: parts separated by dots or slashes, as in
// sysctl(8), none of them empty or "..".
var sysctlName = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_-]+)*$`)

// validateSysctls lets pass only what belongs to a namespace of the pod: the
// others would change the node.
func validateSysctls(sysctls map[string]string, o *runtimeapi.NamespaceOption) error {
	for _, name := range slices.Sorted(maps.Keys(sysctls)) {
		field := fmt.Sprintf("config.linux.sysctls[%s]", name)
		if !sysctlName.MatchString(name) {
			return invalid(field, "is not the name of a sysctl")
		}
		if strings.ContainsAny(sysctls[name], "\x00\n") {
			return invalid(field, "%q is not a value", sysctls[name])
		}
		switch sysctlNamespace(name) {
		case "network":
			if o.GetNetwork() == modeNode {
				return invalid(field, "would change the node: the pod has its network")
			}
		case "ipc":
			if o.GetIpc() == modeNode {
				return invalid(field, "would change the node: the pod has its IPC namespace")
			}
		case "user":
			if podUserns(o) == nil {
				return invalid(field, "would change the node: the pod has its user namespace")
			}
		case "uts":
			if o.GetNetwork() == modeNode {
				return invalid(field, "would change the node: the pod has its UTS namespace")
			}
		default:
			return invalid(field, "belongs to no namespace: it would change the node")
		}
	}
	return nil
}

// sysctlNamespace is the kind of namespace that a sysctl belongs to, "" if to none.
func sysctlNamespace(name string) string {
	name = strings.ReplaceAll(name, "/", ".")
	switch {
	case strings.HasPrefix(name, "net."):
		return "network"
	case strings.HasPrefix(name, "kernel.shm"), strings.HasPrefix(name, "kernel.msg"),
		name == "kernel.sem", strings.HasPrefix(name, "fs.mqueue."):
		return "ipc"
	case name == "kernel.domainname":
		return "uts"
	case strings.HasPrefix(name, "user."):
		return "user"
	}
	return ""
}
