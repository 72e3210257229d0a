package spec

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Device is a device file of the machine, as a container shall see it.
type Device struct {
	specs.LinuxDevice        // Path is the one in the container
	Access            string // of the device cgroup: some of "rwm"
	Source            string // its path on the host
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
	moved := b.movedDevices()
	l.Devices = slices.DeleteFunc(l.Devices, func(d specs.LinuxDevice) bool {
		return slices.ContainsFunc(moved, func(m specs.Mount) bool { return m.Destination == d.Path })
	})
	return nil
}

// movedDevices are mounts for devices that have another path in the container.
// Nobody can make a device in a user namespace. OCI runtimes bind the host's
// instead, from the path that it has in the container.
func (b *builder) movedDevices() []specs.Mount {
	if Userns(b.Sandbox) == nil {
		return nil
	}
	var list []specs.Mount
	for _, d := range b.Devices {
		if d.Source != d.Path {
			list = append(list, specs.Mount{Destination: d.Path, Type: "bind", Source: d.Source,
				Options: []string{"bind", "rprivate", "nosuid", "noexec", "rw"}})
		}
	}
	return list
}
