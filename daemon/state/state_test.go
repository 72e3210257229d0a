package state

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func open(t *testing.T, root, state string) *Store {
	t.Helper()
	s, err := Open(root, state, slog.New(slog.DiscardHandler))
	check(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// Two daemons may share neither tree.
func TestOpenOnce(t *testing.T) {
	root, state := t.TempDir(), t.TempDir()
	s := open(t, root, state)
	for _, trees := range [][2]string{{root, t.TempDir()}, {t.TempDir(), state}} {
		if _, err := Open(trees[0], trees[1], slog.New(slog.DiscardHandler)); !errors.Is(err, ErrLocked) ||
			!strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
			t.Errorf("a second Open: %v", err)
		}
	}
	check(t, s.Close())
	open(t, root, state)
}

// Nobody but the owner enters a tree, whoever made it and whatever the umask.
func TestOpenClosed(t *testing.T) {
	for umask, wide := range map[int]fs.FileMode{0: 0o777, 0o077: 0o711, 0o027: 0o500} {
		t.Run(fs.FileMode(umask).String(), func(t *testing.T) {
			dir := t.TempDir()
			root, state := filepath.Join(dir, "root"), filepath.Join(dir, "state")
			check(t, errors.Join(os.Mkdir(state, 0o700), os.Chmod(state, wide)))
			defer unix.Umask(unix.Umask(umask))
			s := open(t, root, state)
			check(t, s.Create(Pods, "a"))
			for _, d := range []string{root, state, root + "/pods", state + "/containers", root + "/pods/a"} {
				if st, err := os.Stat(d); err != nil || st.Mode() != fs.ModeDir|0o700 {
					t.Errorf("%s: %v, %v", d, st.Mode(), err)
				}
			}
		})
	}
}

// What is mounted below a run directory is not ours to delete.
func TestRemoveRunDirWithMount(t *testing.T) {
	must.BeRoot(t)
	s := open(t, t.TempDir(), t.TempDir())
	dir := s.RunDir(Containers, "a")
	target, precious := filepath.Join(dir, "rootfs"), filepath.Join(t.TempDir(), "precious")
	check(t, errors.Join(os.MkdirAll(target, 0o700), os.WriteFile(precious, nil, 0o600)))
	check(t, unix.Mount(filepath.Dir(precious), target, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	if err := s.RemoveRunDir(Containers, "a"); err == nil {
		t.Error("a directory with a mount was removed")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("a file in the mount: %v", err)
	}
	check(t, unix.Unmount(target, 0))
	for range 2 { // the second time there is nothing to do
		if err := s.RemoveRunDir(Containers, "a"); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory: %v", err)
	}
}

// A daemon that was killed in the middle of a removal leaves a directory that
// nobody loads. The next removal of the name, and Sweep, take it away.
func TestRemovalCutShort(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a[b")
	check(t, os.Mkdir(root, 0o700))
	s := open(t, root, t.TempDir())
	left := filepath.Join(root, string(Pods), delPrefix+"a")
	for _, finish := range []func() error{func() error { return s.Remove(Pods, "a") },
		func() error { s.Sweep(); return nil }} {
		check(t, errors.Join(s.Create(Pods, "a"), os.MkdirAll(filepath.Join(left, "x"), 0o700)))
		if ids, err := s.IDs(Pods); err != nil || len(ids) != 1 || ids[0] != "a" {
			t.Errorf("%v, %v", ids, err)
		}
		if err := finish(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", left, err)
		}
	}
}

// A removal that got no further than another name is finished by the next one.
func TestRunDirRemovalCutShort(t *testing.T) {
	run := t.TempDir()
	s := open(t, t.TempDir(), run)
	left := filepath.Join(run, string(Pods), delPrefix+"a")
	check(t, os.MkdirAll(filepath.Join(left, "x"), 0o700))
	check(t, s.RemoveRunDir(Pods, "a"))
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", left, err)
	}
}

func TestQuarantine(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, t.TempDir())
	path := filepath.Join(s.Dir(Pods, "a"), recordName)
	for range 2 { // a second one of the same name does not replace the first
		check(t, errors.Join(s.Create(Pods, "a"), os.WriteFile(path, []byte("torn"), 0o600)))
		err := s.Get(Pods, "a", new(struct{}))
		if !errors.Is(err, record.ErrDamaged) {
			t.Errorf("a torn record: %v", err)
		}
		s.QuarantineRecord(Pods, "a", err)
		if err := s.Get(Pods, "a", new(struct{})); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after the quarantine: %v", err)
		}
	}
	kept, err := os.ReadDir(filepath.Join(root, "quarantine"))
	if err != nil || len(kept) != 2 {
		t.Errorf("%d files are kept, %v", len(kept), err)
	}
}

var check = must.Succeed
