package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
	"github.com/holdfast-cri/holdfast/tests/refusals"
)

func TestMain(m *testing.M) { os.Exit(fake.Main(func() int { return refusals.Tests{}.Main(m.Run) })) }

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
	ready   = runtimeapi.PodSandboxState_SANDBOX_READY
)

// bed is a node on which one daemon runs after the other.
type bed struct {
	*fake.Node
	*fake.Daemon
	t     *testing.T
	joint *Daemon // of the same parts

	laterLimit time.Duration
}

func newBed(t *testing.T) *bed {
	t.Helper()
	t.Parallel()
	b := &bed{Node: fake.NewNode(t), t: t, laterLimit: time.Minute}
	b.open()
	t.Cleanup(b.close)
	return b
}

// open starts a daemon, which recovers what the one before has left.
func (b *bed) open() *recovery {
	b.t.Helper()
	b.Daemon = b.Open(b.t)
	d := &Daemon{
		state:      b.Store,
		claims:     b.Claims,
		Containers: b.Containers,
		Pods:       b.Pods,
		Events:     b.Daemon.Events,
		log:        b.Log,
		laterLimit: b.laterLimit,
	}
	d.ctx, d.stop = context.WithCancel(context.Background())
	b.joint = d
	images := filepath.Join(filepath.Dir(b.Root), "images")
	store, err := image.Open(image.Options{Root: images, ProgressDir: filepath.Join(images, "pulls"), Log: b.Log})
	if err != nil {
		b.t.Fatal(err)
	}
	if d.layers, err = rootfs.Open(filepath.Join(images, "layers"), b.Log); err != nil {
		b.t.Fatal(err)
	}
	d.Images = &Images{Library: image.NewLibrary(store, d.layers, d.inUse), layers: d.layers}
	r, err := d.recover()
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// close ends the daemon; shims and files stay.
func (b *bed) close() {
	b.joint.stop()
	b.joint.work.Wait()
	b.Daemon.Close()
	b.joint.Images.Close()
	b.joint.layers.Close()
}

// removeAll removes pods, in whatever state they are, and looks for what is left.
func (b *bed) removeAll(podIDs ...string) {
	b.t.Helper()
	for _, id := range podIDs {
		for _, do := range []func(context.Context, string) error{b.Pods.Stop, b.Pods.Remove} {
			if err := do(b.t.Context(), id); err != nil {
				b.t.Error(err)
			}
		}
	}
	must.Come(b.t, "an empty node", func() bool { return len(b.Left(b.t)) == 0 })
}

// Whatever is damaged while a container runs and no daemon does: the next daemon
// tells that it runs, and can stop and remove it.
func TestRecoverDamaged(t *testing.T) {
	all := fake.RunDirDamages()
	for name, damage := range fake.Damages("record.json") {
		all["durable "+name] = func(dir string) error {
			return damage(filepath.Join(dir, "../../../root/containers", filepath.Base(dir)))
		}
	}
	all["no durable directory"] = func(dir string) error {
		return os.RemoveAll(filepath.Join(dir, "../../../root/containers", filepath.Base(dir)))
	}
	for name, damage := range all {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			pod := b.RunPod(t, "pod")
			fresh := b.Create(t, pod, fake.ContainerConfig("fresh"))
			ran := b.Run(t, pod, fake.ContainerConfig("ran"))
			started := b.Status(t, ran).StartedAt
			b.close()
			for _, id := range []string{fresh, ran} {
				check(t, damage(string(b.Dir(id))))
			}
			b.open()
			if s := b.PodStatus(t, pod); s.State != ready || s.Network.GetIp() == "" {
				t.Errorf("the pod: %v", s)
			}
			if s := b.Status(t, ran); s.State != running || !b.Lives(t, pod, ran) {
				t.Errorf("the one that runs: %v", s)
			}
			if s := b.Status(t, fresh); s.State != created || !b.Lives(t, pod, fresh) {
				t.Errorf("the one that was not started: %v", s)
			}
			if err := b.Containers.Start(t.Context(), fresh); err != nil {
				t.Error(err)
			}
			if again := b.Create(t, pod, fake.ContainerConfig("ran")); again != ran {
				t.Errorf("the same request again made %s beside %s", again, ran)
			}
			if err := b.Containers.Stop(t.Context(), ran, time.Minute); err != nil {
				t.Error(err)
			}
			if s := b.Status(t, ran); s.ExitCode != 143 || s.StartedAt != started {
				t.Errorf("after the stop: %v", s)
			}
			b.removeAll(pod)
		})
	}
}

// The same, and the shims were killed too: what ran is ended, and told to have been
// killed; what was not started is not told to have run.
func TestRecoverDamagedWithoutShims(t *testing.T) {
	for name, damage := range fake.RunDirDamages() {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			pod := b.RunPod(t, "pod")
			fresh := b.Create(t, pod, fake.ContainerConfig("fresh"))
			ran := b.Run(t, pod, fake.ContainerConfig("ran"))
			over := b.Run(t, pod, fake.ContainerConfig("over", "sh", "-c", "exit 3"))
			b.Ended(t, over)
			must.Come(t, "the end of a shim", func() bool {
				_, err := b.Dir(over).FindShim()
				return errors.Is(err, rundir.ErrNoProcess)
			})
			b.close()
			for _, id := range []string{fresh, ran} {
				b.KillShim(t, id)
			}
			for _, id := range []string{fresh, ran, over} {
				if err := damage(string(b.Dir(id))); err != nil && !(id == over && errors.Is(err, fs.ErrNotExist)) {
					t.Fatal(err)
				}
			}
			b.open()
			if s := b.Status(t, over); s.State != exited || s.ExitCode != 3 || s.StartedAt == 0 {
				t.Errorf("the one that had ended: %v", s)
			}
			if s := b.Ended(t, ran); s.ExitCode != 137 || s.Reason != rundir.ReasonShimDied {
				t.Errorf("the one that ran: %v", s)
			}
			if s := b.Ended(t, fresh); s.ExitCode != rundir.CodeUnknown || s.Reason != rundir.ReasonNeverRan {
				t.Errorf("the one that was not started: %v", s)
			}
			for _, id := range []string{fresh, ran} {
				if b.Lives(t, pod, id) {
					t.Error("processes are left")
				}
			}
			b.removeAll(pod)
		})
	}
}

// The records of a pod stand in for each other, and in the end its containers do.
func TestRecoverPod(t *testing.T) {
	record := func(b *bed, id string) string { return filepath.Join(b.Durable(state.Pods, id), "record.json") }
	mirror := func(b *bed, id string) string { return filepath.Join(b.Store.RunDir(state.Pods, id), "record.json") }
	for name, c := range map[string]struct {
		damage func(b *bed, podID, containerID string) error
		ready  bool
	}{
		"nothing":   {func(*bed, string, string) error { return nil }, true},
		"no record": {func(b *bed, pod, _ string) error { return os.Remove(record(b, pod)) }, true},
		"damaged record": {
			func(b *bed, pod, _ string) error { return os.WriteFile(record(b, pod), []byte("{}"), 0o600) },
			true,
		},
		"no copy": {func(b *bed, pod, _ string) error { return os.Remove(mirror(b, pod)) }, true},
		"neither": {
			func(b *bed, pod, _ string) error {
				return errors.Join(os.Remove(record(b, pod)), os.Remove(mirror(b, pod)))
			},
			true,
		},
		"only a container": {
			func(b *bed, pod, c string) error {
				return errors.Join(os.Remove(record(b, pod)), os.Remove(mirror(b, pod)),
					os.Remove(b.Dir(c).Path(rundir.LaunchName)))
			},
			false,
		},
		"the whole root": {func(b *bed, _, _ string) error { return os.RemoveAll(b.Root) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			pod := b.RunPod(t, "pod")
			id := b.Run(t, pod, fake.ContainerConfig("c"))
			b.close()
			check(t, c.damage(b, pod, id))
			b.open()
			if s := b.PodStatus(t, pod); s.State == ready != c.ready {
				t.Errorf("the pod: %v", s)
			}
			if s := b.Status(t, id); s.State != running || !b.Lives(t, pod, id) {
				t.Errorf("its container: %v", s)
			}
			if c.ready && b.RunPod(t, "pod") != pod {
				t.Error("the same request again made another pod")
			}
			b.removeAll(pod)
			if b.Network.Deleted(pod) == 0 {
				t.Error("its address was not given back")
			}
		})
	}
}

// A container that lives and of which no record reads is left alone, and is no
// container's name.
func TestRecoverUnknown(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	id := b.Run(t, pod, fake.ContainerConfig("c"))
	b.close()
	err := errors.Join(
		os.WriteFile(filepath.Join(b.Durable(state.Containers, id), "record.json"), nil, 0o600),
		os.WriteFile(b.Dir(id).Path(rundir.LaunchName), nil, 0o600),
	)
	check(t, err)
	for range 2 {
		if r := b.open(); r.complete() {
			t.Error("all pods of the node are known, whatever the container's is")
		}
		b.joint.work.Wait() // all that is done behind the daemon
		if _, err := b.Containers.Find(id); !errors.Is(err, kind.NotFound) || !b.Lives(t, pod, id) {
			t.Errorf("found: %v, lives: %t", err, b.Lives(t, pod, id))
		}
		if _, err := os.Stat(b.Durable(state.Containers, id)); err != nil {
			t.Error(err)
		}
		b.close()
	}
	// Once it is over it goes.
	b.KillShim(t, id)
	path, _ := b.Cgroups.ContainerPath("", pod, id)
	check(t, b.Cgroups.Of(path).Kill(t.Context()))
	b.open()
	b.removeAll(pod)
}

// A pod of which no record reads is left alone for as long as a container lives of
// which none reads either: its network may be that one's.
func TestRecoverUnknownPod(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	id := b.Run(t, pod, fake.ContainerConfig("c"))
	b.close()
	err := errors.Join(
		os.Remove(filepath.Join(b.Durable(state.Containers, id), "record.json")),
		os.Remove(b.Dir(id).Path(rundir.LaunchName)),
		os.Remove(filepath.Join(b.Durable(state.Pods, pod), "record.json")),
		os.Remove(filepath.Join(b.State, "pods", pod, "record.json")),
	)
	check(t, err)
	b.open()
	b.joint.work.Wait()
	if n := b.Network.Deleted(pod); n != 0 || b.Network.Pinned(pod) == (records.Namespaces{}) || !b.Lives(t, pod, id) {
		t.Errorf("its network was deleted %d times; it lives: %t", n, b.Lives(t, pod, id))
	}
	b.close()
	b.KillShim(t, id)
	path, _ := b.Cgroups.ContainerPath("", pod, id)
	check(t, b.Cgroups.Of(path).Kill(t.Context()))
	r := b.open() // both go
	if phase := r.unknownPod(pod).Phase; phase != records.PodRemoved {
		t.Errorf("a start that finds it half removed would serve it: it is %s", phase)
	}
	must.Come(t, "an empty node", func() bool { return len(b.Left(t)) == 0 })
}

// put changes the record of a container while no daemon runs.
func (b *bed) put(id string, change func(*records.Container)) {
	b.t.Helper()
	var rec records.Container
	err := b.Store.Get(state.Containers, id, &rec)
	if err == nil {
		change(&rec)
		err = b.Store.Put(state.Containers, id, &rec, false)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// What was cut short is undone or finished, with or without a shim.
func TestRecoverCutShort(t *testing.T) {
	for _, phase := range []records.ContainerPhase{records.ContainerCreating, records.ContainerRemoving} {
		for _, shim := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s with a shim %t", phase, shim), func(t *testing.T) {
				b := newBed(t)
				pod := b.RunPod(t, "pod")
				id := b.Create(t, pod, fake.ContainerConfig("c"))
				b.close()
				b.put(id, func(r *records.Container) { r.Phase = phase })
				if !shim {
					b.KillShim(t, id)
				}
				b.open()
				must.Come(t, "the end of it", func() bool {
					_, err := os.Stat(b.Durable(state.Containers, id))
					return errors.Is(err, fs.ErrNotExist)
				})
				if b.Lives(t, pod, id) {
					t.Error("its processes live")
				}
				p, err := b.Pods.Find(pod)
				check(t, err)
				must.Come(t, "the name to be free", func() bool {
					next, err := b.Containers.Create(t.Context(), p, fake.ContainerConfig("c"), nil)
					return err == nil && next != id
				})
				b.removeAll(pod)
			})
		}
	}
}

// After a boot nothing runs: what was durable is told, the rest is not known.
func TestRecoverAfterBoot(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	over := b.Run(t, pod, fake.ContainerConfig("over", "sh", "-c", "exit 3"))
	b.Ended(t, over)
	ran := b.Run(t, pod, fake.ContainerConfig("ran"))
	b.close()
	b.KillShim(t, ran)
	path, _ := b.Cgroups.ContainerPath("", pod, ran)
	check(t, b.Cgroups.Of(path).Kill(t.Context()))
	for _, id := range []string{over, ran} {
		b.put(id, func(r *records.Container) { r.BootID = "another" })
	}
	var rec records.Pod
	err := b.Store.Get(state.Pods, pod, &rec)
	rec.BootID = "another"
	err = errors.Join(err, b.Store.Put(state.Pods, pod, &rec, false), os.RemoveAll(b.State))
	check(t, err)
	b.open()
	if s := b.PodStatus(t, pod); s.State == ready {
		t.Errorf("the pod: %v", s)
	}
	if s := b.Status(t, over); s.ExitCode != 3 || s.State != exited {
		t.Errorf("the one that had ended: %v", s)
	}
	if s := b.Status(t, ran); s.State != exited || s.ExitCode != rundir.CodeUnknown ||
		s.Reason != rundir.ReasonUnknown {
		t.Errorf("the one that ran: %v", s)
	}
	b.removeAll(pod)
	if b.Network.Deleted(pod) == 0 {
		t.Error("its address was not given back")
	}
}

// What a pod owes is known to the next daemon, and paid when that is possible.
func TestRecoverDebts(t *testing.T) {
	for name, c := range map[string]struct {
		leave func(*bed, string) error
		stays bool // the pod is still known
	}{
		"of a removed pod": {func(b *bed, pod string) error { return b.Pods.Remove(b.t.Context(), pod) }, false},
		"of a pod that is being stopped": {
			func(b *bed, pod string) error {
				if b.Pods.Stop(b.t.Context(), pod) == nil {
					return errors.New("it was stopped, and has its address still")
				}
				return nil
			},
			true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			pod := b.RunPod(t, "pod")
			b.Run(t, pod, fake.ContainerConfig("c"))
			b.Network.Deleting.Fail(errors.New("the plugin is gone"))
			check(t, c.leave(b, pod))
			for range 2 {
				b.close()
				if r := b.open(); !r.complete() || !slices.Contains(r.podIDs, pod) {
					t.Errorf("complete: %t, pods %q; its address is still owed", r.complete(), r.podIDs)
				}
				var rec records.Pod
				if err := b.Store.Get(state.Pods, pod, &rec); err != nil || !rec.Owes(records.DebtNetwork) {
					t.Fatalf("on record: %v, %v", rec.Debts, err)
				}
				if _, err := b.Pods.Find(pod); errors.Is(err, kind.NotFound) == c.stays {
					t.Errorf("the pod: %v", err)
				}
			}
			b.Network.Deleting.Fail(nil)
			if c.stays { // the kubelet asks again, until it is stopped
				if err := b.Pods.Stop(t.Context(), pod); err != nil {
					t.Error(err)
				}
			}
			must.Come(t, "DEL", func() bool { return b.Network.Deleted(pod) == 1 })
			b.removeAll(pod)
		})
	}
}

// A pod that was never acknowledged, and whose undoing fails, does not take its name from the one that was
// made under it since, and is undone as soon as that is possible.
func TestRecoverUndoneLater(t *testing.T) {
	b := newBed(t)
	old := b.RunPod(t, "pod")
	b.close()
	var rec records.Pod
	err := b.Store.Get(state.Pods, old, &rec)
	rec.Phase = records.PodCreating
	check(t, errors.Join(err, b.Store.Put(state.Pods, old, &rec, false)))
	b.Network.Deleting.Fail(errors.New("the plugin is gone"))
	b.open()
	var pod string
	must.Come(t, "the name to be free", func() bool {
		pod, err = b.Pods.Run(t.Context(), fake.PodConfig("pod"), "")
		return err == nil
	})
	// As a daemon has left it that was killed before it could note that the undoing had failed.
	b.close()
	check(t, b.Store.Get(state.Pods, old, &rec))
	rec.Phase = records.PodCreating
	check(t, b.Store.Put(state.Pods, old, &rec, false))
	b.open()
	for range 2 {
		again, err := b.Pods.Run(t.Context(), fake.PodConfig("pod"), "")
		if err != nil || again != pod || len(b.Pods.List(nil)) != 1 {
			t.Errorf("the name is that of %s, not %s: %v", again, pod, err)
		}
		b.Network.Deleting.Fail(nil)
		must.Come(t, "DEL, with no other start", func() bool { return b.Network.Deleted(old) > 0 })
	}
	b.removeAll(pod)
}

// A process that no signal ends keeps a container from being removed, and nothing else.
func TestRecoverStuck(t *testing.T) {
	b := newBed(t)
	stuck, other := b.RunPod(t, "stuck"), b.RunPod(t, "other")
	id := b.Run(t, stuck, fake.ContainerConfig("c"))
	b.close()
	b.KillShim(t, id)
	b.put(id, func(r *records.Container) { r.Phase = records.ContainerRemoving })
	var rec records.Pod
	err := b.Store.Get(state.Pods, other, &rec)
	rec.Phase = records.PodCreating
	check(t, errors.Join(err, b.Store.Put(state.Pods, other, &rec, false)))
	b.Cgroups.Stuck.Store(true)
	b.laterLimit = time.Second
	b.open()
	var next string
	must.Come(t, "the name of the other pod to be free", func() bool {
		next, err = b.Pods.Run(t.Context(), fake.PodConfig("other"), "")
		return err == nil
	})
	b.Cgroups.Stuck.Store(false)
	b.removeAll(stuck, next)
}

// A pod that was stopped while the disk was full is not ready again, whatever the disk says.
func TestRecoverStoppedOnFullDisk(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	record := filepath.Join(b.Store.Dir(state.Pods, pod), "record.json")
	check(t, os.Rename(record, record+".aside"))
	check(t, os.MkdirAll(filepath.Join(record, "full"), 0o700)) // nothing can be written there
	check(t, b.Pods.Stop(t.Context(), pod))
	b.close()
	check(t, os.RemoveAll(record))
	check(t, os.Rename(record+".aside", record))
	for range 2 {
		b.open()
		list := b.Pods.List(nil)
		if len(list) != 1 || list[0].State == ready {
			t.Errorf("listed: %v", list)
		}
		b.close()
	}
	b.open()
	b.removeAll(pod)
}

// A pod that was removed does not come back because something is left of one of its containers.
func TestRecoverRemovedPod(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	id := b.Create(t, pod, fake.ContainerConfig("c"))
	var rec records.Container
	check(t, b.Store.Get(state.Containers, id, &rec))
	b.removeAll(pod)
	b.close()
	rec.Phase = records.ContainerRemoving
	check(t, errors.Join(b.Store.Create(state.Containers, id), b.Store.Put(state.Containers, id, &rec, false)))
	b.open()
	if list := b.Pods.List(nil); len(list) != 0 {
		t.Errorf("listed: %v", list)
	}
	if _, err := b.Pods.Find(pod); !errors.Is(err, kind.NotFound) {
		t.Errorf("the pod: %v", err)
	}
	must.Come(t, "an empty node", func() bool { return len(b.Left(t)) == 0 })
}

// A container whose removal was answered does not come back because something is left of it.
func TestRecoverRemovedContainer(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	id := b.Run(t, pod, fake.ContainerConfig("c"))
	b.Roots.Unmounting.Fail(errors.New("busy"))
	check(t, b.Containers.Remove(t.Context(), id))
	next := b.Create(t, pod, fake.ContainerConfig("c"))
	b.close()
	if r := b.open(); r.quarantined != 0 || !b.Containers.InUse(fake.Layer) {
		t.Errorf("%d objects were put aside; its layer in use: %t", r.quarantined, b.Containers.InUse(fake.Layer))
	}
	if list := b.Containers.List(nil); len(list) != 1 || list[0].Id != next {
		t.Errorf("listed: %v", list)
	}
	if got, want := b.told(1), id+" CONTAINER_DELETED_EVENT -1 SANDBOX_READY"; got[0] != want {
		t.Errorf("told %q, want %q", got, want)
	}
	b.Roots.Unmounting.Fail(nil)
	b.removeAll(pod)
}

// The init of a pod goes on, and is joined by later containers.
func TestRecoverInit(t *testing.T) {
	damages := fake.Damages(rundir.StatusName)
	damages["nothing"] = func(string) error { return nil }
	damages["no directory"] = os.RemoveAll
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			pod := b.RunPod(t, "pod")
			b.Run(t, pod, fake.Shared("a"))
			p, err := b.Pods.Find(pod)
			check(t, err)
			before := p.Init().Seen().Init
			b.close()
			check(t, damage(string(b.Dir(pod))))
			b.open()
			if p, err = b.Pods.Find(pod); err != nil {
				t.Fatal(err)
			}
			b.Run(t, pod, fake.Shared("b"))
			init := p.Init()
			if init == nil || !before.Alive() || init.Seen().Exit != nil {
				t.Fatalf("the init: %v, lives: %t", init, before.Alive())
			}
			check(t, syscall.Kill(before.PID, syscall.SIGKILL))
			must.Come(t, "the pod not to be ready", func() bool { return p.Ready() != nil })
			b.removeAll(pod)
		})
	}
}

// initCutShort makes a pod, and ends the daemon as if it had been killed while it created the
// init of that.
func (b *bed) initCutShort() (pod string) {
	b.t.Helper()
	pod = b.RunPod(b.t, "pod")
	b.Run(b.t, pod, fake.Shared("a"))
	b.close()
	var init records.Container
	var rec records.Pod
	check(b.t, errors.Join(b.Store.Get(state.Containers, pod, &init), b.Store.Get(state.Pods, pod, &rec)))
	init.Phase, rec.PIDNamespace = records.ContainerCreating, ""
	check(b.t, errors.Join(b.Store.Put(state.Containers, pod, &init, false), b.Store.Put(state.Pods, pod, &rec, false)))
	return pod
}

// An init whose creation was cut short is removed, and once only: the next one, which a
// container may ask for before that, has the same id.
func TestRecoverInitOnce(t *testing.T) {
	b := newBed(t)
	pod := b.initCutShort()
	if r := b.open(); r.undone != 1 {
		t.Errorf("%d creations are undone", r.undone)
	}
	p, err := b.Pods.Find(pod)
	check(t, err)
	before := p.Init()
	b.Run(t, pod, fake.Shared("b"))
	check(t, before.Remove(t.Context())) // as the start does in the background
	if after := p.Init(); after == before || !after.Seen().Init.Alive() || p.Ready() != nil {
		t.Errorf("the init is %v, lives: %t; %v", after, after.Seen().Init.Alive(), p.Ready())
	}
	b.removeAll(pod)
}

// There is no other init before all of such a one has been given back: what takes that away
// goes by the id.
func TestRecoverInitOwed(t *testing.T) {
	b := newBed(t)
	pod := b.initCutShort()
	b.Roots.Unmounting.Fail(errors.New("busy"))
	b.open()
	p, err := b.Pods.Find(pod)
	check(t, err)
	if _, err := b.Containers.Create(t.Context(), p, fake.Shared("b"), nil); !errors.Is(err, kind.Unavailable) {
		t.Errorf("an init beside what is left of the one before: %v", err)
	}
	b.Roots.Unmounting.Fail(nil)
	must.Come(t, "another init", func() bool {
		_, err = b.Containers.Create(t.Context(), p, fake.Shared("b"), nil)
		return !errors.Is(err, kind.Unavailable)
	})
	if err != nil || !p.Init().Seen().Init.Alive() || p.Ready() != nil {
		t.Errorf("%v; the init lives: %t; %v", err, p.Init().Seen().Init.Alive(), p.Ready())
	}
	b.removeAll(pod)
}

// What cannot be given back of those without a record is tried again, not left to the next start.
func TestRecoverUnknownWithDebts(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	c := b.Run(t, pod, fake.ContainerConfig("c", "true"))
	must.Come(t, "the end of its shim", func() bool {
		_, err := b.Dir(c).FindShim()
		held, _ := b.Dir(c).Held()
		return errors.Is(err, rundir.ErrNoProcess) && !held
	})
	b.close()
	check(t, os.Remove(filepath.Join(b.Store.Dir(state.Pods, pod), "record.json")))
	check(t, os.Remove(filepath.Join(b.Store.RunDir(state.Pods, pod), "record.json")))
	check(t, os.Remove(filepath.Join(b.Store.Dir(state.Containers, c), "record.json")))
	check(t, os.Remove(b.Dir(c).Path(rundir.LaunchName)))
	b.Roots.Unmounting.Fail(errors.New("busy"))
	b.open()
	time.Sleep(100 * time.Millisecond)
	b.Roots.Unmounting.Fail(nil)
	must.Come(t, "an empty node", func() bool { return len(b.Left(t)) == 0 })
	if pods, list := b.Pods.List(nil), b.Containers.List(nil); len(pods)+len(list) > 0 {
		t.Errorf("listed: %v, %v", pods, list)
	}
}

// What is removed does not come back. On a disk that is full, where nothing can say so to the next
// daemon, a removal is not answered while something is left.
func TestRecoverRemovedOnFullDisk(t *testing.T) {
	b := newBed(t)
	for _, busy := range []error{errors.New("busy"), nil} {
		pod := b.RunPod(t, "pod")
		c := b.Run(t, pod, fake.ContainerConfig("c"))
		b.Roots.Unmounting.Fail(busy)
		for _, o := range []struct {
			kind   state.Kind
			id     string
			remove func(context.Context, string) error
		}{{state.Containers, c, b.Containers.Remove}, {state.Pods, pod, b.Pods.Remove}} {
			record := filepath.Join(b.Store.Dir(o.kind, o.id), "record.json")
			check(t, os.Rename(record, record+".aside"))
			check(t, os.MkdirAll(filepath.Join(record, "full"), 0o700)) // nothing can be written there
			err := o.remove(t.Context(), o.id)
			if (err == nil) != (busy == nil) || err != nil && !errors.Is(err, kind.Unavailable) {
				t.Errorf("%s, %v: %v", o.kind, busy, err)
			}
			if busy == nil {
				continue
			}
			check(t, os.RemoveAll(record))
			check(t, os.Rename(record+".aside", record))
			if o.kind == state.Containers {
				check(t, o.remove(t.Context(), o.id)) // it is owed, and on record
			}
		}
		b.close()
		b.open()
		if pods, list := b.Pods.List(nil), b.Containers.List(nil); len(list) > 0 || (len(pods) > 0) != (busy != nil) {
			t.Errorf("%v: listed: %v, %v", busy, pods, list)
		}
		b.Roots.Unmounting.Fail(nil)
		b.removeAll(pod)
	}
}

// What its shim was given does not make a removed container anew whose record is damaged.
func TestRecoverRemovedAndDamaged(t *testing.T) {
	must.BeRoot(t)
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	c := b.Run(t, pod, fake.ContainerConfig("c"))
	busy := b.Dir(c).Path(rundir.RootfsName)
	check(t, syscall.Mount("tmpfs", busy, "tmpfs", 0, ""))
	defer syscall.Unmount(busy, syscall.MNT_DETACH)
	check(t, b.Containers.Remove(t.Context(), c))
	b.close()
	check(t, os.WriteFile(filepath.Join(b.Store.Dir(state.Containers, c), "record.json"), []byte("torn"), 0o600))
	b.open()
	if list := b.Containers.List(nil); len(list) > 0 {
		t.Errorf("listed: %v", list)
	}
	check(t, syscall.Unmount(busy, 0))
	b.removeAll(pod)
}

// Of two containers with one name the one that lives has it; the other is put
// aside.
func TestRecoverOneNameTwice(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	id := b.Run(t, pod, fake.ContainerConfig("c"))
	b.close()
	const other = "0000000000000000000000000000000000000000000000000000000000000000"
	var rec records.Container
	err := b.Store.Get(state.Containers, id, &rec)
	rec.ID, rec.CreatedAt = other, time.Now()
	err = errors.Join(err, b.Store.Create(state.Containers, other), b.Store.Put(state.Containers, other, &rec, false))
	check(t, err)
	if r := b.open(); r.quarantined != 1 || r.complete() {
		t.Errorf("%d objects were put aside, complete: %t", r.quarantined, r.complete())
	}
	if again := b.Create(t, pod, fake.ContainerConfig("c")); again != id || !b.Lives(t, pod, id) {
		t.Errorf("the name is that of %s", again)
	}
	if _, err := b.Containers.Find(other); !errors.Is(err, kind.NotFound) {
		t.Errorf("the other one: %v", err)
	}
	b.removeAll(pod)
}

var check = must.Succeed
