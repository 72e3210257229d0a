package fake

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/daemon/pods"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Node is the machine below a daemon: two trees, and what stands in for the kernel
// and for other programs. One daemon after the other can run on it.
type Node struct {
	Root, State string
	Images      *Images
	Roots       *Roots
	Shims       *Shims
	Cgroups     *Cgroups
	Network     *Network
	Sessions    *Sessions
	Plugins     *Plugins
	runtimes    *runtimes.Set

	SELinux bool // the kernel enforces it
}

// NewNode makes a node. At the end of the test nothing runs on it any more.
func NewNode(t *testing.T) *Node {
	t.Helper()
	dir := t.TempDir()
	n := &Node{
		Root:    filepath.Join(dir, "root"),
		State:   filepath.Join(dir, "state"),
		Images:  &Images{},
		Roots:   &Roots{},
		Cgroups: &Cgroups{dir: filepath.Join(dir, "cgroup")},
		Network: &Network{pinned: map[string]records.Namespaces{}},

		Sessions: &Sessions{},
		Plugins:  &Plugins{},
	}
	quiet := slog.New(slog.DiscardHandler)
	n.Shims = &Shims{Launcher: &shims.Launcher{Binary: binary, LogLevel: "debug", Log: quiet}}
	t.Cleanup(func() {
		running, err := rundir.Shims(n.State)
		if err != nil {
			t.Error(err)
		}
		for _, p := range running {
			syscall.Kill(p.PID, syscall.SIGKILL)
		}
		if err := cgroup(n.Cgroups.dir).Kill(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// Of the OCI runtime the daemon itself only uses features and delete.
	script := filepath.Join(dir, "runtime")
	const text = `#!/bin/sh
for id; do :; done
case "$*" in
*features*) echo '{}' ;;
*delete*) rm -rf "$2/$id" ;;
esac
`
	err := os.WriteFile(script, []byte(text), 0o700)
	if err == nil {
		n.runtimes, err = runtimes.Probe(map[string]string{"fake": script}, "fake", filepath.Join(dir, "runc"), false,
			quiet)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Daemon is the pods and containers of one daemon.
type Daemon struct {
	Store      *state.Store
	Claims     *claims.Table
	Containers *containers.Manager
	Pods       *pods.Manager
	Events     *events.Hub
	Log        *slog.Logger

	ctx  context.Context
	stop context.CancelFunc
	work sync.WaitGroup
}

// Open starts a daemon that knows of nothing yet. The one before has been closed.
func (n *Node) Open(t *testing.T) *Daemon {
	t.Helper()
	d := &Daemon{Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))}
	d.ctx, d.stop = context.WithCancel(context.Background())
	var err error
	if d.Store, err = state.Open(n.Root, n.State, d.Log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	d.Claims = claims.NewTable(d.Log)
	d.Events = events.New()
	d.Containers = containers.New(containers.Options{
		State:    d.Store,
		Claims:   d.Claims,
		Runtimes: n.runtimes,
		Host:     spec.Host{NodeName: "node", SELinuxEnabled: n.SELinux},
		Images:   n.Images,
		Roots:    n.Roots,
		Shims:    n.Shims,
		Sessions: n.Sessions,
		Cgroups:  n.Cgroups,
		Plugins:  n.Plugins,
		NoCRIU:   func(context.Context) error { return nil },
		Announce: func(c *containers.Container, t runtimeapi.ContainerEventType) { d.Pods.AnnounceContainer(c, t) },
		Go:       d.Go,
		Log:      d.Log,
	})
	d.Pods = pods.New(pods.Options{
		State:      d.Store,
		Claims:     d.Claims,
		Containers: d.Containers,
		Runtimes:   n.runtimes,
		Sessions:   n.Sessions,
		Network:    n.Network,
		Cgroups:    n.Cgroups,
		Plugins:    n.Plugins,
		Pause:      "/bin/true",
		Publish:    d.Events.Publish,
		Go:         d.Go,
		Log:        d.Log,
	})
	return d
}

// Go runs f in the background; it ends with Close.
func (d *Daemon) Go(f func(ctx context.Context)) { d.work.Go(func() { f(d.ctx) }) }

// Close ends the daemon, and leaves shims and files alone. It may be called twice.
func (d *Daemon) Close() {
	d.stop()
	d.Claims.Close()
	d.work.Wait()
	d.Store.Close()
}
