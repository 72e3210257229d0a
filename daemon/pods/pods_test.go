package pods_test

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
	"github.com/holdfast-cri/holdfast/tests/refusals"
)

func TestMain(m *testing.M) { os.Exit(fake.Main(func() int { return refusals.Tests{}.Main(m.Run) })) }

const (
	ready    = runtimeapi.PodSandboxState_SANDBOX_READY
	notReady = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
)

// bed is a node with a daemon.
type bed struct {
	*fake.Node
	*fake.Daemon
	t *testing.T
}

func newBed(t *testing.T) *bed {
	t.Helper()
	t.Parallel()
	n := fake.NewNode(t)
	return &bed{n, n.Open(t), t}
}

func (b *bed) debts(id string) []records.Debt {
	b.t.Helper()
	var rec records.Pod
	must.Succeed(b.t, b.Store.Get(state.Pods, id, &rec))
	return rec.Debts
}

func (b *bed) remove(id string) {
	b.t.Helper()
	for range 2 { // the second time there is nothing to do
		must.Succeed(b.t, b.Pods.Remove(b.t.Context(), id))
	}
	if _, err := b.Pods.Find(id); !errors.Is(err, kind.NotFound) {
		b.t.Errorf("it is still known: %v", err)
	}
}

// clean looks for what there is of any pod or container.
func (b *bed) clean() {
	b.t.Helper()
	if left := b.Left(b.t); len(left) > 0 {
		b.t.Errorf("left: %v", left)
	}
}

func TestLife(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	id := b.RunPod(t, "pod")
	if s := b.PodStatus(t, id); s.State != ready || s.Network.Ip != "10.0.0.7" ||
		len(s.Network.AdditionalIps) != 1 || s.Network.AdditionalIps[0].Ip != "fd00::7" {
		t.Errorf("after run: %v", s)
	}
	hosts, err := os.ReadFile(filepath.Join(b.Store.RunDir(state.Pods, id), "etc", "hosts"))
	if err != nil || !strings.Contains(string(hosts), "10.0.0.7\thost\n") {
		t.Errorf("/etc/hosts: %q, %v", hosts, err)
	}
	c := b.Run(t, id, fake.ContainerConfig("c"))
	for range 2 {
		must.Succeed(t, b.Pods.Stop(ctx, id))
	}
	if s := b.PodStatus(t, id); s.State != notReady || s.Network.Ip != "" || len(s.Network.AdditionalIps) != 0 {
		t.Errorf("after stop: %v", s)
	}
	if n := b.Network.Deleted(id); n != 1 {
		t.Errorf("DEL ran %d times", n)
	}
	resp, err := b.Containers.Status(c, false)
	if err != nil || resp.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED || resp.Status.ExitCode != 137 {
		t.Errorf("its container: %v, %v", resp, err)
	}
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	if _, err := b.Containers.Create(ctx, p, fake.ContainerConfig("late"), nil); !errors.Is(err, kind.State) {
		t.Errorf("a container in a stopped pod: %v", err)
	}
	b.remove(id)
	b.clean()
}

// Removing what runs ends it first.
func TestRemoveWhatRuns(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	b.Run(t, id, fake.ContainerConfig("a"))
	b.Run(t, id, fake.ContainerConfig("b", fake.Stubborn...))
	b.remove(id[:9])
	b.clean()
	if b.Network.Pinned(id) != (records.Namespaces{}) || b.Network.Deleted(id) != 1 {
		t.Error("its network is left")
	}
}

func TestOneName(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	id := b.RunPod(t, "pod")
	if again := b.RunPod(t, "pod"); again != id {
		t.Errorf("the same request again made %s beside %s", again, id)
	}
	other := fake.PodConfig("pod")
	other.Hostname = "other"
	if _, err := b.Pods.Run(ctx, other, ""); !errors.Is(err, kind.Exists) {
		t.Errorf("another config under the name: %v", err)
	}
	must.Succeed(t, b.Pods.Stop(ctx, id))
	if _, err := b.Pods.Run(ctx, fake.PodConfig("pod"), ""); !errors.Is(err, kind.Exists) {
		t.Errorf("the same request after the stop: %v", err)
	}
	b.remove(id)
	if next := b.RunPod(t, "pod"); next == id {
		t.Error("a removed pod came back")
	}
	if len(b.Pods.List(nil)) != 1 {
		t.Errorf("listed: %v", b.Pods.List(nil))
	}
}

func TestRunRefuses(t *testing.T) {
	b := newBed(t)
	userns := fake.PodConfig("pod")
	userns.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_POD
	userns.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{
		Mode: runtimeapi.NamespaceMode_POD,
		Uids: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}},
		Gids: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}},
	}
	slice := fake.PodConfig("pod")
	slice.Linux.CgroupParent = "/a.slice"
	const linux = "config.linux."
	for field, c := range map[string]struct {
		cfg     *runtimeapi.PodSandboxConfig
		handler string
		err     error
	}{
		"config":                {nil, "", kind.Invalid},
		"runtime_handler":       {fake.PodConfig("pod"), "absent", kind.Invalid},
		linux + "cgroup_parent": {slice, "", kind.Invalid},
		// The OCI runtime does not know it.
		linux + "security_context.namespace_options.userns_options": {userns, "", kind.Unsupported},
	} {
		id, err := b.Pods.Run(t.Context(), c.cfg, c.handler)
		if !errors.Is(err, c.err) || !strings.HasPrefix(err.Error(), field+": ") {
			t.Errorf("%s: %s, %v", field, id, err)
		}
	}
	b.clean()
}

// An ADD that fails is followed by DEL, and leaves nothing. If DEL fails as well, the pod is
// in no list, its name is free, and DEL is tried again in the background.
func TestAddFails(t *testing.T) {
	b := newBed(t)
	broken := errors.New("broken")
	b.Network.Adding.Fail(broken)
	if _, err := b.Pods.Run(t.Context(), fake.PodConfig("pod"), ""); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	b.clean()
	b.Network.Deleting.Fail(broken)
	if _, err := b.Pods.Run(t.Context(), fake.PodConfig("pod"), ""); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if list := b.Pods.List(nil); len(list) != 0 {
		t.Errorf("listed: %v", list)
	}
	ids, err := b.Store.IDs(state.Pods)
	if err != nil || len(ids) != 1 {
		t.Fatalf("on record: %q, %v", ids, err)
	}
	if owed := b.debts(ids[0]); !slices.Contains(owed, records.DebtNetwork) {
		t.Errorf("on record is %v", owed)
	}
	b.Network.Adding.Fail(nil)
	next := b.RunPod(t, "pod")
	b.Network.Deleting.Fail(nil)
	must.Come(t, "DEL", func() bool { return b.Network.Deleted(ids[0]) > 0 })
	b.remove(next)
	must.Come(t, "an empty node", func() bool { return len(b.Left(t)) == 0 })
}

// A network that refuses DEL is told to whoever stops the pod, and keeps nobody
// from removing it: the address is given back as soon as that is possible.
func TestNetworkRefuses(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	id := b.RunPod(t, "pod")
	b.Run(t, id, fake.ContainerConfig("c"))
	refused := errors.New("the plugin is gone")
	b.Network.Deleting.Fail(refused)
	for range 2 {
		err := b.Pods.Stop(ctx, id)
		if !errors.Is(err, refused) || !errors.Is(err, kind.Unavailable) {
			t.Errorf("stop: %v", err)
		}
	}
	if s := b.PodStatus(t, id); s.State != notReady {
		t.Errorf("after the stop: %v", s)
	}
	// What else it held is given back meanwhile, but for what DEL needs.
	for d, want := range map[records.Debt]bool{records.DebtNamespaces: true, records.DebtMounts: false} {
		if owed := b.debts(id); slices.Contains(owed, d) != want {
			t.Errorf("%s is owed: %v, want %v", d, owed, want)
		}
	}
	b.remove(id)
	if got := b.debts(id); !slices.Contains(got, records.DebtNetwork) {
		t.Errorf("on record after the removal: %v", got)
	}
	if next := b.RunPod(t, "pod"); next == id {
		t.Error("the name is still taken")
	} else {
		defer b.remove(next)
	}
	b.Network.Deleting.Fail(nil)
	must.Come(t, "the end of the record", func() bool {
		_, err := os.Stat(b.Durable(state.Pods, id))
		return errors.Is(err, fs.ErrNotExist)
	})
	if n := b.Network.Deleted(id); n != 1 {
		t.Errorf("DEL ran %d times", n)
	}
}

// The debt of a pod that stays is paid in the background too.
func TestStoppedPodPaysLater(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	b.Network.Deleting.Fail(errors.New("the plugin is gone"))
	if err := b.Pods.Stop(t.Context(), id); err == nil {
		t.Error("a pod was stopped that has its address still")
	}
	b.Network.Deleting.Fail(nil)
	must.Come(t, "DEL, which nobody asks for again", func() bool { return b.Network.Deleted(id) == 1 })
	if err := b.Pods.Stop(t.Context(), id); err != nil {
		t.Error(err)
	}
	if n := b.Network.Deleted(id); n != 1 {
		t.Errorf("DEL ran %d times", n)
	}
	b.remove(id)
	b.clean()
}

// The init of a pod is made when the first container asks for it, is in no list,
// and goes with the pod.
func TestInit(t *testing.T) {
	b := newBed(t)
	var warnings strings.Builder
	b.Containers.Log = slog.New(slog.NewTextHandler(&warnings, &slog.HandlerOptions{Level: slog.LevelWarn}))
	id := b.RunPod(t, "pod")
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	b.Run(t, id, fake.ContainerConfig("own"))
	if p.Init() != nil {
		t.Error("there is an init that nobody asked for")
	}
	b.Run(t, id, fake.Shared("a"))
	first := p.Init()
	b.Run(t, id, fake.Shared("b"))
	if first == nil || p.Init() != first || !first.Seen().Init.Alive() {
		t.Fatalf("init: %v, then %v", first, p.Init())
	}
	if list := b.Containers.List(nil); len(list) != 3 {
		t.Errorf("listed: %v", list)
	}
	if err := b.Pods.Stop(t.Context(), id); err != nil || first.Seen().Init.Alive() {
		t.Errorf("stop: %v; init lives: %t", err, first.Seen().Init.Alive())
	}
	b.remove(id)
	b.clean()
	if w := warnings.String(); w != "" {
		t.Errorf("it was not removed once: %s", w)
	}
}

// What is left of an init that could not be made goes with the pod, whose removal it does not
// hold back.
func TestInitHalfMade(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	b.Shims.Launched = func(rundir.Dir) error { return errors.New("no room") }
	b.Roots.Unmounting.Fail(errors.New("busy"))
	if _, err := b.Containers.Create(t.Context(), p, fake.Shared("c"), nil); err == nil {
		t.Error("a container without the init of its pod")
	}
	b.Shims.Launched = nil
	if err := b.Pods.Remove(t.Context(), id); err != nil {
		t.Error(err)
	}
	if list := b.Pods.List(nil); len(list) > 0 {
		t.Errorf("listed: %v", list)
	}
	b.Roots.Unmounting.Fail(nil)
	must.Come(t, "an empty node", func() bool { return len(b.Left(t)) == 0 })
}

// A pod whose init has ended is not ready: nothing can join it.
func TestInitIsKilled(t *testing.T) {
	for name, kill := range map[string]func(*bed, *records.Seen, string) error{
		"init itself": func(_ *bed, s *records.Seen, _ string) error {
			return syscall.Kill(s.Init.PID,
				syscall.SIGKILL)
		},
		"its shim": func(b *bed, _ *records.Seen, id string) error {
			shim, err := b.Dir(id).FindShim()
			if err != nil {
				return err
			}
			return syscall.Kill(shim.PID, syscall.SIGKILL)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			id := b.RunPod(t, "pod")
			c := b.Run(t, id, fake.Shared("c"))
			p, err := b.Pods.Find(id)
			must.Succeed(t, err)
			must.Succeed(t, kill(b, p.Init().Seen(), id))
			must.Come(t, "the pod not to be ready", func() bool { return b.PodStatus(t, id).State == notReady })
			_, err = b.Containers.Create(t.Context(), p, fake.ContainerConfig("late"), nil)
			if !errors.Is(err, kind.State) {
				t.Errorf("a container in it: %v", err)
			}
			if err := b.Containers.Stop(t.Context(), c, time.Minute); err != nil {
				t.Error(err)
			}
			b.remove(id)
			b.clean()
		})
	}
}

// Removing a pod waits for the creation of a container in it.
func TestRemoveDuringCreate(t *testing.T) {
	b := newBed(t)
	id := b.RunPod(t, "pod")
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	launched, proceed := make(chan struct{}), make(chan struct{})
	b.Shims.Launched = func(rundir.Dir) error {
		close(launched)
		<-proceed
		return nil
	}
	created, removed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := b.Containers.Create(context.WithoutCancel(t.Context()), p, fake.ContainerConfig("c"), nil)
		created <- err
	}()
	<-launched
	go func() { removed <- b.Pods.Remove(t.Context(), id) }()
	must.Come(t, "the stop of the pod", func() bool { return p.Record().Phase == records.PodStopped })
	b.remove(b.RunPod(t, "other")) // takes longer than what is left of the removal
	select {
	case err := <-removed:
		t.Errorf("removed under a creation: %v", err)
		removed <- err
	default:
	}
	close(proceed)
	if err := <-created; !errors.Is(err, kind.State) {
		t.Errorf("create: %v", err)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	b.clean()
}
