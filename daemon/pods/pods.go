// Package pods is a pod and all that may be done to it. A pod is pinned
// namespaces, one /dev/shm, a few files and a network attachment: nothing has to
// run for it to exist. Only one whose containers share a pid namespace, and any
// with sandbox.mode = "pause", has an init, which is a container of our own.
//
// Locks. Pod.op is held by the one call that changes the pod, over slow work as
// well; it comes before those of the pod's containers. Manager.mu guards the map
// and is never held over anything slow.
package pods

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Network gives pods their namespaces and their network.
type Network interface {
	CreateNamespaces(id string, w records.Want) (records.Namespaces, error)
	RemoveNamespaces(id string) error
	// Pinned are those of a pod that are pinned, found by its id alone.
	Pinned(id string) records.Namespaces
	// Config is the config in force, for the record. Its error says why no pod with
	// a network of its own can be made.
	Config() ([]byte, error)
	Add(ctx context.Context, a records.Attachment) (records.Result, error)
	// SetInterfaceSysctls sets the sysctls of interfaces, which are there after Add.
	SetInterfaceSysctls(netns string, w records.Want) error
	Del(ctx context.Context, a records.Attachment) error
}

// Cgroups knows the cgroups of pods.
type Cgroups interface {
	ContainerPath(parent, podID, id string) (string, error)
	RemovePod(ctx context.Context, parent, podID string) error
}

// Plugins are told of pods (NRI). Each call ends in bounded time.
type Plugins interface {
	// RunPodSandbox tells of a pod that is whole, before anybody else knows it. After an
	// error RemovePodSandbox is due.
	RunPodSandbox(ctx context.Context, p *Pod) error
	// StopPodSandbox tells of one whose containers have ended, and whose network is still
	// there, RemovePodSandbox of one that goes. What was told is not told again.
	StopPodSandbox(ctx context.Context, p *Pod)
	RemovePodSandbox(ctx context.Context, p *Pod)
	// UpdatePodSandbox tells of limits that are to change, and may refuse them.
	UpdatePodSandbox(ctx context.Context, p *Pod, overhead, resources *runtimeapi.LinuxContainerResources) error
	PostUpdatePodSandbox(ctx context.Context, p *Pod)
}

// Trees writes what is in a directory as a tar stream, and the other way round.
type Trees interface {
	// Diff writes all of a directory, which nobody changes meanwhile.
	Diff(ctx context.Context, dir string, w io.Writer) error
	// Apply puts what a hostile stream has into a directory.
	Apply(ctx context.Context, dir string, r io.Reader) error
}

// Options are what pods are made of.
type Options struct {
	State      *state.Store
	Claims     *claims.Table
	Containers *containers.Manager
	Runtimes   *runtimes.Set
	Sessions   containers.Sessions
	Network    Network
	Cgroups    Cgroups
	Plugins    Plugins
	Trees      Trees
	// Pause is the static binary of a pod's init.
	Pause string
	// Of daemon.Config; AlwaysInit is its PauseMode.
	AlwaysInit, UnprivilegedPorts, UnprivilegedICMP bool
	// NoUserns says why no pod can have a user namespace; nil if one can.
	NoUserns error
	// Publish tells subscribers of an event; nil: there are none.
	Publish func(describe func() *runtimeapi.ContainerEventResponse)
	// Journal keeps what happens to pods. It returns at once, and may be nil.
	Journal func(records.Entry)
	// Go runs f in the background, unless the daemon is closing. It ends with ctx.
	Go  func(f func(ctx context.Context))
	Log *slog.Logger
}

// Manager is all pods.
type Manager struct {
	Options

	mu   sync.Mutex
	all  map[string]*Pod
	owed map[string]*Pod // removed, and something of theirs is still held
}

// New makes a manager without pods.
func New(o Options) *Manager {
	return &Manager{Options: o, all: map[string]*Pod{}, owed: map[string]*Pod{}}
}

// Pod is one pod.
type Pod struct {
	m    *Manager
	op   claims.Lock
	rec  atomic.Pointer[records.Pod]          // replaced by save, never changed in place
	init atomic.Pointer[containers.Container] // nil: there is none; changed under op

	announcing sync.Mutex
	announced  runtimeapi.ContainerEventType // the next event that is to be announced; guarded by announcing

	owing time.Time // since when its debts are paid in the background; guarded by Manager.mu
}

var _ containers.Pod = (*Pod)(nil)

// Adopt makes a pod of a record. Add makes it known.
func (m *Manager) Adopt(rec *records.Pod) *Pod {
	p := &Pod{m: m, op: claims.NewLock()}
	p.rec.Store(rec)
	switch rec.Phase { // what has happened before is not announced again
	case records.PodCreating:
	case records.PodReady, records.PodStopping:
		p.announced = stopped
	default:
		p.announced = deleted
	}
	return p
}

// AdoptInit gives a pod the init that was found. The pod is not known yet.
func (p *Pod) AdoptInit(c *containers.Container) { p.init.Store(c) }

// Add makes a pod known.
func (m *Manager) Add(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all[p.ID()] = p
}

// Find gives a pod by its id, or by a prefix that is that of no other one.
func (m *Manager) Find(id string) (*Pod, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return records.Find(m.all, id, "pod_sandbox_id", "pod")
}

// All gives all pods.
func (m *Manager) All() []*Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.all))
}

// ID is the pod's id.
func (p *Pod) ID() string { return p.Record().ID }

// Record is what is wanted of the pod. It must not be changed.
func (p *Pod) Record() *records.Pod { return p.rec.Load() }

// Init is the pod's init; nil if it has none.
func (p *Pod) Init() *containers.Container { return p.init.Load() }

// String names the pod in errors.
func (p *Pod) String() string { return "pod " + records.ShortID(p.ID()) }

// Ready says why the pod takes no container: it is not whole, is being stopped, or
// its init has ended. nil if it does.
func (p *Pod) Ready() error {
	rec, init := p.Record(), p.Init()
	if rec.Phase != records.PodReady || !records.ThisBoot(rec.BootID) {
		return kind.Errorf(kind.State, "pod_sandbox_id: %s is not ready", p)
	}
	// An init that is being removed was never used.
	if init != nil && init.Seen().Exit != nil && init.Record().Phase != records.ContainerRemoving {
		return kind.Errorf(kind.State, "pod_sandbox_id: the init process of %s has ended", p)
	}
	return nil
}

// save is the one place where a record changes: first on disk, then in memory.
// sync is for what must survive a power cut.
func (p *Pod) save(sync bool, change func(*records.Pod)) error {
	rec := *p.Record()
	change(&rec)
	if err := p.m.State.Put(state.Pods, rec.ID, &rec, sync); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	// The copy stands in for a damaged record; without one nothing is lost yet.
	if err := p.m.State.PutCopy(state.Pods, rec.ID, &rec); err != nil && rec.Phase == records.PodReady {
		return kind.As(kind.Unavailable, err)
	}
	p.rec.Store(&rec)
	return nil
}

// note is save for a stop and a removal, which a full disk must not keep from
// happening: a change that cannot be written is kept in memory, and that of a stop in the
// copy, which is not on that disk. The error is of the disk.
func (p *Pod) note(change func(*records.Pod)) error {
	err := p.save(false, change)
	if err != nil {
		rec := *p.Record()
		change(&rec)
		p.rec.Store(&rec)
		if rec.Phase != records.PodRemoved { // that is not answered
			p.m.State.PutCopy(state.Pods, rec.ID, &rec) // what fails here is done again after a restart
		}
		p.m.Log.Warn("cannot write down the state of a pod", "pod", rec.ID, "error", err)
	}
	return err
}
