// Package containers is a container from the request for it to its removal: its
// record, its root and its spec, its shim, what is seen of it, and its end.
//
// Nothing here waits for a shim in order to tell what a container is: lists and
// statuses answer from what was seen last.
//
// Locks. Container.op is held by the one call that changes the container and may
// be held over slow work; Container.ending, taken after op, by whoever ends its
// shim or buries it. Manager.mu guards the map and is never held over either, nor
// over a call that reaches a disk.
package containers

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// Pod is what a container has to know of its pod.
type Pod interface {
	Record() *records.Pod
	// Ready says why the pod takes no container now; nil if it does.
	Ready() error
	// PIDNamespace is where the pid namespace is pinned that the pod's containers
	// share. It is made when the first of them asks for it.
	PIDNamespace(ctx context.Context) (string, error)
}

// Image is an image that is here.
type Image struct {
	ID     string
	Ref    string // a digest reference where there is one, of the repository that the user named
	Config ocispec.ImageConfig
	Layers []digest.Digest // diff ids, base first
	// Checkpoint is the name of the container that the image is a checkpoint of; empty: it
	// is none.
	Checkpoint string
}

// Images gives images to containers.
type Images interface {
	// Hold finds an image and unpacks what is missing of it. Its layers stay
	// until release is called. field is that of the request, for errors; named is
	// what the user calls the image, if that is not ref.
	Hold(ctx context.Context, field, ref, named string) (img Image, release func(), err error)
	// Unwanted says that a container has gone that used these layers.
	Unwanted(layers []digest.Digest)
}

// Roots mounts the root file systems of containers, and images as volumes.
type Roots interface {
	// Mount mounts layers at target, with a writable layer below dir. A pod with a
	// user namespace has the owners of files mapped. All files have the SELinux label,
	// if it is not empty.
	Mount(ctx context.Context, layers []digest.Digest, dir, target string, pod *records.Pod, label string) error
	// CheckRelabel refuses a path that Relabel would, as kind.Invalid. Relabel gives a
	// file or directory, and all below it, an SELinux label.
	CheckRelabel(path string) error
	Relabel(ctx context.Context, path, label string) error
	Unmount(target string) error
	// Volumes makes the directories that an image declares as volumes in a mounted
	// root, and mounts those that have to be below the directory at. It gives the
	// host's path by the path in the container. use says what is wanted.
	Volumes(ctx context.Context, root string, names []string, owner records.Owner, at string,
		use func(dst string) (wanted, mounted bool)) (map[string]string, error)
	// Bind mounts what name means inside a mounted root on at.
	Bind(root, name, at string) error
	// OpenWay mounts the root of a container a second time, and gives the path:
	// where the root of a user namespace, whom owner says, gets to, and no other
	// user of the host.
	OpenWay(id, root string, owner records.Owner) (path string, err error)
	// CloseWay ends that. The path stays, empty: the OCI runtime works there.
	CloseWay(id string) error
	// RemoveWay removes the path too, whether or not there was one.
	RemoveWay(id string) error
	// Tmpfs mounts a file system with these options of tmpfs(5), of which no
	// program runs.
	Tmpfs(path, options string) error
	// Disarm makes setuid bits and devices below a directory mean nothing on the
	// host. Where no mount is yet, that makes one, which Unmount ends.
	Disarm(target string) error
	// UnmountBelow is Unmount for each entry of a directory, if there is one.
	UnmountBelow(dir string) error
	// Diff writes what is in the writable layer below dir as the stream of a layer. Nobody
	// changes it meanwhile.
	Diff(ctx context.Context, dir string, w io.Writer) error
	// Restore makes the writable layer below dir of such streams, before Mount.
	Restore(ctx context.Context, layers []digest.Digest, dir string, streams ...io.Reader) error
	// OpenLayer opens the directory of a layer that is held.
	OpenLayer(layer digest.Digest) (*os.File, error)
	// PinPID binds the pid namespace of a process to a path; Unmount undoes it.
	PinPID(p rundir.Process, path string) error
}

// Shims starts shims, finds them and ends them.
type Shims interface {
	Launch(ctx context.Context, dir rundir.Dir) error
	// Alive says whether the shim of a run directory lives. It asks the kernel:
	// a missing lock is no answer.
	Alive(dir rundir.Dir) (bool, error)
	// Find tells which process it is.
	Find(dir rundir.Dir) (rundir.Process, error)
	// Reach makes sure that a shim that lives can be called, if its socket was
	// removed.
	Reach(ctx context.Context, dir rundir.Dir, c *client.Client) error
	// End ends a shim, with its container, and returns when it is gone.
	End(ctx context.Context, dir rundir.Dir, c *client.Client) error
}

// CDI finds devices that vendors describe in files.
type CDI interface {
	// Find gives what the devices change in a spec. An error is of the kind kind.State.
	Find(devices []spec.CDIDevice) (Edits, error)
}

// Edits change a spec that has been built.
type Edits interface {
	// Apply changes a spec. An error is of the kind kind.State.
	Apply(s *specs.Spec) error
}

// Sessions gives the address at which one client can have a session, within a minute.
type Sessions interface {
	URL(ctx context.Context, r stream.Request) (string, error)
}

// Cgroups places containers, and knows what is in a cgroup.
type Cgroups interface {
	// ContainerPath is the cgroupsPath of a container's spec.
	ContainerPath(parent, podID, id string) (string, error)
	// Of gives the cgroups of a container by its cgroupsPath.
	Of(cgroupsPath string) Cgroup
	// Recorded is the same by what the shim wrote down.
	Recorded(paths map[string]string) Cgroup
	// OfShim is that of a shim, with what it has started and not placed elsewhere.
	OfShim(id string) Cgroup
	RemoveShim(ctx context.Context, id string) error
	Systemd() bool
}

// Cgroup is all cgroups of one container.
type Cgroup interface {
	// Populated says in which directory, if any, processes live, there or below.
	Populated() (dir string, populated bool, err error)
	Kill(ctx context.Context) error
	Remove(ctx context.Context) error
}

// Plugins are told of containers, and may change them (NRI). Each call ends in bounded
// time. The init of a pod is none of theirs.
type Plugins interface {
	// CreateContainer may change the spec. It gives the resources that a request for what
	// they are now would have; nil if they are not changed. RemoveContainer is due after
	// an error, too.
	CreateContainer(ctx context.Context, c *Container, s *specs.Spec) (*runtimeapi.LinuxContainerResources, error)
	PostCreateContainer(ctx context.Context, c *Container)
	StartContainer(ctx context.Context, c *Container) error
	PostStartContainer(ctx context.Context, c *Container)
	// UpdateContainer gives the limits that the container is to have.
	UpdateContainer(ctx context.Context, c *Container,
		r *runtimeapi.LinuxContainerResources) (*runtimeapi.LinuxContainerResources, error)
	PostUpdateContainer(ctx context.Context, c *Container)
	// StopContainer tells of an end, RemoveContainer of a removal, and of the end
	// before it unless that was told. What was told is not told again.
	StopContainer(ctx context.Context, c *Container)
	RemoveContainer(ctx context.Context, c *Container)
}

// Options are what containers are made of.
type Options struct {
	State    *state.Store
	Claims   *claims.Table
	Runtimes *runtimes.Set
	Host     spec.Host
	Images   Images
	Roots    Roots
	Shims    Shims
	Sessions Sessions
	Cgroups  Cgroups
	CDI      CDI // nil: there are no such devices on this node
	Plugins  Plugins
	// NoCRIU says why no checkpoint can be made or restored now; nil if one can.
	NoCRIU func(ctx context.Context) error
	// RestoreImages is that of daemon.Config.
	RestoreImages bool
	// RejectAbsentMounts is that of daemon.Config.
	RejectAbsentMounts bool
	// OwnPaths are those of the runtime itself: nothing is made there or below, as
	// what a pod mounts.
	OwnPaths []string
	// Given is told that a container more is listed. It returns at once, and may be nil.
	Given func()
	// Announce tells subscribers what has happened to a container, in order; nil: nobody
	// is told. It is called under the lock of what is seen. Of the init of a pod it tells
	// the end alone.
	Announce func(c *Container, t runtimeapi.ContainerEventType)
	// Journal keeps what happens to containers. It returns at once, and may be nil.
	Journal func(records.Entry)
	// Go runs f in the background, unless the daemon is closing. It ends with ctx.
	Go  func(f func(ctx context.Context))
	Log *slog.Logger
}

// Manager is all containers but those that are the init of a pod.
type Manager struct {
	Options

	selinuxIgnored sync.Once // the one warning that it is

	mu   sync.Mutex
	all  map[string]*Container
	pods map[string]map[string]*Container // the same by their pods: the kubelet asks pod by pod
	owed map[string]*Container            // removed, and something of theirs is left

	sources   singleflight.Group // looks at paths of the host that are to be mounted
	leftovers singleflight.Group // removals of files of checkpoints

	answers *semaphore.Weighted // bytes of memory for answers of ExecSync
	rooms   sync.Map            // of answers that are not being sent yet: see Room
}

// New makes a manager without containers.
func New(o Options) *Manager {
	return &Manager{
		Options: o,
		all:     map[string]*Container{},
		pods:    map[string]map[string]*Container{},
		owed:    map[string]*Container{},
		answers: semaphore.NewWeighted(maxAnswers),
	}
}

// Container is what is wanted and what was last seen of it.
type Container struct {
	m      *Manager
	pod    Pod
	dir    rundir.Dir
	client *client.Client

	op      claims.Lock
	ending  claims.Lock
	removed bool // by Remove; guarded by op

	undoing   atomic.Bool                             // by EndCheckpoint; false again only under op
	interrupt atomic.Pointer[context.CancelCauseFunc] // ends a checkpoint that is being made; nil: none is

	record atomic.Pointer[records.Container] // replaced by save, never changed in place

	seeing    sync.Mutex // held by observe, and while events are announced
	seen      atomic.Pointer[records.Seen]
	announced runtimeapi.ContainerEventType // the next event that is to be announced; guarded by seeing
	exited    chan struct{}                 // closed when an exit is seen
}

// Adopt makes a container of a record. Add makes it known.
func (m *Manager) Adopt(rec *records.Container, pod Pod, seen records.Seen) *Container {
	dir := m.dir(rec.ID)
	c := &Container{
		m:      m,
		pod:    pod,
		dir:    dir,
		client: client.New(dir),
		op:     claims.NewLock(),
		ending: claims.NewLock(),
		exited: make(chan struct{}),
	}
	c.record.Store(rec)
	c.seen.Store(&seen)
	if seen.Exit != nil {
		close(c.exited)
	}
	// What has happened before is not announced again.
	c.announced = c.happened()
	return c
}

func (m *Manager) dir(id string) rundir.Dir {
	return rundir.Dir(m.State.RunDir(state.Containers, id))
}

// Add makes a container known, unless ready, called under the manager's lock,
// says why not.
func (m *Manager) Add(c *Container, ready func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ready(); err != nil {
		return err
	}
	m.all[c.ID()] = c
	podID := c.Record().PodID
	if m.pods[podID] == nil {
		m.pods[podID] = map[string]*Container{}
	}
	m.pods[podID][c.ID()] = c
	return nil
}

func (m *Manager) forget(c *Container) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all[c.ID()] != c {
		return
	}
	delete(m.all, c.ID())
	podID := c.Record().PodID
	if delete(m.pods[podID], c.ID()); len(m.pods[podID]) == 0 {
		delete(m.pods, podID)
	}
}

func (m *Manager) known(c *Container) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[c.ID()] == c
}

// Find gives a container by its id, or by a prefix that is that of no other one.
func (m *Manager) Find(id string) (*Container, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return records.Find(m.all, id, "container_id", "container")
}

// All gives all containers.
func (m *Manager) All() []*Container {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.all))
}

// Of gives the containers of a pod.
func (m *Manager) Of(podID string) []*Container {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.pods[podID]))
}

// ID is the container's id.
func (c *Container) ID() string { return c.dir.ID() }

// Record is what is wanted. It must not be changed.
func (c *Container) Record() *records.Container { return c.record.Load() }

// Seen is what was seen last.
func (c *Container) Seen() *records.Seen { return c.seen.Load() }

// String names the container in errors.
func (c *Container) String() string { return "container " + records.ShortID(c.ID()) }

func (c *Container) name() string { return c.Record().Config.M.GetMetadata().GetName() }

// save is the one place where a record changes: on disk, then in memory.
func (c *Container) save(change func(*records.Container)) error {
	rec := *c.Record()
	change(&rec)
	// Not synced: it means little without the shim, which a power cut ends too.
	if err := c.m.State.Put(state.Containers, rec.ID, &rec, false); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	c.record.Store(&rec)
	return nil
}

// note is save for what is so whether or not the disk takes it: then it is kept in memory
// alone, and what it stands for is found out again after a restart. The error is of the disk.
func (c *Container) note(change func(*records.Container)) error {
	err := c.save(change)
	if err != nil {
		rec := *c.Record()
		change(&rec)
		c.record.Store(&rec)
		c.m.Log.Warn("cannot write down the state of a container", "container", rec.ID, "error", err)
	}
	return err
}

// observe is the one place where what is seen changes. News may come twice and
// from several sides; a container never goes back, and its first end stays.
func (c *Container) observe(change func(*records.Seen)) {
	c.seeing.Lock()
	defer c.seeing.Unlock()
	was := c.Seen()
	now := *was
	change(&now)
	if was.Exit != nil {
		now.Exit = was.Exit
	}
	if was.Phase == rundir.PhaseRunning && !was.Guessed && now.Phase != rundir.PhaseExited {
		now.Phase = rundir.PhaseRunning
	}
	c.seen.Store(&now)
	if was.Exit == nil && now.Exit != nil {
		close(c.exited)
		c.logExit(now.Exit)
		if !c.Record().Init {
			c.m.Go(func(ctx context.Context) { c.m.Plugins.StopContainer(ctx, c) })
		}
	}
	c.announceLocked(c.happened())
}

func (c *Container) logExit(e *rundir.Exit) {
	if e.Reason == rundir.ReasonNeverRan {
		return // said where it was not created
	}
	c.m.Log.Info("container exited",
		"container", c.ID(),
		"pod", c.Record().PodID,
		"name", c.name(),
		"code", e.Code,
		"reason", e.Reason,
		"source", e.Source,
		"at", e.ExitedAt)
}

// running says why the container does not run; nil if it does.
func (c *Container) running() error {
	if c.Seen().State() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return kind.Errorf(kind.State, "container_id: %s does not run", c)
	}
	return nil
}
