package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
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
		return placeScope(ctx, id, pid)
	}
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		if err := h.place(filepath.Join(shimsPath, id), pid); err != nil {
			return fmt.Errorf("cannot move the shim of %s (pid %d) out of the daemon's cgroup: %w", id, pid, err)
		}
	}
	return nil
}

// RemoveShim removes the cgroup of a shim that has ended. It waits a little for
// a process that is just dying, no longer than ctx allows, and never kills one:
// the error is ErrBusy then. No cgroup is no error.
func (m *Manager) RemoveShim(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	if m.driver == Systemd {
		return removeScope(ctx, id)
	}
	return removeEverywhere(ctx, filepath.Join(shimsPath, id))
}

// ListShims gives the ids of all containers whose shim has a cgroup, be the
// shim alive or not.
func (m *Manager) ListShims() ([]string, error) {
	if m.driver == Systemd {
		return listScopes()
	}
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, h := range hs {
		names, err := children(filepath.Join(h.root, shimsPath))
		if err != nil {
			return nil, fmt.Errorf("cannot list the cgroups of shims: %w", err)
		}
		ids = append(ids, names...)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
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
	return removeEverywhere(ctx, filepath.Join(podsPath, podID))
}

// place makes the cgroup at path and moves pid there.
func (h hierarchy) place(path string, pid int) error {
	dir := h.root
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot make a cgroup: %w", err)
		}
		if !slices.Contains(h.controllers, "cpuset") {
			continue
		}
		// A new cpuset of v1 is empty, and nothing can enter it (cpuset(7)).
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			if err := inherit(parent, dir, name); err != nil {
				return err
			}
		}
	}
	procs := filepath.Join(dir, "cgroup.procs")
	if err := os.WriteFile(procs, strconv.AppendInt(nil, int64(pid), 10), 0); err != nil {
		return fmt.Errorf("cannot enter a cgroup: %w", err)
	}
	return nil
}

// inherit copies a cpuset file from the parent unless the child's has something.
func inherit(parent, child, name string) error {
	path := filepath.Join(child, name)
	have, err := os.ReadFile(path)
	if err == nil && strings.TrimSpace(string(have)) != "" {
		return nil
	}
	var value []byte
	if err == nil {
		value, err = os.ReadFile(filepath.Join(parent, name))
	}
	if err == nil {
		err = os.WriteFile(path, value, 0)
	}
	if err != nil {
		return fmt.Errorf("cannot set up a cpuset: %w", err)
	}
	return nil
}

// children are the cgroups right below dir; none if dir is missing.
func children(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// removeEverywhere removes the cgroup at path from every hierarchy. What is
// busy in one does not keep it in the others.
func removeEverywhere(ctx context.Context, path string) error {
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	err = retryBusy(ctx, func() error {
		var errs []error
		for _, h := range hs {
			errs = append(errs, removeTree(filepath.Join(h.root, path)))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("cannot remove the cgroup %s: %w", path, err)
	}
	return nil
}

// removeTree removes a cgroup and those below it. The kernel refuses to remove
// one that has processes, so nothing alive is lost.
func removeTree(dir string) error {
	// Mostly there is nothing below.
	err := os.Remove(dir)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	names, lerr := children(dir)
	if lerr != nil {
		return lerr
	}
	for _, name := range names {
		if err := removeTree(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if len(names) > 0 {
		err = os.Remove(dir)
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENOTEMPTY) {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}

// How long a dying process may keep its cgroup: it has been killed or has
// closed its lock already, and only the kernel's part of its end is left.
const (
	busyLimit = 2 * time.Second
	busyFirst = 2 * time.Millisecond
	busyMost  = 100 * time.Millisecond
)

// retryBusy calls f until its error is no longer ErrBusy, with growing pauses.
// Nothing else tells about the end of a process in all of v1, v2 and systemd.
func retryBusy(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, busyLimit)
	defer cancel()
	for pause := busyFirst; ; pause = min(2*pause, busyMost) {
		err := f()
		if !errors.Is(err, ErrBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}
