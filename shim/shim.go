// Package shim keeps one container running, logged and recorded, with or without
// a daemon. It owns the container's standard files, its log, its stop deadline
// and its exit record; all that it knows is its files and its descriptors.
package shim

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/shim/taskapi"
)

// Config is what a shim is started with.
type Config struct {
	Dir           rundir.Dir    // absolute; its base name is the container's id
	CreateTimeout time.Duration // without a Create for so long the shim ends
	Version       string        // of the build
	Log           *slog.Logger
	// Files are those of a container that is there already. nil: there is none.
	Files *Files
	// Stop tells an idle shim to end. One with a container goes on.
	Stop <-chan os.Signal
	// Reappear tells a shim that its lock, its socket or its files were removed.
	// It puts them back.
	Reappear <-chan os.Signal
	// Ready is called once, when the shim can be called.
	Ready func()
}

// lingerTimeout is how long a shim that has nothing left to do waits for the
// answers under way to be sent.
const lingerTimeout = time.Second

// Run is a shim's whole life. It returns when the container has ended and all
// that belonged to it is done, or when there never was one.
func Run(cfg Config) error {
	s, err := open(cfg)
	if err != nil {
		return err
	}
	return s.run()
}

// shim is one shim process.
type shim struct {
	cfg      Config
	presence *presence
	reaper   *reaper.Reaper
	task     *task
	calls    *calls
	server   *ttrpc.Server
}

// open makes the shim of a run directory, which is locked and can be called then.
func open(cfg Config) (s *shim, err error) {
	identity, err := identify(cfg.Version)
	if err != nil {
		return nil, err
	}
	s = &shim{cfg: cfg, calls: newCalls(cfg.Log)}
	s.server, err = ttrpc.NewServer(
		ttrpc.WithChainUnaryServerInterceptor(s.calls.count, convertErrors, onlyFor(cfg.Dir.ID())))
	if err != nil {
		return nil, err
	}
	s.presence = &presence{
		dir:      cfg.Dir,
		identity: identity,
		log:      cfg.Log,
		names:    map[string]fs.FileInfo{},
		serve:    s.serve,
	}
	if cfg.Files != nil {
		s.presence.lock = cfg.Files.Lock
	}
	if err := s.presence.takeLock(); err != nil {
		return nil, err
	}
	protectFromOOM(cfg.Log)
	if s.reaper, err = reaper.New(); err != nil {
		s.presence.close()
		return nil, err
	}
	s.task, err = openTask(cfg.Dir, cfg.Log, s.reaper, cfg.Files)
	s.reaper.Begin()
	if err == nil {
		service := &service{task: s.task, identity: identity}
		pb.RegisterShimService(s.server, service)
		taskapi.Register(s.server, service, cfg.Dir.ID(), string(cfg.Dir))
		if err = s.presence.appear(); err != nil {
			err = errors.Join(err, s.presence.disappear())
		}
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *shim) close() {
	s.reaper.Close()
	s.presence.close()
}

// serve answers calls in the background until the listener is closed. No other error of it
// ends that: see shortage.
func (s *shim) serve(l net.Listener) {
	go s.server.Serve(context.Background(), s.calls.listener(l))
}

// run returns when nothing is left to do.
func (s *shim) run() error {
	defer s.close()
	s.cfg.Log.Info("shim ready", "pid", os.Getpid(), "version", s.cfg.Version)
	s.cfg.Ready()
	s.task.until(s.cfg, s.presence)
	// From here on the files answer. New callers must find no socket rather
	// than one that nobody serves.
	err := s.presence.disappear()
	s.calls.wait(lingerTimeout)
	s.server.Close()
	s.cfg.Log.Info("shim ends")
	return err
}

// until returns when the task has ended.
func (t *task) until(cfg Config, presence *presence) {
	idle := time.NewTimer(cfg.CreateTimeout)
	defer idle.Stop()
	for {
		select {
		case <-t.ended:
			return
		case <-idle.C:
			if t.abandon() {
				t.log.Warn("no Create came", "within", cfg.CreateTimeout.String())
			}
		case <-cfg.Stop:
			t.abandon()
		case <-cfg.Reappear:
			presence.reappear()
			t.rewrite()
		}
	}
}

// rewrite writes state.json again.
func (t *task) rewrite() {
	t.update(noEvent, func(*rundir.Status) {})
}

// protectFromOOM lowers the shim's oom_score_adj: its death costs the container.
// -999 and -1000 are left to the node's own agents. Lowering needs
// CAP_SYS_RESOURCE.
func protectFromOOM(log *slog.Logger) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-998"), 0); err != nil {
		log.Debug("not protected from the OOM killer", "error", err)
	}
}

// Signals are those that must not end a shim, though they end other processes.
// They are caught rather than ignored, because children inherit what is ignored.
var Signals = []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE}
