package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	securejoin "github.com/cyphar/filepath-securejoin"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// container is what is wanted (rec) and what was last seen of it.
type container struct {
	op     oplock
	ending oplock                          // held by whoever ends the shim or buries it; taken after op
	rec    atomic.Pointer[containerRecord] // never changed in place; saveContainer replaces it
	client *client.Client

	mu     sync.Mutex // held by observe
	seen   atomic.Pointer[seen]
	exited chan struct{} // closed when seen.exit is set
}

// seen is what a shim, or its files, said last.
type seen struct {
	status rundir.Status
	exit   *rundir.Exit
}

func newContainer(rec *containerRecord, dir rundir.Dir, s seen) *container {
	c := &container{op: newOplock(), ending: newOplock(), client: client.New(dir), exited: make(chan struct{})}
	c.rec.Store(rec)
	c.seen.Store(&s)
	if s.exit != nil {
		close(c.exited)
	}
	return c
}

// state derives the CRI's state from what was seen.
func (s *seen) state() runtimeapi.ContainerState {
	switch {
	case s.exit != nil:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case s.status.Phase == rundir.PhaseRunning:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	default:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	}
}

// observe is the one place where what was seen changes. News may come twice and
// from several sides; a container never goes back, and its first end stays.
func (d *Daemon) observe(c *container, change func(*seen)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.seen.Load()
	now := *was
	change(&now)
	if was.exit != nil {
		now.exit = was.exit
	}
	if was.status.Phase == rundir.PhaseRunning && now.status.Phase != rundir.PhaseExited {
		now.status.Phase = rundir.PhaseRunning
	}
	c.seen.Store(&now)
	if was.exit == nil && now.exit != nil {
		close(c.exited)
		rec := c.rec.Load()
		if now.exit.Reason == rundir.ReasonNeverRan {
			return // said where it was not created
		}
		d.log.Info("container exited", "container", rec.ID, "pod", rec.PodID, "name", rec.Config.M.GetMetadata().GetName(),
			"code", now.exit.Code, "reason", now.exit.Reason, "source", now.exit.Source, "at", now.exit.ExitedAt)
	}
}

// saveContainer is the one place where a container's record changes.
func (d *Daemon) saveContainer(c *container, change func(*containerRecord)) error {
	rec := *c.rec.Load()
	change(&rec)
	// Not synced: it means little without the shim, which a power cut ends too.
	if err := d.state.Put(state.Containers, rec.ID, &rec, false); err != nil {
		return as(ErrUnavailable, err)
	}
	c.rec.Store(&rec)
	return nil
}

// The type URLs under which a shim keeps the daemon's records.
const (
	containerRecordURL = "holdfast.dev/daemon/container.v1"
	podRecordURL       = "holdfast.dev/daemon/pod.v1"
)

// CreateContainer makes a container, with a shim of its own, and gives its id.
func (d *Daemon) CreateContainer(ctx context.Context, podID string, cfg *runtimeapi.ContainerConfig) (string, error) {
	p, err := d.pod(podID)
	if err != nil {
		return "", err
	}
	if err := spec.Validate(cfg, p.rec.Load().Config.M); err != nil {
		return "", err
	}
	print, err := fingerprint(cfg)
	if err != nil {
		return "", as(ErrInvalid, err)
	}
	name := containerName(podID, cfg.GetMetadata())
	id, err := d.once(ctx, name, podID, print, func(ctx context.Context, cl *claim) error {
		return d.makeContainer(ctx, cl, p, cfg)
	})
	if err != nil {
		return "", err
	}
	if c, err := d.container(id); err != nil || c.seen.Load().exit != nil {
		return "", errorf(ErrExists, "config.metadata: %s exists already, as %s, and has ended: remove it, or ask for another attempt", name, id)
	}
	return id, nil
}

func (d *Daemon) makeContainer(ctx context.Context, cl *claim, p *pod, cfg *runtimeapi.ContainerConfig) error {
	pr := p.rec.Load()
	if err := podIsReady(pr); err != nil {
		return err
	}
	d.enter(cl, "image")
	img, ok := d.images.Get(cfg.GetImage().GetImage())
	if !ok {
		return errorf(ErrNotFound, "config.image.image: %q is not here: pull it first", cfg.GetImage().GetImage())
	}
	d.pin(img.DiffIDs)
	defer d.unpin(img.DiffIDs)
	if err := d.ensureLayers(ctx, img); err != nil {
		return err
	}
	signal, criSignal, err := spec.StopSignal(cfg, img.Config)
	if err != nil {
		return err
	}
	rec := &containerRecord{ID: cl.id, PodID: pr.ID, Config: message[*runtimeapi.ContainerConfig]{cfg}, Handler: pr.Handler,
		Fingerprint: cl.fingerprint, CreatedAt: time.Now(), BootID: rundir.BootID(), Phase: containerCreating,
		ImageID: img.ID, ImageRef: imageRef(img, cfg.GetImage().GetImage()), Layers: img.DiffIDs,
		Signal: int(signal), StopSignal: criSignal}
	dir, path := pr.Config.M.GetLogDirectory(), cfg.GetLogPath()
	if dir != "" && path != "" {
		rec.LogPath = filepath.Join(dir, path)
	}
	if rec.CgroupsPath, err = d.cgroups.ContainerPath(pr.Config.M.GetLinux().GetCgroupParent(), pr.ID, cl.id); err != nil {
		return as(ErrInvalid, err)
	}
	if spec.PIDMode(cfg, pr.Config.M) == runtimeapi.NamespaceMode_POD {
		if err := d.ensureInit(ctx, p); err != nil {
			return err
		}
		pr = p.rec.Load()
	}
	defer func() { // what mountImage has pinned
		for _, m := range rec.ImageMounts {
			d.unpin(m.Layers)
		}
	}()
	return d.launchContainer(ctx, cl, p, rec, func(ctx context.Context, root string) (*spec.Result, error) {
		return d.containerSpec(ctx, pr, rec, img, root)
	})
}

// launchContainer takes a container from its record to a shim that has created
// it. build makes the spec once the root is mounted. On an error nothing is left.
func (d *Daemon) launchContainer(ctx context.Context, cl *claim, p *pod, rec *containerRecord,
	build func(ctx context.Context, root string) (*spec.Result, error)) (err error) {
	dir := d.runDir(rec.ID)
	c := newContainer(rec, dir, seen{})
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if uerr := d.eraseContainer(ctx, c); uerr != nil {
			d.log.Error("cannot undo a container; the next start tries again", "container", rec.ID, "error", uerr)
		}
	}()

	d.enter(cl, "record")
	if err := d.state.Create(state.Containers, rec.ID); err != nil {
		return as(ErrUnavailable, err)
	}
	if err := d.saveContainer(c, func(*containerRecord) {}); err != nil {
		return err
	}
	if err := os.MkdirAll(dir.Path(rundir.RootfsName), 0o711); err != nil {
		return as(ErrUnavailable, fmt.Errorf("cannot make the run directory: %w", err))
	}

	// The shim starts while the root is mounted and the spec built.
	launched := make(chan error, 1)
	go func() {
		err := d.launcher.Launch(ctx, dir)
		if err == nil {
			_, err = c.client.Hello(ctx)
		}
		launched <- err
	}()
	d.enter(cl, "root file system")
	result, err := build(ctx, dir.Path(rundir.RootfsName))
	d.enter(cl, "shim")
	if lerr := <-launched; err == nil && lerr != nil {
		err = as(ErrUnavailable, lerr)
	}
	if err != nil {
		return err
	}
	for _, w := range result.Warnings {
		d.log.Debug("spec adapted to this machine", "container", rec.ID, "warning", w)
	}
	c.rec.Store(rec.with(func(r *containerRecord) {
		r.User.M = result.User
		r.Phase = containerCreated
	}))

	d.enter(cl, "OCI runtime")
	if err := d.createInShim(ctx, p, c, result); err != nil {
		return err
	}
	// The kubelet learns of the container after this, a restart keeps it.
	if err := d.saveContainer(c, func(*containerRecord) {}); err != nil {
		return err
	}
	d.observe(c, func(s *seen) { s.status.Phase = rundir.PhaseCreated })

	d.mu.Lock()
	perr := podIsReady(p.rec.Load())
	if rec.Init {
		perr = nil // the pod is being made, by whoever makes this
	}
	if perr == nil {
		d.containers[rec.ID] = c
	}
	d.mu.Unlock()
	if perr != nil {
		return perr
	}
	d.background(func(ctx context.Context) { d.watch(ctx, c) })
	d.log.Info("container created", "container", rec.ID, "pod", rec.PodID, "name", rec.Config.M.GetMetadata().GetName(),
		"took", time.Since(cl.since).Round(time.Millisecond))
	return nil
}

func (r *containerRecord) with(change func(*containerRecord)) *containerRecord {
	n := *r
	change(&n)
	return &n
}

// createInShim hands everything over. From here on a daemon that lost its own
// records finds them with the shim.
func (d *Daemon) createInShim(ctx context.Context, p *pod, c *container, result *spec.Result) error {
	rec := c.rec.Load()
	pr := p.rec.Load()
	ours, err := json.Marshal(rec)
	if err != nil {
		return as(ErrInvalid, err)
	}
	pods, err := json.Marshal(pr)
	if err != nil {
		return as(ErrInvalid, err)
	}
	h, err := d.handlerFor(rec.Handler)
	if err != nil {
		return err
	}
	launch := rundir.Launch{
		RequestID: rec.ID,
		Runtime: rundir.Runtime{
			Path:          h.Path,
			Root:          d.runtimeRoot(),
			SystemdCgroup: d.cgroups.Driver() == placement.Systemd,
		},
		Stdin:      rec.Config.M.GetStdin(),
		StdinOnce:  rec.Config.M.GetStdinOnce(),
		DurableDir: d.state.Dir(state.Containers, rec.ID),
		Container:  rundir.Opaque{TypeURL: containerRecordURL, Value: ours},
		Sandbox:    rundir.Opaque{TypeURL: podRecordURL, Value: pods},
	}
	if rec.LogPath != "" {
		// The kubelet makes it; people with crictl expect it to be made.
		if err := os.MkdirAll(pr.Config.M.GetLogDirectory(), 0o755); err != nil {
			return as(ErrUnavailable, fmt.Errorf("cannot make config.log_directory: %w", err))
		}
		launch.LogDirectory, launch.LogPath = pr.Config.M.GetLogDirectory(), rec.Config.M.GetLogPath()
	}
	_, err = c.client.Create(ctx, launch, result.Spec)
	return shimError(err)
}

func (d *Daemon) runtimeRoot() string { return filepath.Join(d.cfg.State, "runc") }

// containerSpec mounts the root and makes the OCI spec.
func (d *Daemon) containerSpec(ctx context.Context, pr *podRecord, rec *containerRecord, img image.Image, root string) (*spec.Result, error) {
	cfg := rec.Config.M
	owners := pr.mappedOwners()
	if err := d.layers.Mount(ctx, rec.Layers, d.state.Dir(state.Containers, rec.ID), root, owners); err != nil {
		return nil, as(ErrUnavailable, err)
	}
	if err := d.mountSources(cfg); err != nil {
		return nil, err
	}
	in := spec.Input{Host: d.host, ID: rec.ID, Container: cfg, Sandbox: pr.Config.M, Image: img.Config, Rootfs: root,
		CgroupsPath: rec.CgroupsPath, ImageMounts: map[int]string{}, ImageVolumes: map[string]string{}}
	h, err := d.handlerFor(rec.Handler)
	if err != nil {
		return nil, err
	}
	in.RecursiveReadOnly, in.MappedMounts = h.recursiveReadOnly, h.userns
	if in.User, err = spec.FindUser(root, cfg, img.Config); err != nil {
		return nil, err
	}
	in.Namespaces = pr.specNamespaces()
	switch spec.PIDMode(cfg, pr.Config.M) {
	case runtimeapi.NamespaceMode_POD:
		in.Namespaces.PID = pr.PIDNamespace
	case runtimeapi.NamespaceMode_TARGET:
		if in.Namespaces.PID, err = d.pinTarget(rec, cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId()); err != nil {
			return nil, err
		}
	}
	podDir := d.state.RunDir(state.Pods, pr.ID)
	in.Hosts, in.Hostname, in.ResolvConf = filepath.Join(podDir, "hosts"), filepath.Join(podDir, "hostname"), filepath.Join(podDir, "resolv.conf")
	if pr.Namespaces.IPC != "" {
		in.Shm = filepath.Join(podDir, "shm")
	} else {
		in.Shm = "/dev/shm"
	}
	if in.Devices, err = spec.ResolveDevices(cfg); err != nil {
		return nil, err
	}
	if cfg.GetLinux().GetSecurityContext().GetPrivileged() {
		if in.HostDevices, err = spec.HostDevices(); err != nil {
			return nil, as(ErrUnavailable, err)
		}
	}
	if in.SeccompProfile, err = spec.ReadSeccompProfile(cfg); err != nil {
		return nil, err
	}
	if cfg.GetLinux().GetSecurityContext().GetReadonlyRootfs() {
		// What an image declares a volume stays writable on a read-only root:
		// the same directory, bound over itself.
		for path := range img.Config.Volumes {
			host, err := securejoin.SecureJoin(root, path)
			if err == nil {
				err = rootOf(pr.Config.M).mkdirAll(host)
			}
			if err != nil {
				return nil, errorf(ErrInvalid, "config.image: volume %q of the image: %w", path, err)
			}
			in.ImageVolumes[path] = host
		}
	}
	for i, m := range cfg.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		if in.ImageMounts[i], err = d.mountImage(ctx, rec, i, m, owners); err != nil {
			return nil, err
		}
	}
	result, err := spec.Build(in)
	if err != nil {
		return nil, err
	}
	return result, nil
}

// mountImage mounts an image that a container wants to read, below its run
// directory, and gives the host path of what the mount names.
func (d *Daemon) mountImage(ctx context.Context, rec *containerRecord, i int, m *runtimeapi.Mount, owners *rootfs.IDMap) (string, error) {
	img, ok := d.images.Get(m.GetImage().GetImage())
	if !ok {
		return "", errorf(ErrNotFound, "config.mounts[%d].image: %q is not here: pull it first", i, m.GetImage().GetImage())
	}
	d.pin(img.DiffIDs) // until the container is known, or has failed: see makeContainer
	rec.ImageMounts = append(rec.ImageMounts, imageMount{Index: i, ImageID: img.ID, Layers: img.DiffIDs})
	if err := d.ensureLayers(ctx, img); err != nil {
		return "", err
	}
	target := d.runDir(rec.ID).Path(filepath.Join(imagesName, strconv.Itoa(i)))
	if err := os.MkdirAll(target, 0o711); err != nil {
		return "", as(ErrUnavailable, err)
	}
	// Only the spec makes it read-only: the writable layer below stays empty.
	rw := filepath.Join(d.state.Dir(state.Containers, rec.ID), imagesName, strconv.Itoa(i))
	if err := os.MkdirAll(rw, 0o711); err != nil {
		return "", as(ErrUnavailable, err)
	}
	if err := d.layers.Mount(ctx, img.DiffIDs, rw, target, owners); err != nil {
		return "", as(ErrUnavailable, err)
	}
	path, err := securejoin.SecureJoin(target, m.GetImageSubPath())
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		return "", errorf(ErrInvalid, "config.mounts[%d].image_sub_path: %q is not in the image: %w", i, m.GetImageSubPath(), err)
	}
	return path, nil
}

// imagesName is the folder in a run directory where images are mounted.
const imagesName = "images"

// mountSources makes sure that what is to be mounted exists.
func (d *Daemon) mountSources(cfg *runtimeapi.ContainerConfig) error {
	if !d.cfg.RejectAbsentMounts {
		for i, m := range cfg.GetMounts() {
			if m.GetHostPath() == "" || m.GetImage().GetImage() != "" {
				continue
			}
			if _, err := os.Stat(m.GetHostPath()); errors.Is(err, fs.ErrNotExist) {
				if err := os.MkdirAll(m.GetHostPath(), 0o755); err != nil {
					return errorf(ErrInvalid, "config.mounts[%d].host_path: %w", i, err)
				}
			}
		}
	}
	return spec.CheckMounts(cfg)
}

// pinTarget pins the pid namespace of another container of the same pod for a
// container that joins it: by the time the OCI runtime looks, the pid may be
// another process's.
func (d *Daemon) pinTarget(rec *containerRecord, id string) (string, error) {
	const field = "config.linux.security_context.namespace_options.target_id"
	c, err := d.container(id)
	if err != nil || c.rec.Load().PodID != rec.PodID {
		return "", errorf(ErrInvalid, "%s: there is no container %q in this pod", field, id)
	}
	init := c.seen.Load().status.Init
	if !init.Alive() {
		return "", errorf(ErrState, "%s: container %q does not run", field, id)
	}
	pin := d.runDir(rec.ID).Path(pidName)
	if err := pinPID(init, pin); err != nil {
		return "", as(ErrUnavailable, err)
	}
	return pin, nil
}

// podIsReady says why a pod takes no container.
func podIsReady(rec *podRecord) error {
	if rec.Phase != podReady || !thisBoot(rec.BootID) {
		return errorf(ErrState, "pod_sandbox_id: pod %s is not ready", shortID(rec.ID))
	}
	return nil
}

// StartContainer runs a created container. Repeating it after a lost answer is
// harmless.
func (d *Daemon) StartContainer(ctx context.Context, id string) error {
	c, err := d.container(id)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx, "container "+shortID(id)); err != nil {
		return err
	}
	defer c.op.unlock()
	return d.startContainer(ctx, c)
}

func (d *Daemon) startContainer(ctx context.Context, c *container) error {
	rec := c.rec.Load()
	switch s := c.seen.Load(); {
	case rec.Phase == containerRemoving:
		return errorf(ErrState, "container_id: container %s is being removed", shortID(rec.ID))
	case s.exit != nil:
		return errorf(ErrState, "container_id: container %s has ended (%s) and cannot be started again", shortID(rec.ID), s.exit.Reason)
	}
	if p, err := d.pod(rec.PodID); !rec.Init && (err != nil || podIsReady(p.rec.Load()) != nil) {
		return errorf(ErrState, "container_id: the pod of container %s is not ready", shortID(rec.ID))
	}
	start := time.Now()
	init, at, err := c.client.Start(ctx)
	if err != nil {
		// One that is over in a moment may take its shim along before the
		// answer has come.
		if d.settled(c) && !c.seen.Load().exit.StartedAt.IsZero() {
			return nil
		}
		return shimError(err)
	}
	d.observe(c, func(s *seen) {
		s.status.Phase = rundir.PhaseRunning
		s.status.Init, s.status.StartedAt = init, at
	})
	d.log.Info("container started", "container", rec.ID, "pod", rec.PodID, "name", rec.Config.M.GetMetadata().GetName(),
		"pid", init.PID, "took", time.Since(start).Round(time.Millisecond))
	return nil
}

// StopContainer asks a container to end, makes it end after the grace period,
// and returns when it has. The deadline is the shim's: when the caller, or this
// daemon, goes away, the container ends all the same.
func (d *Daemon) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := d.container(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return d.stopContainer(ctx, c, grace)
}

// stopContainer needs no oplock: the shim puts stops in order, and a second one
// must be able to shorten the first one's grace.
func (d *Daemon) stopContainer(ctx context.Context, c *container, grace time.Duration) error {
	rec := c.rec.Load()
	if s := c.seen.Load(); s.exit != nil || s.status.Phase != rundir.PhaseRunning && grace > 0 {
		return nil
	}
	signal := rec.Signal
	if signal == 0 {
		signal = int(defaultStopSignal)
	}
	if err := c.client.Stop(ctx, signal, grace); err != nil {
		if d.settled(c) {
			return nil
		}
		return shimError(err)
	}
	const dying = 2 * time.Minute // an init in an uninterruptible call
	ctx, cancel := context.WithTimeout(ctx, grace+dying)
	defer cancel()
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return errorf(ErrUnavailable, "container %s has been told to stop and has not ended yet: %w", shortID(rec.ID), ctx.Err())
	}
}

// settled looks whether a container whose shim did not answer has ended.
func (d *Daemon) settled(c *container) bool {
	exit, err := c.readExit(d)
	if err != nil {
		return false
	}
	d.observe(c, func(s *seen) { s.exit = &exit })
	return true
}

// readExit reads the exit record, from the run directory or the durable one.
func (c *container) readExit(d *Daemon) (rundir.Exit, error) {
	id := c.rec.Load().ID
	exit, err := d.runDir(id).ReadExit()
	if err != nil {
		exit, err = rundir.ReadExitIn(d.state.Dir(state.Containers, id))
	}
	return exit, err
}

// RemoveContainer removes a container, running or not, and all that was its.
func (d *Daemon) RemoveContainer(ctx context.Context, id string) error {
	c, err := d.container(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return d.removeContainer(ctx, c)
}

func (d *Daemon) removeContainer(ctx context.Context, c *container) error {
	rec := c.rec.Load()
	if err := c.op.lock(ctx, "container "+shortID(rec.ID)); err != nil {
		return err
	}
	defer c.op.unlock()
	d.mu.Lock()
	here := d.containers[rec.ID] == c
	d.mu.Unlock()
	if !here {
		return nil // another call has removed it
	}
	if err := d.saveContainer(c, func(r *containerRecord) { r.Phase = containerRemoving }); err != nil {
		d.log.Warn("cannot write down that a container is removed", "container", rec.ID, "error", err)
	}
	if err := d.eraseContainer(ctx, c); err != nil {
		return as(ErrUnavailable, fmt.Errorf("cannot remove container %s: %w", shortID(rec.ID), err))
	}
	d.mu.Lock()
	delete(d.containers, rec.ID)
	d.mu.Unlock()
	if layers := rec.allLayers(); len(layers) > 0 {
		d.collect(layers) // it may have been the last one that used a removed image
	}
	if !rec.Init {
		d.releaseName(containerName(rec.PodID, rec.Config.M.GetMetadata()), rec.ID)
		d.log.Info("container removed", "container", rec.ID, "pod", rec.PodID, "name", rec.Config.M.GetMetadata().GetName())
	}
	return nil
}

// eraseContainer removes all trace of a container, the shim first and the
// record last. Each step looks whether it is due, so it also undoes a creation
// that failed anywhere and finishes a removal that was cut short.
func (d *Daemon) eraseContainer(ctx context.Context, c *container) error {
	rec := c.rec.Load()
	dir := d.runDir(rec.ID)
	if err := d.endShim(ctx, c, "it was removed"); err != nil {
		return err
	}
	c.client.Close()
	d.observe(c, func(s *seen) {
		if exit, err := c.readExit(d); err == nil {
			s.exit = &exit
		} else {
			s.exit = &rundir.Exit{Code: rundir.CodeUnknown, Source: rundir.SourceInferred, Reason: rundir.ReasonNeverRan, ExitedAt: time.Now()}
		}
	})
	images, err := os.ReadDir(dir.Path(imagesName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var mounts []string
	for _, e := range images {
		mounts = append(mounts, dir.Path(filepath.Join(imagesName, e.Name())))
	}
	for _, m := range append(mounts, dir.Path(rundir.RootfsName), dir.Path(pidName)) {
		if err := rootfs.Unmount(m); err != nil {
			return err
		}
	}
	if err := d.cgroups.RemoveShim(ctx, rec.ID); err != nil {
		return err
	}
	if err := d.state.RemoveRunDir(state.Containers, rec.ID); err != nil {
		return err
	}
	return d.state.Remove(state.Containers, rec.ID)
}

// ReopenLog has the shim switch to a new log file.
func (d *Daemon) ReopenLog(ctx context.Context, id string) error {
	c, err := d.container(id)
	if err != nil {
		return err
	}
	if s := c.seen.Load(); s.state() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return errorf(ErrState, "container_id: container %s does not run", shortID(id))
	}
	return shimError(c.client.ReopenLog(ctx))
}
