package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/shim/process"
	"github.com/holdfast-cri/holdfast/shim/stdio"
)

// Files are the descriptors with which, and with the files of the run directory, a
// supervisor goes on with a container. A nil one is not there, or has ended.
type Files struct {
	stdio.Files
	Memory *os.File // of the outputs
	Log    *os.File // the log that is in use; its name may have been taken by another one
	Lock   *os.File // of the run directory
}

// container is what is open of a container that is supervised. It does not change, but
// for what its members guard themselves. The task's finish closes what is in it.
type container struct {
	traits rundir.Container

	host *process.Host
	init *process.Process // set by create or open, before anybody else has the container
	oom  *oomWatch        // the same

	exit        *rundir.ExitFile // nil only if there was no room
	durableExit *rundir.ExitFile // nil without a durable directory

	log     *logfile.File // nil: the output is dropped
	memory  *stdio.Memory
	stdio   *stdio.Hub
	console *os.File // a second master of the terminal, for its size

	life context.Context // of its execs and of what watches init; gone ends it
	gone context.CancelCauseFunc

	// supervision is what finish waits under; leave ends it for another supervisor.
	supervision context.Context
	leave       context.CancelFunc
	left        chan bool // one answer of finish: whether it has left, or init has ended
}

// openContainer opens what surrounds init: room for the exit record, log, outputs and
// input. Without files these are new. It owns files. After an error the container has
// what was opened until then: close it.
func (t *task) openContainer(l rundir.Launch, traits rundir.Container, files *Files) (*container, error) {
	c := &container{
		traits: traits,
		left:   make(chan bool, 1),
		host: &process.Host{
			Dir:    t.dir,
			Reaper: t.reaper,
			Runtime: &runc.Runtime{
				Path:          l.Runtime.Path,
				Root:          l.Runtime.Root,
				SystemdCgroup: l.Runtime.SystemdCgroup,
				Log:           t.dir.Path(rundir.RuncLogName),
				Runner:        t.reaper,
			},
		},
	}
	c.life, c.gone = context.WithCancelCause(context.Background())
	c.supervision, c.leave = context.WithCancel(context.Background())
	room := rundir.ResumeExit
	if files == nil {
		files, room = new(Files), rundir.PrepareExit
	}
	var err error
	if c.exit, err = room(string(t.dir), false); err != nil {
		return c, err
	}
	if l.DurableDir != "" {
		if c.durableExit, err = room(l.DurableDir, true); err != nil {
			return c, err
		}
	}
	if err := c.openLog(l, files); err != nil {
		return c, err
	}
	if c.log != nil && traits.Terminal {
		c.log.OfTerminal()
	}
	c.stdio = stdio.New(c.log, c.memory)
	if files.Input != nil {
		c.stdio.SetInput(files.Input, traits.Terminal, l.StdinOnce, t.inputClosed)
	}
	for stream, f := range files.Outputs {
		if f == nil {
			continue
		}
		if traits.Terminal && c.console == nil {
			if c.console, err = descriptor.Dup(f); err != nil {
				return c, err
			}
		}
		c.stdio.Add(logfile.Stream(stream), f)
	}
	return c, nil
}

// openLog opens log and memory.
func (c *container) openLog(l rundir.Launch, files *Files) (err error) {
	if files.Memory != nil {
		c.memory, err = stdio.OpenMemory(files.Memory)
	} else {
		c.memory, err = stdio.NewMemory()
	}
	switch {
	case err != nil || l.LogPath == "":
		return err
	case files.Log != nil:
		var fd int
		if fd, err = unix.FcntlInt(files.Log.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return fmt.Errorf("cannot go on with the log: %w", err)
		}
		files.Log.Close()
		c.log = logfile.Resume(l.LogDirectory, l.LogPath, fd, c.memory.Log())
	default:
		if c.log, err = logfile.Prepare(l.LogDirectory, l.LogPath); err != nil {
			return logError(err)
		}
		c.log.KeepIn(c.memory.Log())
	}
	return nil
}

// logError says that the request is wrong where its log path is.
func logError(err error) error {
	for _, wrong := range []error{
		logfile.ErrPath, logfile.ErrNotRegular, unix.ELOOP, unix.ENAMETOOLONG, unix.ENOTDIR,
	} {
		if errors.Is(err, wrong) {
			return kind.As(kind.Invalid, err)
		}
	}
	return err
}

// killTree kills all processes of the container and returns when they have ended.
func (c *container) killTree() error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	return c.init.KillTree(ctx)
}

// close closes what is open. The output is drained or given up.
func (c *container) close() {
	c.gone(errContainerGone)
	c.leave()
	if c.oom != nil {
		c.oom.close()
	}
	if c.stdio != nil {
		c.stdio.Close()
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

// superviseLocked begins to supervise a container whose init lives, or has ended
// without anybody having seen it.
func (t *task) superviseLocked(c *container) {
	t.container = c
	go t.finish(c)
	c.oom.begin(t.oomRose)
	if err := t.resumeStopLocked(c); err != nil {
		t.log.Error("stop not gone on with", "error", err)
	}
}

// openTask gives the task of a run directory. With files it goes on with the
// container there: after another program was executed, or another shim has left it.
// Without files there must be none.
func openTask(dir rundir.Dir, log *slog.Logger, r *reaper.Reaper, files *Files) (*task, error) {
	t := newTask(dir, log, r)
	status, err := dir.ReadStatus()
	lives := err == nil && status.BootID == rundir.BootID() && status.Container != nil &&
		(status.Phase == rundir.PhaseCreated || status.Phase == rundir.PhaseRunning)
	if files == nil {
		if lives && status.Init.Alive() {
			return nil, fmt.Errorf("cannot go on with container %s: it runs, and its descriptors are gone", dir.ID())
		}
		return t, nil
	}
	if err == nil && !lives {
		err = fmt.Errorf("it is %s, of boot %s", status.Phase, status.BootID)
	}
	var launch rundir.Launch
	if err == nil {
		launch, err = dir.ReadLaunch()
	}
	var c *container
	if err == nil {
		if c, err = t.openContainer(launch, *status.Container, files); err != nil {
			c.close()
		}
	}
	if err == nil {
		c.init, err = c.host.Adopt(status.Init, status.Cgroups)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot go on with container %s: %w", dir.ID(), err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.status, t.requestID = status, launch.RequestID
	c.oom = watchOOM(c.init.Cgroups, status.OOM, log)
	t.resumeExecsLocked(c)
	t.superviseLocked(c)
	close(t.created)
	return t, nil
}

// resumeExecsLocked takes over what execs have left. Nobody waits for those that live.
func (t *task) resumeExecsLocked(c *container) {
	alive, ended, err := c.host.Execs()
	if err != nil {
		t.log.Error("execs not found", "error", err)
	}
	for id := range alive {
		go t.killExec(id, alive[id])
	}
	for _, all := range []map[string]*process.Process{alive, ended} {
		for id, p := range all {
			n, _ := strconv.Atoi(strings.TrimPrefix(id, execPrefix))
			t.execSerial = max(t.execSerial, n)
			t.leftovers = append(t.leftovers, p)
		}
	}
}

// handOver ends the supervision without touching the container, and gives the
// descriptors with which another one goes on. Execs are killed: their callers'
// connections end with this process. It is to be followed by an execve(2) or by the
// end of this process.
func (t *task) handOver() (*Files, error) {
	t.freezer.saving.Lock() // nobody freezes it from here on
	defer t.freezer.saving.Unlock()
	t.thawLocked() // the next one knows nothing of it
	t.updating.Lock()
	defer t.updating.Unlock()
	t.starting.Lock()
	defer t.starting.Unlock()
	t.mu.Lock()
	c, phase := t.container, t.status.Phase
	t.mu.Unlock()
	if t.over || phase != rundir.PhaseCreated && phase != rundir.PhaseRunning {
		return nil, kind.Errorf(kind.State, "cannot hand over: the container is %s", phase)
	}
	c.leave()
	if left := <-c.left; !left {
		return nil, kind.Errorf(kind.State, "cannot hand over: the container has ended")
	}
	t.over = true
	c.gone(errContainerGone)
	t.endExecs(c, killTimeout)
	files := new(Files)
	var err error
	if files.Files, err = c.stdio.Leave(); err != nil {
		return nil, err
	}
	if files.Memory, err = descriptor.Dup(c.memory.File()); err == nil && c.log != nil {
		var fd int
		if fd, err = c.log.Dup(); err == nil && fd >= 0 {
			files.Log = os.NewFile(uintptr(fd), "log")
		}
	}
	return files, err
}
