package containers_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/fake"
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
)

// bed is a node with a daemon and one pod.
type bed struct {
	*fake.Node
	*fake.Daemon
	t     *testing.T
	podID string
}

func newBed(t *testing.T) *bed {
	t.Helper()
	t.Parallel()
	n := fake.NewNode(t)
	b := &bed{Node: n, Daemon: n.Open(t), t: t}
	b.podID = b.RunPod(t, "pod")
	return b
}

func (b *bed) pod() containers.Pod {
	b.t.Helper()
	p, err := b.Pods.Find(b.podID)
	check(b.t, err)
	return p
}

func (b *bed) create(name string, command ...string) string {
	b.t.Helper()
	return b.Create(b.t, b.podID, fake.ContainerConfig(name, command...))
}

func (b *bed) run(name string, command ...string) string {
	b.t.Helper()
	return b.Run(b.t, b.podID, fake.ContainerConfig(name, command...))
}

// remove removes a container and looks for what may be left of it.
func (b *bed) remove(id string) {
	b.t.Helper()
	for range 2 { // the second time there is nothing to do
		check(b.t, b.Containers.Remove(b.t.Context(), id))
	}
	b.gone(id)
}

func (b *bed) gone(id string) {
	b.t.Helper()
	for _, left := range b.Left(b.t) {
		if strings.Contains(left, id) {
			b.t.Errorf("left: %s", left)
		}
	}
	if b.Lives(b.t, b.podID, id) {
		b.t.Error("its processes live")
	}
	if _, err := b.Containers.Find(id); !errors.Is(err, kind.NotFound) {
		b.t.Errorf("it is still known: %v", err)
	}
	if n := b.Images.Held(); n != 0 {
		b.t.Errorf("its image is held %d times", n)
	}
}

func TestLife(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	id := b.create("c")
	if s := b.Status(t, id); s.State != created || s.StartedAt != 0 || s.ImageId != "sha256:image" {
		t.Errorf("after create: %v", s)
	}
	// Stopping what was not started leaves it alone: it may still be started.
	if err := b.Containers.Stop(ctx, id, time.Minute); err != nil || b.Status(t, id).State != created {
		t.Errorf("stop of a created one: %v", err)
	}
	for range 2 {
		check(t, b.Containers.Start(ctx, id))
	}
	if s := b.Status(t, id); s.State != running || s.StartedAt == 0 || !b.Lives(t, b.podID, id) {
		t.Errorf("after start: %v", s)
	}
	out, err := b.Containers.ExecSync(ctx, id, []string{"sh", "-c", "echo x; exit 3"}, 0)
	if err != nil || string(out.Stdout) != "x\n" || out.ExitCode != 3 {
		t.Errorf("exec: %v, %v", out, err)
	}
	for range 2 {
		check(t, b.Containers.Stop(ctx, id, time.Minute))
	}
	s := b.Status(t, id)
	if s.State != exited || s.ExitCode != 143 || s.FinishedAt < s.StartedAt || s.StartedAt == 0 {
		t.Errorf("after stop: %v", s)
	}
	if err := b.Containers.Start(ctx, id); !errors.Is(err, kind.State) {
		t.Errorf("start of one that has ended: %v", err)
	}
	if _, err := b.Containers.ExecSync(ctx, id, []string{"true"}, 0); !errors.Is(err, kind.State) {
		t.Errorf("exec in one that has ended: %v", err)
	}
	b.remove(id)
}

// How containers end, and what is told of it.
func TestEnds(t *testing.T) {
	for name, c := range map[string]struct {
		command []string
		stop    time.Duration // grace; 0: not stopped
		code    int32
		reason  string
	}{
		"well":  {command: []string{"true"}, reason: rundir.ReasonCompleted},
		"badly": {command: []string{"sh", "-c", "exit 7"}, code: 7, reason: rundir.ReasonError},
		"by a signal of its own": {command: []string{"sh", "-c", "kill -KILL $$"}, code: 137,
			reason: rundir.ReasonError},
		"when it is told to": {command: fake.Sleeps, stop: time.Minute, code: 143, reason: rundir.ReasonError},
		"when its time has run out": {command: fake.Stubborn, stop: time.Millisecond, code: 137,
			reason: rundir.ReasonError},
		"without a command to start": {command: []string{"/nonexistent"}, code: 127, reason: rundir.ReasonError},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			id := b.run("c", c.command...)
			if c.stop != 0 {
				if err := b.Containers.Stop(t.Context(), id, c.stop); err != nil {
					t.Error(err)
				}
			}
			s := b.Ended(t, id)
			if s.ExitCode != c.code || s.Reason != c.reason || s.StartedAt == 0 {
				t.Errorf("got %v", s)
			}
			b.remove(id)
		})
	}
}

// A container is removed in any state, also without having been stopped.
func TestRemove(t *testing.T) {
	for name, make := range map[string]func(*bed) string{
		"created":   func(b *bed) string { return b.create("c") },
		"running":   func(b *bed) string { return b.run("c", fake.Sleeps...) },
		"stubborn":  func(b *bed) string { return b.run("c", fake.Stubborn...) },
		"shim dead": func(b *bed) string { id := b.run("c"); b.Signal(b.t, id, syscall.SIGKILL); return id },
		"by a short id": func(b *bed) string {
			id := b.run("c")
			if err := b.Containers.Remove(b.t.Context(), id[:8]); err != nil {
				b.t.Error(err)
			}
			return id
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.remove(make(b))
		})
	}
}

// The same request twice is one container, also when the second comes while the
// first is under way; the name stands for another one only after the removal.
func TestOneName(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	type result struct {
		id  string
		err error
	}
	results := make(chan result)
	for range 4 {
		go func() {
			id, err := b.Containers.Create(ctx, b.pod(), fake.ContainerConfig("c"), nil)
			results <- result{id, err}
		}()
	}
	first := <-results
	for range 3 {
		if r := <-results; r != first || r.err != nil {
			t.Fatalf("got %v and %v", first, r)
		}
	}
	if n := len(b.Containers.All()); n != 1 {
		t.Errorf("%d containers", n)
	}
	if _, err := b.Containers.Create(ctx, b.pod(), fake.ContainerConfig("c", "other"), nil); !errors.Is(err, kind.Exists) {
		t.Errorf("another config under the name: %v", err)
	}
	another := fake.ContainerConfig("c")
	another.Metadata.Attempt = 1
	second, err := b.Containers.Create(ctx, b.pod(), another, nil)
	if err != nil || second == first.id {
		t.Errorf("another attempt: %s, %v", second, err)
	}
	if err := b.Containers.Start(ctx, first.id); err != nil {
		t.Error(err)
	}
	if err := b.Containers.Stop(ctx, first.id, time.Minute); err != nil {
		t.Error(err)
	}
	if _, err := b.Containers.Create(ctx, b.pod(), fake.ContainerConfig("c"), nil); !errors.Is(err, kind.Exists) {
		t.Errorf("the same request after the end: %v", err)
	}
	b.remove(first.id)
	if id := b.create("c"); id == first.id {
		t.Error("a removed container came back")
	}
}

// A kubelet that asks again has made another file for the last words of the container. All
// else of the request is to be the same.
func TestAskedAgainWithAnotherFile(t *testing.T) {
	b := newBed(t)
	dir, other := t.TempDir(), t.TempDir()
	config := func(file string) *runtimeapi.ContainerConfig {
		c := fake.ContainerConfig("c")
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/end"}
		c.Mounts = []*runtimeapi.Mount{
			{HostPath: dir, ContainerPath: "/data"},
			{HostPath: filepath.Join(dir, file), ContainerPath: "/end"},
		}
		return c
	}
	first, err := b.Containers.Create(t.Context(), b.pod(), config("first"), nil)
	check(t, err)
	second, err := b.Containers.Create(t.Context(), b.pod(), config("second"), nil)
	if err != nil || second != first {
		t.Errorf("got %s and %s, %v", first, second, err)
	}
	r, err := b.Containers.Status(first, false)
	if err != nil || r.Status.Mounts[1].HostPath != filepath.Join(dir, "first") {
		t.Errorf("the status is %v, %v", r, err)
	}
	for i, path := range []string{other, filepath.Join(other, "first")} {
		c := config("first")
		c.Mounts[i].HostPath = path
		if _, err := b.Containers.Create(t.Context(), b.pod(), c, nil); !errors.Is(err, kind.Exists) {
			t.Errorf("with another mount[%d]: %v", i, err)
		}
	}
	b.remove(first)
}

// A privileged container needs a pod that is: by how it was made, or by what the request says
// of it now.
func TestPrivilegedInPod(t *testing.T) {
	b := newBed(t)
	config := fake.ContainerConfig("debugger")
	config.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	for _, now := range []*runtimeapi.PodSandboxConfig{nil, {}} {
		_, err := b.Containers.Create(t.Context(), b.pod(), config, now)
		const field = "config.linux.security_context.privileged: "
		if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), field) {
			t.Errorf("in a pod that is not privileged: %v", err)
		}
	}
	now := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: true},
	}}
	id, err := b.Containers.Create(t.Context(), b.pod(), config, now)
	check(t, err)
	if b.pod().Record().Config.M.GetLinux().GetSecurityContext().GetPrivileged() {
		t.Error("the record of the pod has changed")
	}
	b.remove(id)
}

// A creation that fails at any point leaves nothing, and its name is free.
func TestCreateFails(t *testing.T) {
	broken := errors.New("broken")
	kill := func(b *bed) { // the shim is killed as soon as it is ready
		b.Shims.Launched = func(dir rundir.Dir) error {
			p, err := dir.FindShim()
			if err == nil {
				err = syscall.Kill(p.PID, syscall.SIGKILL)
			}
			return err
		}
	}
	for name, c := range map[string]struct {
		damage func(*bed)
		mend   func(*bed)
		config *runtimeapi.ContainerConfig
		err    error
	}{
		"no config": {err: kind.Invalid},
		"no image": {
			config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
				Image:    &runtimeapi.ImageSpec{Image: "another"},
			},
			err: kind.NotFound,
		},
		"no root": {
			damage: func(b *bed) { b.Roots.Mounting.Fail(broken) },
			mend:   func(b *bed) { b.Roots.Mounting.Fail(nil) },
			config: fake.ContainerConfig("c"),
			err:    broken,
		},
		"no shim": {
			damage: func(b *bed) { b.Shims.Launched = func(rundir.Dir) error { return broken } },
			mend:   func(b *bed) { b.Shims.Launched = nil },
			config: fake.ContainerConfig("c"),
			err:    broken,
		},
		"the shim is killed": {
			damage: kill,
			mend:   func(b *bed) { b.Shims.Launched = nil },
			config: fake.ContainerConfig("c"),
			err:    kind.Unavailable,
		},
		"the pod is stopped": {
			damage: func(b *bed) {
				b.Shims.Launched = func(rundir.Dir) error { return b.Pods.Stop(b.t.Context(), b.podID) }
			},
			config: fake.ContainerConfig("c"),
			err:    kind.State,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			if c.damage != nil {
				c.damage(b)
			}
			if id, err := b.Containers.Create(t.Context(), b.pod(), c.config, nil); !errors.Is(err, c.err) {
				t.Errorf("got %s, %v; want %v", id, err, c.err)
			}
			for _, tree := range []string{b.Root, b.State} {
				left, err := filepath.Glob(filepath.Join(tree, string(state.Containers), "*"))
				if err != nil || len(left) > 0 {
					t.Errorf("left: %v, %v", left, err)
				}
			}
			if all, err := rundir.Shims(b.State); err != nil || len(all) > 0 {
				t.Errorf("shims are left: %v, %v", all, err)
			}
			if b.Images.Held() != 0 || len(b.Containers.All()) != 0 {
				t.Error("something is still held")
			}
			if c.mend != nil {
				c.mend(b)
				b.create("c")
			}
		})
	}
}

// What is told when a shim is killed, at each phase.
func TestShimKilled(t *testing.T) {
	for name, c := range map[string]struct {
		phase  func(*bed) string
		code   int32
		reason string
		ran    bool
	}{
		"created": {
			phase:  func(b *bed) string { return b.create("c") },
			code:   rundir.CodeUnknown,
			reason: rundir.ReasonNeverRan,
		},
		"running": {
			phase:  func(b *bed) string { return b.run("c", fake.Sleeps...) },
			code:   137,
			reason: rundir.ReasonShimDied,
			ran:    true,
		},
		"running, and init has children": {
			phase:  func(b *bed) string { return b.run("c", "sh", "-c", "sleep 1000 & sleep 1000") },
			code:   137,
			reason: rundir.ReasonShimDied,
			ran:    true,
		},
		"stopping": {
			phase: func(b *bed) string {
				id := b.run("c", fake.Stubborn...)
				stopped := make(chan error, 1)
				go func() { stopped <- b.Containers.Stop(b.t.Context(), id, time.Hour) }()
				must.Come(b.t, "the stop", func() bool {
					s, err := b.Dir(id).ReadStatus()
					return err == nil && s.Stop != nil
				})
				b.t.Cleanup(func() { // the shim may have been killed before it answered
					if err := <-stopped; err != nil && !errors.Is(err, kind.Unavailable) {
						b.t.Error(err)
					}
				})
				return id
			},
			code:   137,
			reason: rundir.ReasonShimDied,
			ran:    true,
		},
		"running, and init has just ended": {
			phase: func(b *bed) string {
				id := b.run("c", fake.Sleeps...)
				s, err := b.Dir(id).ReadStatus()
				check(b.t, err)
				b.StopShim(b.t, id) // so that it cannot write the record
				check(b.t, syscall.Kill(s.Init.PID, syscall.SIGTERM))
				must.Come(b.t, "the end of init", func() bool { return !s.Init.Alive() })
				return id
			},
			code:   rundir.CodeUnknown,
			reason: rundir.ReasonShimDied,
			ran:    true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			id := c.phase(b)
			b.Signal(t, id, syscall.SIGKILL)
			s := b.Ended(t, id)
			if s.ExitCode != c.code || s.Reason != c.reason || s.StartedAt != 0 != c.ran {
				t.Errorf("got %v", s)
			}
			if b.Lives(t, b.podID, id) {
				t.Error("processes are left")
			}
			for _, dir := range []string{string(b.Dir(id)), b.Durable(state.Containers, id)} {
				exit, err := rundir.ReadExitIn(dir)
				if err != nil || exit.Code != int(c.code) || exit.Source != rundir.SourceInferred {
					t.Errorf("exit record in %s: %+v, %v", dir, exit, err)
				}
			}
			if err := b.Containers.Start(t.Context(), id); !errors.Is(err, kind.State) {
				t.Errorf("start: %v", err)
			}
			b.remove(id)
		})
	}
}

// A shim that is stopped by a signal delays nobody but those who ask it.
func TestStoppedShim(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	stopped, other := b.create("stopped"), b.create("other")
	b.StopShim(t, stopped)
	started := make(chan error)
	go func() { started <- b.Containers.Start(ctx, stopped) }()
	for _, do := range []func() error{
		func() error { return b.Containers.Start(ctx, other) },
		func() error { _, err := b.Containers.ExecSync(ctx, other, []string{"true"}, 0); return err },
		func() error { _, err := b.Containers.Status(stopped, true); return err },
		func() error { return b.Containers.Stop(ctx, other, time.Minute) },
		func() error { return b.Containers.Remove(ctx, other) },
	} {
		if err := do(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-started:
			t.Fatalf("a stopped shim answered: %v", err)
		default:
		}
	}
	b.gone(other)
	if l := b.Containers.List(nil); len(l) != 1 || l[0].State != created {
		t.Errorf("listed: %v", l)
	}
	b.Signal(t, stopped, syscall.SIGCONT)
	if err := <-started; err != nil {
		t.Error(err)
	}
	if s := b.Status(t, stopped); s.State != running {
		t.Errorf("after it was woken: %v", s)
	}
	b.remove(stopped)
}

// A file that is missing or damaged ends nothing that lives, and keeps nobody from
// stopping and removing it. Of a shim that is killed behind it, what still runs is killed
// with it, and what ran is not told to have succeeded, or never to have run.
func TestDamage(t *testing.T) {
	for name, damage := range fake.RunDirDamages() {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			fresh, ran, killed := b.create("fresh"), b.run("ran", fake.Sleeps...), b.run("killed", fake.Sleeps...)
			p, err := b.Dir(killed).FindShim()
			for _, id := range []string{fresh, ran, killed} {
				err = errors.Join(err, damage(string(b.Dir(id))))
			}
			if err == nil {
				err = syscall.Kill(p.PID, syscall.SIGKILL)
			}
			check(t, err)
			if s := b.Status(t, ran); s.State != running || !b.Lives(t, b.podID, ran) {
				t.Errorf("the running one: %v", s)
			}
			if err := b.Containers.Start(t.Context(), fresh); err != nil {
				t.Error(err)
			}
			for _, id := range []string{fresh, ran} {
				if _, err := b.Containers.ExecSync(t.Context(), id, []string{"true"}, 0); err != nil {
					t.Error(err) // it has a connection of its own
				}
				if err := b.Containers.Stop(t.Context(), id, time.Minute); err != nil {
					t.Error(err)
				}
				if s := b.Status(t, id); s.ExitCode != 143 {
					t.Errorf("after the stop: %v", s)
				}
				b.remove(id)
			}
			s := b.Ended(t, killed)
			if s.ExitCode == 0 || s.Reason != rundir.ReasonShimDied || s.StartedAt == 0 ||
				b.Lives(t, b.podID, killed) {
				t.Errorf("the one whose shim was killed: %v", s)
			}
			b.remove(killed)
		})
	}
}

// A container of which something cannot be given back is gone for the kubelet at
// once, and the rest follows.
func TestRemovalOwes(t *testing.T) {
	b := newBed(t)
	id := b.run("c", fake.Sleeps...)
	b.Roots.Unmounting.Fail(errors.New("busy"))
	check(t, b.Containers.Remove(t.Context(), id))
	if _, err := b.Containers.Find(id); !errors.Is(err, kind.NotFound) || b.Lives(t, b.podID, id) {
		t.Errorf("after the removal: %v", err)
	}
	if _, err := os.Stat(b.Durable(state.Containers, id)); err != nil {
		t.Errorf("its record has gone before its root: %v", err)
	}
	if !b.Containers.InUse(fake.Layer) {
		t.Error("the layer under its root is not in use any more")
	}
	if next := b.create("c"); next == id {
		t.Error("the name is still taken")
	} else {
		b.Roots.Unmounting.Fail(nil)
		b.remove(next)
	}
	must.Come(t, "the rest of the removal", func() bool { return !b.Containers.InUse(fake.Layer) })
	b.gone(id)
}

func TestShortIDs(t *testing.T) {
	b := newBed(t)
	var ids []string
	for i := range 17 { // two begin with the same digit
		ids = append(ids, b.create(fmt.Sprint(i)))
	}
	first := map[byte]int{}
	for _, id := range ids {
		first[id[0]]++
	}
	for _, id := range ids {
		_, err := b.Containers.Status(id[:1], false)
		if first[id[0]] > 1 != errors.Is(err, kind.Invalid) {
			t.Errorf("of %d ids: %v", first[id[0]], err)
		}
		if resp, err := b.Containers.Status(id[:20], false); err != nil || resp.Status.Id != id {
			t.Errorf("got %v, %v", resp, err)
		}
	}
}

var check = must.Succeed
