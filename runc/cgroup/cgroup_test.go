package cgroup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// newCgroup makes a cgroup of the test's own in the hierarchies that matter.
func newCgroup(t *testing.T) Set {
	t.Helper()
	must.BeRoot(t)
	path := "/holdfast-runc-test-" + strconv.Itoa(os.Getpid())
	c := Set{}
	all := Everywhere(path)
	for _, name := range []string{"", "freezer", "memory", "pids"} {
		if _, ok := all[name]; ok {
			c[name] = path
		}
	}
	if c["freezer"] != "" {
		delete(c, "") // a hybrid's v2 tree is empty
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := c.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := c.Remove(ctx); err != nil {
			t.Error(err)
		}
		if left := At(path); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	for name := range c {
		dir, ok := c.dir(name)
		if !ok {
			t.Fatalf("no directory for %q", name)
		}
		check(t, os.Mkdir(dir, 0o755))
	}
	return c
}

// join runs a command in the cgroup. It is waited for after the test.
func (c Set) join(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	line := ""
	for name := range c {
		dir, _ := c.dir(name)
		line += "echo $$ > " + dir + "/cgroup.procs && "
	}
	cmd := exec.Command("sh", "-c", line+script)
	check(t, cmd.Start())
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := c.Kill(ctx); err != nil {
			t.Error(err)
		}
		<-done
	})
	until(t, "the process is in its cgroup", func() bool {
		pids, err := c.Pids()
		return err == nil && slices.Contains(pids, cmd.Process.Pid)
	})
	return cmd
}

var until = must.Come

func TestNeverTheRoot(t *testing.T) {
	for _, path := range []string{"/", "", "//", "/..", "/a/../..", "relative"} {
		c := Everywhere(path)
		if dir, ok := c.tracker(); ok || len(c.dirs()) > 0 {
			t.Errorf("%q leads to %s and %v", path, dir, c.dirs())
		}
		if pids, err := c.Pids(); len(pids) > 0 || err != nil {
			t.Errorf("%q: %v, %v", path, pids, err)
		}
		if err := c.Kill(t.Context()); err != nil {
			t.Error(err)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestReadCgroups(t *testing.T) {
	c := newCgroup(t)
	cmd := c.join(t, "exec sleep 1000")
	until(t, "it has joined all", func() bool {
		got, err := Of(cmd.Process.Pid)
		return err == nil && maps.Equal(got, c)
	})
	if own, err := Of(os.Getpid()); err != nil || len(own) > 0 {
		t.Errorf("our own are somebody else's: %v, %v", own, err)
	}
}

// A container may make cgroups below its own, and freeze those.
func TestKill(t *testing.T) {
	for name, frozen := range map[string]func(top, sub Set) Set{
		"running":      func(_, _ Set) Set { return nil },
		"frozen":       func(top, _ Set) Set { return top },
		"frozen below": func(_, sub Set) Set { return sub },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCgroup(t)
			c.join(t, "for i in 1 2 3 4 5; do sleep 1000 & done; wait")
			until(t, "six processes", func() bool { p, _ := c.Pids(); return len(p) == 6 })
			sub, _, err := c.Sub("below")
			check(t, err)
			sub.join(t, "exec sleep 1000")
			frozen(c, sub).freeze()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			if err := c.Kill(ctx); err != nil {
				t.Error(err)
			}
			if pids, err := c.Pids(); err != nil || len(pids) > 0 {
				t.Errorf("left: %v, %v", pids, err)
			}
		})
	}
}

// What is frozen below, by whoever is in the container, runs again too.
func TestThawBelow(t *testing.T) {
	c := newCgroup(t)
	sub, _, err := c.Sub("below")
	check(t, err)
	mark := filepath.Join(t.TempDir(), "mark")
	sub.join(t, "trap 'echo x > "+mark+"; exit' USR1; echo > "+mark+".ready; while :; do sleep 0.01; done")
	until(t, "the trap is set", func() bool { _, err := os.Stat(mark + ".ready"); return err == nil })
	sub.freeze()
	c.Thaw()
	check(t, c.Signal(unix.SIGUSR1))
	until(t, "the signal arrived", func() bool { _, err := os.Stat(mark); return err == nil })
}

// Cgroups can be nested deeper than a path can be long, and processes be more
// than are held at once.
func TestDeepAndWide(t *testing.T) {
	c := newCgroup(t)
	top, _ := c.tracker()
	at, err := openBelow(nil, top)
	check(t, err)
	const deep, wide = 1500, holdAtOnce + 10
	for range deep {
		check(t, unix.Mkdirat(int(at.Fd()), "deep", 0o755))
		below, err := openBelow(at, "deep")
		check(t, err)
		at.Close()
		at = below
	}
	defer at.Close()
	cmd := c.join(t, "exec sleep 1000")
	check(t, write(at, "cgroup.procs", strconv.Itoa(cmd.Process.Pid)))
	c.join(t, fmt.Sprintf("i=0; while [ $i -lt %d ]; do sleep 1000 & i=$((i+1)); done; wait", wide))
	until(t, "all processes", func() bool { p, _ := c.Pids(); return len(p) == wide+2 })
	if _, populated, err := c.Populated(); !populated || err != nil {
		t.Errorf("populated: %v, %v", populated, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	check(t, c.Kill(ctx))
	if dir, populated, err := c.Populated(); populated || err != nil {
		t.Errorf("populated: %s, %v, %v", dir, populated, err)
	}
	if err := c.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// A process that is left keeps its cgroup and no other.
func TestRemoveWhatCanGo(t *testing.T) {
	c := newCgroup(t)
	busy, _, err := c.Sub("busy")
	check(t, err)
	idle, _, err := c.Sub("idle")
	check(t, err)
	busy.join(t, "exec sleep 1000")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Remove(ctx); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	if _, populated, err := busy.Populated(); !populated || err != nil {
		t.Errorf("the busy one: %v, %v", populated, err)
	}
	for _, dir := range idle.dirs() {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

// Cgroups come and go while others look at them.
func TestWalkOfWhatChanges(t *testing.T) {
	c := newCgroup(t)
	top, _ := c.tracker()
	ctx, cancel := context.WithCancel(t.Context())
	var churn sync.WaitGroup
	for i := range 4 {
		churn.Go(func() {
			dir := filepath.Join(top, strconv.Itoa(i))
			for ctx.Err() == nil {
				os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755)
				for _, below := range []string{"a/b/c", "a/b", "a", ""} {
					os.Remove(filepath.Join(dir, below))
				}
			}
		})
	}
	for range 300 {
		if pids, err := c.Pids(); err != nil || len(pids) > 0 {
			t.Errorf("got %v, %v", pids, err)
		}
		c.Thaw()
		err := walk(top, func(*os.File) error { return nil }, func(*os.File, string) error { return nil })
		if err != nil {
			t.Error(err)
		}
	}
	cancel()
	churn.Wait()
}

func TestFind(t *testing.T) {
	for path, want := range map[string]string{
		"system.slice:holdfast:c1": "/system.slice/holdfast-c1.scope",
		"-.slice:holdfast:c1":      "/holdfast-c1.scope",
		"kubepods-burstable-podX.slice:hf:c1": "/kubepods.slice/kubepods-burstable.slice/" +
			"kubepods-burstable-podX.slice/hf-c1.scope",
		"/kubepods/burstable/podX/c1": "",
		"system.slice:holdfast":       "",
	} {
		if got := Path(path, true); got != want {
			t.Errorf("Path(%q, true) = %q, want %q", path, got, want)
		}
	}
	c := newCgroup(t)
	for name, path := range c {
		if got := Find(path, false)[name]; got != path {
			t.Errorf("Find(%q) has %q for %q", path, got, name)
		}
		if got := Find(path+"/none", false); len(got) > 0 {
			t.Errorf("found %v", got)
		}
	}
}

func TestEnter(t *testing.T) {
	must.BeRoot(t)
	path := "/holdfast-runc-test-" + strconv.Itoa(os.Getpid())
	c := Everywhere(path + "/a/b")
	cmd := exec.Command("sleep", "1000")
	check(t, cmd.Start())
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
		if err := Everywhere(path).Remove(t.Context()); err != nil {
			t.Error(err)
		}
		if left := At(path); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}()
	for range 2 {
		check(t, c.Enter(cmd.Process.Pid))
	}
	if got, err := Of(cmd.Process.Pid); err != nil || !maps.Equal(got, c) {
		t.Errorf("it is in %v, %v; want %v", got, err, c)
	}
}

func TestHierarchies(t *testing.T) {
	const hybrid = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 /docker/x /sys/fs/cgroup/cpu,cpuacct ro,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:29 / /mnt/with\040space rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset,clone_children
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
42 31 0:38 / /elsewhere rw,relatime - cgroup2 cgroup2 rw,nsdelegate
`
	const v2 = `30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
`
	const named = `31 30 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
`
	for _, c := range []struct {
		name, table, want string
		unified           bool
	}{
		{
			"hybrid", hybrid,
			`/mnt/with space ["cpu" "cpuacct"];/sys/fs/cgroup/cpuset ["cpuset"];` +
				`/sys/fs/cgroup/systemd ["name=systemd"];/sys/fs/cgroup/unified [""]`, false,
		},
		{"v2", v2, `/sys/fs/cgroup [""]`, true},
		{"v2 and a named one", v2 + named, `/sys/fs/cgroup [""];/sys/fs/cgroup/systemd ["name=systemd"]`, true},
		{"none", "", "", false},
	} {
		hs := parseMountinfo(strings.NewReader(c.table))
		var all []string
		for _, h := range hs {
			all = append(all, fmt.Sprintf("%s %q", h.dir, h.names))
		}
		if got := strings.Join(all, ";"); got != c.want || unified(hs) != c.unified {
			t.Errorf("%s: got %q, unified %v; want %q, %v", c.name, got, unified(hs), c.want, c.unified)
		}
	}
}

// What forks as fast as it can is killed as well.
func TestKillForking(t *testing.T) {
	c := newCgroup(t)
	c.join(t, "f() { while :; do (sleep 0.05) & done; }; f")
	until(t, "it forks", func() bool { p, _ := c.Pids(); return len(p) > 5 })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := c.Kill(ctx); err != nil {
		t.Error(err)
	}
}

func TestSignal(t *testing.T) {
	c := newCgroup(t)
	mark := filepath.Join(t.TempDir(), "mark")
	c.join(t, "trap 'echo x > "+mark+"; exit' USR1; echo > "+mark+".ready; while :; do sleep 0.01; done")
	until(t, "the trap is set", func() bool { _, err := os.Stat(mark + ".ready"); return err == nil })
	check(t, c.Signal(unix.SIGUSR1))
	until(t, "the signal arrived", func() bool { _, err := os.Stat(mark); return err == nil })
}

func TestRemoveIdle(t *testing.T) {
	c := newCgroup(t)
	sub, _, err := c.Sub("below")
	check(t, err)
	cmd := sub.join(t, "exec sleep 1000")
	if idle, err := sub.RemoveIdle(); idle || err != nil {
		t.Errorf("with a process: %v, %v", idle, err)
	}
	cmd.Process.Kill()
	until(t, "it is removed", func() bool { idle, err := sub.RemoveIdle(); return idle && err == nil })
	if dir, populated, err := c.Populated(); populated || err != nil {
		t.Errorf("%s in use, %v", dir, err)
	}
}

var check = must.Succeed
