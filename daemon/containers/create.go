package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// eraseTimeout bounds the undoing of a creation, and a removal that nobody
// waits for.
const eraseTimeout = time.Minute

// NameOf is the name that a container takes in the table of claims.
func NameOf(rec *records.Container) claims.Name {
	m := rec.Config.M.GetMetadata()
	return claims.Name{
		Name:        fmt.Sprintf("container %q attempt %d of pod %s", m.GetName(), m.GetAttempt(), rec.PodID),
		Group:       rec.PodID,
		Fingerprint: rec.Fingerprint,
	}
}

// Create makes a container, with a shim of its own, and gives its id. now is the config of the
// pod that came with the request; nil: none did.
func (m *Manager) Create(ctx context.Context, pod Pod, cfg *runtimeapi.ContainerConfig,
	now *runtimeapi.PodSandboxConfig) (string, error) {
	if err := spec.Validate(cfg, withPrivileges(pod.Record().Config.M, now)); err != nil {
		return "", err
	}
	return m.createOnce(ctx, pod, cfg, nil)
}

// CreateFrom is Create from a checkpoint, which says of which image it was made. The source
// is the container's from now on.
func (m *Manager) CreateFrom(ctx context.Context, pod Pod, cfg *runtimeapi.ContainerConfig,
	archive *checkpoint.Source) (string, error) {
	defer archive.Close() // it is closed twice where this request makes the container
	if err := spec.Validate(cfg, pod.Record().Config.M); err != nil {
		return "", err
	}
	return m.createOnce(ctx, pod, cfg, archive)
}

// withPrivileges is the config of a pod in which a container is asked for. A pod may get a
// privileged container to be debugged with when it runs already: a kubelet says so in the config
// that comes with the request. All else of the pod is as it was made.
func withPrivileges(pod, now *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
	if !now.GetLinux().GetSecurityContext().GetPrivileged() {
		return pod
	}
	pod = proto.CloneOf(pod)
	proto.Merge(pod, &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: true},
	}})
	return pod
}

// createOnce makes the container of a config that is valid, from a checkpoint unless archive is
// nil.
func (m *Manager) createOnce(ctx context.Context, pod Pod, cfg *runtimeapi.ContainerConfig,
	archive *checkpoint.Source) (string, error) {
	if err := m.checkHandlers(cfg); err != nil {
		return "", err
	}
	parts := []any{identity(cfg)}
	if archive != nil {
		parts = append(parts, archive.String())
	}
	fingerprint, err := records.Fingerprint(parts...)
	if err != nil {
		return "", err
	}
	config, err := records.Encoded(cfg)
	if err != nil {
		return "", err
	}
	rec := &records.Container{
		PodID:       pod.Record().ID,
		Config:      config,
		Handler:     pod.Record().Handler,
		Fingerprint: fingerprint,
		BootID:      rundir.BootID(),
		Phase:       records.ContainerCreating,
	}
	name := NameOf(rec)
	id, err := m.Claims.Once(ctx, name, claims.Creation{
		Make: func(ctx context.Context, cl *claims.Claim) error {
			rec.ID, rec.CreatedAt = cl.ID, time.Now()
			asked := m.Adopt(rec, pod, records.Seen{})
			asked.journal(records.Asked, rec.CreatedAt, "CreateContainer")
			err := m.create(ctx, cl, pod, rec, archive)
			if err != nil {
				asked.journal(records.Failed, time.Now(), "%v", err)
			}
			return err
		},
		Give:   func(ctx context.Context) error { return m.give(ctx, rec.ID) },
		Remove: func(ctx context.Context) error { return m.Remove(ctx, rec.ID) },
	})
	if err != nil {
		return "", err
	}
	if c, err := m.Find(id); err != nil || c.Seen().Exit != nil && !c.unrunnable() {
		return "", kind.Errorf(kind.Exists,
			"config.metadata: %s exists already, as %s, and has ended: remove it, or ask for another attempt",
			name.Name, id)
	}
	return id, nil
}

// terminationPath is the annotation in which a kubelet says where in the container its program
// may leave its last words.
const terminationPath = "io.kubernetes.container.terminationMessagePath"

// identity is what makes requests for a container the same one. A kubelet has made another file
// for the last words when it asks again; the container keeps the one that it was made with, and
// its status says which.
func identity(cfg *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	at := cfg.GetAnnotations()[terminationPath]
	for i, m := range slices.Backward(cfg.GetMounts()) { // the kubelet's own comes last
		if m.GetContainerPath() == at && m.GetImage() == nil {
			same := proto.CloneOf(cfg)
			same.Mounts[i].HostPath = filepath.Dir(m.GetHostPath())
			return same
		}
	}
	return cfg
}

// create makes the container that a claim is for.
func (m *Manager) create(ctx context.Context, cl *claims.Claim, pod Pod, rec *records.Container,
	archive *checkpoint.Source) error {
	if err := pod.Ready(); err != nil {
		return err
	}
	cfg, pr := rec.Config.M, pod.Record()
	b := &builder{m: m, pod: pr, rec: rec}
	defer b.release()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	img, release, from, err := m.holdImage(ctx, cfg, pod, archive)
	if err != nil {
		return err
	}
	defer release()
	defer from.close()
	if from != nil {
		rec.Restored = from.name
	}
	if err := cl.Reach(step.ContainerImage); err != nil {
		return err
	}
	rec.ImageID, rec.ImageRef, rec.Layers = img.ID, img.Ref, img.Layers
	signal, name, err := spec.StopSignal(cfg, img.Config)
	if err != nil {
		return err
	}
	rec.Signal, rec.StopSignal = int(signal), name
	if dir, path := pr.Config.M.GetLogDirectory(), cfg.GetLogPath(); dir != "" && path != "" {
		rec.LogPath = filepath.Join(dir, path)
	}
	parent := pr.Config.M.GetLinux().GetCgroupParent()
	if rec.CgroupsPath, err = m.Cgroups.ContainerPath(parent, pr.ID, rec.ID); err != nil {
		return kind.As(kind.State, fmt.Errorf("pod_sandbox_id: %w", err)) // it was made with another cgroup driver
	}
	if err := b.checkSources(ctx); err != nil {
		return err
	}
	if spec.PIDMode(cfg, pr.Config.M) == runtimeapi.NamespaceMode_POD {
		if b.in.Namespaces.PID, err = pod.PIDNamespace(ctx); err != nil {
			return err
		}
	}
	b.in.Image = img.Config
	if b.from = from; from != nil {
		b.in.Container = from.withArgs(b.in.Container)
	}
	c, err := m.Launch(ctx, cl, pod, rec, b.build)
	if err != nil {
		return err
	}
	if err := m.Add(c, pod.Ready); err != nil {
		return undo(ctx, c, err)
	}
	m.Follow(c)
	m.Plugins.PostCreateContainer(ctx, c)
	return nil
}

// HostFor is the machine as it is now, with what the OCI runtime of a handler can do.
func (m *Manager) HostFor(handler string) (spec.Host, error) {
	h, err := m.Runtimes.For(handler)
	if err != nil {
		return spec.Host{}, err
	}
	host := m.Host.Now()
	host.RecursiveReadOnly, host.MappedMounts = h.RecursiveReadOnly, h.Userns
	host.SeccompSupported = host.SeccompSupported && !h.NoSeccomp
	return host, nil
}

// checkHandlers refuses images for a handler that is not known. All handlers have the
// same ones.
func (m *Manager) checkHandlers(cfg *runtimeapi.ContainerConfig) error {
	if err := m.Runtimes.Check("config.image", cfg.GetImage()); err != nil {
		return err
	}
	for i, mount := range cfg.GetMounts() {
		if err := m.Runtimes.Check(fmt.Sprintf("config.mounts[%d].image", i), mount.GetImage()); err != nil {
			return err
		}
	}
	return nil
}

// cdiDevices finds the devices of the CDI that a container asks for; nil for none. A
// container without its device would only seem to run.
func (m *Manager) cdiDevices(cfg *runtimeapi.ContainerConfig) (Edits, error) {
	devices, err := spec.CDIDevices(cfg)
	if err != nil || len(devices) == 0 {
		return nil, err
	}
	return m.FindDevices(devices)
}

// FindDevices finds devices of the CDI, of which there is at least one.
func (m *Manager) FindDevices(devices []spec.CDIDevice) (Edits, error) {
	if m.CDI == nil {
		return nil, kind.Errorf(kind.Unsupported,
			"%s: cannot add %.200q: CDI devices are turned off on this node (cdi.enabled)",
			devices[0].Field, devices[0].Name)
	}
	return m.CDI.Find(devices)
}

// Built is the spec of a container and what was decided on the way to it.
type Built struct {
	Spec        *specs.Spec
	User        *runtimeapi.LinuxContainerUser
	ImageMounts []records.ImageMount
	Warnings    []string // deviations from the request that the machine forces
}

// Build makes the spec of a container while its shim is being started. root is
// where its root file system is to be mounted.
type Build func(ctx context.Context, root string) (*Built, error)

// Launch takes a container from its record to a shim that has created it. A restart
// undoes it until Give was called. On an error nothing is left, or the next start
// removes it.
func (m *Manager) Launch(ctx context.Context, cl *claims.Claim, pod Pod, rec *records.Container,
	build Build) (_ *Container, err error) {
	if m.owes(rec.ID) { // the next init of a pod has the id of the one before
		return nil, kind.Errorf(kind.Unavailable, "something is left of an earlier container with the id %s, and is "+
			"being given back", records.ShortID(rec.ID))
	}
	c := m.Adopt(rec, pod, records.Seen{})
	defer func() {
		if err != nil {
			err = undo(ctx, c, err)
		}
	}()
	if err := m.State.Create(state.Containers, rec.ID); err != nil {
		return nil, kind.As(kind.Unavailable, err)
	}
	if err := c.save(func(*records.Container) {}); err != nil {
		return nil, err
	}
	if err := c.makeRunDir(); err != nil {
		return nil, kind.As(kind.Unavailable, fmt.Errorf("cannot make the run directory: %w", err))
	}
	if err := cl.Reach(step.ContainerRecord); err != nil {
		return nil, err
	}
	built, err := c.prepare(ctx, cl, build)
	if err != nil {
		return nil, err
	}
	for _, w := range built.Warnings {
		m.Log.Debug("spec adapted to this machine", "container", rec.ID, "warning", w)
		if w == spec.SELinuxIgnored {
			m.selinuxIgnored.Do(func() { m.Log.Warn(w, "container", rec.ID) })
		}
	}
	created := *c.Record()
	created.Phase, created.User.M, created.ImageMounts = records.ContainerCreated, built.User, built.ImageMounts
	if err := c.createOnWay(ctx, &created, built.Spec); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(c.checkpointDir()); err != nil { // it goes with the container at the latest
		m.Log.Warn("cannot remove an unpacked checkpoint", "container", rec.ID, "error", err)
	}
	if err := cl.Reach(step.ContainerRuntime); err != nil {
		return nil, err
	}
	created.Phase = records.ContainerCreating // until Give, which writes it down
	c.record.Store(&created)
	c.observe(func(s *records.Seen) { s.Phase = rundir.PhaseCreated })
	m.Log.Info("container created",
		"container", rec.ID,
		"pod", rec.PodID,
		"name", c.name(),
		"took", time.Since(cl.Since).Round(time.Millisecond))
	return c, nil
}

// give is Container.Give for one that may have been removed meanwhile.
func (m *Manager) give(ctx context.Context, id string) error {
	c, err := m.Find(id)
	if err != nil {
		return nil //nolint:nilerr // the caller finds out as well
	}
	return c.Give(ctx)
}

// Give makes a container known: it is listed, and a restart keeps it.
func (c *Container) Give(ctx context.Context) error {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return err
	}
	defer c.op.Unlock()
	if c.Record().Phase != records.ContainerCreating {
		return nil
	}
	if err := c.save(func(r *records.Container) { r.Phase = records.ContainerCreated }); err != nil {
		return err
	}
	if c.m.Given != nil {
		c.m.Given()
	}
	c.announce(c.happened())
	return step.Reach(step.ContainerCreated)
}

// makeRunDir makes the run directory and in it a place for the root. Where nothing is
// mounted there, it is itself the root, for whichever user of the container.
func (c *Container) makeRunDir() error {
	if err := os.MkdirAll(string(c.dir), 0o700); err != nil {
		return err
	}
	root := c.dir.Path(rundir.RootfsName)
	if err := os.Mkdir(root, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(root, 0o711) // whatever the umask
}

// prepare starts the shim while the root is mounted and the spec built.
func (c *Container) prepare(ctx context.Context, cl *claims.Claim, build Build) (*Built, error) {
	launched := make(chan error, 1)
	go func() {
		err := c.m.Shims.Launch(ctx, c.dir)
		if err == nil {
			_, err = c.client.Hello(ctx) // out of the way of the create
		}
		launched <- err
	}()
	built, err := build(ctx, c.dir.Path(rundir.RootfsName))
	if err == nil {
		err = c.adjust(ctx, built.Spec)
	}
	if err == nil {
		err = cl.Reach(step.ContainerRoot)
	}
	if lerr := <-launched; err == nil && lerr != nil {
		err = kind.As(kind.Unavailable, lerr)
	}
	if err == nil {
		err = cl.Reach(step.ContainerShim)
	}
	return built, err
}

// adjust lets plugins change the spec. What the record has to know of it, it knows before
// the OCI runtime does.
func (c *Container) adjust(ctx context.Context, s *specs.Spec) error {
	if c.Record().Init {
		return nil
	}
	resources, err := c.m.Plugins.CreateContainer(ctx, c, s)
	if err == nil {
		err = step.Reach(step.ContainerPlugins)
	}
	if err != nil {
		return err
	}
	now := *c.Record()
	if s.Linux != nil {
		now.CgroupsPath = s.Linux.CgroupsPath
	}
	if resources != nil {
		if err := now.SetResources(resources); err != nil {
			return err
		}
	}
	if resources == nil && now.CgroupsPath == c.Record().CgroupsPath {
		return nil
	}
	return c.save(func(r *records.Container) { r.CgroupsPath, r.Config = now.CgroupsPath, now.Config })
}

// createOnWay has the container created. In a user namespace the OCI runtime walks
// to the root as somebody without rights, whom STATE does not let in: the root is on
// a way of its own meanwhile.
func (c *Container) createOnWay(ctx context.Context, rec *records.Container, s *specs.Spec) (err error) {
	pod := c.pod.Record()
	if pod.Userns() != nil {
		if s.Root.Path, err = c.m.Roots.OpenWay(c.ID(), s.Root.Path, pod.Root()); err != nil {
			return kind.As(kind.Unavailable, err)
		}
	}
	if err := c.createInShim(ctx, rec, s); err != nil {
		return err
	}
	if pod.Userns() != nil {
		err = c.m.Roots.CloseWay(c.ID())
	}
	if !rec.Init {
		err = errors.Join(err, c.disarm())
	}
	return kind.As(kind.Unavailable, err)
}

// disarm takes what a program with a setuid bit could give to a user of the host
// from all of the container that the host sees. The container itself has mounts of
// its own by now. That the directories are closed is the first line.
func (c *Container) disarm() error {
	paths := []string{c.dir.Path(rundir.RootfsName), c.Layer()}
	for _, name := range []string{imagesName, volumesName} {
		below, _ := filepath.Glob(c.dir.Path(name) + "/*")
		paths = append(paths, below...)
	}
	var errs []error
	for _, path := range paths {
		errs = append(errs, c.m.Roots.Disarm(path))
	}
	return errors.Join(errs...)
}

// Layer is the writable layer of the container.
func (c *Container) Layer() string {
	return filepath.Join(c.m.State.Dir(state.Containers, c.ID()), "upper")
}

// createInShim hands everything over. From here on a daemon that lost its own
// records finds them with the shim.
func (c *Container) createInShim(ctx context.Context, rec *records.Container, s *specs.Spec) error {
	container, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	pr := c.pod.Record()
	sandbox, err := json.Marshal(pr)
	if err != nil {
		return err
	}
	h, err := c.m.Runtimes.For(rec.Handler)
	if err != nil {
		return err
	}
	launch := rundir.Launch{
		RequestID: rec.ID,
		Runtime: rundir.Runtime{
			Path:          h.Path,
			Root:          c.m.Runtimes.Root(),
			SystemdCgroup: c.m.Cgroups.Systemd(),
		},
		Stdin:      rec.Config.M.GetStdin(),
		StdinOnce:  rec.Config.M.GetStdinOnce(),
		DurableDir: c.m.State.Dir(state.Containers, rec.ID),
		RestoreDir: c.restoreDir(),
		Container:  rundir.Opaque{TypeURL: records.ContainerURL, Value: container},
		Sandbox:    rundir.Opaque{TypeURL: records.PodURL, Value: sandbox},
	}
	if rec.LogPath != "" {
		launch.LogDirectory, launch.LogPath = pr.Config.M.GetLogDirectory(), rec.Config.M.GetLogPath()
		// The kubelet makes it; people with crictl expect it to be made.
		if err := c.m.makeHostDir(launch.LogDirectory); err != nil {
			return kind.As(kind.Unavailable, fmt.Errorf("cannot make config.log_directory: %w", err))
		}
	}
	_, err = c.client.Create(ctx, launch, s)
	if err = spec.Blame("config.linux.resources", rec.Config.M.GetLinux().GetResources(), err); err == nil {
		return nil
	}
	// One that cannot run for reasons of its own is a container that has ended. A pod
	// without its init would be none.
	if c.readExit() && c.unrunnable() && !rec.Init {
		return nil
	}
	return err
}

// unrunnable says that the container has ended because nothing can run what it is.
func (c *Container) unrunnable() bool {
	exit := c.Seen().Exit
	return exit != nil && exit.Reason == rundir.ReasonStartError
}

// undo undoes a creation. What cannot be undone now is tried again in the
// background, and by the next start: the record still says creating.
func undo(ctx context.Context, c *Container, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), eraseTimeout)
	defer cancel()
	c.m.tellRemoved(ctx, c)
	c.Undo(ctx)
	return err
}
