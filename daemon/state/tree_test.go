package state

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// deep makes a directory that is nested, each level with a file in it.
func deep(t *testing.T, dir string, levels int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for i := 0; err == nil && i < levels; i++ {
		var file, next int
		if file, err = unix.Openat(fd, "f", unix.O_CREAT|unix.O_CLOEXEC, 0o600); err != nil {
			break
		}
		unix.Close(file)
		if err = unix.Mkdirat(fd, "d", 0o700); err != nil {
			break
		}
		next, err = unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		fd = next
	}
	check(t, err)
	unix.Close(fd)
}

// TestRemoveDeepTree has fewer descriptors than the tree has levels.
func TestRemoveDeepTree(t *testing.T) {
	var was unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	few := was
	few.Cur = 256
	top := filepath.Join(t.TempDir(), "gone")
	for _, name := range []string{"a", "b", ".deep-1", "c"} { // the third as a removal cut short leaves it
		check(t, os.MkdirAll(filepath.Join(top, name), 0o700))
		deep(t, filepath.Join(top, name), 3000)
	}
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &few))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	check(t, RemoveTree(top))
	if _, err := os.Lstat(top); !os.IsNotExist(err) {
		t.Fatalf("it is still there: %v", err)
	}
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	kept := filepath.Join(dir, "kept")
	check(t, os.WriteFile(kept, nil, 0o600))
	top := filepath.Join(dir, "gone")
	check(t, os.MkdirAll(filepath.Join(top, "many"), 0o700))
	for i := range 3000 {
		check(t, os.WriteFile(filepath.Join(top, "many", strconv.Itoa(i)), nil, 0o600))
	}
	for name, to := range map[string]string{"file": kept, "dir": dir, "nothing": "/nonexistent"} {
		check(t, os.Symlink(to, filepath.Join(top, name)))
	}
	check(t, unix.Mkfifo(filepath.Join(top, "fifo"), 0o600))
	for _, path := range []string{top, top, kept} { // again, and what is no directory
		check(t, RemoveTree(path))
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Fatalf("%s is still there: %v", path, err)
		}
		if _, err := os.Lstat(dir); err != nil {
			t.Fatal(err)
		}
	}
}
