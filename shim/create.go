package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/shim/logfile"
)

const (
	// createTimeout is that of the kubelet for a whole call, which a create
	// that hangs (on a dead network file system, on systemd) must stay below.
	createTimeout = 4 * time.Minute
	deleteTimeout = 30 * time.Second
)

// codeNeverRan is the exit code of a container whose process never ran; it is
// what a shell and other runtimes say then.
const codeNeverRan = 128

// Create makes the container, once: a repeated request waits for the first one.
func (t *task) Create(ctx context.Context, launch rundir.Launch, spec []byte) (rundir.Process, error) {
	if err := t.begin(launch, spec); err != nil {
		return rundir.Process{}, err
	}
	select {
	case <-t.created:
	case <-ctx.Done():
		return rundir.Process{}, fmt.Errorf("the create goes on: %w", ctx.Err())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.status.Init, t.createErr
}

// begin starts the create unless it has been started. The create then owes nothing to
// the call that asked for it: it ends by itself, with the caller or without.
func (t *task) begin(launch rundir.Launch, rawSpec []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.abandoned {
		return kind.Errorf(kind.Unavailable, "the shim ends because no Create came")
	}
	if t.status.Phase != rundir.PhaseEmpty {
		if t.requestID != launch.RequestID {
			return kind.Errorf(kind.Exists, "the container exists: made by request %q, not %q",
				t.requestID, launch.RequestID)
		}
		return nil
	}
	spec, err := parseSpec(rawSpec)
	if err != nil {
		return err
	}
	if err := t.dir.WriteLaunch(launch); err != nil {
		return err
	}
	if err := os.WriteFile(t.dir.Path(rundir.SpecName), rawSpec, 0o600); err != nil {
		return fmt.Errorf("cannot write the spec: %w", err)
	}
	launch.Container, launch.Sandbox = rundir.Opaque{}, rundir.Opaque{} // large, and on file now
	t.requestID = launch.RequestID
	t.updateLocked(noEvent, func(s *rundir.Status) { s.Phase = rundir.PhaseCreating })
	ctx, cancel := context.WithTimeoutCause(context.Background(), createTimeout,
		fmt.Errorf("it took longer than %s", createTimeout))
	t.cancelCreate = cancel
	go func() {
		defer cancel()
		t.create(ctx, launch, spec)
	}()
	return nil
}

// spec is the part of an OCI spec that the shim cares about. Decoding all of
// it would cost memory for the life of the container.
type spec struct {
	Process     json.RawMessage // for execs
	Root        struct{ Path string }
	Hooks       struct{ Poststop []json.RawMessage }
	Annotations map[string]string
	Linux       struct {
		CgroupsPath string
		IntelRdt    json.RawMessage
		Namespaces  []struct{ Type, Path string }
	}
	terminal bool // of the process
}

func parseSpec(raw []byte) (*spec, error) {
	var s spec
	var process struct {
		Args     []string
		Terminal bool
	}
	err := json.Unmarshal(raw, &s)
	if err == nil && s.Process != nil {
		err = json.Unmarshal(s.Process, &process)
	}
	s.terminal = process.Terminal
	switch {
	case err != nil:
		return nil, kind.Errorf(kind.Invalid, "spec: %w", err)
	case len(process.Args) == 0:
		return nil, kind.Errorf(kind.Invalid, "spec.process.args is empty")
	case s.Root.Path == "":
		return nil, kind.Errorf(kind.Invalid, "spec.root.path is empty")
	case s.Linux.CgroupsPath != "" && filepath.Clean(s.Linux.CgroupsPath) == "/":
		return nil, kind.Errorf(kind.Invalid, "spec.linux.cgroupsPath is the root")
	}
	return &s, nil
}

// userns says whether the container has a user namespace.
func (s *spec) userns() bool {
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == "user" {
			return true
		}
	}
	return false
}

// shareMode is that of pipes in a user namespace. The OCI runtime makes a pipe the
// container's, so that a program can open its /dev/stdout; there it may not. The
// mode protects nothing: the way to a pipe is /proc/PID/fd, and it takes the right
// to trace a process that has it open.
const shareMode = 0o666

// shareWithUserns gives pipes that mode. A nil one is not there.
func shareWithUserns(pipes []*os.File) error {
	for _, f := range pipes {
		if f == nil {
			continue
		}
		if err := f.Chmod(shareMode); err != nil {
			return fmt.Errorf("cannot share a standard file: %w", err)
		}
	}
	return nil
}

// privatePID says whether the container has a pid namespace of its own, which
// ends with its init.
func (s *spec) privatePID() bool {
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == "pid" {
			return ns.Path == ""
		}
	}
	return false
}

func (t *task) create(ctx context.Context, launch rundir.Launch, spec *spec) {
	started := time.Now()
	m := &making{task: t, launch: launch, spec: spec}
	err := m.make(ctx)
	if err == nil {
		t.mu.Lock()
		t.updateLocked(rundir.EventCreated, func(s *rundir.Status) {
			s.Phase, s.CreatedAt = rundir.PhaseCreated, time.Now()
			s.Init, s.Cgroups = m.c.init.Process, m.c.init.Cgroups
			s.Container, s.OOM = &m.c.traits, m.c.oom.record()
		})
		t.superviseLocked(m.c)
		t.mu.Unlock()
		t.log.Info("container created", "pid", m.c.init.PID, "took", time.Since(started).String())
		t.reach(step.ShimCreated)
		close(t.created)
		return
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		// As text, because the kind of the cause would come first.
		err = kind.Errorf(kind.Aborted, "deleted while it was created: %v", err)
	}
	t.log.Error("container not created", "error", err)
	m.undo()
	reason := rundir.ReasonNeverRan
	if e, ok := errors.AsType[*runc.Error](err); ok && e.Unrunnable() && ctx.Err() == nil {
		reason = rundir.ReasonStartError
	}
	durable := t.conclude(m.c, rundir.Exit{
		Code:     codeNeverRan,
		ExitedAt: time.Now(),
		Source:   rundir.SourceInferred,
		Reason:   reason,
		Message:  err.Error(),
	})
	t.mu.Lock()
	t.createErr = err
	t.mu.Unlock()
	t.announceExit(err.Error())
	close(t.created)
	<-durable
	close(t.ended)
}

// making is a container on its way. make fills c; after an error, undo takes
// back all that make did.
type making struct {
	task   *task
	launch rundir.Launch
	spec   *spec

	c     *container
	asked bool // the OCI runtime was run
}

// cgroups are those that exist where the container's will be. The systemd
// driver names a unit instead, whose cgroup systemd removes itself.
func (m *making) cgroups() cgroup.Set {
	if path := m.spec.Linux.CgroupsPath; !m.launch.Runtime.SystemdCgroup && filepath.IsAbs(path) {
		return cgroup.At(filepath.Clean(path))
	}
	return nil
}

func (m *making) make(ctx context.Context) (err error) {
	t := m.task
	traits := rundir.Container{
		Terminal:   m.spec.terminal,
		UserNS:     m.spec.userns(),
		PrivatePID: m.spec.privatePID(),
	}
	if m.c, err = t.openContainer(m.launch, traits, nil); err != nil {
		return err
	}
	c := m.c
	if err := m.checkRestore(); err != nil {
		return err
	}
	// What is in the cgroup now is not ours, and undo must not kill it.
	if dir, used, err := m.cgroups().Populated(); err != nil {
		return fmt.Errorf("cannot create %s: %w", t.dir.ID(), err)
	} else if used {
		return fmt.Errorf("cannot create %s: cgroup %s is in use", t.dir.ID(), dir)
	}
	if err := c.host.SaveProcess(m.spec.Process); err != nil {
		return err
	}
	if err := step.Reach(step.ShimCreating); err != nil {
		return err
	}
	m.asked = true
	if traits.Terminal {
		err = m.createWithTerminal(ctx)
	} else {
		err = m.createWithPipes(ctx)
	}
	if err == nil {
		err = step.Reach(step.ShimRuntime)
	}
	if err != nil {
		return err
	}
	c.traits.RuntimeExe = programOf(c.init.PID)
	c.traits.Fifo = c.host.Runtime.HasFifo(t.dir.ID())
	c.traits.CheapDelete = c.traits.Fifo && !m.launch.Runtime.SystemdCgroup &&
		m.spec.Linux.IntelRdt == nil && len(m.spec.Hooks.Poststop) == 0
	c.oom = watchOOM(c.init.Cgroups, nil, t.log)
	return nil
}

// createWithPipes runs the OCI runtime's create with pipes as standard files.
func (m *making) createWithPipes(ctx context.Context) error {
	t, c := m.task, m.c
	var child []*os.File // the container's ends; closed here once it has them
	defer func() {
		for _, f := range child {
			f.Close()
		}
	}()
	pipe := func(name string) (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err != nil {
			err = fmt.Errorf("cannot make %s of %s: %w", name, t.dir.ID(), err)
		}
		return r, w, err
	}
	o := runc.CreateOptions{Bundle: string(t.dir)}
	if m.launch.Stdin {
		r, w, err := pipe("stdin")
		if err != nil {
			return err
		}
		o.Stdin = r
		child = append(child, r)
		c.stdio.SetInput(w, false, m.launch.StdinOnce, t.inputClosed)
	}
	for stream, file := range map[logfile.Stream]**os.File{logfile.Stdout: &o.Stdout, logfile.Stderr: &o.Stderr} {
		r, w, err := pipe(stream.String())
		if err != nil {
			return err
		}
		*file = w
		child = append(child, w)
		c.stdio.Add(stream, r)
	}
	if c.traits.UserNS {
		if err := shareWithUserns(child); err != nil {
			return fmt.Errorf("cannot create %s: %w", t.dir.ID(), err)
		}
	}
	return m.createInit(ctx, o)
}

// createWithTerminal runs the OCI runtime's create and receives the terminal that it
// makes.
func (m *making) createWithTerminal(ctx context.Context) error {
	t, c := m.task, m.c
	master, err := pty.Collect(ctx, string(t.dir), "console.sock", func(socket string) error {
		return m.createInit(ctx, runc.CreateOptions{Bundle: string(t.dir), ConsoleSocket: socket})
	})
	if err == nil {
		c.console, err = descriptor.Dup(master)
	}
	if err == nil && m.launch.Stdin {
		var input *os.File
		if input, err = descriptor.Dup(master); err == nil {
			c.stdio.SetInput(input, true, m.launch.StdinOnce, t.inputClosed)
		}
	}
	if err != nil {
		if master != nil {
			master.Close()
		}
		return err
	}
	c.stdio.Add(logfile.Stdout, master)
	return nil
}

// undo leaves nothing of the container but its records: no process, no cgroup,
// no state of the OCI runtime.
func (m *making) undo() {
	t, c := m.task, m.c
	// A context of its own: that of the create may be what ended it.
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	var errs []error
	if m.asked {
		if _, err := os.Stat(c.host.Runtime.StateDir(t.dir.ID())); err == nil {
			errs = append(errs, c.host.Runtime.Delete(ctx, t.dir.ID(), true))
		}
		// A runtime that was killed has left its children to this process,
		// which has no others.
		errs = append(errs, t.reaper.KillStrays())
		g := m.cgroups()
		errs = append(errs, g.Kill(ctx), g.Remove(ctx))
	}
	if c.init.Started() {
		errs = append(errs, c.init.End(ctx), c.init.Cgroups.Remove(ctx))
	}
	c.close()
	if err := errors.Join(errs...); err != nil {
		t.log.Error("something is left of a container that was not created", "error", err)
	}
}
