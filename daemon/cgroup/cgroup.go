// Package cgroup decides where containers and shims sit among the control
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
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
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
	ErrBusy = errors.New("the cgroup has processes")
)

// runningSystemd exists where systemd is the init process: sd_booted(3).
const runningSystemd = "/run/systemd/system"

// Detect turns the setting of the config, "auto", "cgroupfs" or "systemd", into
// a driver. With auto it is systemd where systemd runs on cgroup v2, and
// cgroupfs elsewhere, as kubeadm and the distributions have it.
func Detect(setting string) (Driver, error) {
	_, err := os.Stat(runningSystemd)
	return detect(setting, err == nil, Unified())
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
		return "", fmt.Errorf("cannot use the cgroup driver systemd: systemd is not the init process here (no %s); set driver of [cgroup] to cgroupfs, in the kubelet too", runningSystemd)
	}
	return "", fmt.Errorf("cannot use the cgroup driver %q: want auto, cgroupfs or systemd", setting)
}

// Unified says whether this machine has cgroup v2 alone. A hybrid one, where
// controllers are on v1, is not unified.
func Unified() bool {
	hs, err := hierarchies()
	return err == nil && unified(hs)
}

// unified allows for named v1 hierarchies, which old containers may still mount.
func unified(hs []hierarchy) bool {
	v2 := false
	for _, h := range hs {
		if len(h.controllers) > 0 {
			return false
		}
		v2 = v2 || h.v2
	}
	return v2
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
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	if len(hs) == 0 {
		return nil, errors.New("cannot manage cgroups: no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")
	}
	return &Manager{driver: driver}, nil
}

// Driver is the driver that New was given.
func (m *Manager) Driver() Driver { return m.driver }

// hierarchy is one tree of cgroups: one or more v1 controllers, a named one
// without any, or v2.
type hierarchy struct {
	root        string // where it is mounted
	v2          bool
	controllers []string // of v1
}

// hierarchies lists every hierarchy that is mounted, each once.
func hierarchies() ([]hierarchy, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the cgroup mounts in /proc/self/mountinfo: %w", err)
	}
	return fromMounts(mounts), nil
}

// fromMounts takes one mount of each hierarchy: of the whole tree and writable
// if there is such a one. The device number tells hierarchies apart, because
// any may be mounted several times.
func fromMounts(mounts []*mountinfo.Info) []hierarchy {
	type device struct{ major, minor int }
	best := map[device]*mountinfo.Info{}
	var order []device
	worth := func(m *mountinfo.Info) int {
		n := 0
		if m.Root == "/" {
			n += 2
		}
		if slices.Contains(strings.Split(m.Options, ","), "rw") {
			n++
		}
		return n
	}
	for _, m := range mounts {
		d := device{m.Major, m.Minor}
		old, ok := best[d]
		if !ok {
			order = append(order, d)
		}
		if !ok || worth(m) > worth(old) {
			best[d] = m
		}
	}
	var hs []hierarchy
	for _, d := range order {
		m := best[d]
		h := hierarchy{root: m.Mountpoint, v2: m.FSType == "cgroup2"}
		if !h.v2 {
			h.controllers = v1Controllers(m.VFSOptions)
		}
		hs = append(hs, h)
	}
	return hs
}

// notControllers are the other options that a v1 superblock shows (cgroups(7)
// and cgroup-v1/cgroups.rst of the kernel).
var notControllers = []string{"rw", "ro", "none", "noprefix", "clone_children", "xattr", "cpuset_v2_mode", "favordynmods", "seclabel"}

func v1Controllers(options string) []string {
	var cs []string
	for o := range strings.SplitSeq(options, ",") {
		if !slices.Contains(notControllers, o) && !strings.Contains(o, "=") {
			cs = append(cs, o)
		}
	}
	return cs
}

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

// checkID keeps an id from naming another cgroup or unit than its own.
func checkID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("cannot name a cgroup after the id %q: want letters, digits, '.', '_' and '-'", id)
	}
	return nil
}
