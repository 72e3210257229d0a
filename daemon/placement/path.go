package placement

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode"
)

// Where our own cgroups are, below the root of each hierarchy.
const (
	PodsPath   = "/holdfast/pods"  // of pods without a cgroup_parent, with those of their containers
	ShimsPath  = "/holdfast/shims" // with one for each shim, by the id of its container
	StreamPath = "/holdfast/stream"
)

// Beginnings of the names of scopes.
const (
	containerPrefix = "holdfast"
	scopePrefix     = "holdfast-shim"
	streamPrefix    = "holdfast-stream"
)

// sameDriver is what to do where a parent belongs to the other driver.
const sameDriver = "give the kubelet (cgroupDriver) and holdfastd (driver of [cgroup]) the same one"

// systemSlice never stops, not even at shutdown: see scopeProperties.
const systemSlice = "system.slice"

// ContainerPath is linux.cgroupsPath of the OCI spec of a container. parent is
// the pod's cgroup_parent as the kubelet sent it; where that is empty, the
// container goes below a cgroup of our own (see RemovePod). The error about a
// parent wraps ErrParent.
//
//	cgroupfs  PARENT/ID                    /holdfast/pods/PODID/ID
//	systemd   BASE OF PARENT:holdfast:ID   system.slice:holdfast:ID
func (m *Manager) ContainerPath(parent, podID, id string) (string, error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	if m.driver == Systemd {
		slice := systemSlice
		if parent != "" {
			var err error
			if slice, err = sliceName(parent); err != nil {
				return "", err
			}
		}
		return slice + ":" + containerPrefix + ":" + id, nil
	}
	if parent == "" {
		if err := checkID(podID); err != nil {
			return "", err
		}
		return path.Join(PodsPath, podID, id), nil
	}
	if err := checkParent(parent); err != nil {
		return "", err
	}
	if strings.HasSuffix(path.Clean(parent), ".slice") {
		return "", fmt.Errorf("%w %q: this is a slice of systemd, and the cgroup driver here is cgroupfs; "+
			sameDriver, ErrParent, parent)
	}
	return path.Join("/", parent, id), nil
}

// checkParent refuses what would lead out of the parent or split the lines of
// /proc/PID/cgroup.
func checkParent(parent string) error {
	if slices.Contains(strings.Split(parent, "/"), "..") {
		return fmt.Errorf("%w %q: it must not contain \"..\"", ErrParent, parent)
	}
	if strings.ContainsFunc(parent, unicode.IsControl) {
		return fmt.Errorf("%w %q: it must not contain control characters", ErrParent, parent)
	}
	return nil
}

// sliceName takes the slice out of a parent such as
// /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice: the
// name of a slice says where it is, so the last one is enough
// (systemd.slice(5)).
func sliceName(parent string) (string, error) {
	if err := checkParent(parent); err != nil {
		return "", err
	}
	name := path.Base(path.Clean(parent))
	stem, ok := strings.CutSuffix(name, ".slice")
	if !ok {
		return "", fmt.Errorf("%w %q: the cgroup driver here is systemd and wants a slice, such as kubepods.slice; "+
			sameDriver, ErrParent, parent)
	}
	if stem == "-" { // the root slice
		return name, nil
	}
	bad := func(r rune) bool { return !strings.ContainsRune(unitChars, r) }
	if stem == "" || strings.ContainsFunc(stem, bad) || slices.Contains(strings.Split(stem, "-"), "") {
		return "", fmt.Errorf("%w %q: %s is not the name of a slice", ErrParent, parent, name)
	}
	return name, nil
}

// unitChars may be in the name of a unit (systemd.unit(5)), but for the colon,
// which separates the parts of a cgroupsPath.
const unitChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.\\-"

// ShimOfScope gives the id of the container whose shim is in a scope of this name.
func ShimOfScope(unit string) (id string, ok bool) { return scopeOf(unit, scopePrefix+"-") }

// ContainerOfScope gives the id of the container that an OCI runtime has put into a scope
// of this name.
func ContainerOfScope(unit string) (id string, ok bool) {
	id, ok = scopeOf(unit, containerPrefix+"-")
	return id, ok && !strings.Contains(id, "-")
}

// IsStreamScope says whether a scope of this name is that of a holdfast-stream.
func IsStreamScope(unit string) bool {
	_, ok := scopeOf(unit, streamPrefix+"-")
	return ok
}

func scopeOf(unit, prefix string) (id string, ok bool) {
	id, ok = strings.CutSuffix(unit, scopeSuffix)
	if !ok {
		return "", false
	}
	id, ok = strings.CutPrefix(id, prefix)
	return id, ok && validID.MatchString(id)
}
