package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// A pod whose containers share a pid namespace needs a process 1 in it. It is a
// container of our own, with the pod's id, a shim, and a root that holds nothing
// but a static binary. It is started when the first container asks for it: most pods
// never do.

// initOf gives the init of a pod, nil if it has none.
func (d *Daemon) initOf(podID string) *container {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.containers[podID]
}

// ensureInit starts the init of a pod unless it runs.
func (d *Daemon) ensureInit(ctx context.Context, p *pod) error {
	id := p.rec.Load().ID
	if err := p.op.lock(ctx, "pod "+shortID(id)); err != nil {
		return err
	}
	defer p.op.unlock()
	if err := podIsReady(p.rec.Load()); err != nil {
		return err
	}
	return d.startInit(ctx, p)
}

// startInit is ensureInit for the holder of the oplock.
func (d *Daemon) startInit(ctx context.Context, p *pod) error {
	pr := p.rec.Load()
	c := d.initOf(pr.ID)
	if c != nil && c.rec.Load().Phase == containerRemoving { // a creation that a restart cut short
		if err := d.removeContainer(ctx, c); err != nil {
			return err
		}
		c = nil
	}
	if c == nil {
		if err := d.makeInit(ctx, p); err != nil {
			return err
		}
		c = d.initOf(pr.ID)
	}
	switch {
	case c.seen.Load().exit != nil:
		return errorf(ErrState, "pod_sandbox_id: the init process of pod %s has ended", shortID(pr.ID))
	case pr.PIDNamespace != "":
		return nil
	}
	// It may run already: a restart came in between, or the record of the pod
	// was rebuilt from an older one. Others may live in its namespace by now.
	if err := d.startContainer(ctx, c); err != nil {
		return err
	}
	pin := filepath.Join(d.state.RunDir(state.Pods, pr.ID), pidName)
	if err := pinPID(c.seen.Load().status.Init, pin); err != nil {
		return as(ErrUnavailable, err)
	}
	return d.savePod(p, false, func(r *podRecord) { r.PIDNamespace = pin })
}

// makeInit creates the init of a pod. The caller holds the pod's oplock.
func (d *Daemon) makeInit(ctx context.Context, p *pod) error {
	pr := p.rec.Load()
	if !pr.Init {
		if err := d.savePod(p, false, func(r *podRecord) { r.Init = true }); err != nil {
			return err
		}
	}
	cgroupsPath, err := d.cgroups.ContainerPath(pr.Config.M.GetLinux().GetCgroupParent(), pr.ID, pr.ID)
	if err != nil {
		return as(ErrInvalid, err)
	}
	rec := &containerRecord{ID: pr.ID, PodID: pr.ID, Init: true, Handler: pr.Handler, CreatedAt: time.Now(), BootID: rundir.BootID(),
		Phase: containerCreating, Signal: int(unix.SIGTERM), CgroupsPath: cgroupsPath,
		Config: message[*runtimeapi.ContainerConfig]{&runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "init"}}}}
	cl := newClaim("init of pod "+shortID(pr.ID), pr.ID, "")
	return d.launchContainer(ctx, cl, p, rec, func(ctx context.Context, root string) (*spec.Result, error) {
		s, err := spec.PodInit(spec.PodInitInput{Host: d.host, ID: pr.ID, Rootfs: root, CgroupsPath: cgroupsPath,
			Namespaces: pr.specNamespaces(), Sandbox: pr.Config.M})
		if err != nil {
			return nil, err
		}
		// The root is the empty directory itself: nothing to mount, nothing to copy.
		if err := rootOf(pr.Config.M).take(root); err != nil {
			return nil, as(ErrUnavailable, err)
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/pause", Source: d.cfg.Pause, Type: "bind", Options: []string{"bind", "ro"}})
		return &spec.Result{Spec: s}, nil
	})
}

// pidName is where a run directory, of a pod or of a container that joins the
// pid namespace of another, has that namespace pinned.
const pidName = "pid"

// pinPID binds the pid namespace of a process to a path. The process is looked
// at again afterwards, so that what was bound is its.
func pinPID(p rundir.Process, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE, 0o600)
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

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
