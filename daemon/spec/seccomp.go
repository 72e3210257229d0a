package spec

import (
	"fmt"
	"strings"

	"github.com/moby/profiles/seccomp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

const (
	profileDefault    = runtimeapi.SecurityProfile_RuntimeDefault
	profileUnconfined = runtimeapi.SecurityProfile_Unconfined
	profileLocalhost  = runtimeapi.SecurityProfile_Localhost

	fieldSeccomp = fieldContext + "seccomp"
)

// maxProfile bounds a seccomp profile, in bytes. The default one has 15 KB.
const maxProfile = 1 << 20

// ReadSeccompProfile reads the file of the profile that the container asks for;
// nil if it asks for none. The path is the host's.
func ReadSeccompProfile(c *runtimeapi.ContainerConfig) ([]byte, error) {
	sc := c.GetLinux().GetSecurityContext()
	p := seccompProfile(sc)
	if p.GetProfileType() != profileLocalhost || sc.GetPrivileged() {
		return nil, nil
	}
	b, err := beneath.ReadFile("/", p.GetLocalhostRef(), maxProfile)
	if err != nil {
		return nil, invalid(fieldSeccomp+".localhost_ref", "%v", err)
	}
	return b, nil
}

// seccompProfile gives what is asked for, nil for nothing. The CRI says that
// the deprecated field's default is unconfined, and so is no field at all.
func seccompProfile(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	if p := sc.GetSeccomp(); p != nil {
		return p
	}
	return namedProfile(sc.GetSeccompProfilePath()) //nolint:staticcheck // clients still send it
}

// namedProfile reads the deprecated form of a profile, of seccomp and AppArmor.
// What it does not know becomes a type that validation rejects.
func namedProfile(name string) *runtimeapi.SecurityProfile {
	ref, localhost := strings.CutPrefix(name, "localhost/")
	switch {
	case name == "":
		return nil
	case name == "runtime/default", name == "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: profileDefault}
	case name == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: profileUnconfined}
	case localhost:
		return &runtimeapi.SecurityProfile{ProfileType: profileLocalhost, LocalhostRef: ref}
	}
	return &runtimeapi.SecurityProfile{ProfileType: -1, LocalhostRef: name}
}

func (b *builder) seccomp() error {
	p := seccompProfile(b.sc)
	if p == nil || p.GetProfileType() == profileUnconfined || b.sc.GetPrivileged() {
		return nil
	}
	if !b.SeccompSupported {
		return unsupported(fieldSeccomp, "this kernel or the OCI runtime has no seccomp")
	}
	if p.GetProfileType() == profileDefault {
		return b.seccompDefault()
	}
	if len(b.SeccompProfile) == 0 {
		return invalid(fieldSeccomp+".localhost_ref", "%s is missing or empty", p.GetLocalhostRef())
	}
	filter, err := seccomp.LoadProfile(string(b.SeccompProfile), b.spec)
	if err != nil {
		return invalid(fieldSeccomp+".localhost_ref", "cannot use %s: %v", p.GetLocalhostRef(), err)
	}
	if filter == nil || filter.DefaultAction == "" {
		// The library takes an empty profile for "no filter", which is not
		// what somebody who names a file wants.
		return invalid(fieldSeccomp+".localhost_ref", "cannot use %s: it has no defaultAction", p.GetLocalhostRef())
	}
	b.spec.Linux.Seccomp = filter
	return nil
}

// checkSeccomp is seccomp, but for the default filter where there can be one: to make it
// takes a while, and nothing can be wrong with it.
func (b *builder) checkSeccomp() error {
	if b.SeccompSupported && seccompProfile(b.sc).GetProfileType() == profileDefault {
		return nil
	}
	return b.seccomp()
}

// seccompDefault applies the profile that Docker keeps: an allow-list, with
// rules that depend on the capabilities and the architecture. Some of its rules
// name a least kernel, which the library asks the running one for.
func (b *builder) seccompDefault() error {
	filter, err := seccomp.GetDefaultProfile(b.spec)
	if err != nil {
		return fmt.Errorf("%s: cannot make the default profile: %w", fieldSeccomp, err)
	}
	compact(filter, b.NoX32)
	b.spec.Linux.Seccomp = filter
	return nil
}
