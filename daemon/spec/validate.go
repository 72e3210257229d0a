package spec

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxConfig bounds the config of a pod, in bytes; maxContainer that of a container,
// which has an environment of any size that the kernel takes. Both are kept in memory
// and in several files.
const (
	maxConfig    = 1 << 20
	maxContainer = 4 << 20
)

// maxString is the kernel's bound of one argument or environment variable
// (MAX_ARG_STRLEN), its terminating zero included.
const maxString = 128 << 10

// Validate checks all of a container's config that needs no look at the machine
// or at the image. s is its pod's config.
func Validate(c *runtimeapi.ContainerConfig, s *runtimeapi.PodSandboxConfig) error {
	if c == nil {
		return invalid("config", "is missing")
	}
	if n := proto.Size(c); n > maxContainer {
		return invalid("config", "has %d bytes, more than %d", n, maxContainer)
	}
	if err := validateName("config.metadata.name", c.GetMetadata().GetName()); err != nil {
		return err
	}
	if c.GetImage().GetImage() == "" {
		return invalid("config.image.image", "is empty")
	}
	if c.GetWindows() != nil {
		return unsupported("config.windows", "is set, and this is Linux")
	}
	if _, err := CDIDevices(c); err != nil {
		return err
	}
	if _, ok := runtimeapi.Signal_name[int32(c.GetStopSignal())]; !ok {
		return invalid(fieldStopSignal, "%d is not a signal", c.GetStopSignal())
	}
	return cmp.Or(
		validateProcess(c),
		validateLogPath(c.GetLogPath()),
		validateMounts(c.GetMounts()),
		validateImageOwners(c.GetMounts(), Userns(s)),
		validateDevices(c.GetDevices()),
		ValidateResources(fieldResources, c.GetLinux().GetResources()),
		validateContext(c.GetLinux().GetSecurityContext(), s.GetLinux().GetSecurityContext()),
	)
}

func validateProcess(c *runtimeapi.ContainerConfig) error {
	for _, l := range []namedList{{"config.command", c.GetCommand()}, {"config.args", c.GetArgs()}} {
		for i, s := range l.items {
			if err := execString(fmt.Sprintf("%s[%d]", l.field, i), s); err != nil {
				return err
			}
		}
	}
	for i, kv := range c.GetEnvs() {
		field := fmt.Sprintf("config.envs[%d]", i)
		if kv.GetKey() == "" || strings.Contains(kv.GetKey(), "=") {
			return invalid(field+".key", "%q is not the name of a variable", kv.GetKey())
		}
		if !utf8.Valid(kv.GetValue()) {
			// JSON would replace the bytes and the container would start with
			// another value than it was given.
			return unsupported(field+".value", "the value of %s is not UTF-8, which an OCI spec cannot hold",
				kv.GetKey())
		}
		if err := execString(field, kv.GetKey()+"="+string(kv.GetValue())); err != nil {
			return err
		}
	}
	if dir := c.GetWorkingDir(); dir != "" {
		return absolute("config.working_dir", dir)
	}
	return nil
}

// execString checks what execve(2) shall be given.
func execString(field, s string) error {
	if strings.Contains(s, "\x00") {
		return invalid(field, "holds a zero byte")
	}
	if len(s) >= maxString {
		return invalid(field, "has %d bytes, and the kernel takes less than %d", len(s), maxString)
	}
	return nil
}

func absolute(field, p string) error {
	switch {
	case p == "":
		return invalid(field, "is empty")
	case !path.IsAbs(p):
		return invalid(field, "%q is not absolute", p)
	case strings.Contains(p, "\x00"):
		return invalid(field, "holds a zero byte")
	}
	return nil
}

// relative checks a path that must stay below another; empty is none.
func relative(field, p string) error {
	switch {
	case path.IsAbs(p):
		return invalid(field, "%q is absolute", p)
	case hasDotDot(p):
		return invalid(field, "%q has a .. in it", p)
	case p != "" && path.Clean(p) == ".":
		return invalid(field, "%q is a directory", p)
	case strings.ContainsAny(p, "\x00\n"):
		return invalid(field, "%q has a control character in it", p)
	}
	return nil
}

func validateLogPath(p string) error {
	const field = "config.log_path"
	if err := relative(field, p); err != nil {
		return err
	}
	if p != "" && p != path.Clean(p) {
		return invalid(field, "%q has an empty part or a . in it", p)
	}
	return nil
}

func hasDotDot(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }

// mountOptions are those that a mount can have beside what other fields say, each with
// what takes it away again, where the source's own mount has it.
var mountOptions = map[string]string{
	"noexec":      "exec",
	"nodev":       "dev",
	"nosuid":      "suid",
	"nosymfollow": "symfollow",
	"noatime":     "atime",
	"nodiratime":  "diratime",
}

func validateMounts(mounts []*runtimeapi.Mount) error {
	for i, m := range mounts {
		if err := validateMount(fmt.Sprintf("config.mounts[%d].", i), m); err != nil {
			return err
		}
	}
	return nil
}

func validateMount(field string, m *runtimeapi.Mount) error {
	if err := absolute(field+"container_path", m.GetContainerPath()); err != nil {
		return err
	}
	if path.Clean(m.GetContainerPath()) == "/" {
		return invalid(field+"container_path", "is the root of the container")
	}
	image := m.GetImage() != nil
	switch {
	case image && m.GetImage().GetImage() == "":
		return invalid(field+"image.image", "is empty")
	case image && !m.GetReadonly():
		return invalid(field+"readonly", "must be set for an image")
	case image && m.GetHostPath() != "":
		return invalid(field+"host_path", "is set together with image")
	case !image && m.GetImageSubPath() != "":
		return invalid(field+"image_sub_path", "is set without image")
	case !image:
		if err := absolute(field+"host_path", m.GetHostPath()); err != nil {
			return err
		}
	}
	private := m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_PRIVATE
	if _, ok := runtimeapi.MountPropagation_name[int32(m.GetPropagation())]; !ok {
		return invalid(field+"propagation", "%d is not known", m.GetPropagation())
	}
	if image && !private {
		return invalid(field+"propagation", "must be PROPAGATION_PRIVATE for an image")
	}
	if m.GetRecursiveReadOnly() && !m.GetReadonly() {
		return invalid(field+"recursive_read_only", "is set without readonly")
	}
	if m.GetRecursiveReadOnly() && !private {
		return invalid(field+"recursive_read_only", "needs PROPAGATION_PRIVATE, not %s", m.GetPropagation())
	}
	if (len(m.GetUidMappings()) > 0) != (len(m.GetGidMappings()) > 0) {
		return invalid(field+"uidMappings", "and gidMappings go together, and one of them is empty")
	}
	err := cmp.Or(
		validateMappings(field+"uidMappings", m.GetUidMappings()),
		validateMappings(field+"gidMappings", m.GetGidMappings()),
	)
	if err != nil {
		return err
	}
	return cmp.Or(
		validateMountOptions(field+"mount_options", m.GetMountOptions()),
		relative(field+"image_sub_path", m.GetImageSubPath()),
	)
}

// validateMountOptions takes options that other fields do not have, and no two that
// contradict each other.
func validateMountOptions(field string, options []string) error {
	for i, o := range options {
		known := false
		for adds, removes := range mountOptions {
			known = known || o == adds || o == removes
			if o == adds && slices.Contains(options, removes) {
				return invalid(field, "has both %s and %s", adds, removes)
			}
		}
		if !known {
			names := slices.Sorted(maps.Keys(mountOptions))
			return invalid(fmt.Sprintf("%s[%d]", field, i), "%q is not one of %s, each with or without its \"no\"", o,
				strings.Join(names, ", "))
		}
	}
	return nil
}

func validateDevices(devices []*runtimeapi.Device) error {
	for i, d := range devices {
		field := fmt.Sprintf("config.devices[%d].", i)
		err := absolute(field+"host_path", d.GetHostPath())
		if p := d.GetContainerPath(); err == nil && p != "" {
			err = absolute(field+"container_path", p)
		}
		if err == nil && strings.Trim(d.GetPermissions(), "rwm") != "" {
			err = invalid(field+"permissions", "%q is not made of r, w and m", d.GetPermissions())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func validateContext(sc *runtimeapi.LinuxContainerSecurityContext, pod *runtimeapi.LinuxSandboxSecurityContext) error {
	if sc.GetPrivileged() && !pod.GetPrivileged() {
		return invalid(fieldContext+"privileged", "is set, and the pod's is not")
	}
	for _, l := range []namedList{
		{fieldContext + "masked_paths", sc.GetMaskedPaths()},
		{fieldContext + "readonly_paths", sc.GetReadonlyPaths()},
	} {
		for i, p := range l.items {
			if err := absolute(fmt.Sprintf("%s[%d]", l.field, i), p); err != nil {
				return err
			}
		}
	}
	return cmp.Or(
		validateUser(sc),
		validateCapabilities(sc.GetCapabilities()),
		profile(fieldSeccomp, "seccomp_profile_path", seccompProfile(sc), true),
		profile(fieldApparmor, "apparmor_profile", apparmorProfile(sc), false),
		selinuxOptions(fieldContext+"selinux_options", sc.GetSelinuxOptions()),
		validateContainerNamespaces(sc.GetNamespaceOptions(), pod.GetNamespaceOptions()),
	)
}

func validateUser(sc *runtimeapi.LinuxContainerSecurityContext) error {
	user, name, group := sc.GetRunAsUser(), sc.GetRunAsUsername(), sc.GetRunAsGroup()
	switch {
	case user != nil && name != "":
		return invalid(fieldUsername, "is set together with run_as_user")
	case strings.ContainsAny(name, ":\n\x00"):
		return invalid(fieldUsername, "%q is not the name of a user", name)
	case group != nil && user == nil && name == "":
		return invalid(fieldContext+"run_as_group", "is set without run_as_user or run_as_username")
	}
	return identity(fieldContext, user, group, sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
}

func identity(field string, user, group *runtimeapi.Int64Value, groups []int64,
	policy runtimeapi.SupplementalGroupsPolicy) error {
	id := func(name string, n int64) error {
		if n < 0 || n > maxID {
			return invalid(field+name, "%d is not within 0..%d", n, maxID)
		}
		return nil
	}
	err := cmp.Or(id("run_as_user", user.GetValue()), id("run_as_group", group.GetValue()))
	for i := 0; i < len(groups) && err == nil; i++ {
		err = id(fmt.Sprintf("supplemental_groups[%d]", i), groups[i])
	}
	if _, ok := runtimeapi.SupplementalGroupsPolicy_name[int32(policy)]; err == nil && !ok {
		err = invalid(field+"supplemental_groups_policy", "%d is not known", policy)
	}
	return err
}

// profile checks one of seccomp or AppArmor; deprecated is the name of the field
// that held it before.
func profile(field, deprecated string, p *runtimeapi.SecurityProfile, isFile bool) error {
	ref := p.GetLocalhostRef()
	switch {
	case p == nil:
		return nil
	case p.GetProfileType() == -1:
		return invalid(fieldContext+deprecated, "%q is not runtime/default, unconfined or localhost/...", ref)
	case p.GetProfileType() != profileLocalhost:
		if _, ok := runtimeapi.SecurityProfile_ProfileType_name[int32(p.GetProfileType())]; !ok {
			return invalid(field+".profile_type", "%d is not known", p.GetProfileType())
		}
		if ref != "" {
			return invalid(field+".localhost_ref", "is set, and profile_type is %s", p.GetProfileType())
		}
		return nil
	case isFile:
		return absolute(field+".localhost_ref", ref)
	case ref == "":
		return invalid(field+".localhost_ref", "is empty")
	}
	return nil
}

func selinuxOptions(field string, o *runtimeapi.SELinuxOption) error {
	// A colon separates the parts, and only levels have some of their own.
	for _, part := range []struct{ name, value, not string }{
		{"user", o.GetUser(), ": \n\x00"},
		{"role", o.GetRole(), ": \n\x00"},
		{"type", o.GetType(), ": \n\x00"},
		{"level", o.GetLevel(), " \n\x00"},
	} {
		if strings.ContainsAny(part.value, part.not) {
			return invalid(field+"."+part.name, "%q is not part of an SELinux label", part.value)
		}
	}
	return nil
}

func validateContainerNamespaces(own, pod *runtimeapi.NamespaceOption) error {
	const field = fieldContext + "namespace_options."
	if err := namespaceModes(field, own, true); err != nil {
		return err
	}
	for _, n := range []struct {
		name     string
		own, pod runtimeapi.NamespaceMode
	}{
		{"network", own.GetNetwork(), pod.GetNetwork()},
		{"pid", own.GetPid(), pod.GetPid()},
		{"ipc", own.GetIpc(), pod.GetIpc()},
	} {
		if n.own == modeNode && n.pod != modeNode {
			return invalid(field+n.name, "is NODE, and the pod's is %s", n.pod)
		}
	}
	if !sameUserns(own, pod) {
		return invalid(field+"userns_options", "is not that of the pod, and a pod has one user namespace")
	}
	return nil
}

// namespaceModes checks the modes that make sense; TARGET only for the PID
// namespace of a container.
func namespaceModes(field string, o *runtimeapi.NamespaceOption, container bool) error {
	for _, n := range []struct {
		name  string
		mode  runtimeapi.NamespaceMode
		valid []runtimeapi.NamespaceMode
	}{
		{"network", o.GetNetwork(), []runtimeapi.NamespaceMode{modePod, modeNode}},
		{"ipc", o.GetIpc(), []runtimeapi.NamespaceMode{modePod, modeNode}},
		{"pid", o.GetPid(), []runtimeapi.NamespaceMode{modePod, modeContainer, modeNode, modeTarget}},
	} {
		if !slices.Contains(n.valid, n.mode) || n.mode == modeTarget && !container {
			return invalid(field+n.name, "%s is not possible here", n.mode)
		}
	}
	if o.GetPid() == modeTarget && o.GetTargetId() == "" {
		return invalid(field+"target_id", "is empty, and pid is TARGET")
	}
	return cmp.Or(validateUserns(field, o.GetUsernsOptions()), validateUsernsModes(field, o))
}

// namedList is a field of strings.
type namedList struct {
	field string
	items []string
}
