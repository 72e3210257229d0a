package containers_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// deadDirectory is one of a file system that does not answer, until the test is at its end.
func deadDirectory(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { server.Close() })
	err = unix.Mount("none", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd()))
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// Files of a checkpoint whose directory does not answer keep nobody from the container, and
// are no reason to leave others.
func TestCheckpointInDeadDirectory(t *testing.T) {
	dead, live := deadDirectory(t), t.TempDir()
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
