// Package cgroup is all that is known of cgroups, v1 and v2: which hierarchies
// there are, who is in a cgroup, how one is entered, killed, frozen and removed,
// what the kernel counts there. Where shims and containers sit is decided
// elsewhere.
//
// A container may make cgroups below its own. What is done to a cgroup is done
// to the whole tree below it.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Set are the cgroups of a container: controller -> path below the mount
// of its hierarchy, as /proc/PID/cgroup has them. "" is cgroup v2, "name=..."
// a named v1 hierarchy.
//
// No method touches the root of a hierarchy, whatever the map says.
type Set map[string]string

// ErrNone says that there is no cgroup to do this with.
var ErrNone = errors.New("the container has no cgroup of its own")

// Of tells the cgroups that a process has for itself: hierarchies
// where it sits in the root, or where the caller sits, are left out.
func Of(pid int) (Set, error) {
	c := Set{}
	err := procCgroups(strconv.Itoa(pid), func(controller, path string) {
		if safe(path) {
			c[controller] = path
		}
	})
	if err != nil {
		return nil, err
	}
	err = procCgroups("self", func(controller, path string) {
		if c[controller] == path {
			delete(c, controller)
		}
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// procCgroups calls f with each cgroup of a process.
func procCgroups(pid string, f func(controller, path string)) error {
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return fmt.Errorf("cannot read the cgroups of process %s: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		// hierarchy-ID:controller-list:cgroup-path, see cgroups(7).
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, path, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		path = strings.TrimSuffix(path, " (deleted)")
		for name := range strings.SplitSeq(controllers, ",") {
			f(name, path)
		}
	}
	return nil
}

// Everywhere is the same path in every hierarchy, be there a cgroup or not.
func Everywhere(path string) Set {
	c := Set{}
	for _, h := range hierarchies() {
		for _, name := range h.names {
			c[name] = path
		}
	}
	return c
}

// At are the cgroups that exist now at the same path of every hierarchy.
func At(path string) Set {
	c := Set{}
	for _, h := range hierarchies() {
		dir, ok := h.at(path)
		if !ok {
			continue
		}
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		for _, name := range h.names {
			c[name] = path
		}
	}
	return c
}

// Find gives the cgroups that exist now where the OCI runtime makes those of a
// container: cgroupsPath is linux.cgroupsPath of its spec, which is a path for
// the cgroupfs driver, and SLICE:PREFIX:NAME for the systemd driver.
func Find(cgroupsPath string, systemd bool) Set { return At(Path(cgroupsPath, systemd)) }

// Path is where that is in every hierarchy. It names nothing if cgroupsPath names no
// scope of systemd, and should.
func Path(cgroupsPath string, systemd bool) string {
	if !systemd {
		return filepath.Clean(cgroupsPath)
	}
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 {
		return ""
	}
	return filepath.Join(SlicePath(parts[0]), parts[1]+"-"+parts[2]+".scope")
}

// SlicePath is where systemd puts a slice: its name says which slices are above
// (systemd.slice(5)).
func SlicePath(slice string) string {
	path := "/"
	if stem := strings.TrimSuffix(slice, ".slice"); stem != "-" { // the root slice
		for i, r := range stem + "-" {
			if r == '-' {
				path = filepath.Join(path, stem[:i]+".slice")
			}
		}
	}
	return path
}

// dir is the directory of a controller's cgroup.
func (c Set) dir(controller string) (string, bool) {
	path, ok := c[controller]
	if !ok {
		return "", false
	}
	for _, h := range hierarchies() {
		if h.has(controller) {
			return h.at(path)
		}
	}
	return "", false
}

// dirs are the directories of the set, one for each hierarchy.
func (c Set) dirs() []string {
	var all []string
	for controller := range c {
		if dir, ok := c.dir(controller); ok {
			all = append(all, dir)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// tracker is the hierarchy by which the container's processes are known.
func (c Set) tracker() (dir string, ok bool) {
	for _, controller := range []string{"", "freezer", "pids", "memory", "devices", "cpu"} {
		if dir, ok := c.dir(controller); ok {
			return dir, true
		}
	}
	return "", false
}

// Enter makes the cgroups where they are missing, with those above, and moves a
// process into them. The caller keeps the pid from being used again. After an
// error some of it may have been done.
func (c Set) Enter(pid int) error {
	for _, h := range hierarchies() {
		path, ok := c[h.names[0]]
		if _, below := h.at(path); !ok || !below {
			continue
		}
		dir := h.dir
		for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
			parent := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return fmt.Errorf("cannot make a cgroup: %w", err)
			}
			if !h.has("cpuset") {
				continue
			}
			// A new cpuset of v1 is empty, and nothing can enter it (cpuset(7)).
			for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(parent, dir, name); err != nil {
					return fmt.Errorf("cannot set up a cpuset: %w", err)
				}
			}
		}
		procs := filepath.Join(dir, "cgroup.procs")
		if err := os.WriteFile(procs, strconv.AppendInt(nil, int64(pid), 10), 0); err != nil {
			return fmt.Errorf("cannot enter a cgroup: %w", err)
		}
	}
	return nil
}

// inherit copies a file from the parent unless the child's has something.
func inherit(parent, child, name string) error {
	path := filepath.Join(child, name)
	if have, err := os.ReadFile(path); err != nil || !blank(have) {
		return err
	}
	value, err := os.ReadFile(filepath.Join(parent, name))
	if err != nil {
		return err
	}
	return os.WriteFile(path, value, 0)
}

// Sub makes a cgroup below the container's, for the tree of one exec. The
// argument is for ExecOptions.Cgroup of package runc. On v1 it is made where
// processes can be frozen, and nowhere else.
func (c Set) Sub(name string) (sub Set, argument string, err error) {
	controller, argument := "freezer", "freezer:"
	if _, v1 := c[controller]; !v1 {
		controller, argument = "", ""
	}
	dir, ok := c.dir(controller)
	if !ok {
		return nil, "", fmt.Errorf("cannot make cgroup %s: %w", name, ErrNone)
	}
	if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
		return nil, "", fmt.Errorf("cannot make a cgroup for an exec: %w", err)
	}
	return Set{controller: c[controller] + "/" + name}, argument + name, nil
}

// ignoreGone forgives a cgroup that was removed meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
