// Package nri tells plugins of pods and containers, and lets them change what
// containers are made of: the Node Resource Interface of containerd, whose library
// speaks to the plugins. A plugin either connects to a socket, or lies in a directory
// and is started here.
//
// What is told, and to whom, is in one table: a pod or container is in it from the
// first call about it to the last one. A plugin that comes is told of all that is in
// the table, and of what follows. It can come at any time, but not between a change of
// the table and the call that tells of it; so it hears of everything, and of nothing
// twice. After a restart of the daemon Adopt fills the table, before any plugin can
// connect.
//
// Plugins are asked one after the other, each within RequestTimeout. One that takes
// longer, or is gone, is dropped by the library, and the call goes on without it.
//
// Locks. The library lets either calls to plugins or one plugin that comes go on (its
// gate). Plugins.mu guards the table, is held over calls to plugins, and is taken after
// the gate. Whoever holds them waits for nobody but plugins.
package nri

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Defaults, which are those of other runtimes.
const (
	DefaultSocket              = adaptation.DefaultSocketPath
	DefaultPluginDir           = adaptation.DefaultPluginPath
	DefaultConfigDir           = adaptation.DefaultPluginConfigPath
	DefaultRegistrationTimeout = adaptation.DefaultPluginRegistrationTimeout
	DefaultRequestTimeout      = adaptation.DefaultPluginRequestTimeout
)

// Validator is the config of the validator that the library brings along.
type Validator = validator.DefaultValidatorConfig

// Config is what the owner of the node says. Paths are absolute.
type Config struct {
	Disable   bool
	Socket    string // where plugins connect; empty: none may
	PluginDir string // of plugins that are started with the daemon
	ConfigDir string // what each of them is given, as files
	// RegistrationTimeout bounds the coming of a plugin: what it says of itself, and
	// then its taking in of what there is. RequestTimeout bounds each later call.
	RegistrationTimeout, RequestTimeout time.Duration
	Validator                           Validator
	Version                             string // of the runtime, for plugins
}

// Pod is what plugins are told of a pod.
type Pod interface {
	Record() *records.Pod
	PID() int // of a process in its namespaces; 0: none
}

// Container is what plugins are told of a container.
type Container interface {
	Record() *records.Container
	Seen() *records.Seen
	Spec() json.RawMessage // nil if it cannot be read
}

// Options are what Plugins are made of.
type Options struct {
	Config
	// SwapSupported and HugetlbSupported are those of spec.Host.
	SwapSupported, HugetlbSupported bool
	// InjectDevices adds devices that a plugin names as CDI does; nil: there is no CDI.
	InjectDevices func(s *specs.Spec, names []string) error
	// Update changes the limits of a container as a plugin wants, Evict ends one.
	Update func(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources) error
	Evict  func(ctx context.Context, id string) error
	// Go runs f in the background, unless the daemon is closing. It ends with ctx.
	Go  func(f func(ctx context.Context))
	Log *slog.Logger
}

// known is something that plugins have been told of, or would have been.
type known[T any] struct {
	of      T
	spec    *specs.Spec // of a container, until it is created: Spec has none yet
	stopped bool        // its end was told
}

// Plugins is all plugins. nil is none, for good.
type Plugins[P Pod, C Container] struct {
	o     Options
	lib   *adaptation.Adaptation
	count atomic.Int32 // of plugins that are served

	mu         sync.Mutex
	pods       map[string]*known[P]
	containers map[string]*known[C]
}

// New makes plugins, of which none is served before Start. It is nil if there are to
// be none.
func New[P Pod, C Container](o Options) (*Plugins[P, C], error) {
	if o.Disable {
		return nil, nil
	}
	n := &Plugins[P, C]{o: o, pods: map[string]*known[P]{}, containers: map[string]*known[C]{}}
	setLog(o.Log)
	options := []adaptation.Option{
		adaptation.WithPluginPath(o.PluginDir),
		adaptation.WithPluginConfigPath(o.ConfigDir),
		adaptation.WithSocketPath(o.Socket),
		adaptation.WithDefaultValidator(&o.Validator),
		adaptation.WithMetrics(counter{&n.count}),
	}
	if !n.socketFree() {
		options = append(options, adaptation.WithDisabledExternalConnections())
	}
	var err error
	n.lib, err = adaptation.New("holdfast", o.Version, n.synchronize, n.updateContainers, options...)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare for NRI plugins: %w", err)
	}
	return n, nil
}

// Start starts the plugins that lie in the directory, and lets others connect. It
// returns when the former have taken in all that is known.
func (n *Plugins[P, C]) Start() error {
	if n == nil {
		return nil
	}
	began := time.Now()
	adaptation.SetPluginRegistrationTimeout(n.o.RegistrationTimeout)
	adaptation.SetPluginRequestTimeout(n.o.RequestTimeout)
	if err := n.makeSocketDir(); err != nil {
		return err
	}
	if err := n.lib.Start(); err != nil {
		return fmt.Errorf("cannot start NRI: %w (plugins are in %s, the socket is %s; [nri] disable = true turns it "+
			"off)", err, n.o.PluginDir, n.o.Socket)
	}
	if err := n.closeSocket(); err != nil {
		n.lib.Stop()
		return err
	}
	chatty.Store(true)
	if count := n.count.Load(); count > 0 {
		n.o.Log.Info("NRI plugins are served", "count", count, "took", time.Since(began).Round(time.Millisecond))
	}
	return nil
}

// Close ends the plugins that Start started, and lets no other one connect.
func (n *Plugins[P, C]) Close() {
	if n != nil {
		n.lib.Stop()
	}
}

// any says whether a plugin is served. It holds as long as the caller is in.
func (n *Plugins[P, C]) any() bool { return n.count.Load() > 0 }

// enter begins a change of the table and the call that tells of it. No plugin comes
// until leave is called. Nobody enters twice: the gate does not let a second one in
// while a plugin waits.
func (n *Plugins[P, C]) enter() (leave func()) {
	gate := n.lib.BlockPluginSync()
	n.mu.Lock()
	return func() {
		n.mu.Unlock()
		gate.Unblock()
	}
}

// Adopt fills the table with what an earlier daemon left. It comes before Start.
func (n *Plugins[P, C]) Adopt(pods []P, containers []C) {
	if n == nil {
		return
	}
	defer n.enter()()
	for _, p := range pods {
		rec := p.Record()
		stopped := rec.Phase == records.PodStopped || rec.Phase == records.PodRemoved
		n.pods[rec.ID] = &known[P]{of: p, stopped: stopped}
	}
	for _, c := range containers {
		n.containers[c.Record().ID] = &known[C]{of: c, stopped: c.Seen().Exit != nil}
	}
}

// synchronize tells a plugin that comes of all pods, and of the containers that have
// not ended. The library holds its gate. What the plugin wants changed is done later:
// it may have to wait for a call that waits for the gate.
func (n *Plugins[P, C]) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	n.mu.Lock()
	var pods []*api.PodSandbox
	for _, p := range n.pods {
		pods = append(pods, podMessage(p.of))
	}
	var containers []*api.Container
	for _, c := range n.containers {
		if !c.stopped && c.of.Seen().Exit == nil {
			containers = append(containers, containerMessage(c.of, c.spec))
		}
	}
	n.mu.Unlock()
	// The timeout is one for the whole library. Behind the gate nobody else uses it.
	adaptation.SetPluginRequestTimeout(n.o.RegistrationTimeout)
	defer adaptation.SetPluginRequestTimeout(n.o.RequestTimeout)
	updates, err := tell(ctx, pods, containers)
	if err != nil {
		return err
	}
	n.applyLater(updates)
	return nil
}

// refused is the error of a call that a plugin failed.
func refused(call, what, id string, err error) error {
	if err == nil {
		return nil
	}
	return kind.Errorf(kind.Unavailable, "an NRI plugin failed %s of %s %s: %v", call, what, records.ShortID(id), err)
}

// log is for calls whose errors change nothing.
func (n *Plugins[P, C]) log(err error) {
	if err != nil {
		n.o.Log.Warn("an NRI plugin returned an error, which changes nothing", "error", err)
	}
}

// lasting is ctx without its end: who called last is not the plugin's fault, which
// would be dropped for not answering in time.
func lasting(ctx context.Context) context.Context { return context.WithoutCancel(ctx) }

// counter is told by the library how many plugins there are.
type counter struct{ count *atomic.Int32 }

// UpdatePluginCount is called behind the gate, or with the library's lock.
func (c counter) UpdatePluginCount(count int) { c.count.Store(int32(count)) }

// RecordPluginInvocation does nothing, as the others.
func (counter) RecordPluginInvocation(string, string, error) {}

// RecordPluginLatency does nothing.
func (counter) RecordPluginLatency(string, string, time.Duration) {}

// RecordPluginAdjustments does nothing.
func (counter) RecordPluginAdjustments(string, string, *api.ContainerAdjustment, int, int) {}
