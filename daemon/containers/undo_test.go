package containers_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
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
