package spec

import (
	"cmp"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const fieldApparmor = fieldContext + "apparmor"

// lsm sets the labels of AppArmor and SELinux. Privileged containers get none.
func (b *builder) lsm() error {
	if b.sc.GetPrivileged() {
		return nil
	}
	if b.SELinuxEnabled {
		b.selinux()
	} else if o := selinuxOf(b.sc, b.Sandbox); o.GetUser()+o.GetRole()+o.GetType()+o.GetLevel() != "" {
		b.warn("%s", SELinuxIgnored)
	}
	return b.apparmor()
}

// SELinuxIgnored is the warning about a container that has a label on other nodes.
const SELinuxIgnored = fieldContext + "selinux_options are ignored, as this kernel does not enforce SELinux: " +
	"nothing confines the container that they would confine elsewhere"

// apparmorProfile gives what is asked for, nil for nothing. Some clients write the name of a
// profile as in the deprecated field, which other runtimes take as well.
func apparmorProfile(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	p := sc.GetApparmor()
	if p == nil {
		return namedProfile(sc.GetApparmorProfile()) //nolint:staticcheck // clients still send it
	}
	if name, ok := strings.CutPrefix(p.GetLocalhostRef(), "localhost/"); ok {
		return &runtimeapi.SecurityProfile{ProfileType: p.GetProfileType(), LocalhostRef: name}
	}
	return p
}

// apparmor: a profile that was asked for by name is applied or is an error; the
// default where there is no AppArmor is nothing, as on other runtimes. No profile is the
// default, says the CRI, if there is one.
func (b *builder) apparmor() error {
	p := apparmorProfile(b.sc)
	if p.GetProfileType() == profileUnconfined || p == nil && b.AppArmorDefault == "" {
		return nil
	}
	if p.GetProfileType() == profileLocalhost {
		if !b.AppArmorEnabled {
			return unsupported(fieldApparmor, "cannot apply profile %q: AppArmor is not enabled", p.GetLocalhostRef())
		}
		b.spec.Process.ApparmorProfile = p.GetLocalhostRef()
		return nil
	}
	if b.AppArmorEnabled && b.AppArmorDefault == "" {
		return unsupported(fieldApparmor, "no default AppArmor profile is loaded")
	}
	if b.AppArmorEnabled {
		b.spec.Process.ApparmorProfile = b.AppArmorDefault
	}
	return nil
}

// selinuxOf gives the container's options, else the pod's.
func selinuxOf(sc *runtimeapi.LinuxContainerSecurityContext,
	pod *runtimeapi.PodSandboxConfig) *runtimeapi.SELinuxOption {
	if o := sc.GetSelinuxOptions(); o != nil {
		return o
	}
	return pod.GetLinux().GetSecurityContext().GetSelinuxOptions()
}

// selinux applies the container's options, else the pod's. It is not called where the kernel
// does not enforce SELinux: options are ignored there, as on other runtimes, since pods that
// are for any cluster ask for levels and types.
func (b *builder) selinux() {
	b.spec.Process.SelinuxLabel, b.spec.Linux.MountLabel = b.labelPair()
}

// labelPair are the labels of the process and of its files. Parts that are left out are
// those of the reference policy for containers.
func (b *builder) labelPair() (process, files string) {
	o := selinuxOf(b.sc, b.Sandbox)
	if o == nil {
		return "", ""
	}
	user, level := cmp.Or(o.GetUser(), "system_u"), cmp.Or(o.GetLevel(), "s0")
	role, domain := cmp.Or(o.GetRole(), "system_r"), cmp.Or(o.GetType(), "container_t")
	return strings.Join([]string{user, role, domain, level}, ":"), user + ":object_r:container_file_t:" + level
}

// FileLabel is the SELinux label of all files that are the container's own; empty: they
// have no other one than elsewhere.
func FileLabel(in Input) string {
	b := &builder{Input: in, sc: in.Container.GetLinux().GetSecurityContext()}
	if !b.SELinuxEnabled || b.sc.GetPrivileged() {
		return ""
	}
	_, files := b.labelPair()
	return files
}
