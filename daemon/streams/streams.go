// Package streams gives out the addresses of sessions (exec, attach, port-forward) and
// has holdfast-stream run, the process that serves them. The daemon is in the way of no
// byte of a session: it writes down what is asked for (package stream of proto), and
// whoever brings the token to holdfast-stream gets it, with the daemon dead as well.
package streams

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/spawn"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// limit bounds a call, with the start of a holdfast-stream.
const limit = 30 * time.Second

// Settings are what a user says of sessions.
type Settings struct {
	Address         string // host:port to listen on; port 0: any
	TLSCert, TLSKey string // paths; empty: plain HTTP
	// IdleTimeout ends a connection on which nothing is sent, CreationTimeout one whose
	// client does not open its streams.
	IdleTimeout, CreationTimeout time.Duration
}

// Options are what sessions are made of.
type Options struct {
	Settings
	Dir      stream.Dir
	Binary   string // of holdfast-stream
	LogLevel string
	// Place moves a new process out of the daemon's cgroup.
	Place func(ctx context.Context, pid int) error
	Log   *slog.Logger
}

// Sessions gives out addresses. Any number of calls may run at a time.
type Sessions struct {
	Options
	turn chan struct{} // full while somebody puts a token or starts a process
	// known is the process that need not be looked at again; whoever has the turn changes it.
	known rundir.Process
}

// New makes sessions; nothing is started yet.
func New(o Options) *Sessions { return &Sessions{Options: o, turn: make(chan struct{}, 1)} }

// URL gives the address at which one client can have a session, within a minute.
func (s *Sessions) URL(ctx context.Context, r stream.Request) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	url, err := s.url(ctx, r)
	return url, kind.As(kind.Unavailable, err)
}

func (s *Sessions) url(ctx context.Context, r stream.Request) (string, error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return "", fmt.Errorf("other requests for sessions have not been answered yet: %w", ctx.Err())
	}
	// In this order: a process that ends because it is idle sees the token, or is seen
	// to have ended.
	token, err := s.Dir.Put(ctx, r)
	if err != nil {
		return "", err
	}
	a := stream.Address{}
	if err = step.Reach(step.SessionToken); err == nil {
		a, err = s.serveLocked(ctx)
	}
	if err == nil {
		err = step.Reach(step.SessionServed)
	}
	if err != nil {
		s.Dir.Take(token) // nobody will bring it
		return "", fmt.Errorf("cannot serve sessions: %w", err)
	}
	return a.URL(r.Kind, token), nil
}

// serveLocked gives the address of the holdfast-stream that runs, once one does.
func (s *Sessions) serveLocked(ctx context.Context) (stream.Address, error) {
	started := false
	for wait := time.Millisecond; ; {
		a, err := s.Dir.Running()
		switch {
		case err == nil && (started || a.Process == s.known || !s.outdated(a.Process)):
			s.known = a.Process
			return a, nil
		case err == nil:
			err = s.drain(ctx, a.Process)
		case errors.Is(err, stream.ErrNotRunning) && started:
			err = fmt.Errorf("holdfast-stream has ended as soon as it was ready; see %s", s.Dir.Path(stream.LogName))
		case errors.Is(err, stream.ErrNotRunning):
			started = true
			err = s.start(ctx)
			if _, rerr := s.Dir.Running(); errors.Is(rerr, stream.ErrStarting) {
				err = nil // another one has the lock, which a killed daemon has just started
			}
		case errors.Is(err, stream.ErrStarting):
			// A killed daemon has started it. Only its file tells when it listens.
			select {
			case <-time.After(wait):
				wait, err = min(2*wait, 100*time.Millisecond), nil
			case <-ctx.Done():
				err = fmt.Errorf("%w: %w", err, ctx.Err())
			}
		}
		if err != nil {
			return a, err
		}
	}
}

// start starts a holdfast-stream, which listens when it returns.
func (s *Sessions) start(ctx context.Context) error {
	p := spawn.Program{
		Binary: s.Binary,
		Args:   s.args(),
		Log:    s.Dir.Path(stream.LogName),
		Place:  s.Place,
		Ended: func(pid int, status error) {
			s.Log.Info("holdfast-stream ended", "pid", pid, "status", status)
		},
	}
	if err := p.Start(ctx); err != nil {
		return fmt.Errorf("cannot start holdfast-stream: %w", err)
	}
	s.Log.Info("holdfast-stream started", "address", s.Address)
	return nil
}

func (s *Sessions) args() []string {
	args := []string{
		"--dir", string(s.Dir),
		"--address", s.Address,
		"--idle-timeout", s.IdleTimeout.String(),
		"--creation-timeout", s.CreationTimeout.String(),
		"--log-level", s.LogLevel,
	}
	if s.TLSCert != "" {
		args = append(args, "--tls-cert", s.TLSCert, "--tls-key", s.TLSKey)
	}
	return args
}

// outdated says whether a process is not what would be started now: an earlier daemon
// started it, with other settings or before an upgrade. What cannot be found out is no
// reason to replace it.
func (s *Sessions) outdated(p rundir.Process) bool {
	proc := fmt.Sprintf("/proc/%d/", p.PID)
	args := rundir.CommandLine(p.PID)
	running, err := os.Stat(proc + "exe")
	if err != nil {
		return false
	}
	installed, err := os.Stat(s.Binary)
	if err != nil || len(args) == 0 || !p.Alive() {
		return false
	}
	return !slices.Equal(args[1:], s.args()) || !os.SameFile(running, installed)
}

// drain has a process that is outdated let go of its lock and its port. It serves its
// connections to their ends.
func (s *Sessions) drain(ctx context.Context, p rundir.Process) error {
	s.Log.Info("replacing holdfast-stream, which has another version or other settings", "pid", p.PID)
	proc, err := pidfd.Open(p.PID, p.Alive)
	if err == nil {
		defer proc.Close()
		err = proc.Signal(unix.SIGTERM)
	}
	if errors.Is(err, pidfd.ErrEnded) {
		return nil
	}
	for wait := time.Millisecond; err == nil; wait = min(2*wait, 100*time.Millisecond) {
		if a, rerr := s.Dir.Running(); rerr != nil || a.Process != p {
			return nil
		}
		select {
		case <-time.After(wait): // nothing tells when a lock is free
		case <-ctx.Done():
			err = fmt.Errorf("it has not let go of its lock: %w", ctx.Err())
		}
	}
	return fmt.Errorf("cannot replace the holdfast-stream that runs (process %d), kill it if it hangs: %w", p.PID, err)
}
