package containers_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// Files of a checkpoint whose directory does not answer keep nobody from the container, and
// are no reason to leave others.
func TestCheckpointInDeadDirectory(t *testing.T) {
	live := t.TempDir()
	dead, _ := containers.DeadServer(t)
	b := newBed(t)
	id := b.run("c", fake.Sleeps...)
	c, err := b.Containers.Find(id)
	check(t, err)
	_, interrupt := context.WithCancelCause(t.Context())
	defer interrupt(nil)
	for _, name := range []string{"a", "b"} {
		path := filepath.Join(live, name)
		check(t, os.WriteFile(path, nil, 0o600))
		s, err := c.Begin(t.Context(), interrupt, records.File{Path: filepath.Join(dead, name), Own: name},
			records.File{Path: path + "-asked-for", Own: name})
		check(t, err)
		check(t, s.End(false))
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file beside one that is out of reach: %v", err)
		}
	}
	if left := c.Record().Leftover; len(left) != 2 {
		t.Errorf("left: %v", left)
	}
	b.remove(id)
}

// frozenDisk makes a file system of its own, and gives functions that freeze it and thaw it.
func frozenDisk(t *testing.T) (dir string, freeze, thaw func()) {
	t.Helper()
	must.BeRoot(t)
	dir = t.TempDir()
	image := filepath.Join(t.TempDir(), "disk")
	check(t, errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20)))
	for _, command := range [][]string{{"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v: %s", command, err, out)
		}
	}
	top, err := os.Open(dir)
	check(t, err)
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878 // of linux/fs.h
	set := func(request uint) error { return unix.IoctlSetInt(int(top.Fd()), request, 0) }
	thaw = func() { set(fiThaw) } // a second time is an error, and no more
	t.Cleanup(func() {
		thaw()
		top.Close()
		must.Come(t, "nobody uses the disk", func() bool { return unix.Unmount(dir, 0) == nil })
	})
	return dir, func() { check(t, set(fiFreeze)) }, thaw
}

// waitsForDisk says whether a thread of this process waits for what cannot be interrupted.
func waitsForDisk() bool {
	tasks, _ := filepath.Glob("/proc/self/task/*/stat")
	return slices.ContainsFunc(tasks, func(path string) bool {
		b, _ := os.ReadFile(path) // it may have ended
		return strings.Contains(string(b), ") D ")
	})
}

// An archive that is written to a disk which does not answer is given up with the container.
func TestCheckpointOnFrozenDisk(t *testing.T) {
	dir, freeze, thaw := frozenDisk(t)
	b := newBed(t)
	id := b.run("c", fake.Sleeps...)
	only := func(name string) {
		t.Helper()
		entries, err := filepath.Glob(dir + "/*.tar")
		if hidden, _ := filepath.Glob(dir + "/.*"); err != nil || len(entries) != 1 || entries[0] != name || len(hidden) > 0 {
			t.Errorf("there are %v, %v; %v", entries, hidden, err)
		}
	}
	whole := filepath.Join(dir, "whole.tar")
	check(t, b.Containers.Checkpoint(t.Context(), id, whole, 0))
	only(whole)
	frozen, made := make(chan struct{}), make(chan error, 1)
	b.Roots.Diffing = func() {
		freeze()
		close(frozen)
	}
	go func() { made <- b.Containers.Checkpoint(t.Context(), id, filepath.Join(dir, "frozen.tar"), 0) }()
	<-frozen
	must.Come(t, "somebody waits for the disk", waitsForDisk)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.Containers.Remove(ctx, id); err != nil {
		t.Error(err)
	}
	b.gone(id)
	thaw()
	if err := <-made; !errors.Is(err, kind.State) {
		t.Errorf("the checkpoint: %v", err)
	}
	must.Come(t, "nobody waits for the disk", func() bool { return !waitsForDisk() })
	only(whole)
}
