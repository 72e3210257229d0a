// Package daemon is what is wanted and what is seen: pods, containers and
// images, made of the mechanisms in its sub-packages. It holds no truth of its
// own. What was wanted lies in records (records.go), what is lies with the shims
// and their files, and Open is the same code whether it is the first start or
// the thousandth after a SIGKILL (recover.go).
//
// Locks. An object's oplock is held by the one call that changes it and may be
// held over slow work; Daemon.mu guards the maps and is never held over any.
// Whoever reads (lists, status) takes the maps' lock and a snapshot, and waits
// for nobody. Order: a pod's oplock before those of its containers.
package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/metrics"
	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Config is what cmd/holdfastd read from its file and flags. Paths are absolute.
type Config struct {
	Root, State    string
	DefaultRuntime string
	Runtimes       map[string]Runtime
	Shim           string // binary of the shim
	Pause          string // static binary of a pod's init, and of what keeps a namespace until it is pinned
	LogLevel       string // for shims

	CNIConfDir     string
	CNIBinDirs     []string
	DefaultNetwork bool
	Subnet         string

	RegistryConfigDir string
	PinnedImages      []string // references
	// DropLayerBlobs does not keep layers as they were downloaded.
	DropLayerBlobs bool
	// ImageVerifierDir has programs that decide which images may be pulled;
	// empty: all may. Each has ImageVerifierTimeout to answer; 0: the default.
	ImageVerifierDir     string
	ImageVerifierTimeout time.Duration

	CgroupDriver string // auto, cgroupfs, systemd
	// PauseMode gives every pod an init process; otherwise only a pod that
	// shares its pid namespace has one.
	PauseMode bool
	// RejectAbsentMounts makes a mount source that does not exist an error.
	// Otherwise it is created as a directory, as pods with an untyped hostPath
	// rely on.
	RejectAbsentMounts bool

	Metrics *metrics.Metrics // nil: nobody asks for them
}

// Runtime is one OCI runtime, a runtime handler of the CRI.
type Runtime struct {
	Path string // of its binary, absolute
}

// Daemon is the runtime. Its methods are the CRI's verbs in the CRI's messages,
// validated by the caller; any number of calls may run at the same time.
type Daemon struct {
	cfg      Config
	log      *slog.Logger
	state    *state.Store
	images   *image.Store
	layers   *rootfs.Store
	net      *network.Network
	cgroups  *placement.Manager
	launcher *shims.Launcher
	host     spec.Host
	handlers map[string]handler
	noUserns error // why this machine has no user namespaces for pods; nil if it has

	ctx  context.Context // ends with Close; watchers live in it
	stop context.CancelFunc
	work sync.WaitGroup // attempts and background work

	pulls    context.Context // ends with EndPulls
	endPulls context.CancelFunc

	mu         sync.Mutex
	closing    bool
	pods       map[string]*pod
	containers map[string]*container
	claims     map[string]*claim
	// pins are the layers that calls under way rely on, so that nothing
	// collects them meanwhile: diff id -> calls.
	pins map[digest.Digest]int
}

// Open recovers whatever an earlier daemon left and returns as soon as every
// container can be told of: no shim has to answer for that.
func Open(cfg Config, log *slog.Logger) (_ *Daemon, err error) {
	start := time.Now()
	d := &Daemon{cfg: cfg, log: log,
		pods: map[string]*pod{}, containers: map[string]*container{}, claims: map[string]*claim{}, pins: map[digest.Digest]int{}}
	d.ctx, d.stop = context.WithCancel(context.Background())
	d.pulls, d.endPulls = context.WithCancel(context.Background())
	var undo []func()
	defer func() {
		if err != nil {
			d.stop()
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()

	if err := inHostMountNamespace(); err != nil {
		return nil, err
	}
	if d.state, err = state.Open(cfg.Root, cfg.State, log); err != nil {
		return nil, err
	}
	undo = append(undo, func() { d.state.Close() })
	driver, err := placement.Detect(cfg.CgroupDriver)
	if err != nil {
		return nil, err
	}
	if d.cgroups, err = placement.New(driver); err != nil {
		return nil, err
	}
	if d.layers, err = rootfs.Open(filepath.Join(cfg.Root, "layers"), log); err != nil {
		return nil, err
	}
	undo = append(undo, func() { d.layers.Close() })
	if d.images, err = image.Open(image.Options{Root: filepath.Join(cfg.Root, "images"), RegistryConfigDir: cfg.RegistryConfigDir,
		ProgressDir: filepath.Join(cfg.State, records.PullsName), DropLayers: cfg.DropLayerBlobs,
		VerifierDir: cfg.ImageVerifierDir, VerifierTimeout: cfg.ImageVerifierTimeout,
		Log: log, Pulled: cfg.Metrics.Pulled, Pinned: cfg.PinnedImages}); err != nil {
		return nil, err
	}
	undo = append(undo, func() { d.images.Close() })
	if d.net, err = network.New(network.Options{ConfDir: cfg.CNIConfDir, BinDirs: cfg.CNIBinDirs, CacheDir: filepath.Join(cfg.Root, "cni"),
		PinDir: filepath.Join(cfg.State, string(state.Pods)), Keeper: cfg.Pause, DefaultNetwork: cfg.DefaultNetwork, Subnet: cfg.Subnet, Log: log}); err != nil {
		return nil, err
	}
	if d.host, err = spec.ProbeHost(); err != nil {
		return nil, err
	}
	if d.handlers, err = probeHandlers(cfg, log); err != nil {
		return nil, err
	}
	if d.noUserns = d.probeUserns(); d.noUserns != nil {
		log.Warn("pods cannot have user namespaces", "error", d.noUserns)
	}
	d.launcher = &shims.Launcher{Binary: cfg.Shim, LogLevel: cfg.LogLevel, Place: d.cgroups.PlaceShim, Log: log}

	recovered, err := d.recover()
	if err != nil {
		return nil, err
	}
	log.Info("recovered", "pods", recovered.pods, "containers", recovered.containers, "running", recovered.running,
		"rebuilt", recovered.rebuilt, "undone", recovered.undone, "quarantined", recovered.quarantined,
		"cgroup_driver", driver, "took", time.Since(start).Round(time.Microsecond))
	return d, nil
}

// EndPulls calls off the pulls that run and those that come: a shutdown need not
// wait for them, as the next pull goes on where they were.
func (d *Daemon) EndPulls() { d.endPulls() }

// Close ends what this process does and leaves every container alone. Creations
// under way are waited for until ctx ends; what they leave, the next start undoes.
func (d *Daemon) Close(ctx context.Context) error {
	d.mu.Lock()
	d.closing = true
	d.mu.Unlock()
	d.stop()
	done := make(chan struct{})
	go func() { d.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		d.log.Warn("leaving work undone; the next start cleans up", "error", ctx.Err())
		return ctx.Err()
	}
	err := d.images.Close()
	d.layers.Close()
	if serr := d.state.Close(); err == nil {
		err = serr
	}
	return err
}

// background runs f unless the daemon is closing; Close waits for it.
func (d *Daemon) background(f func(ctx context.Context)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing {
		return
	}
	d.work.Go(func() { f(d.ctx) })
}

// Driver is the cgroup driver in force.
func (d *Daemon) Driver() placement.Driver { return d.cgroups.Driver() }

// NetworkReady says why no pod with a network of its own can be made; nil if
// one can.
func (d *Daemon) NetworkReady(ctx context.Context) error { return d.net.Ready(ctx) }

// SetPodCIDR takes the node's pod range for the built-in network.
func (d *Daemon) SetPodCIDR(cidr string) error {
	return as(ErrInvalid, d.net.SetPodCIDR(cidr))
}

// Config is what the daemon was started with.
func (d *Daemon) Config() Config { return d.cfg }

func (d *Daemon) runDir(id string) rundir.Dir {
	return rundir.Dir(d.state.RunDir(state.Containers, id))
}

func (d *Daemon) pod(id string) (*pod, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.pods[id]; p != nil {
		return p, nil
	}
	return nil, errorf(ErrNotFound, "pod_sandbox_id: there is no pod %q", id)
}

func (d *Daemon) container(id string) (*container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.containers[id]; c != nil && !c.rec.Load().Init {
		return c, nil
	}
	return nil, errorf(ErrNotFound, "container_id: there is no container %q", id)
}

// containersOf gives the containers of a pod, its init last.
func (d *Daemon) containersOf(podID string) []*container {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []*container
	var init *container
	for _, c := range d.containers {
		switch rec := c.rec.Load(); {
		case rec.PodID != podID:
		case rec.Init:
			init = c
		default:
			list = append(list, c)
		}
	}
	if init != nil {
		list = append(list, init)
	}
	return list
}

// inHostMountNamespace refuses to run where mounts would be seen by nobody: the
// shims and the OCI runtime live in the host's mount namespace.
func inHostMountNamespace() error {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return fmt.Errorf("cannot read the mount namespace: %w", err)
	}
	if host, err := os.Readlink("/proc/1/ns/mnt"); err == nil && host != ours {
		return fmt.Errorf("cannot run in a mount namespace of its own (%s, process 1 has %s): containers would lose their roots with it; remove PrivateMounts= and the like from the unit", ours, host)
	}
	return nil
}
