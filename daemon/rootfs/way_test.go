package rootfs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// asUser runs f on a thread that is a user of the host without rights.
func asUser(t *testing.T, uid, gid int, f func() error) (err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and it ends with the goroutine
		_, _, e1 := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		_, _, e2 := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid))
		_, _, e3 := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		if e1 != 0 || e2 != 0 || e3 != 0 {
			t.Errorf("cannot become %d:%d: %v, %v, %v", uid, gid, e1, e2, e3)
			return
		}
		err = f()
	}()
	<-done
	return err
}

// A way lets in one group and nobody else, while it is open.
func TestWay(t *testing.T) {
	must.BeRoot(t)
	defer unix.Umask(unix.Umask(0))
	dir := t.TempDir()
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err != nil || st.Mode()&0o001 == 0 {
			if err = errors.Join(err, os.Chmod(d, st.Mode().Perm()|0o011)); err != nil {
				t.Fatal(err)
			}
		}
	}
	root := filepath.Join(dir, "closed", "rootfs")
	check(t, os.MkdirAll(root, 0o755))
	check(t, errors.Join(os.WriteFile(root+"/file", nil, 0o644), os.Chmod(filepath.Dir(root), 0o700)))
	w := Ways(filepath.Join(dir, "ways"))
	if err := w.Remove("c"); err != nil {
		t.Errorf("of none: %v", err)
	}
	check(t, w.Make())
	const gid = 100000
	for range 2 { // the second time it is there already
		at, err := w.Open("c", root, gid)
		check(t, err)
		defer w.Remove("c")
		stat := func(path string) func() error {
			return func() error { _, err := os.Stat(path); return err }
		}
		if err := asUser(t, gid, gid, stat(at+"/file")); err != nil {
			t.Errorf("its group: %v", err)
		}
		for _, path := range []string{at, at + "/file", root} {
			if err := asUser(t, 65534, 65534, stat(path)); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%s by somebody: %v", path, err)
			}
		}
		list := func() error { _, err := os.ReadDir(string(w)); return err }
		if err := asUser(t, gid, gid, list); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("the ways are told: %v", err)
		}
		write := func() error { return os.WriteFile(filepath.Dir(at)+"/x", nil, 0o600) }
		if err := asUser(t, gid, gid, write); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("its group writes beside the root: %v", err)
		}
		if err := w.Close("c"); err != nil {
			t.Error(err)
		}
		if entries, err := os.ReadDir(at); err != nil || len(entries) > 0 {
			t.Errorf("after the end: %v, %v", entries, err)
		}
		if _, err := w.Open("c", root, gid); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Remove("c"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(string(w), "c")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the removal: %v", err)
	}
	if _, err := os.Stat(root + "/file"); err != nil {
		t.Error(err)
	}
	check(t, os.Chmod(dir, 0o700))
	if err := w.Make(); err == nil || !strings.Contains(err.Error(), "chmod o+x "+dir) {
		t.Errorf("below a closed directory: %v", err)
	}
}

func TestDisarm(t *testing.T) {
	must.BeRoot(t)
	dir := t.TempDir()
	check(t, os.WriteFile(dir+"/file", nil, 0o600))
	defer unmountAll(dir)
	for range 2 {
		check(t, Disarm(dir))
		var st unix.Statfs_t
		check(t, unix.Statfs(dir+"/file", &st))
		if st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
			t.Errorf("flags %#x", st.Flags)
		}
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("it is not mounted: %v", err)
	}
	if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("it is mounted twice: %v", err)
	}
	if err := Disarm(dir + "/absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
}
