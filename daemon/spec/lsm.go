package spec

import (
	"cmp"
	"fmt"
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
	}
	return b.apparmor()
}

func apparmorProfile(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	if p := sc.GetApparmor(); p != nil {
		return p
	}
	return namedProfile(sc.GetApparmorProfile()) //nolint:staticcheck // clients still send it
}

// apparmor: a profile that was asked for by name is applied or is an error; the
// default where there is no AppArmor is nothing, as on other runtimes.
func (b *builder) apparmor() error {
	p := apparmorProfile(b.sc)
	if p == nil || p.GetProfileType() == profileUnconfined {
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

// labels refuses SELinux options that would confine a container, or a volume's new
// label, where they cannot be had: without them it would run with more rights than
// somebody meant it to have. A type that confines nothing is had everywhere, and so is a
// level alone: it keeps apart what has labels, and pods for any cluster ask for one.
func (b *builder) labels() error {
	o, field := selinuxOf(b.sc, b.Sandbox), fieldContext+"selinux_options"
	if b.sc.GetPrivileged() || o.GetType() == unconfinedType {
		return nil
	}
	asked := o.GetUser()+o.GetRole()+o.GetType()+o.GetLevel() != ""
	if o.GetUser()+o.GetRole()+o.GetType() != "" && !b.SELinuxEnabled {
		return unsupported(field, "%q cannot be applied: this kernel does not enforce SELinux", o.String())
	}
	for i, m := range b.Container.GetMounts() {
		if asked && b.SELinuxEnabled && m.GetSelinuxRelabel() && m.GetImage() == nil {
			return unsupported(fmt.Sprintf("config.mounts[%d].selinux_relabel", i),
				"relabelling is not supported: label %s on the host, or leave selinux_options out", m.GetHostPath())
		}
	}
	return nil
}

// unconfinedType is that of a container with all the rights of the host.
const unconfinedType = "spc_t"

// selinuxOf gives the container's options, else the pod's.
func selinuxOf(sc *runtimeapi.LinuxContainerSecurityContext,
	pod *runtimeapi.PodSandboxConfig) *runtimeapi.SELinuxOption {
	if o := sc.GetSelinuxOptions(); o != nil {
		return o
	}
	return pod.GetLinux().GetSecurityContext().GetSelinuxOptions()
}

// selinux applies the container's options, else the pod's. Parts that are left
// out are those of the reference policy for containers.
func (b *builder) selinux() {
	o := selinuxOf(b.sc, b.Sandbox)
	if o == nil {
		return
	}
	user, level := cmp.Or(o.GetUser(), "system_u"), cmp.Or(o.GetLevel(), "s0")
	role, domain := cmp.Or(o.GetRole(), "system_r"), cmp.Or(o.GetType(), "container_t")
	b.spec.Process.SelinuxLabel = strings.Join([]string{user, role, domain, level}, ":")
	b.spec.Linux.MountLabel = user + ":object_r:container_file_t:" + level
}
