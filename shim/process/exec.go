package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// execStartTimeout bounds the OCI runtime, not the process that it starts.
const execStartTimeout = time.Minute

// NewExec prepares an exec in the container whose cgroups are given: a cgroup for
// its tree, and its record. Forget ends it, also after an error of Exec. An
// error about the cgroup alone comes beside: without a cgroup of its own only the
// first process of an exec can be killed.
func (h *Host) NewExec(id string, container cgroup.Set) (p *Process, cgroupErr, err error) {
	p = &Process{host: h, id: id}
	if p.Cgroups, p.sub, cgroupErr = container.Sub(id); cgroupErr != nil {
		p.Cgroups, p.sub = nil, ""
	}
	if err = os.Mkdir(h.Dir.Path(rundir.ExecsName), 0o700); errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err == nil {
		err = p.save(false)
	}
	if err != nil {
		p.Forget()
		return nil, cgroupErr, fmt.Errorf("cannot exec: %w", err)
	}
	return p, cgroupErr, nil
}

func (p *Process) save(ended bool) error {
	r := rundir.Exec{Process: p.Process, Cgroups: p.Cgroups, Ended: ended}
	return record.WriteOf(p.path(".json"), p.host.Dir.ID(), r, false)
}

func (p *Process) path(ext string) string { return p.host.Dir.ExecPath(p.id, ext) }

// Exec starts the process and adopts it. Of one with a terminal it gives the master,
// which is the caller's. After an error something of it may live in its cgroup:
// KillTree.
func (p *Process) Exec(ctx context.Context, process *specs.Process, stdio runc.IO) (master *os.File, err error) {
	b, err := json.Marshal(process)
	if err == nil {
		err = os.WriteFile(p.path(".spec"), b, 0o600)
	}
	defer p.removeFiles()
	if err != nil {
		return nil, fmt.Errorf("cannot write the process of an exec: %w", err)
	}
	if err := step.Reach(step.ShimExecRecord); err != nil {
		return nil, err
	}
	release := p.host.Reaper.Hold()
	defer release()
	ctx, cancel := context.WithTimeout(ctx, execStartTimeout)
	defer cancel()
	o := runc.ExecOptions{
		IO:      stdio,
		Process: p.path(".spec"),
		PidFile: p.path(".pid"),
		Cgroup:  p.sub,
	}
	if process.Terminal {
		dir := p.host.Dir.Path(rundir.ExecsName)
		master, err = pty.Collect(ctx, dir, p.id+".tty", func(socket string) error {
			o.ConsoleSocket = socket
			return p.start(ctx, o)
		})
	} else {
		err = p.start(ctx, o)
	}
	if err == nil {
		err = step.Reach(step.ShimExecStarted)
	}
	if err != nil {
		return master, err
	}
	p.save(false) // the record names the cgroup already, by which an exec is killed
	return master, nil
}

// start runs the OCI runtime and adopts what it leaves.
func (p *Process) start(ctx context.Context, o runc.ExecOptions) error {
	runtime := *p.host.Runtime
	runtime.Log = p.path(".log") // of its own, so that its errors are not mixed with others'
	if err := runtime.Exec(ctx, p.host.Dir.ID(), o); err != nil {
		return err
	}
	return p.adopt(p.path(".pid"))
}

// removeFiles removes what only the OCI runtime needs.
func (p *Process) removeFiles() {
	for _, ext := range []string{".spec", ".pid", ".log"} {
		os.Remove(p.path(ext))
	}
	os.Remove(p.host.Dir.ExecPath("."+p.id, ".pid")) // of an OCI runtime that was killed
}

// Forget removes cgroup and record of an exec that has ended, and reports false if
// something that came of it lives on and keeps them.
func (p *Process) Forget() (gone bool, err error) {
	if idle, err := p.Cgroups.RemoveIdle(); !idle && err == nil {
		return false, p.save(true)
	} else if err != nil {
		os.Remove(p.path(".json"))
		return true, fmt.Errorf("cannot remove the cgroup of exec %s: %w", p.id, err)
	}
	os.Remove(p.path(".json"))
	return true, nil
}

// Execs gives those that another supervisor has left, by their ids: alive are those
// that nobody has seen the end of, ended have left something that lives on. Nobody waits
// for them any more: kill the first, and forget both.
func (h *Host) Execs() (alive, ended map[string]*Process, err error) {
	entries, err := os.ReadDir(h.Dir.Path(rundir.ExecsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	alive, ended = map[string]*Process{}, map[string]*Process{}
	for _, e := range entries {
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		if !isRecord || strings.HasPrefix(id, ".") {
			continue
		}
		var r rundir.Exec
		if rerr := record.ReadOf(h.Dir.ExecPath(id, ".json"), h.Dir.ID(), &r); rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		p := &Process{Process: r.Process, Cgroups: r.Cgroups, host: h, id: id}
		if r.Ended {
			ended[id] = p
		} else {
			alive[id] = p
		}
	}
	return alive, ended, err
}
