package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// Each change of a file of a cgroup wakes who waits, whichever of them it is; nothing else does, and no inotify
// instance is used. memory.events is such a file; cgroup.events is there without a memory controller too.
func TestOOMWatchWakes(t *testing.T) {
	must.BeRoot(t)
	const events = "cgroup.events"
	w, err := newOOMWatch()
	must.Succeed(t, err)
	var dirs []string
	for _, name := range []string{"own", "parent"} {
		dir, ok := Set{"": fmt.Sprintf("/holdfast-oom-test-%d-%s", os.Getpid(), name)}.dir("")
		if !ok {
			t.Skip("no cgroup v2 is mounted")
		}
		must.Succeed(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() { os.Remove(dir) })
		must.Succeed(t, w.addFile(filepath.Join(dir, events)))
		dirs = append(dirs, dir)
	}
	var wakes atomic.Int64
	ended := make(chan error)
	go func() {
		for {
			if err := w.Wait(); err != nil {
				ended <- err
				return
			}
			wakes.Add(1)
		}
	}()
	until(t, "the first look is over", func() bool { return wakes.Load() > 0 })
	changes := int64(0)
	for range 20 {
		for _, state := range []string{"1", "0"} {
			for _, dir := range dirs {
				before := wakes.Load()
				must.Succeed(t, os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte(state), 0))
				changes++
				until(t, "the change of "+dir+" is told", func() bool { return wakes.Load() > before })
				b, err := os.ReadFile(filepath.Join(dir, events))
				if err != nil || !strings.Contains(string(b), "frozen "+state) {
					t.Fatalf("told of %q, %v", b, err)
				}
			}
		}
	}
	// A watched cgroup can be removed, and one that has gone wakes nobody for ever.
	for _, dir := range dirs {
		must.Succeed(t, os.Remove(dir))
	}
	w.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the wait ended with %v", err)
	}
	// The first look at each file is one more, and the kernel may tell twice.
	if n := wakes.Load(); n > 2*(changes+int64(len(dirs))) {
		t.Errorf("%d changes woke %d times", changes, n)
	}
	t.Logf("%d changes woke %d times", changes, wakes.Load())
}

// The watch of a container's cgroup ends when it is closed, also while it waits.
func TestWatchOOM(t *testing.T) {
	c := newCgroup(t)
	before := openFiles(t)
	w, err := c.WatchOOM()
	must.Succeed(t, err)
	for _, open := range openFiles(t) {
		if strings.Contains(open, "inotify") {
			t.Errorf("it has open %s", open)
		}
	}
	ended := make(chan error)
	go func() {
		err := w.Wait()
		for err == nil {
			err = w.Wait()
		}
		ended <- err
	}()
	w.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the wait ended with %v", err)
	}
	if after := openFiles(t); len(after) != len(before) {
		t.Errorf("it has left of %v: %v", before, after)
	}
	if w, err := (Set{}).WatchOOM(); w != nil || !errors.Is(err, ErrNone) {
		t.Errorf("without a cgroup: %v, %v", w, err)
	}
}

// openFiles are the files that this process has open.
func openFiles(t *testing.T) (all []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must.Succeed(t, err)
	for _, e := range entries {
		// The directory itself has been closed.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			all = append(all, target)
		}
	}
	return all
}
