package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMeasure(t *testing.T) {
	const size = 1 << 20
	full := strings.Repeat("x", size)
	for _, c := range []struct {
		name   string
		make   func(dir string) error
		files  uint64 // with bytes of their own
		inodes uint64
	}{
		{"nothing", func(string) error { return nil }, 0, 1},
		{"files", func(dir string) error {
			return errors.Join(os.MkdirAll(dir+"/a/b", 0o755), os.WriteFile(dir+"/a/b/f", []byte(full), 0o600),
				os.WriteFile(dir+"/a/g", []byte(full), 0o600))
		}, 2, 5},
		{"two names", func(dir string) error {
			return errors.Join(os.WriteFile(dir+"/f", []byte(full), 0o600), os.Mkdir(dir+"/a", 0o755),
				os.Link(dir+"/f", dir+"/a/g"))
		}, 1, 3},
		{"a hole", func(dir string) error {
			return errors.Join(os.WriteFile(dir+"/f", nil, 0o600), os.Truncate(dir+"/f", 1<<40))
		}, 0, 2},
		{"links and others", func(dir string) error {
			return errors.Join(os.Symlink("/", dir+"/root"), os.Symlink(dir, dir+"/self"), unix.Mkfifo(dir+"/fifo",
				0o600))
		}, 0, 4},
		{"closed directories", func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/a", 0o700), os.WriteFile(dir+"/a/f", []byte(full), 0), os.Chmod(dir+"/a",
				0))
		}, 1, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			check(t, c.make(dir))
			got, err := Measure(t.Context(), dir)
			// Directories take a few blocks, how many is for the file system to say.
			if err != nil || got.Inodes != c.inodes || got.Bytes < c.files*size || got.Bytes > c.files*size+size/2 {
				t.Errorf("got %+v, %v; want %d inodes and a little above %d bytes", got, err, c.inodes, c.files*size)
			}
		})
	}
}

// A container can nest directories far deeper than a path can be long.
func TestMeasureDeep(t *testing.T) {
	const depth = 2000
	top := t.TempDir()
	at, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(t, err)
	for range depth {
		check(t, unix.Mkdirat(at, "directory", 0o755))
		next, err := unix.Openat(at, "directory", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, err)
		unix.Close(at)
		at = next
	}
	check(t, unix.Mknodat(at, "file", unix.S_IFREG|0o600, 0))
	unix.Close(at)
	check(t, os.WriteFile(filepath.Join(top, "beside"), nil, 0o600))
	if got, err := Measure(t.Context(), top); err != nil || got.Inodes != depth+3 {
		t.Errorf("got %+v, %v; want %d inodes", got, err, depth+3)
	}
}

// What is changed meanwhile is no error, and never leads out of the tree.
func TestMeasureWhatChanges(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tree")
	for i := range 50 {
		check(t, os.MkdirAll(fmt.Sprintf("%s/%d/a/b/c", dir, i), 0o755))
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ctx.Err() == nil; i = (i + 1) % 50 {
			from := fmt.Sprintf("%s/%d/a/b", dir, i)
			os.Rename(from, dir+"/moved")
			os.Rename(dir+"/moved", from)
			os.Remove(from + "/c")
			os.Symlink("/", from+"/c")
			os.Remove(from + "/c")
			os.Mkdir(from+"/c", 0o755)
		}
	}()
	for range 200 {
		got, err := Measure(ctx, dir)
		if err != nil && !errors.Is(err, ErrUnmeasured) || got.Inodes > 1+50*4+10 {
			t.Fatalf("got %+v, %v", got, err)
		}
	}
	cancel()
	<-ended
	if _, err := Measure(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("when nobody waits any more: %v", err)
	}
	if _, err := Measure(t.Context(), dir+"/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
}
