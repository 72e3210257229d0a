package containers

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Ask gathers what files and kernel say of a container. Its record may be nil.
// This is the one place where the kernel is asked: about the shim, the processes
// in the container's cgroups, its init, and the FIFO of one that was not started.
// An error means that the kernel could not be asked: nothing may be concluded.
func (m *Manager) Ask(id string, rec *records.Container) (records.Files, records.Kernel, error) {
	files := m.read(id)
	var k records.Kernel
	var err error
	if k.Shim, err = m.Shims.Alive(m.dir(id)); err != nil {
		return files, k, err
	}
	k.Unstarted = m.Runtimes.Unstarted(id)
	if s := files.Status; s != nil && s.BootID == rundir.BootID() {
		k.Processes = s.Init.Alive()
	}
	for _, g := range m.cgroups(id, files, rec) {
		_, populated, err := g.Populated()
		if err != nil {
			return files, k, err
		}
		k.Processes = k.Processes || populated
	}
	return files, k, nil
}

// cgroups are all in which processes of a container may be: those that the shim
// wrote down, and those that the spec names. One that is not named after the
// container may be another's, whatever a file says.
func (m *Manager) cgroups(id string, f records.Files, rec *records.Container) []Cgroup {
	var all []Cgroup
	if f.Status != nil {
		paths := maps.Clone(f.Status.Cgroups)
		maps.DeleteFunc(paths, func(_, path string) bool { return !namedAfter(path, id) })
		all = append(all, m.Cgroups.Recorded(paths))
	}
	if rec != nil && strings.HasSuffix(rec.CgroupsPath, id) {
		all = append(all, m.Cgroups.Of(rec.CgroupsPath))
	}
	return all
}

// namedAfter says whether a cgroup is that of a container, or the one below it in
// which some OCI runtimes put the processes.
func namedAfter(path, id string) bool {
	base := filepath.Base(path)
	if base == "container" {
		base = filepath.Base(filepath.Dir(path))
	}
	return base == id || strings.HasSuffix(base, "-"+id+".scope")
}

// read reads the files of a shim. What is damaged is moved out of the way, so
// that it can be looked at and written anew.
func (m *Manager) read(id string) (f records.Files) {
	dir := m.dir(id)
	if status, err := dir.ReadStatus(); err == nil {
		f.Status = &status
	}
	durable := m.State.Dir(state.Containers, id)
	for _, at := range []string{string(dir), durable} {
		exit, err := rundir.ReadExitIn(at)
		if errors.Is(err, record.ErrDamaged) {
			m.State.Quarantine(filepath.Join(at, rundir.ExitName), err)
		}
		if err == nil {
			f.Exit = &exit
			return f
		}
	}
	return f
}

// readExit looks whether a container whose shim did not answer has ended.
func (c *Container) readExit() bool {
	exit := c.m.read(c.ID()).Exit
	if exit != nil {
		c.observe(func(s *records.Seen) { s.Exit = exit })
	}
	return exit != nil
}

// PinPID binds the pid namespace of a process to a path. The process is looked at
// again afterwards, so that what was bound is its own.
func PinPID(p rundir.Process, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/pid", p.PID), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot pin the pid namespace of process %d at %s: %w", p.PID, path, err)
	}
	if !p.Alive() {
		unix.Unmount(path, unix.MNT_DETACH)
		return fmt.Errorf("cannot pin the pid namespace of process %d: it has ended", p.PID)
	}
	return nil
}
