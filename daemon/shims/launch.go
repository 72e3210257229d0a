// Package shims starts shims, finds them again and speaks to them.
package shims

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/holdfast-cri/holdfast/daemon/spawn"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Launcher starts shims.
type Launcher struct {
	Binary   string
	LogLevel string // debug, info, warn or error
	// Place moves the new shim out of the daemon's cgroup. It is called before
	// the shim does anything, so that what the shim starts is outside as well.
	Place func(ctx context.Context, id string, pid int) error
	Log   *slog.Logger
}

// Launch starts the shim of a run directory and returns when it listens, holds
// its lock and is in its cgroup. On an error no process is left. This process is
// the parent of the shim and reaps it, if it lives long enough.
func (l *Launcher) Launch(ctx context.Context, dir rundir.Dir) error {
	if err := l.launch(ctx, dir); err != nil {
		return fmt.Errorf("cannot start the shim of %s: %w", dir.ID(), err)
	}
	return nil
}

func (l *Launcher) launch(ctx context.Context, dir rundir.Dir) error {
	p := spawn.Program{
		Binary: l.Binary,
		Args:   []string{"--dir", string(dir), "--log-level", l.LogLevel},
		// A shim needs one processor only; setting that here costs half a megabyte less
		// than a call in the shim does.
		Env: []string{"GOMAXPROCS=1"},
		Log: dir.Path(rundir.ShimLogName),
		Ended: func(pid int, status error) {
			l.Log.Debug("shim ended", "container", dir.ID(), "pid", pid, "status", status)
		},
	}
	if l.Place != nil {
		p.Place = func(ctx context.Context, pid int) error { return l.Place(ctx, dir.ID(), pid) }
	}
	return p.Start(ctx)
}

// Alive is the method of this name.
func (*Launcher) Alive(dir rundir.Dir) (bool, error) { return dir.Alive() }

// Find is dir.FindShim.
func (*Launcher) Find(dir rundir.Dir) (rundir.Process, error) { return dir.FindShim() }

// Reach is the function of this name.
func (*Launcher) Reach(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	return Reach(ctx, dir, c)
}

// End is the function of this name.
func (*Launcher) End(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	return End(ctx, dir, c)
}
