package placement

import (
	"context"
	"fmt"
	"path"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// PlaceShim moves the shim of a container into a cgroup of its own. The caller
// keeps pid from being used again: it has not reaped it. A process that the
// shim starts later is born there too, so call it before the shim starts any.
//
// Calling it again is harmless. After an error the cgroup may exist in part:
// RemoveShim takes it away once the process is gone.
func (m *Manager) PlaceShim(ctx context.Context, id string, pid int) error {
	if err := checkID(id); err != nil {
		return err
	}
	if m.driver == Systemd {
		return placeScope(ctx, scopeName(id), "Holdfast shim of container "+id, pid)
	}
	if err := shimCgroups(id).Enter(pid); err != nil {
		return fmt.Errorf("cannot move the shim of %s (pid %d) out of the daemon's cgroup: %w", id, pid, err)
	}
	return nil
}

// PlaceStream does the same for the process that serves sessions. Nothing has to be
// removed later: the cgroup is one for all such processes, and a scope ends with its
// process.
func (m *Manager) PlaceStream(ctx context.Context, pid int) error {
	if m.driver == Systemd {
		return placeScope(ctx, fmt.Sprintf("%s-%d%s", streamPrefix, pid, scopeSuffix), "Holdfast sessions", pid)
	}
	if err := cgroup.Everywhere(StreamPath).Enter(pid); err != nil {
		return fmt.Errorf("cannot move holdfast-stream (pid %d) out of the daemon's cgroup: %w", pid, err)
	}
	return nil
}

// ShimCgroups are those that exist now of the shim of a container.
func (m *Manager) ShimCgroups(id string) cgroup.Set {
	if m.driver == Systemd {
		return cgroup.At(path.Join("/"+systemSlice, scopeName(id)))
	}
	return cgroup.At(path.Join(ShimsPath, id))
}

func shimCgroups(id string) cgroup.Set { return cgroup.Everywhere(path.Join(ShimsPath, id)) }

// ContainerCgroups are those that exist now of a container, by what
// ContainerPath gave for it.
func (m *Manager) ContainerCgroups(cgroupsPath string) cgroup.Set {
	return cgroup.Find(cgroupsPath, m.driver == Systemd)
}

// ContainerCgroup is where these are in every hierarchy.
func (m *Manager) ContainerCgroup(cgroupsPath string) string {
	return cgroup.Path(cgroupsPath, m.driver == Systemd)
}

// PodCgroup is the cgroup of a pod, of which ContainerPath makes those of its
// containers, in every hierarchy. "": it has none of its own.
func (m *Manager) PodCgroup(parent, podID string) string {
	switch {
	case m.driver != Systemd && parent == "":
		return path.Join(PodsPath, podID)
	case m.driver != Systemd:
		return path.Join("/", parent)
	case parent == "":
		return "" // its containers are beside those of other pods
	}
	slice, err := sliceName(parent)
	if err != nil {
		return ""
	}
	return cgroup.SlicePath(slice)
}

// RemoveShim removes the cgroup of a shim that has ended. It waits a little for
// a process that is just dying, no longer than ctx allows, and never kills one:
// the error is ErrBusy then. No cgroup is no error.
func (m *Manager) RemoveShim(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	if m.driver == Systemd {
		return removeScope(ctx, scopeName(id))
	}
	if err := shimCgroups(id).Remove(ctx); err != nil {
		return fmt.Errorf("cannot remove the cgroup of the shim of %s: %w", id, err)
	}
	return nil
}

// RemovePod removes the cgroup that the containers of a pod without a
// cgroup_parent shared, with what is left of theirs. Any other parent belongs to
// whoever named it and stays. It waits as RemoveShim does.
func (m *Manager) RemovePod(ctx context.Context, parent, podID string) error {
	if err := checkID(podID); err != nil {
		return err
	}
	if parent != "" || m.driver == Systemd {
		return nil
	}
	if err := cgroup.Everywhere(path.Join(PodsPath, podID)).Remove(ctx); err != nil {
		return fmt.Errorf("cannot remove the cgroup of pod %s: %w", podID, err)
	}
	return nil
}
