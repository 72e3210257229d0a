package containers_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// deadDirectory is one of a file system that does not answer until the test is at its end,
// or revive is called.
func deadDirectory(t *testing.T) (dir string, revive func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir = t.TempDir()
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	err = unix.Mount("none", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd()))
	if err != nil {
		server.Close()
		t.Skip(err)
	}
	t.Cleanup(func() {
		server.Close()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	return dir, func() { server.Close() }
}

// Files of a checkpoint whose directory does not answer keep nobody from the container.
func TestCheckpointInDeadDirectory(t *testing.T) {
	dir, revive := deadDirectory(t)
	b := newBed(t)
	id := b.run("c", fake.Sleeps...)
	c, err := b.Containers.Find(id)
	check(t, err)
	_, interrupt := context.WithCancelCause(t.Context())
	s, err := c.Begin(t.Context(), interrupt, records.File{Path: filepath.Join(dir, "a"), Own: "b"})
	check(t, err)
	ended := make(chan struct{})
	go func() {
		s.End(true)
		close(ended)
	}()
	fake.Until(t, "the end of the checkpoint", func() bool { return c.Record().Checkpoint == nil })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.Containers.Remove(ctx, id); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
		t.Error("the directory has answered")
	default:
	}
	revive()
	<-ended
	b.gone(id)
}
