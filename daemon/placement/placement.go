// Package placement decides where containers and shims sit among the control
// groups, and puts shims there: cgroup v1, v2 or both, with or without systemd.
//
// A container's cgroup is made by the OCI runtime from ContainerPath. A shim's
// is made here, outside of the daemon's own and of the pod's, so that neither a
// service manager that ends the daemon nor the limits of a pod reach it:
//
//	cgroupfs  /holdfast/shims/ID      in every hierarchy that is mounted
//	systemd   holdfast-shim-ID.scope  in system.slice
//
// The kernel keeps all state; a Manager holds none and may be used from any
// number of goroutines.
package placement

import (
	"errors"
	"fmt"
	"os"
	"regexp"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// Driver is who makes cgroups. It has to be the one that the kubelet uses.
type Driver string

// The drivers, as the config and the CRI name them.
const (
	Cgroupfs Driver = "cgroupfs" // mkdir below the hierarchies
	Systemd  Driver = "systemd"  // slices and scopes, asked for over D-Bus
)

// Errors that callers tell apart.
var (
	// ErrParent says that a cgroup_parent cannot be used with this driver.
	ErrParent = errors.New("invalid cgroup_parent")
	// ErrBusy says that processes are left in a cgroup that was to go.
	ErrBusy = cgroup.ErrBusy
)

// runningSystemd exists where systemd is the init process: sd_booted(3).
const runningSystemd = "/run/systemd/system"

// Detect turns the setting of the config, "auto", "cgroupfs" or "systemd", into
// a driver. With auto it is systemd where systemd runs on cgroup v2, and
// cgroupfs elsewhere, as kubeadm and the distributions have it.
func Detect(setting string) (Driver, error) {
	_, err := os.Stat(runningSystemd)
	return detect(setting, err == nil, cgroup.Probe().Unified)
}

func detect(setting string, booted, unified bool) (Driver, error) {
	switch {
	case setting == "auto" && booted && unified:
		return Systemd, nil
	case setting == "auto", setting == string(Cgroupfs):
		return Cgroupfs, nil
	case setting == string(Systemd) && booted:
		return Systemd, nil
	case setting == string(Systemd):
		return "", fmt.Errorf("cannot use the cgroup driver systemd: systemd is not the init process here (no %s);"+
			" set driver of [cgroup] to cgroupfs, in the kubelet too", runningSystemd)
	}
	return "", fmt.Errorf("cannot use the cgroup driver %q: want auto, cgroupfs or systemd", setting)
}

// Manager places and removes cgroups by one driver.
type Manager struct {
	driver Driver
}

// New returns the manager of a driver that Detect gave.
func New(driver Driver) (*Manager, error) {
	if driver != Cgroupfs && driver != Systemd {
		return nil, fmt.Errorf("cannot use the cgroup driver %q: want cgroupfs or systemd", driver)
	}
	if !cgroup.Probe().Mounted {
		return nil, errors.New(
			"cannot manage cgroups: no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")
	}
	return &Manager{driver: driver}, nil
}

// Driver is the driver that New was given.
func (m *Manager) Driver() Driver { return m.driver }

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

// checkID keeps an id from naming another cgroup or unit than its own.
func checkID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("cannot name a cgroup after the id %q: want letters, digits, '.', '_' and '-'", id)
	}
	return nil
}
