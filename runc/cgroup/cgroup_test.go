package cgroup

import (
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newCgroup makes a cgroup of the test's own in the hierarchies that matter.
func newCgroup(t *testing.T) Set {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	path := "/holdfast-runc-test-" + strconv.Itoa(os.Getpid())
	c := Set{}
	for _, name := range []string{"", "freezer", "memory", "pids"} {
		if _, ok := mounts()[name]; ok {
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
		if err := c.Remove(); err != nil {
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
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
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
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
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

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestNeverTheRoot(t *testing.T) {
	for _, path := range []string{"/", "", "//", "/..", "/a/../..", "relative"} {
		c := Set{}
		for name := range mounts() {
			c[name] = path
		}
		if controller, dir, ok := c.tracker(); ok {
			t.Errorf("%q leads to %s of %q", path, dir, controller)
		}
		if pids, err := c.Pids(); len(pids) > 0 || err != nil {
			t.Errorf("%q: %v, %v", path, pids, err)
		}
		if err := c.Kill(t.Context()); err != nil {
			t.Error(err)
		}
		if err := c.Remove(); err != nil {
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

func TestKill(t *testing.T) {
	for name, prepare := range map[string]func(Set){
		"running": func(Set) {},
		"frozen":  Set.freeze,
	} {
		t.Run(name, func(t *testing.T) {
			c := newCgroup(t)
			c.join(t, "for i in 1 2 3 4 5; do sleep 1000 & done; wait")
			until(t, "six processes", func() bool { p, _ := c.Pids(); return len(p) == 6 })
			sub, _, err := c.Sub("below")
			if err != nil {
				t.Fatal(err)
			}
			sub.join(t, "exec sleep 1000")
			prepare(c)
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
	if err := c.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	until(t, "the signal arrived", func() bool { _, err := os.Stat(mark); return err == nil })
}

func TestRemoveIdle(t *testing.T) {
	c := newCgroup(t)
	sub, _, err := c.Sub("below")
	if err != nil {
		t.Fatal(err)
	}
	cmd := sub.join(t, "exec sleep 1000")
	if idle, err := sub.RemoveIdle(); idle || err != nil {
		t.Errorf("with a process: %v, %v", idle, err)
	}
	cmd.Process.Kill()
	until(t, "it is removed", func() bool { idle, err := sub.RemoveIdle(); return idle && err == nil })
	if dir, used := c.InUse(); used {
		t.Errorf("%s in use", dir)
	}
}
