package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/shims"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// Images has one image, which is called image.
type Images struct {
	mu   sync.Mutex
	held int
}

// Layer is the only one of that image.
const Layer digest.Digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// Hold gives the image.
func (i *Images) Hold(_ context.Context, field, ref, _ string) (containers.Image, func(), error) {
	if ref != "image" {
		return containers.Image{}, nil, kind.Errorf(kind.NotFound, "%s: %q is not here", field, ref)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held++
	release := func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.held--
	}
	return containers.Image{
		ID:     "sha256:image",
		Ref:    "image",
		Config: ocispec.ImageConfig{Cmd: Sleeps},
		Layers: []digest.Digest{Layer},
	}, release, nil
}

// Held is how often the image is held.
func (i *Images) Held() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.held
}

// Unwanted does nothing.
func (i *Images) Unwanted([]digest.Digest) {}

// Failing makes something fail until it is told to work again.
type Failing struct {
	mu  sync.Mutex
	err error
}

// Fail sets the error; nil: none.
func (f *Failing) Fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *Failing) try() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Roots mounts nothing: the root of a container is the empty directory.
type Roots struct {
	Mounting, Unmounting Failing
	// Diffing, if not nil, is called when the writable layer of a checkpoint is written.
	Diffing func()

	mu         sync.Mutex
	relabelled map[string]string
}

// Mount mounts nothing.
func (r *Roots) Mount(context.Context, []digest.Digest, string, string, *records.Pod, string) error {
	return r.Mounting.try()
}

// CheckRelabel refuses /etc alone.
func (r *Roots) CheckRelabel(path string) error {
	if path == "/etc" {
		return kind.Errorf(kind.Invalid, "cannot relabel %s", path)
	}
	return nil
}

// Relabel notes what it was asked for.
func (r *Roots) Relabel(_ context.Context, path, label string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.relabelled == nil {
		r.relabelled = map[string]string{}
	}
	r.relabelled[path] = label
	return nil
}

// Relabelled are the labels that paths were given.
func (r *Roots) Relabelled() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.relabelled)
}

// Unmount unmounts nothing.
func (r *Roots) Unmount(string) error { return r.Unmounting.try() }

// UnmountBelow is Unmount.
func (r *Roots) UnmountBelow(dir string) error { return r.Unmount(dir) }

// Diff writes nothing.
func (r *Roots) Diff(context.Context, string, io.Writer) error {
	if r.Diffing != nil {
		r.Diffing()
	}
	return r.Mounting.try()
}

// Restore restores nothing.
func (r *Roots) Restore(context.Context, []digest.Digest, string, ...io.Reader) error {
	return r.Mounting.try()
}

// OpenLayer has no layers.
func (r *Roots) OpenLayer(digest.Digest) (*os.File, error) { return nil, fs.ErrNotExist }

// Bind mounts nothing.
func (r *Roots) Bind(_, _, _ string) error { return r.Mounting.try() }

// Volumes makes none.
func (r *Roots) Volumes(context.Context, string, []string, records.Owner, string, func(string) (bool, bool)) (
	map[string]string, error) {
	return nil, r.Mounting.try()
}

// OpenWay is the path itself.
func (r *Roots) OpenWay(_, root string, _ records.Owner) (string, error) {
	return root, r.Mounting.try()
}

// CloseWay unmounts nothing.
func (r *Roots) CloseWay(string) error { return r.Unmounting.try() }

// RemoveWay is CloseWay.
func (r *Roots) RemoveWay(id string) error { return r.CloseWay(id) }

// Tmpfs mounts nothing.
func (r *Roots) Tmpfs(string, string) error { return r.Mounting.try() }

// Disarm does nothing.
func (r *Roots) Disarm(string) error { return nil }

// PinPID makes a file.
func (r *Roots) PinPID(p rundir.Process, path string) error {
	if !p.Alive() {
		return fmt.Errorf("process %d has ended", p.PID)
	}
	return os.WriteFile(path, nil, 0o600)
}

// Sessions keeps what it was asked for.
type Sessions struct {
	mu    sync.Mutex
	asked []stream.Request
}

// URL gives an address at which nobody listens.
func (s *Sessions) URL(_ context.Context, r stream.Request) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, r)
	return fmt.Sprintf("http://fake/%s/%d", r.Kind, len(s.asked)), nil
}

// Asked is what it was asked for since the last time.
func (s *Sessions) Asked() []stream.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

// Shims starts this test binary as shims.
type Shims struct {
	*shims.Launcher
	// Launched, if not nil, is called when a shim is ready.
	Launched func(dir rundir.Dir) error
}

// Launch starts a shim.
func (s *Shims) Launch(ctx context.Context, dir rundir.Dir) error {
	err := s.Launcher.Launch(ctx, dir)
	if err == nil && s.Launched != nil {
		err = s.Launched(dir)
	}
	return err
}

// Cgroups are directories: the processes of a container work in one of its own,
// which children inherit as they do a cgroup.
type Cgroups struct {
	// Stuck makes kills wait for as long as they may, as of a process that no signal ends.
	Stuck atomic.Bool

	dir string
}

// ContainerPath is where the processes of a container are. This node has no slices.
func (c *Cgroups) ContainerPath(parent, podID, id string) (string, error) {
	if strings.HasSuffix(parent, ".slice") {
		return "", fmt.Errorf("%q is a slice of systemd", parent)
	}
	return filepath.Join(c.dir, podID, id), nil
}

// Of gives the processes of a container.
func (c *Cgroups) Of(path string) containers.Cgroup {
	if c.Stuck.Load() {
		return stuck{cgroup(path)}
	}
	return cgroup(path)
}

// Recorded gives the same.
func (c *Cgroups) Recorded(paths map[string]string) containers.Cgroup { return c.Of(paths[""]) }

// OfShim is that of nobody: a shim of tests starts nothing that it does not place.
func (c *Cgroups) OfShim(string) containers.Cgroup { return cgroup("") }

// RemoveShim does nothing.
func (c *Cgroups) RemoveShim(context.Context, string) error { return nil }

// RemovePod fails while there is something in the pod.
func (c *Cgroups) RemovePod(_ context.Context, _, podID string) error {
	return ignoreMissing(os.Remove(filepath.Join(c.dir, podID)))
}

// Systemd is false.
func (c *Cgroups) Systemd() bool { return false }

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// cgroup is a directory, and those below it; "" is none.
type cgroup string

// processes are those that live: one that has ended works nowhere.
func (c cgroup) processes() ([]rundir.Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil || c == "" {
		return nil, err
	}
	var all []rundir.Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil || dir != string(c) && !strings.HasPrefix(dir, string(c)+"/") {
			continue
		}
		if p, err := rundir.FindProcess(pid); err == nil {
			all = append(all, p)
		}
	}
	return all, nil
}

func (c cgroup) Populated() (string, bool, error) {
	list, err := c.processes()
	return string(c), len(list) > 0, err
}

func (c cgroup) Kill(ctx context.Context) error {
	for {
		list, err := c.processes()
		if err != nil || len(list) == 0 {
			return err
		}
		for _, proc := range list {
			p, err := pidfd.Open(proc.PID, proc.Alive)
			if err != nil {
				continue // it has ended
			}
			err = p.Kill(ctx)
			p.Close()
			if err != nil {
				return err
			}
		}
	}
}

// stuck is a cgroup with a process that no signal ends.
type stuck struct{ cgroup }

func (stuck) Kill(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func (c cgroup) Remove(context.Context) error {
	_, populated, err := c.Populated()
	if err == nil && populated {
		err = fmt.Errorf("cannot remove %s: processes live there", c)
	}
	if err != nil {
		return err
	}
	return ignoreMissing(os.Remove(string(c)))
}

// Network has namespaces and addresses without any.
type Network struct {
	Adding, Deleting Failing

	mu      sync.Mutex
	pinned  map[string]records.Namespaces
	deleted []string
}

// CreateNamespaces notes that the pod has namespaces.
func (n *Network) CreateNamespaces(id string, w records.Want) (records.Namespaces, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ns records.Namespaces
	if w.Net {
		ns.Net = "/fake/net/" + id
	}
	if w.IPC {
		ns.IPC = "/fake/ipc/" + id
	}
	n.pinned[id] = ns
	return ns, nil
}

// RemoveNamespaces notes that the pod has none any more.
func (n *Network) RemoveNamespaces(id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pinned, id)
	return nil
}

// Pinned are those of the pod.
func (n *Network) Pinned(id string) records.Namespaces {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pinned[id]
}

// Config is one that nobody reads.
func (n *Network) Config() ([]byte, error) { return []byte("{}"), nil }

// Add gives an address of each family.
func (n *Network) Add(context.Context, records.Attachment) (records.Result, error) {
	return records.Result{IPs: []string{"10.0.0.7", "fd00::7"}, Raw: []byte("{}")}, n.Adding.try()
}

// SetInterfaceSysctls does nothing.
func (n *Network) SetInterfaceSysctls(string, records.Want) error { return nil }

// Del gives the address back.
func (n *Network) Del(_ context.Context, a records.Attachment) error {
	err := n.Deleting.try()
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil {
		n.deleted = append(n.deleted, a.ID)
	}
	return err
}

// Deleted is how often DEL has succeeded for a pod.
func (n *Network) Deleted(id string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	times := 0
	for _, d := range n.deleted {
		if d == id {
			times++
		}
	}
	return times
}
