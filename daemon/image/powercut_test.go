package image

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// disk is an ext4 of its own, whose power can be cut.
type disk struct {
	t         testing.TB
	file, dir string
}

func newDisk(t testing.TB) *disk {
	t.Helper()
	must.BeRoot(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: ", err)
	}
	d := &disk{t, filepath.Join(t.TempDir(), "disk"), t.TempDir()}
	d.run("truncate", "-s", "64M", d.file)
	d.run("mkfs.ext4", "-q", d.file)
	// The journal is written when somebody syncs, and hardly ever else.
	d.run("mount", "-o", "loop,commit=3600", d.file, d.dir)
	t.Cleanup(d.umount)
	return d
}

func (d *disk) run(name string, args ...string) {
	d.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/sbin:/usr/bin:/bin")
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// cut makes the file system forget what is not on the disk; from now on all of
// its calls fail.
func (d *disk) cut() {
	d.t.Helper()
	const (
		shutdown = 0x8004587d // EXT4_IOC_SHUTDOWN
		noFlush  = 2          // not even the journal
	)
	f, err := os.Open(d.dir)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noFlush)
		f.Close()
	}
	if err != nil {
		d.t.Fatalf("cannot cut the power: %v", err)
	}
}

// umount waits for children of other tests, which have all files between fork
// and exec.
func (d *disk) umount() {
	d.t.Helper()
	eventually(d.t, "nobody uses the disk", func() bool { return unix.Unmount(d.dir, 0) == nil })
}

// boot mounts what is on the disk. As long as another process has a copy of
// the mounts, because a container is started beside this test, a mount gives the
// file system that was cut.
func (d *disk) boot() {
	d.t.Helper()
	eventually(d.t, "the disk is back", func() bool {
		d.umount()
		d.run("mount", "-o", "loop,commit=3600", d.file, d.dir)
		probe := filepath.Join(d.dir, "probe")
		return os.WriteFile(probe, nil, 0o600) == nil && os.Remove(probe) == nil
	})
}

// A power cut at any moment of a pull leaves a store that is whole: an image is
// there with all of its blobs or not at all, and one whose pull was answered is
// there.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 400_000, 300_000, 200_000)
	d := newDisk(t)
	root := filepath.Join(d.dir, "images")
	for round := range 8 {
		s := openAt(t, root)
		// The cut comes with the round-th request, or after the answer.
		var mu sync.Mutex
		n := 0
		var once sync.Once
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			n++
			now := n == round
			mu.Unlock()
			if now {
				once.Do(d.cut)
			}
			return true
		})
		var k sink
		_, err := s.Pull(t.Context(), k.request(f.ref))
		answered := err == nil
		once.Do(d.cut)
		s.Close()
		d.boot()
		f.set(nil)
		s = openAt(t, root)
		verify(t, s)
		if got := len(s.List()); answered && got != 1 {
			t.Errorf("round %d: the pull was answered, and %d images are there", round, got)
		}
		mustPull(t, s, k.request(f.ref))
		verify(t, s)
		if _, err := s.Remove(f.ref); err != nil {
			t.Fatal(err)
		}
		eventually(t, "all is collected", func() bool { return s.Usage() == Usage{} })
		s.Close()
		check(t, os.RemoveAll(root))
		d.run("sync", "-f", d.dir)
	}
}

// A removal that is cut off half way leaves the image, or not, and nothing that
// nobody needs.
func TestPowerCutAtRemoval(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 100_000, 50_000)
	d := newDisk(t)
	root := filepath.Join(d.dir, "images")
	for _, synced := range []bool{false, true} {
		s := openAt(t, root)
		var k sink
		img := mustPull(t, s, k.request(f.ref))
		other := f.push(t, "team/other:1", imageOf(t, fmt.Sprint(synced), f.layers[0]))
		kept := mustPull(t, s, k.request(other))
		if _, err := s.Remove(img.ID); err != nil {
			t.Fatal(err)
		}
		if synced { // as far as the collector has come
			d.run("sync", "-f", d.dir)
		}
		d.cut()
		s.Close()
		d.boot()
		s = openAt(t, root)
		verify(t, s)
		if !slices.ContainsFunc(s.List(), func(i Image) bool { return i.ID == kept.ID }) {
			t.Errorf("synced %v: another image went along: %+v", synced, s.List())
		}
		for _, i := range s.List() {
			if _, err := s.Remove(i.ID); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "all is collected", func() bool { return s.Usage() == Usage{} })
		s.Close()
	}
}
