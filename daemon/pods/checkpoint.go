package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// A checkpoint of a pod is a directory: an archive of each container, what was in the pod's
// /dev/shm, and pod.json, which comes last. All containers are frozen before the first of
// them is saved, and run again when the last one is. What is written has no name until all
// of it is complete; the records of the containers say what is to be removed if a killed
// daemon had just begun to give names.

// Files of a checkpoint of a pod.
const (
	manifestName    = "pod.json"
	shmArchive      = "shm.tar"
	manifestVersion = 1
	maxManifest     = 8 << 20 // bytes
)

// manifest is pod.json.
type manifest struct {
	Version    int                                           `json:"version"`
	ID         string                                        `json:"id"`
	At         time.Time                                     `json:"at"`
	Handler    string                                        `json:"handler"`
	Config     records.Message[*runtimeapi.PodSandboxConfig] `json:"config"`
	Containers []savedContainer                              `json:"containers"`
}

// savedContainer is a container in pod.json.
type savedContainer struct {
	Name    string                                       `json:"name"`
	ID      string                                       `json:"id"`
	Archive string                                       `json:"archive"` // a name in the same directory
	ImageID string                                       `json:"imageId"`
	Config  records.Message[*runtimeapi.ContainerConfig] `json:"config"`
}

// Checkpoint saves containers of a pod in an empty directory, all as of one moment. They go
// on, whatever has become of it.
func (m *Manager) Checkpoint(ctx context.Context, r *runtimeapi.CheckpointPodRequest) error {
	p, err := m.Find(r.GetPodSandboxId())
	if err != nil {
		return err
	}
	list, err := m.toSave(p, r)
	if err != nil {
		return err
	}
	dir, err := emptyDirectory(r.GetOutputPath())
	if err != nil {
		return fmt.Errorf("output_path: %w", err)
	}
	defer dir.Close()
	if err := m.Containers.NoCRIU(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, containers.DefaultCheckpoint)
	defer cancel()
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	s := &saving{pod: p, list: list, interrupt: interrupt}
	err = containers.Interrupted(ctx, s.make(ctx, dir))
	if eerr := s.end(err == nil); err == nil {
		err = eerr
	}
	return err
}

// toSave gives the containers that a request names, in the order of their ids: that is the
// one in which any two of them are locked.
func (m *Manager) toSave(p *Pod, r *runtimeapi.CheckpointPodRequest) (list []*containers.Container, err error) {
	for key := range r.GetOptions() {
		return nil, kind.Errorf(kind.Invalid, "options: %.200q is not known: there are none", key)
	}
	if err := p.Ready(); err != nil {
		return nil, err
	}
	if len(r.GetContainerIds()) == 0 {
		return nil, kind.Errorf(kind.Invalid, "container_ids: is empty")
	}
	seen := map[string]bool{}
	for i, id := range r.GetContainerIds() {
		c, err := m.Containers.Find(id)
		field := fmt.Sprintf("container_ids[%d]", i)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", field, err)
		case seen[c.ID()]:
			return nil, kind.Errorf(kind.Invalid, "%s: %s is there twice", field, c)
		case c.Record().PodID != p.ID():
			return nil, kind.Errorf(kind.Invalid, "%s: %s is not of this pod", field, c)
		}
		if err := c.Checkpointable(); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		seen[c.ID()] = true
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *containers.Container) int { return strings.Compare(a.ID(), b.ID()) })
	return list, nil
}

// emptyDirectory opens a directory in which nothing is. The caller closes it.
func emptyDirectory(path string) (*os.File, error) {
	dir, err := checkpoint.Directory(path)
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(1)
	if err == io.EOF && len(names) == 0 {
		return dir, nil
	}
	dir.Close()
	if err == nil {
		return nil, kind.Errorf(kind.State, "the directory %.200q is not empty", path)
	}
	return nil, kind.As(kind.Unavailable, err)
}

// saving is a checkpoint of a pod on its way. end is called in any case.
type saving struct {
	pod  *Pod
	list []*containers.Container
	// outputs are the archives in the order of list, then shm.tar and pod.json.
	outputs   []*checkpoint.Output
	snapshots []*containers.Snapshot
	interrupt context.CancelCauseFunc
}

// make makes the checkpoint.
func (s *saving) make(ctx context.Context, dir *os.File) error {
	if err := s.create(dir); err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	if err := s.take(ctx); err != nil {
		return err
	}
	return containers.AwaitFiles(ctx, func() error { return s.write(ctx) }, s.outputs...)
}

// create makes the files without names, so that a directory that cannot have them is no
// reason to freeze anything.
func (s *saving) create(dir *os.File) error {
	names := []string{}
	for i := range s.list {
		names = append(names, fmt.Sprintf("container-%d.tar", i))
	}
	for _, name := range append(names, shmArchive, manifestName) {
		out, err := checkpoint.CreateIn(dir, name)
		if err != nil {
			return fmt.Errorf("output_path: %w", err)
		}
		s.outputs = append(s.outputs, out)
	}
	return nil
}

// begin has it on record what is to be undone. The first container has all files, so that one
// record decides whether they are kept.
func (s *saving) begin(ctx context.Context) error {
	var files []records.File
	for _, out := range s.outputs {
		files = append(files, out.At)
	}
	for _, c := range s.list {
		snapshot, err := c.Begin(ctx, s.interrupt, files...)
		if err != nil {
			return err
		}
		s.snapshots, files = append(s.snapshots, snapshot), nil
	}
	return nil
}

// each calls f for all containers at the same time.
func (s *saving) each(f func(*containers.Snapshot) error) error {
	errs := make([]error, len(s.snapshots))
	var wg sync.WaitGroup
	for i, snapshot := range s.snapshots {
		wg.Go(func() { errs[i] = f(snapshot) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// take does all that needs frozen containers, and has them run again.
func (s *saving) take(ctx context.Context) error {
	err := s.each(func(c *containers.Snapshot) error { return c.Freeze(ctx) })
	if err == nil {
		err = step.Reach(step.PodFrozen)
	}
	for _, c := range s.snapshots {
		if err == nil {
			err = c.Save(ctx)
		}
	}
	if err == nil {
		err = containers.AwaitFiles(ctx, func() error { return s.saveShm(ctx) }, s.outputs...)
	}
	err = errors.Join(err, s.each((*containers.Snapshot).Thaw))
	if err == nil {
		err = step.Reach(step.PodThawed)
	}
	return err
}

// saveShm writes what is in the pod's /dev/shm, which CRIU takes for a volume.
func (s *saving) saveShm(ctx context.Context) error {
	if s.pod.Record().Namespaces.IPC == "" {
		return nil // the host's
	}
	return s.pod.m.Trees.Diff(ctx, s.pod.shmDir(), s.outputs[len(s.list)])
}

// write completes the files, then gives them their names.
func (s *saving) write(ctx context.Context) error {
	for i, c := range s.snapshots {
		if err := c.Fill(ctx, s.outputs[i]); err != nil {
			return err
		}
	}
	if err := s.writeManifest(s.outputs[len(s.list)+1]); err != nil {
		return err
	}
	for i, out := range s.outputs {
		if err := out.Commit(); err != nil {
			return err
		}
		if i == 0 {
			if err := step.Reach(step.PodArchive); err != nil {
				return err
			}
		}
	}
	return step.Reach(step.PodArchived)
}

func (s *saving) writeManifest(w io.Writer) error {
	rec := s.pod.Record()
	m := manifest{Version: manifestVersion, ID: rec.ID, At: time.Now(), Handler: rec.Handler, Config: rec.Config}
	for i, c := range s.list {
		r := c.Record()
		m.Containers = append(m.Containers, savedContainer{
			Name:    r.Config.M.GetMetadata().GetName(),
			ID:      r.ID,
			Archive: filepath.Base(s.outputs[i].At.Path),
			ImageID: r.ImageID,
			Config:  r.Config,
		})
	}
	b, err := json.Marshal(m)
	if err == nil && len(b) > maxManifest {
		return kind.Errorf(kind.State, "what the containers were asked for is larger than %d bytes", maxManifest)
	}
	if err == nil {
		_, err = w.Write(b)
	}
	return kind.As(kind.Unavailable, err)
}

// end lets go of all, which run. Without keep no file is left, nor after an error. Only the
// first has files: what cannot be undone now of the others is no reason to keep none.
func (s *saving) end(keep bool) (err error) {
	if len(s.snapshots) > 0 {
		err = s.snapshots[0].End(keep)
		s.snapshots = s.snapshots[1:]
	}
	s.each(func(c *containers.Snapshot) error { return c.End(keep) })
	for _, out := range s.outputs {
		out.Close()
	}
	return err
}
