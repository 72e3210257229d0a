package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/shim/stdio"
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

// begin starts the create unless it has been. The create then owes nothing to
// the call that asked for it: it ends by itself, with the caller or without.
func (t *task) begin(launch rundir.Launch, rawSpec []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.abandoned {
		return kind.Errorf(kind.Unavailable, "the shim ends because no Create came")
	}
	if t.status.Phase != rundir.PhaseEmpty {
		if t.requestID != launch.RequestID {
			return kind.Errorf(kind.Exists, "the container exists: made by request %q, not %q", t.requestID, launch.RequestID)
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
	launch.Container, launch.Sandbox = rundir.Opaque{}, rundir.Opaque{} // large, and in the file now
	t.requestID = launch.RequestID
	t.update(pb.EventType_EVENT_TYPE_UNSPECIFIED, func(s *rundir.Status) { s.Phase = rundir.PhaseCreating })
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
	Process struct {
		Args     []string
		Terminal bool
	}
	Root  struct{ Path string }
	Hooks struct{ Poststop []json.RawMessage }
	Linux struct {
		CgroupsPath string
		IntelRdt    json.RawMessage
		Namespaces  []struct{ Type, Path string }
	}
}

func parseSpec(raw []byte) (*spec, error) {
	s := new(spec)
	err := json.Unmarshal(raw, s)
	switch {
	case err != nil:
		return nil, kind.Errorf(kind.Invalid, "spec: %w", err)
	case len(s.Process.Args) == 0:
		return nil, kind.Errorf(kind.Invalid, "spec.process.args is empty")
	case s.Root.Path == "":
		return nil, kind.Errorf(kind.Invalid, "spec.root.path is empty")
	case s.Linux.CgroupsPath != "" && filepath.Clean(s.Linux.CgroupsPath) == "/":
		return nil, kind.Errorf(kind.Invalid, "spec.linux.cgroupsPath is the root")
	}
	return s, nil
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
		t.container = m.c
		t.update(pb.EventType_EVENT_TYPE_CREATED, func(s *rundir.Status) {
			s.Phase, s.Init, s.CreatedAt, s.Cgroups = rundir.PhaseCreated, m.init, time.Now(), m.c.cgroups
		})
		t.mu.Unlock()
		t.log.Info("container created", "pid", m.init.PID, "took", time.Since(started).String())
		go t.finish(m.c)
		close(t.created)
		return
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		// As text, because the kind of the cause would come first.
		err = kind.Errorf(kind.Aborted, "deleted while it was created: %v", err)
	}
	t.log.Error("container not created", "err", err)
	m.undo()
	durable := t.conclude(m.c, rundir.Exit{
		Code: codeNeverRan, ExitedAt: time.Now(),
		Source: rundir.SourceInferred, Reason: rundir.ReasonNeverRan, Message: err.Error(),
	})
	t.mu.Lock()
	t.createErr = err
	t.mu.Unlock()
	t.exitNow(func(s *rundir.Status) { s.Error = err.Error() })
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

	c       *container
	init    rundir.Process
	asked   bool   // the OCI runtime was run
	release func() // ends the reaper's hold
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
	m.c = &container{
		terminal:   m.spec.Process.Terminal,
		privatePID: m.spec.privatePID(),
		userns:     m.spec.userns(),
		runtime: &runc.Runtime{
			Path:          m.launch.Runtime.Path,
			Root:          m.launch.Runtime.Root,
			SystemdCgroup: m.launch.Runtime.SystemdCgroup,
			Log:           t.dir.Path(rundir.RuncLogName),
			Runner:        t.reaper,
		},
	}
	m.c.life, m.c.gone = context.WithCancel(context.Background())
	if m.c.exit, err = rundir.PrepareExit(string(t.dir), false); err != nil {
		return err
	}
	if dir := m.launch.DurableDir; dir != "" {
		if m.c.durableExit, err = rundir.PrepareExit(dir, true); err != nil {
			return err
		}
	}
	// What is in the cgroup now is not ours, and undo must not kill it.
	if dir, used, err := m.cgroups().Populated(); err != nil {
		return fmt.Errorf("cannot create %s: %w", t.dir.ID(), err)
	} else if used {
		return fmt.Errorf("cannot create %s: cgroup %s is in use", t.dir.ID(), dir)
	}
	if m.launch.LogPath != "" {
		if m.c.log, err = logfile.Open(m.launch.LogDirectory, m.launch.LogPath); err != nil {
			return logError(err)
		}
	}
	if m.c.memory, err = stdio.NewMemory(); err != nil {
		return err
	}
	if m.c.log != nil {
		m.c.log.KeepIn(m.c.memory.Log())
	}
	m.c.stdio = stdio.New(m.c.log, m.c.memory)
	m.release = t.reaper.Hold()
	if err := m.run(ctx); err != nil {
		return err
	}
	if err := m.adopt(); err != nil {
		return err
	}
	m.release()
	m.c.fifo = m.c.runtime.HasFifo(t.dir.ID())
	m.c.cheapEnd = m.c.fifo && !m.launch.Runtime.SystemdCgroup &&
		m.spec.Linux.IntelRdt == nil && len(m.spec.Hooks.Poststop) == 0
	m.c.oom = watchOOM(m.c.cgroups, t.log, t.oomKilled)
	return nil
}

// logError says that the request is wrong where its log path is.
func logError(err error) error {
	for _, wrong := range []error{logfile.ErrPath, logfile.ErrNotRegular, unix.ELOOP, unix.ENAMETOOLONG} {
		if errors.Is(err, wrong) {
			return kind.As(kind.Invalid, err)
		}
	}
	return err
}

// run makes the standard files and runs the OCI runtime's create.
func (m *making) run(ctx context.Context) error {
	t, id := m.task, m.task.dir.ID()
	o := runc.CreateOptions{Bundle: string(t.dir), PidFile: t.dir.Path(rundir.PidfileName)}
	m.asked = true
	if m.c.terminal {
		return m.runWithTerminal(ctx, o)
	}
	var child []*os.File // the container's ends; closed here once it has them
	defer func() {
		for _, f := range child {
			f.Close()
		}
	}()
	if m.launch.Stdin {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("cannot make stdin of %s: %w", id, err)
		}
		o.Stdin = r
		child = append(child, r)
		m.c.stdio.SetInput(w, false, m.launch.StdinOnce, t.inputClosed)
	}
	for stream, file := range map[logfile.Stream]**os.File{logfile.Stdout: &o.Stdout, logfile.Stderr: &o.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("cannot make %s of %s: %w", stream, id, err)
		}
		*file = w
		child = append(child, w)
		m.c.stdio.Add(stream, r)
	}
	if m.c.userns {
		for _, f := range child {
			if err := f.Chmod(shareMode); err != nil {
				return fmt.Errorf("cannot share the standard files of %s: %w", id, err)
			}
		}
	}
	return m.c.runtime.Create(ctx, id, o)
}

func (m *making) runWithTerminal(ctx context.Context, o runc.CreateOptions) error {
	s, err := pty.Listen(string(m.task.dir))
	if err != nil {
		return err
	}
	defer s.Close()
	o.ConsoleSocket = s.Path()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		master *os.File
		err    error
	}
	received := make(chan result, 1)
	go func() { // ends at the latest when cancel ends Receive
		master, err := s.Receive(ctx)
		received <- result{master, err}
	}()
	err = m.c.runtime.Create(ctx, m.task.dir.ID(), o)
	if err != nil {
		cancel()
	}
	r := <-received
	if err == nil {
		err = r.err
	}
	if err != nil {
		if r.master != nil {
			r.master.Close()
		}
		return err
	}
	if m.c.console, err = pty.Dup(r.master); err != nil {
		r.master.Close()
		return err
	}
	if m.launch.Stdin {
		input, err := pty.Dup(r.master)
		if err != nil {
			r.master.Close()
			return err
		}
		m.c.stdio.SetInput(input, true, m.launch.StdinOnce, m.task.inputClosed)
	}
	m.c.stdio.Add(logfile.Stdout, r.master)
	return nil
}

// adopt takes over the init that the OCI runtime left behind.
func (m *making) adopt() (err error) {
	t := m.task
	pid, err := readPid(t.dir.Path(rundir.PidfileName))
	if err != nil {
		return err
	}
	if m.c.init, err = t.reaper.Adopt(pid); err != nil {
		return err
	}
	if m.init, err = rundir.FindProcess(pid); err != nil {
		return fmt.Errorf("cannot create %s: its init has ended already: %w", t.dir.ID(), err)
	}
	m.c.runtimeExe = programOf(pid)
	m.c.cgroups, err = cgroup.Of(pid)
	return err
}

func readPid(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("cannot learn the pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("cannot learn the pid: %s holds %.20q", path, b)
	}
	return pid, nil
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
		os.Remove(t.dir.Path("." + rundir.PidfileName)) // of a runtime that was killed
		if _, err := os.Stat(c.runtime.StateDir(t.dir.ID())); err == nil {
			errs = append(errs, c.runtime.Delete(ctx, t.dir.ID(), true))
		}
		// A runtime that was killed has left its children to this process,
		// which has no others.
		errs = append(errs, t.reaper.KillStrays())
		for _, g := range []cgroup.Set{m.cgroups(), c.cgroups} {
			errs = append(errs, g.Kill(ctx), g.Remove(ctx))
		}
	}
	if c.init != nil {
		c.init.Signal(unix.SIGKILL)
		if _, err := c.init.Wait(); err == nil {
			c.init.Reap()
		}
	}
	if m.release != nil {
		m.release()
	}
	if c.stdio != nil {
		c.stdio.Close()
	}
	c.close()
	if err := errors.Join(errs...); err != nil {
		t.log.Error("something is left of a container that was not created", "err", err)
	}
}

// close closes the files. The output is drained or given up.
func (c *container) close() {
	c.gone()
	if c.oom != nil {
		c.oom.close()
	}
	if c.console != nil {
		c.console.Close()
	}
	if c.log != nil {
		c.log.Close()
	}
	if c.memory != nil {
		c.memory.Close()
	}
}
