package containers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Names in the run directory of a container, beside those of its shim.
const (
	imagesName  = "images"  // where images are mounted that it reads as volumes
	volumesName = "volumes" // where volumes of its own image are mounted
	pidName     = "pid"     // the pin of a pid namespace that it joins
)

// builder makes the spec of one container.
type builder struct {
	m   *Manager
	pod *records.Pod
	rec *records.Container
	in  spec.Input // filled step by step
	cdi Edits      // of devices, nil for none

	from *origin // nil: the container is made anew

	images map[int]Image // that the container reads as volumes, by the index of the mount
	mounts []records.ImageMount
	held   []func() // release these images
}

// release lets go of the images that were mounted: from here on the record of the
// container keeps their layers, or nothing has to.
func (b *builder) release() {
	for _, f := range b.held {
		f()
	}
}

// prepare finds all that the container needs beside its own image. What is missing is
// refused before anything is made.
func (b *builder) prepare(ctx context.Context) error {
	host, err := b.m.HostFor(b.rec.Handler)
	if err != nil {
		return err
	}
	b.in = spec.Input{
		Host:      host,
		ID:        b.rec.ID,
		Container: b.rec.Config.M,
		Sandbox:   b.pod.Config.M,
	}
	if b.in.SeccompProfile, err = spec.ReadSeccompProfile(b.in.Container); err != nil {
		return err
	}
	if err := spec.Check(b.in); err != nil {
		return err
	}
	if err := spec.CheckLabels(b.in); err != nil {
		return err
	}
	if b.cdi, err = b.m.cdiDevices(b.in.Container); err != nil {
		return err
	}
	if b.in.Devices, err = spec.ResolveDevices(b.in.Container); err != nil {
		return err
	}
	if _, err := b.target(); err != nil {
		return err
	}
	return b.holdImages(ctx)
}

// eachRelabel calls f for each mount that the container wants to have its own SELinux label.
func (b *builder) eachRelabel(f func(path string) error) error {
	if spec.FileLabel(b.in) == "" {
		return nil
	}
	for i, m := range b.in.Container.GetMounts() {
		if !m.GetSelinuxRelabel() || m.GetImage() != nil {
			continue
		}
		if err := f(m.GetHostPath()); err != nil {
			return fmt.Errorf("config.mounts[%d].selinux_relabel: %w", i, err)
		}
	}
	return nil
}

// relabel gives the container's label to the mounts that want it, and to what it shares with
// its pod. Containers of a pod usually have the same one.
func (b *builder) relabel(ctx context.Context) error {
	label := spec.FileLabel(b.in)
	if label == "" {
		return nil
	}
	shared := []string{b.in.Hosts, b.in.Hostname, b.in.ResolvConf}
	if b.pod.Namespaces.IPC != "" {
		shared = append(shared, b.in.Shm)
	}
	for _, path := range shared {
		if err := b.m.Roots.Relabel(ctx, path, label); err != nil {
			return kind.As(kind.Unavailable, err)
		}
	}
	err := b.eachRelabel(func(path string) error { return b.m.Roots.Relabel(ctx, path, label) })
	return kind.As(kind.Unavailable, err) // unless it is kind.Invalid
}

// holdImages finds the images that the container reads as volumes.
func (b *builder) holdImages(ctx context.Context) error {
	b.images = map[int]Image{}
	for i, m := range b.in.Container.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		field := "config.mounts[" + strconv.Itoa(i) + "].image"
		img, release, err := b.m.Images.Hold(ctx, field, m.GetImage().GetImage(), "")
		if err != nil {
			return err
		}
		b.images[i], b.held = img, append(b.held, release)
	}
	return nil
}

// build mounts the root and makes the spec.
func (b *builder) build(ctx context.Context, root string) (*Built, error) {
	dir := b.m.State.Dir(state.Containers, b.rec.ID)
	label := spec.FileLabel(b.in)
	if b.from != nil {
		if err := b.unpack(ctx); err != nil {
			return nil, err
		}
	}
	if err := b.m.Roots.Mount(ctx, b.rec.Layers, dir, root, b.pod, label); err != nil {
		return nil, kind.As(kind.Unavailable, fmt.Errorf("config.image: %w", err)) // unless it is kind.Invalid
	}
	b.in.Rootfs, b.in.CgroupsPath = root, b.rec.CgroupsPath
	for _, step := range []func(context.Context) error{
		b.users, b.namespaces, b.podFiles, b.devices, b.imageVolumes, b.imageMounts, b.relabel,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	result, err := spec.Build(b.in)
	if err != nil {
		return nil, err
	}
	if b.cdi != nil {
		if err := b.cdi.Apply(result.Spec); err != nil {
			return nil, err
		}
		result.User = spec.StatusUser(result.Spec) // a device may come with groups
	}
	if b.from != nil {
		if err := b.from.fits(result.Spec); err != nil {
			return nil, err
		}
	}
	b.configureCRIU(result.Spec)
	return &Built{Spec: result.Spec, User: result.User, ImageMounts: b.mounts, Warnings: result.Warnings}, nil
}

// configureCRIU says where CRIU finds its configuration, which the shim writes. No annotation
// of a request may: that file can name a program that CRIU runs as root.
func (b *builder) configureCRIU(s *specs.Spec) {
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
	s.Annotations[rundir.CRIUConfigAnnotation] = b.m.dir(b.rec.ID).Path(rundir.CRIUConfigName)
}

// sourceLimit is how long the file system of what is to be mounted has to answer. That of a
// server that is gone never does, and whoever waits for it cannot be called off. Tests have
// another one.
var sourceLimit = time.Minute

// checkSources makes sure that what is to be mounted exists. What is missing is made when all
// that is there has been checked.
func (b *builder) checkSources(ctx context.Context) error {
	for _, missing := range []bool{false, true} {
		for i, mount := range b.rec.Config.M.GetMounts() {
			if mount.GetImage() != nil {
				continue
			}
			if err := b.awaitSource(ctx, fmt.Sprintf("config.mounts[%d].", i), mount, missing); err != nil {
				return err
			}
		}
	}
	return b.eachRelabel(b.m.Roots.CheckRelabel)
}

// awaitSource is checkSource for as long as sourceLimit. Of a path that does not answer one
// goroutine waits for the kernel, however often the container is asked for. It is left alone
// when the time is up, so that neither the name of the container nor its pod is held.
func (b *builder) awaitSource(ctx context.Context, field string, mount *runtimeapi.Mount, missing bool) error {
	key := fmt.Sprint(NameOf(b.rec).Name, field, mount.GetHostPath(), missing)
	answer := b.m.sources.DoChan(key, func() (any, error) { return nil, b.m.checkSource(field, mount, missing) })
	late := time.NewTimer(sourceLimit)
	defer late.Stop()
	select {
	case r := <-answer:
		return r.Err
	case <-late.C:
		return kind.Errorf(kind.Unavailable, "%shost_path: the file system of %q has not answered for %s: "+
			"is its server gone?", field, mount.GetHostPath(), sourceLimit)
	case <-ctx.Done():
		return fmt.Errorf("%shost_path: cannot wait for %q: %w", field, mount.GetHostPath(), ctx.Err())
	}
}

// checkSource checks what is there or, if that is wanted, makes and checks what is missing.
func (m *Manager) checkSource(field string, mount *runtimeapi.Mount, missing bool) error {
	// A link that leads nowhere is for CheckMount: whoever made it meant something.
	_, err := os.Lstat(filepath.Clean(mount.GetHostPath()))
	if missing != (!m.RejectAbsentMounts && errors.Is(err, fs.ErrNotExist)) {
		return nil
	}
	if missing {
		if err := m.makeHostDir(mount.GetHostPath()); err != nil {
			return kind.Errorf(kind.Invalid, "%shost_path: %w", field, err)
		}
	}
	return spec.CheckMount(field, mount)
}

// users finds out who the container runs as, from its config and its root.
func (b *builder) users(context.Context) (err error) {
	b.in.User, err = spec.FindUser(b.in.Rootfs, b.in.Container, b.in.Image)
	return err
}

// namespaces gives the container those of its pod, and pins the one of another
// container that it joins: by the time the OCI runtime looks, the pid may be that of
// another process.
func (b *builder) namespaces(context.Context) error {
	n := b.pod.Namespaces
	b.in.Namespaces = spec.Namespaces{Net: n.Net, IPC: n.IPC, UTS: n.UTS, User: n.User, PID: b.in.Namespaces.PID}
	target, err := b.target()
	if target == nil || err != nil {
		return err
	}
	b.in.Namespaces.PID = b.m.dir(b.rec.ID).Path(pidName)
	return kind.As(kind.Unavailable, b.m.Roots.PinPID(*target, b.in.Namespaces.PID))
}

// target is the process of another container of the same pod, whose pid namespace is
// joined; nil: none is.
func (b *builder) target() (*rundir.Process, error) {
	const field = "config.linux.security_context.namespace_options.target_id"
	if spec.PIDMode(b.in.Container, b.in.Sandbox) != runtimeapi.NamespaceMode_TARGET {
		return nil, nil
	}
	id := b.in.Container.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId()
	c, err := b.m.Find(id)
	if err != nil || c.Record().PodID != b.pod.ID {
		return nil, kind.Errorf(kind.Invalid, "%s: there is no container %q in this pod", field, id)
	}
	init := c.Seen().Init
	if !init.Alive() {
		return nil, kind.Errorf(kind.State, "%s: %s does not run", field, c)
	}
	return &init, nil
}

// podFiles are the files of the pod that the container sees below /etc and /dev.
func (b *builder) podFiles(context.Context) error {
	dir := b.m.State.RunDir(state.Pods, b.pod.ID)
	files := cmp.Or(b.pod.FilesDir, dir)
	b.in.Hosts = filepath.Join(files, "hosts")
	b.in.Hostname = filepath.Join(files, "hostname")
	b.in.ResolvConf = filepath.Join(files, "resolv.conf")
	b.in.Shm = "/dev/shm"
	if b.pod.Namespaces.IPC != "" {
		b.in.Shm = filepath.Join(dir, "shm")
	}
	return nil
}

func (b *builder) devices(context.Context) (err error) {
	if b.in.Container.GetLinux().GetSecurityContext().GetPrivileged() {
		b.in.HostDevices, err = spec.HostDevices()
	}
	return kind.As(kind.Unavailable, err)
}

// imageVolumes makes the directories that the image declares as volumes, and
// mounts those that have to be.
func (b *builder) imageVolumes(ctx context.Context) (err error) {
	names := slices.Collect(maps.Keys(b.in.Image.Volumes))
	at := b.m.dir(b.rec.ID).Path(volumesName)
	use := spec.ImageVolumes(b.in.Container)
	b.in.ImageVolumes, err = b.m.Roots.Volumes(ctx, b.in.Rootfs, names, b.pod.Root(), at, use)
	if err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("config.image: %w", err)) // unless it is kind.Invalid
	}
	return nil
}

// imageMounts mounts the images that the container reads as volumes.
func (b *builder) imageMounts(ctx context.Context) (err error) {
	b.in.ImageMounts = map[int]string{}
	for i, m := range b.in.Container.GetMounts() {
		if img, ok := b.images[i]; ok {
			if b.in.ImageMounts[i], err = b.mountImage(ctx, i, m, img); err != nil {
				return err
			}
		}
	}
	return nil
}

// mountImage mounts an image below the run directory, and gives the path of what
// the mount names in it.
func (b *builder) mountImage(ctx context.Context, i int, m *runtimeapi.Mount, img Image) (string, error) {
	b.mounts = append(b.mounts, records.ImageMount{
		Index:   i,
		ImageID: img.ID,
		Layers:  img.Layers,
	})
	target := b.m.dir(b.rec.ID).Path(filepath.Join(imagesName, strconv.Itoa(i)))
	// Only the spec makes it read-only: the writable layer below stays empty.
	rw := filepath.Join(b.m.State.Dir(state.Containers, b.rec.ID), imagesName, strconv.Itoa(i))
	for _, dir := range []string{target, rw} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", kind.As(kind.Unavailable, err)
		}
	}
	if err := b.m.Roots.Mount(ctx, img.Layers, rw, target, b.pod, spec.FileLabel(b.in)); err != nil {
		err = fmt.Errorf("config.mounts[%d].image: %w", i, err)
		return "", kind.As(kind.Unavailable, err) // unless it is kind.Invalid
	}
	if m.GetImageSubPath() == "" {
		return target, nil
	}
	if err := b.m.Roots.Bind(target, m.GetImageSubPath(), target+".sub"); err != nil {
		err = fmt.Errorf("config.mounts[%d].image_sub_path: %w", i, err)
		return "", kind.As(kind.Unavailable, err) // unless it is kind.Invalid
	}
	return target + ".sub", nil
}
