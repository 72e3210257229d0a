package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// ErrNoRecord says that a container has lost its shim and has no exit record.
var ErrNoRecord = errors.New("the shim is gone and there is no exit record: the daemon writes one when it starts")

// View is what can be seen of a container: from its shim, or from its files where
// that does not answer. Its JSON is for scripts: fields are added, not renamed.
type View struct {
	ID        string            `json:"id"`
	State     string            `json:"state"`  // a rundir.Phase, or Lost
	Source    string            `json:"source"` // FromShim or FromFiles
	Note      string            `json:"note,omitempty"`
	Shim      rundir.Process    `json:"shim,omitzero"`
	Version   string            `json:"shimVersion,omitempty"`
	Init      rundir.Process    `json:"init,omitzero"` // while it lives
	CreatedAt time.Time         `json:"createdAt,omitzero"`
	StartedAt time.Time         `json:"startedAt,omitzero"`
	Exit      *rundir.Exit      `json:"exit,omitempty"`
	Stop      *StopView         `json:"stop,omitempty"`
	OOMKills  uint64            `json:"oomKills,omitempty"`
	Terminal  bool              `json:"terminal,omitempty"`
	Execs     int               `json:"execs,omitempty"`
	LogFile   string            `json:"logFile,omitempty"`
	Log       *LogCounters      `json:"log,omitempty"`
	LastEvent uint64            `json:"lastEvent,omitempty"`
	Cgroups   map[string]string `json:"cgroups,omitempty"`
	Dir       string            `json:"dir"`
	Launch    rundir.Launch     `json:"-"`
}

// StopView is a stop that was asked for, on the wall clock.
type StopView struct {
	Signal      int       `json:"signal"`
	RequestedAt time.Time `json:"requestedAt,omitzero"`
	KillAt      time.Time `json:"killAt"`
}

// What a View can say beyond the phases, and where it comes from.
const (
	Lost      = "lost" // the shim died and left no exit record
	FromShim  = "shim"
	FromFiles = "files"
)

// note adds to the note. A missing record is none: it means "not yet".
func (v *View) note(err error) {
	switch {
	case err == nil || errors.Is(err, fs.ErrNotExist):
	case v.Note == "":
		v.Note = err.Error()
	default:
		v.Note += "; " + err.Error()
	}
}

// status takes over what a shim and its state.json have in common.
func (v *View) status(s rundir.Status) {
	v.State, v.Init, v.LastEvent = string(s.Phase), s.Init, s.Seq
	v.CreatedAt, v.StartedAt, v.Stop = s.CreatedAt, s.StartedAt, nil
	if len(s.Cgroups) > 0 {
		v.Cgroups = s.Cgroups
	}
	if s.Stop != nil {
		v.Stop = &StopView{
			Signal:      s.Stop.Signal,
			RequestedAt: s.Stop.RequestedAt,
			KillAt:      rundir.WallTime(s.Stop.KillAt).Round(time.Millisecond),
		}
	}
	if s.Error != "" {
		v.note(errors.New(s.Error))
	}
}

// Look asks the files, then the shim. Once there is an exit record, that has the
// last word.
func (c *Client) Look(ctx context.Context) View {
	// Before the files: a shim that lets go of its lock has written its exit record.
	alive, err := c.dir.Alive()
	v := c.lookAtFiles(alive)
	v.note(err)
	if !alive || v.Exit != nil {
		return v
	}
	ctx, cancel := c.Impatient(ctx)
	defer cancel()
	s, err := c.State(ctx)
	if err != nil {
		v.note(err)
		return v
	}
	v.status(s.Status)
	v.Source, v.Shim, v.Exit = FromShim, s.Shim, s.Exit
	v.Terminal, v.Execs, v.OOMKills, v.Log = s.Terminal, s.Execs, s.OOMKills, s.Log
	if v.Exit != nil {
		v.Init = rundir.Process{}
	}
	return v
}

// lookAtFiles is what the run directory says. alive is whether the shim lives.
func (c *Client) lookAtFiles(alive bool) View {
	v := View{ID: c.dir.ID(), Source: FromFiles, State: string(rundir.PhaseEmpty), Dir: string(c.dir)}
	identity, err := c.dir.ReadIdentity()
	v.note(err)
	if v.Version = identity.Version; alive {
		if v.Shim = identity.Shim; !v.Shim.Alive() {
			v.Shim, _ = c.dir.FindShim()
		}
	}
	status, err := c.dir.ReadStatus()
	v.note(err)
	if err == nil {
		v.status(status)
	}
	if status.BootID != rundir.BootID() || !status.Init.Alive() {
		v.Init = rundir.Process{}
	}
	v.Launch, err = c.dir.ReadLaunch()
	v.note(err)
	if v.Launch.LogPath != "" {
		v.LogFile = filepath.Join(v.Launch.LogDirectory, v.Launch.LogPath)
	}
	exit, err := c.dir.ReadExit()
	v.note(err)
	switch {
	case err == nil:
		v.State, v.Exit = string(rundir.PhaseExited), &exit
	case !alive && status.Phase != "":
		v.State = Lost
		v.note(ErrNoRecord)
		if v.Init.PID != 0 {
			v.note(fmt.Errorf("the container's process %d still runs", v.Init.PID))
		}
	case !alive:
		v.note(errors.New("no shim: it died before Create, or was never started"))
	}
	return v
}

// Impatient bounds a call that a shim should answer at once, to three seconds. A
// shim that is stopped by a signal gets no time at all.
func (c *Client) Impatient(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := 3 * time.Second
	if id, err := c.dir.ReadIdentity(); err == nil && id.Shim.Stopped() {
		limit = 0
	}
	return context.WithTimeout(ctx, limit)
}

// Await waits for the end of a container and the exit record. A shim that does
// not answer is asked again, since it may be stopped and go on later; silent is
// called with the first such error. ErrNoRecord: nobody knows how it ended.
func (c *Client) Await(ctx context.Context, silent func(error)) (rundir.Exit, error) {
	const poll = 20 * time.Second // bounds how late the end of a shim shows that was stopped, then killed
	for ctx.Err() == nil {
		alive, err := c.dir.Alive() // first: a shim that lets go has written the record
		if err != nil {
			return rundir.Exit{}, err
		}
		exit, xerr := c.dir.ReadExit()
		switch {
		case !alive && xerr == nil:
			return exit, nil
		case !alive:
			return rundir.Exit{}, ErrNoRecord
		}
		quick, cancel := c.Impatient(ctx)
		_, err = c.Hello(quick)
		cancel()
		var end *rundir.Exit
		if err == nil {
			end, err = c.Wait(ctx, poll)
		}
		switch {
		case end != nil:
			status, _ := c.dir.ReadStatus() // where it does not read, the start is not known
			end.StartedAt = status.StartedAt
			return *end, nil
		case err == nil: // not yet
			continue
		case !errors.Is(err, ErrUnreachable) && ctx.Err() == nil:
			return rundir.Exit{}, err
		case xerr == nil: // only the last of its output may be missing in the log
			return exit, nil
		case errors.Is(err, context.DeadlineExceeded) && silent != nil:
			silent(err)
			silent = nil
		}
		pause(ctx, 100*time.Millisecond)
	}
	return rundir.Exit{}, fmt.Errorf("it has not ended: %w", ctx.Err())
}

// pause waits between two attempts.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
