package containers

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// A container is made from a checkpoint where its image names one: an archive by its path,
// or an image that is a checkpoint. It has the root of the image that the checkpoint was
// made of, and its processes are those of the checkpoint; all else is as the request says.
// The archive is unpacked among the container's own files until the container is created.

// origin is a checkpoint from which a container is made.
type origin struct {
	name   string // as the request has it
	source *checkpoint.Source
	info   *checkpoint.Info
	held   func() // lets go of the image that is the checkpoint; nil: it is none
}

func (o *origin) close() {
	if o == nil {
		return
	}
	// Its file system may have stopped to answer, and a creation has to end.
	over, cancel := context.WithCancel(context.Background())
	cancel()
	await(over, o.source.Close)
	if o.held != nil {
		o.held()
	}
}

// holdImage holds the image of a container. Of one that is made from a checkpoint that is
// the image which the checkpoint was made of, and the checkpoint is opened, for the caller
// to close.
func (m *Manager) holdImage(ctx context.Context, cfg *runtimeapi.ContainerConfig, pod Pod,
	archive *checkpoint.Source) (
	img Image, release func(), from *origin, err error) {
	const field = "config.image.image"
	ref := cfg.GetImage().GetImage()
	switch {
	case archive != nil:
		from = &origin{name: archive.String(), source: archive}
	case filepath.IsAbs(ref):
		from = &origin{name: ref}
		if from.source, err = openArchive(ctx, ref); err != nil {
			return img, nil, nil, fmt.Errorf("%s: %w", field, err)
		}
	default:
		img, release, err = m.Images.Hold(ctx, field, ref, cfg.GetImage().GetUserSpecifiedImage())
		if err != nil || img.Checkpoint == "" {
			return img, release, nil, err
		}
		from = &origin{name: ref, held: release}
		if from.source, err = m.ofImage(img); err != nil {
			release()
			return img, nil, nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	if err = m.mayRestore(ctx, pod, cfg); err == nil {
		from.info, err = from.read(ctx)
	}
	if err == nil {
		img, release, err = m.holdBase(ctx, field, from.info.Config)
	}
	if err != nil {
		from.close()
		return img, nil, nil, err
	}
	return img, release, from, nil
}

// openArchive opens the archive of a checkpoint, for as long as ctx.
func openArchive(ctx context.Context, name string) (source *checkpoint.Source, err error) {
	var opened *checkpoint.Source
	err = await(ctx, func() (err error) {
		opened, err = checkpoint.OpenArchive(name)
		if err == nil && ctx.Err() != nil { // nobody may wait for it any more
			opened.Close()
			err = ctx.Err()
		}
		return err
	})
	if err != nil {
		return nil, err // opened may be written yet
	}
	return opened, nil
}

// read reads what has to be known of the checkpoint, for as long as ctx.
func (o *origin) read(ctx context.Context) (*checkpoint.Info, error) {
	var info *checkpoint.Info
	err := await(ctx, func() (err error) {
		info, err = o.source.Info()
		return err
	})
	if err != nil {
		return nil, err // info may be written yet
	}
	return info, nil
}

// mayRestore says why no container of a pod can be made from a checkpoint.
func (m *Manager) mayRestore(ctx context.Context, pod Pod, cfg *runtimeapi.ContainerConfig) error {
	if spec.PIDMode(cfg, pod.Record().Config.M) != runtimeapi.NamespaceMode_CONTAINER {
		return kind.Errorf(kind.State, "config.linux.security_context.namespace_options.pid: CRIU cannot restore a "+
			"container that has no PID namespace of its own")
	}
	if pod.Record().Userns() != nil {
		return kind.Errorf(kind.State, "config.image.image: CRIU cannot restore a container into a user namespace")
	}
	return m.NoCRIU(ctx)
}

// ofImage opens the layer of an image that has the checkpoint.
func (m *Manager) ofImage(img Image) (*checkpoint.Source, error) {
	if !m.RestoreImages {
		return nil, kind.Errorf(kind.State, "the image is a checkpoint of %.200q, and this node restores none from "+
			"images: whoever could name an image would be root of the node (checkpoint.restore_images)", img.Checkpoint)
	}
	for _, layer := range slices.Backward(img.Layers) {
		root, err := m.Roots.OpenLayer(layer)
		if err != nil {
			return nil, kind.As(kind.Unavailable, err)
		}
		if checkpoint.In(root) {
			return checkpoint.OfDirectory(root), nil
		}
		root.Close()
	}
	return nil, kind.Errorf(kind.Invalid, "the image says that it is a checkpoint, and no layer of it is one")
}

// holdBase holds the image that a checkpoint was made of.
func (m *Manager) holdBase(ctx context.Context, field string, c checkpoint.Config) (Image, func(), error) {
	var errs []error
	for _, ref := range []string{c.ImageRef, c.ImageName, c.Image} {
		if ref == "" || filepath.IsAbs(ref) {
			continue
		}
		img, release, err := m.Images.Hold(ctx, field, ref, "")
		if err == nil && img.Checkpoint != "" {
			release()
			err = kind.Errorf(kind.Invalid, "%s: %.200q, of which the checkpoint was made, is a checkpoint", field, ref)
		}
		if err == nil || !errors.Is(err, kind.NotFound) {
			return img, release, err
		}
		errs = append(errs, err)
	}
	return Image{}, nil, kind.Errorf(kind.NotFound, "%s: the image that the checkpoint was made of is not here: %w",
		field, errors.Join(errs...))
}

// unpack puts what the container is made from into its own directory, and makes its
// writable layer of it.
func (b *builder) unpack(ctx context.Context) error {
	dir := b.m.State.Dir(state.Containers, b.rec.ID)
	to := filepath.Join(dir, checkpointName)
	if err := os.Mkdir(to, 0o700); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	hostname := cmp.Or(b.pod.Config.M.GetHostname(), b.m.Host.NodeName)
	var whiteouts []byte
	err := await(ctx, func() (err error) {
		whiteouts, err = b.from.source.Unpack(ctx, to, hostname)
		return err
	})
	if err != nil { // whiteouts may be written yet, and files until the directory is removed
		return kind.As(kind.Unavailable, fmt.Errorf("config.image.image: %w", err)) // unless it is kind.Invalid
	}
	streams := []io.Reader{bytes.NewReader(whiteouts)}
	diff, err := os.Open(checkpoint.DiffPath(to))
	if err == nil {
		defer diff.Close()
		st, err := diff.Stat()
		if err == nil {
			err = checkpoint.Room(diff, st.Size())
		}
		if err != nil {
			return kind.As(kind.Unavailable, err)
		}
		streams = append(streams, diff)
	} else if !errors.Is(err, os.ErrNotExist) {
		return kind.As(kind.Unavailable, err)
	}
	if len(whiteouts) == 0 {
		streams = streams[1:]
	}
	if err := b.m.Roots.Restore(ctx, b.rec.Layers, dir, streams...); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("config.image.image: %w", err)) // unless it is kind.Invalid
	}
	return nil
}

// withArgs is a config that says what runs, as a spec has to: a request for a restore need
// not say it.
func (o *origin) withArgs(cfg *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	if len(cfg.GetCommand())+len(cfg.GetArgs()) > 0 {
		return cfg
	}
	cfg = proto.Clone(cfg).(*runtimeapi.ContainerConfig)
	cfg.Command = o.info.Spec.Process.Args
	return cfg
}

// fits makes sure that a spec has what CRIU expects, and nothing that the restored processes
// would miss.
func (o *origin) fits(s *specs.Spec) error {
	was := &o.info.Spec
	if was.Process.Terminal != s.Process.Terminal {
		return kind.Errorf(kind.Invalid, "config.tty: it was %v when the checkpoint was made", was.Process.Terminal)
	}
	had, have := binds(was), binds(s)
	for _, path := range had {
		if !slices.Contains(have, path) {
			return kind.Errorf(kind.Invalid, "config.mounts: the checkpoint has a mount on %.200q, the request none",
				path)
		}
	}
	for _, path := range have {
		if !slices.Contains(had, path) {
			return kind.Errorf(kind.Invalid, "config.mounts: nothing was mounted on %.200q when the checkpoint was "+
				"made", path)
		}
	}
	if a, b := ofTypes(was), ofTypes(s); a != b {
		return kind.Errorf(kind.Invalid, "config.linux.security_context.namespace_options: the container had the "+
			"namespaces %s when the checkpoint was made, and would have %s", a, b)
	}
	return o.exceeds(s)
}

// exceeds refuses a checkpoint whose processes, as its spec says, may do more than the
// request lets them: CRIU gives them what they had. It is no defence against an archive
// that lies.
//
// A request for root takes any user: a kubelet asks for root where the image names no user,
// and an image that is a checkpoint names none. What is inheritable has to be among what
// the request gives at all: other runtimes had all of it there.
func (o *origin) exceeds(s *specs.Spec) error {
	was, now := o.info.Spec.Process, s.Process
	a, b := was.User, now.User
	missing := func(had, have []string) bool {
		return slices.ContainsFunc(had, func(name string) bool { return !slices.Contains(have, name) })
	}
	had := cmp.Or(was.Capabilities, &specs.LinuxCapabilities{})
	have := cmp.Or(now.Capabilities, &specs.LinuxCapabilities{})
	for _, f := range []struct {
		field string
		more  bool
	}{
		{"run_as_user", b.UID != 0 && a.UID != b.UID},
		{"run_as_group", b.UID != 0 && a.GID != b.GID},
		{"supplemental_groups", b.UID != 0 && slices.ContainsFunc(a.AdditionalGids, func(gid uint32) bool {
			return !slices.Contains(b.AdditionalGids, gid)
		})},
		{"capabilities", missing(had.Bounding, have.Bounding) || missing(had.Permitted, have.Permitted) ||
			missing(had.Effective, have.Effective) || missing(had.Inheritable, have.Bounding) ||
			missing(had.Ambient, have.Ambient)},
		{"no_new_privs", now.NoNewPrivileges && !was.NoNewPrivileges},
		{"seccomp", s.Linux.Seccomp != nil && o.info.Spec.Linux.Seccomp == nil},
		{"apparmor", now.ApparmorProfile != "" && was.ApparmorProfile == ""},
	} {
		if f.more {
			return kind.Errorf(kind.Invalid, "config.linux.security_context.%s: the processes of the checkpoint have "+
				"more, or others, than is asked for", f.field)
		}
	}
	return nil
}

// binds are the places of the mounts that CRIU is told the sources of.
func binds(s *specs.Spec) (paths []string) {
	for _, m := range s.Mounts {
		if m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			paths = append(paths, filepath.Clean(m.Destination))
		}
	}
	return paths
}

// ofTypes are the namespaces of a spec, but for their paths.
func ofTypes(s *specs.Spec) string {
	var types []string
	for _, n := range s.Linux.Namespaces {
		types = append(types, cmp.Or(string(n.Type), "?"))
	}
	slices.Sort(types)
	return strings.Join(types, ", ")
}

// restoreDir is what the shim makes the container from; empty: from its image.
func (c *Container) restoreDir() string {
	if c.Record().Restored == "" {
		return ""
	}
	return checkpoint.ImagesDir(c.checkpointDir())
}
