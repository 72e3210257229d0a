package spec

import (
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Device is a device file of the machine, as a container shall see it.
type Device struct {
	specs.LinuxDevice        // Path is the one in the container
	Access            string // of the device cgroup: some of "rwm"
}

// devices: nothing is allowed but what is named here, and the harmless ones
// (null, zero, random, tty, ...) that every OCI runtime adds.
func (b *builder) devices() error {
	l := b.spec.Linux
	list := b.Devices
	if b.sc.GetPrivileged() {
		list = append(append([]Device(nil), b.HostDevices...), b.Devices...)
	}
	at := map[string]int{}
	l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: b.sc.GetPrivileged(), Access: "rwm"}}
	for _, d := range list {
		// A device that was asked for by name replaces the host's at its path.
		if i, ok := at[d.Path]; ok {
			l.Devices[i] = d.LinuxDevice
		} else {
			at[d.Path] = len(l.Devices)
			l.Devices = append(l.Devices, d.LinuxDevice)
		}
		if !b.sc.GetPrivileged() {
			l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{
				Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: d.Access,
			})
		}
	}
	return nil
}
