package pods

import (
	"context"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// A pod whose containers share a pid namespace needs a process 1 in it: a
// container of our own, with the pod's id, a shim, and a root that holds nothing
// but a static binary. It is started when the first container asks for it: most
// pods never do.

// PIDNamespace starts the init of the pod unless it runs, and gives the path of
// its pid namespace.
func (p *Pod) PIDNamespace(ctx context.Context) (string, error) {
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return "", err
	}
	defer p.op.Unlock()
	if err := p.Ready(); err != nil {
		return "", err
	}
	if err := p.startInitLocked(ctx); err != nil {
		return "", err
	}
	return p.Record().PIDNamespace, nil
}

// startInitLocked starts the init. The caller holds op.
func (p *Pod) startInitLocked(ctx context.Context) error {
	c := p.Init()
	if c != nil && c.Record().Phase == records.ContainerRemoving { // a creation that a restart cut short
		if err := c.Remove(ctx); err != nil {
			return err
		}
		c = nil
	}
	if c == nil {
		var err error
		if c, err = p.makeInitLocked(ctx); err != nil {
			return err
		}
		p.init.Store(c)
		p.m.Containers.Follow(c)
	}
	if err := c.Give(ctx); err != nil {
		return err
	}
	switch {
	case c.Seen().Exit != nil:
		return kind.Errorf(kind.State, "pod_sandbox_id: the init process of %s has ended", p)
	case p.Record().PIDNamespace != "":
		return nil
	}
	// It may run already: a restart came in between, or the record of the pod was
	// rebuilt from an older one. Others may live in its namespace by now.
	if err := c.Start(ctx); err != nil {
		return err
	}
	if err := step.Reach(step.PodInit); err != nil {
		return err
	}
	pin := filepath.Join(p.dir(), pidName)
	if err := p.m.Containers.Roots.PinPID(c.Seen().Init, pin); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	if err := step.Reach(step.PodPinned); err != nil {
		return err
	}
	return p.save(false, func(r *records.Pod) { r.PIDNamespace = pin })
}

// makeInitLocked creates the init. The caller holds op.
func (p *Pod) makeInitLocked(ctx context.Context) (*containers.Container, error) {
	rec := p.Record()
	if !rec.Init {
		err := p.save(false, func(r *records.Pod) {
			r.Init = true
			r.Debts = append([]records.Debt{records.DebtInit}, r.Debts...)
		})
		if err != nil {
			return nil, err
		}
	}
	cgroupsPath, err := p.m.Cgroups.ContainerPath(rec.Config.M.GetLinux().GetCgroupParent(), rec.ID, rec.ID)
	if err != nil {
		return nil, kind.As(kind.State, err) // it was made with another cgroup driver
	}
	config, err := records.Encoded(&runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "init"},
	})
	if err != nil {
		return nil, err
	}
	init := &records.Container{
		ID:          rec.ID,
		PodID:       rec.ID,
		Init:        true,
		Config:      config,
		Handler:     rec.Handler,
		CreatedAt:   time.Now(),
		BootID:      rundir.BootID(),
		Phase:       records.ContainerCreating,
		Signal:      int(unix.SIGTERM),
		CgroupsPath: cgroupsPath,
	}
	cl := claims.NewClaim(claims.Name{Name: "init of " + p.String()}, rec.ID)
	return p.m.Containers.Launch(ctx, cl, p, init, func(_ context.Context, root string) (*containers.Built, error) {
		return p.buildInit(cgroupsPath, root)
	})
}

// buildInit makes the spec of the init. Its root is the empty directory itself:
// there is nothing to mount, and nothing to copy.
func (p *Pod) buildInit(cgroupsPath, root string) (*containers.Built, error) {
	rec := p.Record()
	host, err := p.m.Containers.HostFor(rec.Handler)
	if err != nil {
		return nil, err
	}
	n := rec.Namespaces
	s, err := spec.PodInit(spec.PodInitInput{
		Host:        host,
		ID:          rec.ID,
		Rootfs:      root,
		CgroupsPath: cgroupsPath,
		Namespaces:  spec.Namespaces{Net: n.Net, IPC: n.IPC, UTS: n.UTS, User: n.User},
		Sandbox:     rec.Config.M,
	})
	if err != nil {
		return nil, err
	}
	if err := p.own(root); err != nil {
		return nil, kind.As(kind.Unavailable, err)
	}
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: "/pause",
		Source:      p.m.Pause,
		Type:        "bind",
		Options:     []string{"bind", "ro"},
	})
	return &containers.Built{Spec: s}, nil
}
