package rootfs

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Ioctls of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// waiting counts the threads of this process that wait for a disk.
func waiting(t *testing.T) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/stat")
	check(t, err)
	for _, f := range files {
		b, _ := os.ReadFile(f)
		_, state, _ := strings.Cut(string(b), ") ") // proc_pid_stat(5)
		if strings.HasPrefix(state, "D") {
			n++
		}
	}
	return n
}

// While the disk stands still, and calls that change layers with it, readers get
// their answers.
func TestReadersDoNotWaitForTheDisk(t *testing.T) {
	dir := smallDisk(t, "16M")
	s := open(t, filepath.Join(dir, "layers"))
	kept := apply(t, s, e{name: "kept", body: "x"})
	removed := apply(t, s, e{name: "removed", body: "y"})
	lost := apply(t, s, e{name: "lost", body: "z"})
	check(t, os.RemoveAll(filepath.Join(s.layerDir(lost), diffName)))
	list := slices.Sorted(slices.Values([]digest.Digest{kept, removed, lost}))
	usage := s.Usage()

	disk, err := os.Open(dir)
	check(t, err)
	defer disk.Close()
	if err := unix.IoctlSetInt(int(disk.Fd()), fiFreeze, 0); err != nil {
		t.Fatalf("cannot freeze the disk: %v", err)
	}
	thaw := func() { unix.IoctlSetInt(int(disk.Fd()), fiThaw, 0) }
	defer thaw() // a second time is an error, and no more

	fresh := archive(t, e{name: "fresh", body: "w"})
	writers := []func() error{
		func() error { return s.Apply(t.Context(), digest.FromBytes(fresh), bytes.NewReader(fresh)) },
		func() error { return s.Remove(removed) },
		func() error { s.Has(lost); return nil }, // it removes what is left of it
	}
	ended := make(chan error, len(writers))
	for _, w := range writers {
		go func() { ended <- w() }()
	}
	eventually(t, "all writers wait", func() bool { return waiting(t) >= len(writers) })

	// If these wait, the test does so until it is killed.
	if !s.Has(kept) || !s.Has(removed) || s.Has(digest.FromBytes(fresh)) {
		t.Errorf("has %v", s.List())
	}
	if got := s.List(); !slices.Equal(got, list) || s.Count() != len(list) || s.Usage() != usage {
		t.Errorf("%v, %d, %+v while the disk stands still", got, s.Count(), s.Usage())
	}
	select {
	case err := <-ended:
		t.Errorf("a writer did not wait: %v", err)
	default:
	}
	thaw()
	for range writers {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	want := slices.Sorted(slices.Values([]digest.Digest{kept, digest.FromBytes(fresh)}))
	if got := s.List(); !slices.Equal(got, want) {
		t.Errorf("%v in the end, want %v", got, want)
	}
}
