package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Restore makes a pod, and its containers, of what Checkpoint has written. They are created,
// and go on when they are started. After an error there is neither.
func (m *Manager) Restore(ctx context.Context, r *runtimeapi.RestorePodRequest,
) (*runtimeapi.RestorePodResponse, error) {
	for key := range r.GetOptions() {
		return nil, kind.Errorf(kind.Invalid, "options: %.200q is not known: there are none", key)
	}
	if len(r.GetContainerConfigs()) == 0 {
		return nil, kind.Errorf(kind.Invalid, "container_configs: is empty")
	}
	if _, err := m.Runtimes.For(r.GetRuntimeHandler()); err != nil {
		return nil, err
	}
	saved, err := openCheckpoint(r.GetCheckpointPath())
	if err != nil {
		return nil, fmt.Errorf("checkpoint_path: %w", err)
	}
	defer saved.dir.Close()
	if err := saved.matches(r); err != nil {
		return nil, err
	}
	if err := m.Containers.NoCRIU(ctx); err != nil {
		return nil, err
	}
	began := time.Now()
	id, err := m.Run(ctx, r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	p, err := m.Find(id)
	if err != nil {
		return nil, err
	}
	// An answer may have been lost: the same request goes on with what there is.
	for _, c := range m.Containers.Of(id) {
		if c.Record().Restored == "" {
			return nil, kind.Errorf(kind.Exists, "config.metadata: there is such a pod already, %s, with %s", p, c)
		}
	}
	resp, err := m.fill(ctx, p, r, saved)
	if err != nil && !p.Record().CreatedAt.Before(began) {
		m.discard(p)
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// discard removes a pod of which nobody was told.
func (m *Manager) discard(p *Pod) {
	ctx, cancel := context.WithTimeout(context.Background(), networkLimit)
	defer cancel()
	if err := m.Remove(ctx, p.ID()); err != nil {
		m.Log.Error("cannot remove a pod that could not be restored; it stays until it is removed", "pod", p.ID(),
			"error", err)
	}
}

// fill makes what a new pod is to have.
func (m *Manager) fill(ctx context.Context, p *Pod, r *runtimeapi.RestorePodRequest, saved *savedPod) (
	*runtimeapi.RestorePodResponse, error) {
	if err := step.Reach(step.PodRestoring); err != nil {
		return nil, err
	}
	if err := m.restoreShm(ctx, p, saved); err != nil {
		return nil, err
	}
	resp := &runtimeapi.RestorePodResponse{PodSandboxId: p.ID()}
	for i, cfg := range r.GetContainerConfigs() {
		name := cfg.GetMetadata().GetName()
		source, err := saved.archive(saved.container(name).Archive)
		if err != nil {
			return nil, fmt.Errorf("checkpoint_path: %w", err)
		}
		source.WithoutIPC(i > 0)
		id, err := m.Containers.CreateFrom(ctx, p, cfg, source)
		if err != nil {
			return nil, fmt.Errorf("container_configs[%d]: %w", i, err)
		}
		resp.RestoredContainers = append(resp.RestoredContainers,
			&runtimeapi.RestoredContainer{Name: name, ContainerId: id})
	}
	return resp, step.Reach(step.PodRestored)
}

// restoreShm fills the pod's /dev/shm.
func (m *Manager) restoreShm(ctx context.Context, p *Pod, saved *savedPod) error {
	if p.Record().Namespaces.IPC == "" || len(m.Containers.Of(p.ID())) > 0 {
		return nil // it is the host's, or in use
	}
	f, err := beneath.FileAt(saved.dir, shmArchive, math.MaxInt64)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return kind.Errorf(kind.Invalid, "checkpoint_path: %w", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() == 0 {
		return err
	}
	if err := emptyShm(p.shmDir()); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot empty the pod's /dev/shm: %w", err))
	}
	return m.Trees.Apply(ctx, p.shmDir(), f)
}

// emptyShm removes what a restore that was cut short has left. No container has it mounted.
func emptyShm(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	return err
}

// savedPod is a checkpoint of a pod that somebody gives. It is hostile, as an archive is.
type savedPod struct {
	dir *os.File
	manifest
}

// openCheckpoint reads what Checkpoint has written. The caller closes the directory.
func openCheckpoint(path string) (*savedPod, error) {
	dir, err := checkpoint.Directory(path)
	if err != nil {
		return nil, err
	}
	s := &savedPod{dir: dir}
	if err := s.read(); err != nil {
		dir.Close()
		return nil, kind.Errorf(kind.Invalid, "%.200q is no checkpoint of a pod, or not a whole one: %w", path, err)
	}
	return s, nil
}

func (s *savedPod) read() error {
	f, err := beneath.FileAt(s.dir, manifestName, maxManifest)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err == nil {
		err = json.Unmarshal(b, &s.manifest)
	}
	if err == nil && s.Version != manifestVersion {
		err = fmt.Errorf("%s is of version %d", manifestName, s.Version)
	}
	return err
}

// archive opens that of a container. It has the same name in each daemon: a repeated request
// has to find what the first one has made.
func (s *savedPod) archive(name string) (*checkpoint.Source, error) {
	if name != filepath.Base(name) {
		return nil, kind.Errorf(kind.Invalid, "%.200q is not in the directory of the checkpoint", name)
	}
	source, err := checkpoint.OpenIn(s.dir, name)
	if errors.Is(err, kind.NotFound) {
		err = kind.Errorf(kind.Invalid, "%w", err)
	}
	return source, err
}

// container gives one by its name; nil if there is none.
func (s *savedPod) container(name string) *savedContainer {
	i := slices.IndexFunc(s.Containers, func(c savedContainer) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	return &s.Containers[i]
}

// matches compares a request with the checkpoint: the containers by their names, and of each
// what says what its processes are.
func (s *savedPod) matches(r *runtimeapi.RestorePodRequest) error {
	if s.Handler != r.GetRuntimeHandler() {
		return kind.Errorf(kind.Invalid, "runtime_handler: is %.200q, the checkpoint is of %.200q",
			r.GetRuntimeHandler(), s.Handler)
	}
	seen := map[string]bool{}
	for i, cfg := range r.GetContainerConfigs() {
		field, name := fmt.Sprintf("container_configs[%d]", i), cfg.GetMetadata().GetName()
		was := s.container(name)
		switch {
		case name == "":
			return kind.Errorf(kind.Invalid, "%s.metadata.name: is empty", field)
		case seen[name]:
			return kind.Errorf(kind.Invalid, "%s.metadata.name: %.200q is there twice", field, name)
		case was == nil:
			return kind.Errorf(kind.Invalid, "%s.metadata.name: the checkpoint has no container %.200q", field, name)
		}
		seen[name] = true
		if differs := differs(was, cfg); differs != "" {
			return kind.Errorf(kind.Invalid, "%s.%s: is not what it was when the checkpoint was made", field, differs)
		}
	}
	if len(seen) != len(s.Containers) {
		return kind.Errorf(kind.Invalid, "container_configs: has %d containers, the checkpoint has %d", len(seen),
			len(s.Containers))
	}
	return nil
}

// differs names the first field in which a config is not that of the saved process; "" if
// there is none.
func differs(was *savedContainer, cfg *runtimeapi.ContainerConfig) string {
	old := was.Config.M
	image := cfg.GetImage().GetImage()
	a, b := old.GetLinux().GetSecurityContext(), cfg.GetLinux().GetSecurityContext()
	envs := func(c *runtimeapi.ContainerConfig) []string {
		var list []string
		for _, e := range c.GetEnvs() {
			list = append(list, e.GetKey()+"="+string(e.GetValue()))
		}
		slices.Sort(list)
		return list
	}
	for _, f := range []struct {
		name string
		same bool
	}{
		{"image.image", image == old.GetImage().GetImage() || image == was.ImageID},
		{"command", slices.Equal(old.GetCommand(), cfg.GetCommand())},
		{"args", slices.Equal(old.GetArgs(), cfg.GetArgs())},
		{"working_dir", old.GetWorkingDir() == cfg.GetWorkingDir()},
		{"envs", slices.Equal(envs(old), envs(cfg))},
		{"stdin", old.GetStdin() == cfg.GetStdin()},
		{"tty", old.GetTty() == cfg.GetTty()},
		{"linux.security_context.run_as_user", proto.Equal(a.GetRunAsUser(), b.GetRunAsUser())},
		{"linux.security_context.run_as_username", a.GetRunAsUsername() == b.GetRunAsUsername()},
		{"linux.security_context.run_as_group", proto.Equal(a.GetRunAsGroup(), b.GetRunAsGroup())},
		{"linux.security_context.supplemental_groups",
			slices.Equal(a.GetSupplementalGroups(), b.GetSupplementalGroups())},
		{"linux.security_context.capabilities", proto.Equal(a.GetCapabilities(), b.GetCapabilities())},
		{"linux.security_context.privileged", a.GetPrivileged() == b.GetPrivileged()},
		{"linux.security_context.no_new_privs", a.GetNoNewPrivs() == b.GetNoNewPrivs()},
		{"linux.security_context.seccomp", proto.Equal(a.GetSeccomp(), b.GetSeccomp())},
		{"linux.security_context.apparmor", proto.Equal(a.GetApparmor(), b.GetApparmor())},
	} {
		if !f.same {
			return f.name
		}
	}
	return ""
}
