package image

import (
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// Requests of ioctl(2), see linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freeze has all that write to the disk wait until thaw is called, which may be
// done twice.
func (d *disk) freeze() (thaw func()) {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), fiFreeze, 0)
	}
	if err != nil {
		d.t.Fatalf("cannot freeze the disk: %v", err)
	}
	thaw = sync.OnceFunc(func() {
		defer f.Close()
		if err := unix.IoctlSetPointerInt(int(f.Fd()), fiThaw, 0); err != nil {
			d.t.Errorf("cannot thaw the disk: %v", err)
		}
	})
	d.t.Cleanup(thaw)
	return thaw
}

// Who only reads does not wait for a disk, whatever writers wait for it.
func TestReadersDoNotWaitForTheDisk(t *testing.T) {
	t.Parallel()
	d, f := newDisk(t), newFaulty(t, 300_000)
	s := openAt(t, d.dir)
	l := NewLibrary(s, &sink{}, (&users{}).use)
	pull := func(ref string) (Image, error) { return l.Pull(t.Context(), PullRequest{Ref: ref}) }
	img, err := pull(f.push(t, "here:1", imageOf(t, "y", layerOf(t, "y", 1000, 9, types.OCILayer))))
	check(t, err)
	asked, answer := make(chan struct{}), make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if f.isLayer(r, 0) {
			close(asked)
			<-answer
		}
		return true
	})
	usage := s.Usage()
	var writers sync.WaitGroup
	writers.Go(func() {
		if _, err := pull(f.ref); err != nil {
			t.Error(err)
		}
	})
	<-asked
	thaw := d.freeze()
	close(answer)
	writers.Go(func() {
		if err := l.Remove(img.ID); err != nil {
			t.Error(err)
		}
	})
	stuck := func() bool {
		if s.mu.TryLock() {
			s.mu.Unlock()
			return false
		}
		return true
	}
	eventually(t, "the removal waits for the disk", stuck)
	read := make(chan struct{})
	go func() {
		defer close(read)
		readAll(t, l, img, usage)
	}()
	select {
	case <-read:
	case <-time.After(time.Minute):
		t.Error("readers wait")
	}
	if !stuck() {
		t.Error("nothing waited for the disk: nothing was shown")
	}
	thaw()
	<-read
	writers.Wait()
	if _, ok := l.Get(img.ID); ok {
		t.Error("the image is still there")
	}
	if _, ok := l.Get(f.ref); !ok {
		t.Error("the other did not come")
	}
}

// readAll asks for all that there is to read while img is the only image and
// another one is on its way.
func readAll(t *testing.T, l *Library, img Image, before Usage) {
	if list := l.List(); len(list) != 1 || list[0].ID != img.ID {
		t.Errorf("list: %v", list)
	}
	for _, ref := range []string{img.ID, img.RepoTags[0], img.RepoDigests[0]} {
		if got, ok := l.Get(ref); !ok || got.ID != img.ID {
			t.Errorf("%s: %v", ref, got)
		}
	}
	if got := l.Usage(); got.Bytes < before.Bytes {
		t.Errorf("usage: %v, before %v", got, before)
	}
	if st := l.Stats(); len(st.Running) != 1 || st.Downloads != 1 || st.Images != 1 {
		t.Errorf("stats: %+v", st)
	}
	if c, err := l.Spec(img); err != nil || len(c.RootFS.DiffIDs) != 1 {
		t.Errorf("spec: %v", err)
	}
}
