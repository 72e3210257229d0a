package containers

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// A checkpoint freezes the container, has its shim save the processes, writes down what is
// in the writable layer, and lets it run again. The archive is made of that. The record says
// from before the freeze on that all this may have to be undone; a shim whose daemon was
// killed thaws by itself when the time is up.

// DefaultCheckpoint is how long a checkpoint may take for which nothing is said.
const DefaultCheckpoint = 10 * time.Minute

const (
	// thawTimeout bounds how long a thaw waits for the OCI runtime, which ends at the limit
	// of the freeze.
	thawTimeout = 30 * time.Second
	// checkpointName is the directory of a checkpoint among the container's own files.
	checkpointName = "checkpoint"
)

// Snapshot is a checkpoint of one container on its way: Begin, Freeze, Save, Thaw, Fill,
// End. End is called in any case, and undoes what is left of the others.
type Snapshot struct {
	c    *Container
	dir  string
	took time.Time
}

// Checkpoint makes an archive of a running container, which goes on. timeout 0 is the
// default.
func (m *Manager) Checkpoint(ctx context.Context, id, location string, timeout time.Duration) error {
	c, err := m.Find(id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(timeout, DefaultCheckpoint))
	defer cancel()
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	out, err := checkpoint.Create(location)
	if err != nil {
		return fmt.Errorf("location: %w", err)
	}
	defer out.Close()
	if err := c.Checkpointable(); err != nil {
		return err
	}
	if err := m.NoCRIU(ctx); err != nil {
		return err
	}
	s, err := c.Begin(ctx, interrupt, out.At)
	if err != nil {
		return err
	}
	err = Interrupted(ctx, s.make(ctx, out))
	if eerr := s.End(err == nil); err == nil {
		err = eerr
	}
	return err
}

// make makes the archive of a container.
func (s *Snapshot) make(ctx context.Context, out *checkpoint.Output) error {
	if err := s.take(ctx); err != nil {
		return err
	}
	return AwaitFiles(ctx, func() error {
		if err := s.Fill(ctx, out); err != nil {
			return err
		}
		if err := out.Commit(); err != nil {
			return fmt.Errorf("location: %w", err)
		}
		return step.Reach(step.ContainerArchived)
	}, out)
}

// AwaitFiles calls f, which writes files where somebody wants them, and waits for its end as
// await does. If f is left alone it cannot give names to the files any more, which are closed.
func AwaitFiles(ctx context.Context, f func() error, files ...*checkpoint.Output) error {
	err := await(ctx, f)
	if errors.Is(err, errNoAnswer) {
		for _, file := range files {
			go file.Close() // may have to write what is in memory
		}
	}
	return err
}

// errNoAnswer says that a call was left alone which waits for a file system.
var errNoAnswer = errors.New("the directory of the checkpoint does not answer")

// await calls f, which uses files that somebody named, and waits for its end; when ctx has
// ended, no longer than f takes to see that. Where their directory does not answer f is left
// alone, with all that it uses, and the error is errNoAnswer, of the kind kind.Unavailable.
func await(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(dropTimeout):
		return kind.Errorf(kind.Unavailable, "%w: %w", errNoAnswer, context.Cause(ctx))
	}
}

// Checkpointable says why no checkpoint can be made of the container; nil if one can.
func (c *Container) Checkpointable() error {
	if err := c.running(); err != nil {
		return err
	}
	if c.pod.Record().Userns() != nil {
		return kind.Errorf(kind.State, "container_id: %s has a user namespace, which CRIU cannot restore", c)
	}
	if spec.PIDMode(c.Record().Config.M, c.pod.Record().Config.M) != runtimeapi.NamespaceMode_CONTAINER {
		return kind.Errorf(kind.State, "container_id: %s has no PID namespace of its own, and CRIU cannot restore "+
			"processes among others, which may have their numbers", c)
	}
	return nil
}

// Begin writes down that a checkpoint may be under way, which makes these files. No other
// call changes the container until End; one that stops it calls interrupt.
func (c *Container) Begin(ctx context.Context, interrupt context.CancelCauseFunc, files ...records.File) (
	*Snapshot, error) {
	if err := c.op.Lock(ctx, c.String()); err != nil {
		return nil, err
	}
	s := &Snapshot{c: c, dir: c.checkpointDir()}
	err := c.Checkpointable()
	if err == nil && c.Record().Phase == records.ContainerRemoving {
		err = kind.Errorf(kind.State, "container_id: %s is being removed", c)
	}
	if err == nil && c.Record().Checkpoint != nil {
		err = c.undoCheckpointLocked(ctx, false)
	}
	if err == nil {
		err = c.save(func(r *records.Container) { r.Checkpoint = &records.Checkpoint{Files: files} })
	}
	if err != nil {
		c.op.Unlock()
		return nil, err
	}
	c.interrupt.Store(&interrupt)
	err = step.Reach(step.ContainerFreezing)
	if err == nil {
		err = errors.Join(os.Mkdir(s.dir, 0o700), os.Mkdir(checkpoint.ImagesDir(s.dir), 0o700))
		err = kind.As(kind.Unavailable, err)
	}
	if err != nil {
		s.End(false)
		return nil, err
	}
	return s, nil
}

// interruptCheckpoint ends a checkpoint that is being made. The container runs soon after: as
// soon as CRIU has let go of it.
func (c *Container) interruptCheckpoint(why string) {
	if interrupt := c.interrupt.Load(); interrupt != nil {
		(*interrupt)(kind.Errorf(kind.State, "container_id: %s is told to end meanwhile, by %s", c, why))
	}
}

// Interrupted says why a checkpoint failed that was made under ctx. nil stays nil.
func Interrupted(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, kind.State) {
		return cause
	}
	return err
}

// checkpointDir is where a checkpoint of the container lies until it is an archive, or is
// restored.
func (c *Container) checkpointDir() string {
	return filepath.Join(c.m.State.Dir(state.Containers, c.ID()), checkpointName)
}

// take does all that needs a frozen container.
func (s *Snapshot) take(ctx context.Context) error {
	err := s.Freeze(ctx)
	if err == nil {
		err = s.Save(ctx)
	}
	if terr := s.Thaw(); err == nil && terr == nil {
		return step.Reach(step.ContainerThawed)
	} else if err == nil {
		err = terr
	}
	return err
}

// limit is how long a call of the shim may take: the shim is bounded by that of the freeze.
func limit(ctx context.Context) time.Duration {
	if at, ok := ctx.Deadline(); ok {
		return max(time.Until(at), time.Millisecond)
	}
	return DefaultCheckpoint
}

// Freeze stops the container.
func (s *Snapshot) Freeze(ctx context.Context) error {
	c := s.c
	err := c.call(ctx, func() error { return c.client.Freeze(ctx, limit(ctx)) })
	if errors.Is(err, kind.Unsupported) {
		err = kind.Errorf(kind.State, "container_id: the shim of %s is of a version without checkpoints", c)
	}
	if err == nil {
		s.took = time.Now()
		err = step.Reach(step.ContainerFrozen)
	}
	return err
}

// Save has what a frozen container is written down.
func (s *Snapshot) Save(ctx context.Context) error {
	c := s.c
	err := c.call(ctx, func() error {
		return c.client.Checkpoint(ctx, checkpoint.ImagesDir(s.dir), limit(ctx))
	})
	if err == nil {
		err = s.saveLayer(ctx)
	}
	if err == nil {
		err = step.Reach(step.ContainerSaved)
	}
	return err
}

// saveLayer writes down what the container has written.
func (s *Snapshot) saveLayer(ctx context.Context) error {
	f, err := os.OpenFile(checkpoint.DiffPath(s.dir), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return kind.As(kind.Unavailable, err)
	}
	w := &checkpoint.Spare{File: f}
	if err = s.c.m.Roots.Diff(ctx, filepath.Dir(s.dir), w); err == nil {
		err = w.Finish()
	}
	return kind.As(kind.Unavailable, errors.Join(err, f.Close()))
}

// Thaw lets the container run, whatever has become of the caller.
func (s *Snapshot) Thaw() error {
	c := s.c
	ctx, cancel := context.WithTimeout(context.Background(), thawTimeout)
	defer cancel()
	err := c.call(ctx, func() error { return c.client.Thaw(ctx, thawTimeout) })
	if err != nil && c.readExit() {
		return nil
	}
	return err
}

// Fill makes the archive, which has no name yet.
func (s *Snapshot) Fill(ctx context.Context, out *checkpoint.Output) error {
	parts, err := s.parts()
	if err == nil {
		err = parts.Write(ctx, out.File)
	}
	return kind.As(kind.Unavailable, err)
}

// parts says of what the archive is made.
func (s *Snapshot) parts() (*checkpoint.Parts, error) {
	c := s.c
	rec := c.Record()
	b, err := c.dir.ReadSpec()
	if err != nil {
		return nil, err
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(b, spec); err != nil {
		return nil, fmt.Errorf("cannot read the spec: %w", err)
	}
	if err := annotate(spec, c.pod.Record(), rec); err != nil {
		return nil, err
	}
	handler, err := c.m.Runtimes.For(rec.Handler)
	if err != nil {
		return nil, err
	}
	return &checkpoint.Parts{
		Config: checkpoint.Config{
			ID:           rec.ID,
			Name:         c.name(),
			Image:        ImageOf(rec.Config.M).GetImage(),
			ImageRef:     rec.ImageID,
			ImageName:    rec.ImageRef,
			Runtime:      filepath.Base(handler.Path),
			CreatedAt:    rec.CreatedAt,
			Checkpointed: s.took,
			Restored:     rec.Restored != "",
		},
		Spec: spec,
		Dir:  s.dir,
		Logs: c.dir.Path(rundir.CRIUName),
	}, nil
}

// annotate says in a spec what tools for such archives look for there.
func annotate(spec *specs.Spec, pod *records.Pod, rec *records.Container) error {
	meta, cfg := pod.Config.M.GetMetadata(), rec.Config.M
	own, err := json.Marshal(cfg.GetAnnotations())
	if err != nil {
		return err
	}
	spec.Annotations = maps.Clone(spec.Annotations)
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	delete(spec.Annotations, rundir.CRIUConfigAnnotation)
	maps.Copy(spec.Annotations, map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.container-name":    cfg.GetMetadata().GetName(),
		"io.kubernetes.cri.image-name":        ImageOf(cfg).GetImage(),
		"io.kubernetes.cri.sandbox-id":        pod.ID,
		"io.kubernetes.cri.sandbox-name":      meta.GetName(),
		"io.kubernetes.cri.sandbox-namespace": meta.GetNamespace(),
		"io.kubernetes.cri.sandbox-uid":       meta.GetUid(),
		"io.kubernetes.cri-o.Annotations":     string(own),
	})
	return nil
}
