package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// allCaps are the kernel's capabilities (capabilities(7)), by their numbers.
var allCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
	"CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE",
	"CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK",
	"CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
	"CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE",
	"CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
	"CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF",
	"CAP_CHECKPOINT_RESTORE",
}

// defaultCaps are those that every Kubernetes runtime gives and images rely on.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT",
	"CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
}

const (
	capALL       = "ALL"
	fieldAdd     = fieldContext + "capabilities.add_capabilities"
	fieldDrop    = fieldContext + "capabilities.drop_capabilities"
	fieldAmbient = fieldContext + "capabilities.add_ambient_capabilities"
)

// parseCaps gives the kernel's names for those that the CRI may write in any case
// and without their prefix, or ALL.
func parseCaps(names []string) (caps []string) {
	for _, n := range names {
		c := strings.ToUpper(n)
		if c != capALL && !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		caps = append(caps, c)
	}
	return caps
}

// validateCapabilities refuses what is no capability of any kernel. A name to drop that
// was mistyped would leave the container with a right that somebody meant to take away.
func validateCapabilities(c *runtimeapi.Capability) error {
	for _, l := range []namedList{
		{fieldAdd, c.GetAddCapabilities()},
		{fieldDrop, c.GetDropCapabilities()},
		{fieldAmbient, c.GetAddAmbientCapabilities()},
	} {
		for i, name := range parseCaps(l.items) {
			if name != capALL && !slices.Contains(allCaps, name) {
				return invalid(fmt.Sprintf("%s[%d]", l.field, i), "%q is not the name of a capability", l.items[i])
			}
		}
	}
	return nil
}

// capabilities: ALL counts first, then what is added by name, then what is
// dropped by name. So "drop ALL, add X" gives X and "add ALL, drop X" all but X.
func (b *builder) capabilities() error {
	known := b.KnownCaps
	if known == nil {
		known = allCaps
	}
	if b.sc.GetPrivileged() {
		b.setCaps(known, nil)
		return nil
	}
	req := b.sc.GetCapabilities()
	add, drop := parseCaps(req.GetAddCapabilities()), parseCaps(req.GetDropCapabilities())
	ambient := parseCaps(req.GetAddAmbientCapabilities())

	set := slices.DeleteFunc(slices.Clone(defaultCaps), func(c string) bool { return !slices.Contains(known, c) })
	if slices.Contains(add, capALL) {
		set = slices.Clone(known)
	}
	if slices.Contains(drop, capALL) {
		set = nil
	}
	if slices.Contains(ambient, capALL) {
		ambient = slices.Clone(known)
	}
	dropped := func(c string) bool { return slices.Contains(drop, c) }
	for _, from := range []struct {
		field string
		caps  []string
	}{{fieldAdd, add}, {fieldAmbient, ambient}} {
		for _, c := range from.caps {
			if c != capALL && !dropped(c) && !slices.Contains(known, c) {
				return unsupported(from.field, "%s: the kernel does not know it or this daemon may not give it", c)
			}
			set = append(set, c)
		}
	}
	b.setCaps(slices.DeleteFunc(set, dropped), slices.DeleteFunc(ambient, dropped))
	return nil
}

// setCaps leaves the inheritable set empty but for ambient ones, which the
// kernel wants there: a program with file capabilities must not gain more than
// the container was given.
func (b *builder) setCaps(set, ambient []string) {
	inOrder := func(caps []string) []string {
		var out []string
		for _, c := range allCaps {
			if slices.Contains(caps, c) {
				out = append(out, c)
			}
		}
		return out
	}
	set, ambient = inOrder(set), inOrder(ambient)
	b.spec.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding:    set,
		Effective:   set,
		Permitted:   set,
		Inheritable: ambient,
		Ambient:     ambient,
	}
}
