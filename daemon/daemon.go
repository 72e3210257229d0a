// Package daemon joins the parts in its folders into the runtime: it opens them,
// recovers what an earlier daemon left, and closes them. It holds no truth of its
// own. What was wanted lies in records, what is lies with the shims and their
// files, and Open is the same code whether it is the first start or the thousandth
// after a SIGKILL (recover.go).
package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/events"
	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/journal"
	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/nri"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/daemon/pods"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/daemon/stats"
	"github.com/holdfast-cri/holdfast/daemon/streams"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// Daemon is the runtime. The methods of its parts are the verbs of the CRI in the
// messages of the CRI; any number of calls may run at the same time.
type Daemon struct {
	Pods       *pods.Manager
	Containers *containers.Manager
	Images     *Images
	Runtimes   *runtimes.Set
	Stats      *stats.Collector
	Events     *events.Hub

	cfg     Config
	log     *slog.Logger
	state   *state.Store
	layers  *rootfs.Store
	net     *network.Network
	cgroups *placement.Manager
	claims  *claims.Table
	journal *journal.Journal
	plugins *nri.Plugins[*pods.Pod, *containers.Container] // nil: off
	userns  error                                          // why pods get no user namespaces here; nil: they do

	// laterLimit bounds each thing that a start leaves for later.
	laterLimit time.Duration

	ctx  context.Context // of background work; ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // background work

	mu      sync.Mutex
	closing bool
}

// Open recovers whatever an earlier daemon left and returns as soon as every
// container can be told of: no shim has to answer for that.
func Open(cfg Config, log *slog.Logger) (_ *Daemon, err error) {
	start := time.Now()
	d := &Daemon{cfg: cfg, log: log, Events: events.New(), laterLimit: time.Minute}
	d.ctx, d.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			d.stop()
			d.closeParts()
		}
	}()
	for _, open := range []func() error{
		inHostMountNamespace, d.openStores, d.openMachine, d.openPods,
	} {
		if err := open(); err != nil {
			return nil, err
		}
	}
	finishGC := d.net.HoldForGC()
	found, err := d.recover()
	if err != nil {
		return nil, err
	}
	d.background(d.Stats.Run)
	d.plugins.Adopt(d.Pods.All(), d.Containers.All())
	if err := d.plugins.Start(); err != nil {
		return nil, err
	}
	d.background(func(ctx context.Context) {
		collect := cfg.CNIGC && found.complete()
		if cfg.CNIGC && !collect {
			log.Warn("no garbage collection of networks (CNI GC): not everything could be read")
		}
		if err := finishGC(ctx, found.podIDs, collect); err != nil {
			log.Warn("garbage collection of networks failed; the next start tries again", "error", err)
		}
	})
	log.Info("recovered",
		"pods", found.pods,
		"containers", found.containers,
		"running", found.running,
		"rebuilt", found.rebuilt,
		"undone", found.undone,
		"quarantined", found.quarantined,
		"cgroup_driver", d.cgroups.Driver(),
		"took", time.Since(start).Round(time.Microsecond))
	return d, nil
}

// openStores opens what lies on the disk.
func (d *Daemon) openStores() (err error) {
	cfg := d.cfg
	if d.state, err = state.Open(cfg.Root, cfg.State, d.log); err != nil {
		return err
	}
	d.writeDown()
	d.journal = journal.Open(filepath.Join(cfg.Root, journal.DirName), d.log)
	if d.layers, err = rootfs.Open(filepath.Join(cfg.Root, "layers"), d.log); err != nil {
		return err
	}
	store, err := image.Open(image.Options{
		Root:              filepath.Join(cfg.Root, "images"),
		RegistryConfigDir: cfg.RegistryConfigDir,
		ProgressDir:       filepath.Join(cfg.State, records.PullsName),
		DropLayers:        cfg.DropLayerBlobs,
		VerifierDir:       cfg.ImageVerifierDir,
		VerifierTimeout:   cfg.ImageVerifierTimeout,
		Log:               d.log,
		Pulled:            cfg.Metrics.Pulled,
		Pinned:            cfg.PinnedImages,
	})
	if err != nil {
		return err
	}
	d.Images = &Images{Library: image.NewLibrary(store, d.layers, d.inUse), layers: d.layers}
	return nil
}

// writeDown tells whoever looks at the machine where the daemon has what belongs to it. It
// is for people, so a failure is no reason not to start.
func (d *Daemon) writeDown() {
	self, err := rundir.FindProcess(os.Getpid())
	if err == nil {
		err = records.WriteDaemon(d.cfg.State, records.Daemon{
			Process:    self,
			BootID:     rundir.BootID(),
			Root:       d.cfg.Root,
			Address:    d.cfg.Address,
			CNIConfDir: d.cfg.CNIConfDir,
			NRISocket:  d.cfg.NRI.Socket,
		})
	}
	if err != nil {
		d.log.Warn("cannot write down how the daemon was started", "error", err)
	}
}

func (d *Daemon) openMachine() (err error) {
	cfg := d.cfg
	driver, err := placement.Detect(cfg.CgroupDriver)
	if err != nil {
		return err
	}
	if d.cgroups, err = placement.New(driver); err != nil {
		return err
	}
	d.net, err = network.New(network.Options{
		ConfDir:        cfg.CNIConfDir,
		BinDirs:        cfg.CNIBinDirs,
		CacheDir:       filepath.Join(cfg.Root, "cni"),
		PinDir:         filepath.Join(cfg.State, string(state.Pods)),
		Keeper:         cfg.Pause,
		DefaultNetwork: cfg.DefaultNetwork,
		Subnet:         cfg.Subnet,
		ConfTemplate:   cfg.CNIConfTemplate,
		Log:            d.log,
	})
	if err != nil {
		return err
	}
	root := filepath.Join(cfg.State, "runc")
	d.Runtimes, err = runtimes.Probe(cfg.Runtimes, cfg.DefaultRuntime, root, driver == placement.Systemd, d.log)
	if err != nil {
		return err
	}
	if d.userns = d.probeUserns(); d.userns != nil {
		d.log.Warn("pods cannot have user namespaces", "error", d.userns)
	}
	return nil
}

// openPods makes pods and containers, of which none is known yet.
func (d *Daemon) openPods() error {
	cfg := d.cfg
	host, err := spec.ProbeHost()
	if err != nil {
		return err
	}
	host.AppArmorDefault = d.loadAppArmor(host)
	d.claims = claims.NewTable(d.log)
	if d.plugins, err = nri.New[*pods.Pod, *containers.Container](d.nriOptions(host)); err != nil {
		return err
	}
	sessions := d.sessions()
	d.Stats = stats.New(stats.Options{
		Node:    statsNode{d},
		Root:    cfg.Root,
		Measure: measureLayer,
		Log:     d.log,
	})
	d.Containers = d.newContainers(host, sessions)
	d.Pods = pods.New(pods.Options{
		State:      d.state,
		Claims:     d.claims,
		Containers: d.Containers,
		Sessions:   sessions,
		Runtimes:   d.Runtimes,
		Network:    networkOfPods{d.net},
		Cgroups:    d.cgroups,
		Plugins:    d.plugins,
		Trees:      trees{d.layers},
		Pause:      cfg.Pause,
		AlwaysInit: cfg.PauseMode,

		UnprivilegedPorts: cfg.UnprivilegedPorts,
		UnprivilegedICMP:  cfg.UnprivilegedICMP,

		NoUserns: d.userns,
		Publish:  d.Events.Publish,
		Journal:  d.journal.Add,
		Go:       d.background,
		Log:      d.log,
	})
	return nil
}

// newContainers makes what d.Pods is made with.
func (d *Daemon) newContainers(host spec.Host, sessions *streams.Sessions) *containers.Manager {
	cfg := d.cfg
	return containers.New(containers.Options{
		State:    d.state,
		Claims:   d.claims,
		Runtimes: d.Runtimes,
		Host:     host,
		Images:   d.Images,
		Roots:    roots{d.layers, d.ways()},
		Shims: &shims.Launcher{
			Binary:   cfg.Shim,
			LogLevel: cfg.LogLevel,
			Place:    d.cgroups.PlaceShim,
			Log:      d.log,
		},
		Sessions:           sessions,
		Cgroups:            cgroups{d.cgroups},
		CDI:                d.openCDI(),
		NoCRIU:             checkpoint.Probe,
		RestoreImages:      cfg.RestoreImages,
		Plugins:            d.plugins,
		RejectAbsentMounts: cfg.RejectAbsentMounts,
		OwnPaths:           cfg.ownPaths(d.ways()),
		Given:              d.Stats.Added,
		Announce: func(c *containers.Container, t runtimeapi.ContainerEventType) {
			d.Pods.AnnounceContainer(c, t)
		},
		Journal: d.journal.Add,
		Go:      d.background,
		Log:     d.log,
	})
}

// sessions makes what gives out addresses of sessions. What an earlier daemon gave out
// goes on being valid.
func (d *Daemon) sessions() *streams.Sessions {
	dir := stream.Dir(filepath.Join(d.cfg.State, stream.DirName))
	d.background(func(ctx context.Context) {
		if err := dir.Sweep(ctx); err != nil {
			d.log.Warn("cannot remove the tokens of sessions that have expired", "error", err)
		}
	})
	return streams.New(streams.Options{
		Settings: d.cfg.Streaming,
		Dir:      dir,
		Binary:   d.cfg.Stream,
		LogLevel: d.cfg.LogLevel,
		Place:    d.cgroups.PlaceStream,
		Log:      d.log,
	})
}

// EndPulls calls off the pulls that run and those that come: a shutdown need not
// wait for them, as the next pull goes on where they were.
func (d *Daemon) EndPulls() { d.Images.EndPulls() }

// Close ends what this process does and leaves every container alone. Creations
// under way are waited for until ctx ends; what they leave, the next start undoes.
func (d *Daemon) Close(ctx context.Context) error {
	d.mu.Lock()
	d.closing = true
	d.mu.Unlock()
	d.stop()
	done := make(chan struct{})
	go func() {
		d.claims.Close()
		d.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		d.log.Warn("leaving work undone; the next start cleans up", "error", ctx.Err())
		return ctx.Err()
	}
	return d.closeParts()
}

// closeParts closes what has been opened.
func (d *Daemon) closeParts() (err error) {
	d.plugins.Close()
	if d.Images != nil {
		err = d.Images.Close()
	}
	if d.layers != nil {
		d.layers.Close()
	}
	if d.journal != nil {
		d.journal.Close()
	}
	if d.state != nil {
		if serr := d.state.Close(); err == nil {
			err = serr
		}
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

// probeUserns says why no pod can have a user namespace here; nil if one can.
func (d *Daemon) probeUserns() error {
	some := network.IDMap{HostID: 1 << 16, Length: 1 << 16}
	ns, err := d.net.OpenUserns(network.Userns{UIDs: some, GIDs: some})
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := d.layers.CheckMapped(ns); err != nil {
		return err
	}
	return d.ways().Make()
}

// ways is where roots are while the OCI runtime creates containers in user
// namespaces. That cannot be in STATE, which is closed.
func (d *Daemon) ways() rootfs.Ways { return rootfs.Ways(d.cfg.State + "-userns") }

// inHostMountNamespace refuses to run where mounts would be seen by nobody: the
// shims and the OCI runtime live in the host's mount namespace.
func inHostMountNamespace() error {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return fmt.Errorf("cannot read the mount namespace: %w", err)
	}
	if host, err := os.Readlink("/proc/1/ns/mnt"); err == nil && host != ours {
		return fmt.Errorf("cannot run in a mount namespace of its own (%s, process 1 has %s): "+
			"containers would lose their roots with it; remove PrivateMounts= and the like from the unit", ours, host)
	}
	return nil
}

// SystemdCgroups says whether the cgroup driver in force is systemd.
func (d *Daemon) SystemdCgroups() bool { return d.cgroups.Driver() == placement.Systemd }

// NetworkReady says why no pod with a network of its own can be made; nil if one
// can.
func (d *Daemon) NetworkReady(ctx context.Context) error { return d.net.Ready(ctx) }

// SetPodCIDR takes the node's pod range for the built-in network, or for a CNI config that
// is made of a template.
func (d *Daemon) SetPodCIDR(cidr string) error { return d.net.SetPodCIDR(cidr) }

// Userns says whether pods can have user namespaces.
func (d *Daemon) Userns() bool { return d.userns == nil }
