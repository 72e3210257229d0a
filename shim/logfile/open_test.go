package logfile

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func statInode(st fs.FileInfo) uint64 { return st.Sys().(*syscall.Stat_t).Ino }

func TestOpenCreates(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	dir := t.TempDir()
	for _, path := range []string{"0.log", "a/b/c/0.log", "a/b/1.log"} {
		f, err := Open(dir, path)
		check(t, err)
		defer f.Close()
		st, err := os.Lstat(filepath.Join(dir, path))
		if err != nil || st.Mode() != 0o640 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	if st, err := os.Lstat(filepath.Join(dir, "a/b")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("a/b: %v, %v", st.Mode(), err)
	}
}

// A log that is prepared has its directories, and no file before it is opened.
func TestPrepare(t *testing.T) {
	dir := t.TempDir()
	f, err := Prepare(dir, "a/0.log")
	check(t, err)
	if names, err := os.ReadDir(dir + "/a"); err != nil || len(names) > 0 {
		t.Errorf("there is %v, %v", names, err)
	}
	if fd, err := f.Dup(); fd != -1 || err != nil {
		t.Errorf("Dup gives %d, %v", fd, err)
	}
	_, err = f.Reopen()
	check(t, err)
	f.Append(Stdout, time.Now(), []byte("x\n"), true)
	check(t, f.Close())
	if got := output(parse(t, read(t, dir+"/a/0.log")), Stdout); got != "x\n" {
		t.Errorf("got %q", got)
	}
	// One that is never opened leaves nothing, and is closed like any other.
	if f, err = Prepare(dir, "b.log"); err == nil {
		err = f.Close()
	}
	check(t, err)
	if _, err := f.Reopen(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Reopen after Close: %v", err)
	}
	if _, err := os.Lstat(dir + "/b.log"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("b.log: %v", err)
	}
}

func TestOpenAppends(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		f, err := Open(dir, "0.log")
		check(t, err)
		f.Append(Stdout, time.Now(), []byte("x\n"), true)
		f.Close()
	}
	if got := output(parse(t, read(t, dir+"/0.log")), Stdout); got != "x\nx\n" {
		t.Errorf("got %q", got)
	}
}

func TestOpenRefusesPaths(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{
		"", "/", "/0.log", "../0.log", "a/../0.log", "a/..", "a//0.log", "a/", "./0.log", ".", "..", "a\x00b",
	} {
		if f, err := Open(dir, path); !errors.Is(err, ErrPath) {
			t.Errorf("%q: %v", path, err)
			if err == nil {
				f.Close()
			}
		}
	}
	if names, _ := os.ReadDir(dir); len(names) > 0 {
		t.Errorf("%v came into being", names)
	}
}

// What a pod with /var/log mounted can put in the way.
func TestOpenRefusesWhatIsNoFile(t *testing.T) {
	dir, victim := t.TempDir(), t.TempDir()
	secret := filepath.Join(victim, "secret")
	must := func(err error) {
		t.Helper()
		check(t, err)
	}
	must(os.WriteFile(secret, nil, 0o600))
	must(os.Symlink(secret, dir+"/link"))
	must(os.Symlink(victim+"/new", dir+"/dangling"))
	must(os.Symlink(victim, dir+"/dirlink"))
	must(os.Symlink("real", dir+"/inside"))
	must(os.Mkdir(dir+"/real", 0o755))
	must(unix.Mkfifo(dir+"/fifo", 0o600))
	must(unix.Mkfifo(dir+"/read", 0o600))
	reader, err := unix.Open(dir+"/read", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	must(err)
	defer unix.Close(reader)
	l, err := net.Listen("unix", dir+"/socket")
	must(err)
	defer l.Close()
	must(os.Symlink("/proc/self/fd/1", dir+"/magic"))

	tests := map[string]error{
		"link": unix.ELOOP, "dangling": unix.ELOOP, "dirlink/new": unix.ELOOP, "dirlink/a/new": unix.ELOOP,
		"inside/0.log": unix.ELOOP, "magic": unix.ELOOP,
		"real": unix.EISDIR, "fifo": ErrNotRegular, "read": ErrNotRegular, "socket": ErrNotRegular,
		"fifo/0.log": unix.ENOTDIR,
	}
	if os.Geteuid() == 0 && unix.Mknod(dir+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))) == nil {
		tests["null"] = ErrNotRegular
		var st unix.Statfs_t
		if must(unix.Statfs(dir, &st)); st.Flags&unix.MS_NODEV != 0 { // as a tmpfs on /tmp mostly is
			tests["null"] = unix.EACCES
		}
	}
	for path, want := range tests {
		f, err := Open(dir, path)
		// A symbolic link where a directory should be is one or the other.
		if !errors.Is(err, want) && !(want == unix.ELOOP && errors.Is(err, unix.ENOTDIR)) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
		if err == nil {
			f.Close()
		}
	}
	if names, _ := os.ReadDir(victim); len(names) != 1 {
		t.Errorf("%v outside of the log directory", names)
	}

	// The same between two calls.
	f, err := Open(dir, "pod/0.log")
	must(err)
	defer f.Close()
	must(os.Remove(dir + "/pod/0.log"))
	must(os.Symlink(victim+"/new", dir+"/pod/0.log"))
	if _, err := f.Reopen(); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Reopen of a link: %v", err)
	}
	must(os.RemoveAll(dir + "/pod"))
	must(os.Symlink(victim, dir+"/pod"))
	if _, err := f.Reopen(); err == nil {
		t.Error("Reopen followed a link in place of the directory")
	}
	if names, _ := os.ReadDir(victim); len(names) != 1 {
		t.Errorf("%v outside of the log directory", names)
	}
	if st, _ := os.Stat(secret); st.Size() != 0 {
		t.Error("somebody else's file was written to")
	}
}

// The directory itself may be reached through a link: /var/log often is.
func TestOpenTrustsTheDirectory(t *testing.T) {
	dir := t.TempDir()
	check(t, os.Mkdir(dir+"/real", 0o755))
	check(t, os.Symlink("real", dir+"/log"))
	f, err := Open(dir+"/log", "0.log")
	check(t, err)
	f.Close()
	if _, err := Open(dir+"/missing", "0.log"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestDescriptors(t *testing.T) {
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return len(names)
	}
	dir := t.TempDir()
	os.Mkdir(dir+"/d", 0o755)
	before := count()
	for range 20 {
		f, err := Open(dir, "a/b/0.log")
		check(t, err)
		f.Reopen()
		f.Close()
		f.Reopen()
		Open(dir, "d")
		Open(dir, "a/b/0.log/x")
		Open(dir, "../x")
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
