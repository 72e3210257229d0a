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

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Names in the run directory of a container, beside those of its shim.
const (
	imagesName  = "images"  // where images are mounted that it reads as volumes
	volumesName = "volumes" // where volumes of its own image are mounted
	pidName     = "pid"     // the pin of a pid namespace that it joins
)

// builder makes the spec of one container.
type builder struct {
	m     *Manager
	pod   *records.Pod
	rec   *records.Container
	image Image
	pidns string // of the pod, if the container joins that
	cdi   Edits  // of devices, nil for none

	mounts []records.ImageMount
	held   []func() // release what mounts hold
}

// release lets go of the images that were mounted: from here on the record of the
// container keeps their layers, or nothing has to.
func (b *builder) release() {
	for _, f := range b.held {
		f()
	}
}

// build mounts the root and makes the spec.
func (b *builder) build(ctx context.Context, root string) (*Built, error) {
	cfg := b.rec.Config.M
	dir := b.m.State.Dir(state.Containers, b.rec.ID)
	if err := b.m.Roots.Mount(ctx, b.rec.Layers, dir, root, b.pod); err != nil {
		return nil, kind.As(kind.Unavailable, err)
	}
	if err := b.checkSources(); err != nil {
		return nil, err
	}
	h, err := b.m.Runtimes.For(b.rec.Handler)
	if err != nil {
		return nil, err
	}
	in := spec.Input{
		Host:        b.m.Host,
		ID:          b.rec.ID,
		Container:   cfg,
		Sandbox:     b.pod.Config.M,
		Image:       b.image.Config,
		Rootfs:      root,
		CgroupsPath: b.rec.CgroupsPath,
	}
	in.RecursiveReadOnly, in.MappedMounts = h.RecursiveReadOnly, h.Userns
	for _, step := range []func(context.Context, *spec.Input) error{
		b.users, b.namespaces, b.podFiles, b.devices, b.seccomp, b.imageVolumes, b.imageMounts,
	} {
		if err := step(ctx, &in); err != nil {
			return nil, err
		}
	}
	result, err := spec.Build(in)
	if err != nil {
		return nil, err
	}
	if b.cdi != nil {
		if err := b.cdi.Apply(result.Spec); err != nil {
			return nil, err
		}
		result.User = spec.StatusUser(result.Spec) // a device may come with groups
	}
	return &Built{Spec: result.Spec, User: result.User, ImageMounts: b.mounts, Warnings: result.Warnings}, nil
}

// checkSources makes sure that what is to be mounted exists.
func (b *builder) checkSources() error {
	cfg := b.rec.Config.M
	if !b.m.RejectAbsentMounts {
		for i, m := range cfg.GetMounts() {
			if m.GetHostPath() == "" || m.GetImage().GetImage() != "" {
				continue
			}
			// A link that leads nowhere is for CheckMounts: whoever made it meant something.
			if _, err := os.Lstat(filepath.Clean(m.GetHostPath())); errors.Is(err, fs.ErrNotExist) {
				if err := b.m.makeHostDir(m.GetHostPath()); err != nil {
					return kind.Errorf(kind.Invalid, "config.mounts[%d].host_path: %w", i, err)
				}
			}
		}
	}
	return spec.CheckMounts(cfg)
}

// users finds out who the container runs as, from its config and its root.
func (b *builder) users(_ context.Context, in *spec.Input) (err error) {
	in.User, err = spec.FindUser(in.Rootfs, in.Container, in.Image)
	return err
}

// namespaces gives the container those of its pod, and pins the one of another
// container that it joins.
func (b *builder) namespaces(_ context.Context, in *spec.Input) (err error) {
	n := b.pod.Namespaces
	in.Namespaces = spec.Namespaces{Net: n.Net, IPC: n.IPC, UTS: n.UTS, User: n.User, PID: b.pidns}
	if spec.PIDMode(in.Container, in.Sandbox) == runtimeapi.NamespaceMode_TARGET {
		target := in.Container.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId()
		in.Namespaces.PID, err = b.pinTarget(target)
	}
	return err
}

// pinTarget pins the pid namespace of another container of the same pod: by the
// time the OCI runtime looks, the pid may be that of another process.
func (b *builder) pinTarget(id string) (string, error) {
	const field = "config.linux.security_context.namespace_options.target_id"
	c, err := b.m.Find(id)
	if err != nil || c.Record().PodID != b.pod.ID {
		return "", kind.Errorf(kind.Invalid, "%s: there is no container %q in this pod", field, id)
	}
	init := c.Seen().Init
	if !init.Alive() {
		return "", kind.Errorf(kind.State, "%s: %s does not run", field, c)
	}
	pin := b.m.dir(b.rec.ID).Path(pidName)
	return pin, kind.As(kind.Unavailable, b.m.Roots.PinPID(init, pin))
}

// podFiles are the files of the pod that the container sees below /etc and /dev.
func (b *builder) podFiles(_ context.Context, in *spec.Input) error {
	dir := b.m.State.RunDir(state.Pods, b.pod.ID)
	files := cmp.Or(b.pod.FilesDir, dir)
	in.Hosts = filepath.Join(files, "hosts")
	in.Hostname = filepath.Join(files, "hostname")
	in.ResolvConf = filepath.Join(files, "resolv.conf")
	in.Shm = "/dev/shm"
	if b.pod.Namespaces.IPC != "" {
		in.Shm = filepath.Join(dir, "shm")
	}
	return nil
}

func (b *builder) devices(_ context.Context, in *spec.Input) (err error) {
	if in.Devices, err = spec.ResolveDevices(in.Container); err != nil {
		return err
	}
	if in.Container.GetLinux().GetSecurityContext().GetPrivileged() {
		in.HostDevices, err = spec.HostDevices()
	}
	return kind.As(kind.Unavailable, err)
}

func (b *builder) seccomp(_ context.Context, in *spec.Input) (err error) {
	in.SeccompProfile, err = spec.ReadSeccompProfile(in.Container)
	return err
}

// imageVolumes makes the directories that the image declares as volumes, and
// mounts those that have to be.
func (b *builder) imageVolumes(_ context.Context, in *spec.Input) (err error) {
	names := slices.Collect(maps.Keys(in.Image.Volumes))
	at := b.m.dir(b.rec.ID).Path(volumesName)
	in.ImageVolumes, err = b.m.Roots.Volumes(in.Rootfs, names, b.pod.Root(), at, spec.ImageVolumes(in.Container))
	if err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("config.image: %w", err)) // unless it is kind.Invalid
	}
	return nil
}

// imageMounts mounts the images that the container reads as volumes.
func (b *builder) imageMounts(ctx context.Context, in *spec.Input) (err error) {
	in.ImageMounts = map[int]string{}
	for i, m := range in.Container.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		if in.ImageMounts[i], err = b.mountImage(ctx, i, m); err != nil {
			return err
		}
	}
	return nil
}

// mountImage mounts an image below the run directory, and gives the path of what
// the mount names in it.
func (b *builder) mountImage(ctx context.Context, i int, m *runtimeapi.Mount) (string, error) {
	field := "config.mounts[" + strconv.Itoa(i) + "].image"
	img, release, err := b.m.Images.Hold(ctx, field, m.GetImage().GetImage())
	if err != nil {
		return "", err
	}
	b.held = append(b.held, release)
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
	if err := b.m.Roots.Mount(ctx, img.Layers, rw, target, b.pod); err != nil {
		return "", kind.As(kind.Unavailable, err)
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
