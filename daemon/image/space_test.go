package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func dropping(o *Options) { o.DropLayers = true }

// Without the blobs of its layers an image is listed, pulled again for nothing,
// and what was lost of it is fetched.
func TestLayersDropped(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 100_000, 50_000)
	root := t.TempDir()
	s := openAt(t, root, dropping)
	var k sink
	img := mustPull(t, s, k.request(f.ref))
	dropped := func(s *Store) func() bool {
		return func() bool {
			return !s.hasBlob(descOf(f.layers[0])) && !s.hasBlob(descOf(f.layers[1])) && s.Usage().Inodes == 2
		}
	}
	eventually(t, "layers are dropped", dropped(s))
	f.reset()
	mustPull(t, s, k.request(f.ref))
	if hits, sent := f.reset(); sent != 0 || count(hits, "GET blobs") != 0 {
		t.Errorf("came again: %v", hits)
	}
	s.Close()
	// The other setting, and back: an image is whole under both.
	s = openAt(t, root)
	if l := s.List(); len(l) != 1 || l[0].ID != img.ID || l[0].Size != img.Size {
		t.Fatalf("after a restart: %+v", l)
	}
	mustPull(t, s, k.request(f.ref)) // the layout is made complete
	if !s.hasBlob(descOf(f.layers[0])) || !s.hasBlob(descOf(f.layers[1])) {
		t.Error("the blobs did not come back")
	}
	verify(t, s)
	s.Close()
	s = openAt(t, root, dropping)
	eventually(t, "layers are dropped", dropped(s))
	// One layer was lost.
	lost := img.DiffIDs[0]
	k.mu.Lock()
	delete(k.layers, lost)
	k.mu.Unlock()
	f.reset()
	if err := s.unpack(t.Context(), k.request(img.ID)); err != nil || !k.Has(lost) {
		t.Errorf("unpack: %v", err)
	}
	if hits, _ := f.reset(); count(hits, "GET blobs") != 1 {
		t.Errorf("more than the lost one came: %v", hits)
	}
	eventually(t, "layers are dropped", dropped(s))
	// It cannot be had: somebody has to pull the image.
	f.set(basicAuth("me", "secret"))
	var k2 sink
	if err := s.unpack(t.Context(), k2.request(img.ID)); !errors.Is(err, ErrNotFound) {
		t.Errorf("unpack without credentials: %v", err)
	}
	r := k2.request(img.ID)
	r.Auth = &Auth{Username: "me", Password: "secret"}
	if err := s.unpack(t.Context(), r); err != nil {
		t.Errorf("unpack with credentials: %v", err)
	}
	if free, err := s.Remove(f.ref); err != nil || len(free) != 2 {
		t.Errorf("removed: %v %v", free, err)
	}
	eventually(t, "all is collected", func() bool { return s.Usage() == Usage{} })
}

// What has come of a lost layer does not come again: a container is asked for
// anew after minutes, in which a slow link does not bring all of it.
func TestLostLayerGoesOn(t *testing.T) {
	t.Parallel()
	for name, again := range map[string]func(s *Store, img, tag PullRequest) error{
		"container": func(s *Store, img, _ PullRequest) error { return s.unpack(t.Context(), img) },
		"pull":      func(s *Store, _, tag PullRequest) error { _, err := s.Pull(t.Context(), tag); return err },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFaulty(t, 600_000)
			s := openAt(t, t.TempDir(), dropping)
			var k, lost sink
			img := mustPull(t, s, k.request(f.ref))
			eventually(t, "the layer is dropped", func() bool { return !s.hasBlob(descOf(f.layers[0])) })
			ctx, cancel := context.WithCancel(t.Context())
			f.set(func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Length", fmt.Sprint(len(f.layers[0].packed)))
				w.Write(f.layers[0].packed[:400_000])
				http.NewResponseController(w).Flush()
				part := filepath.Join(s.o.Root, ingestName, partName(f.host, descOf(f.layers[0])))
				eventually(
					t,
					"it has come",
					func() bool { st, err := os.Stat(part); return err == nil && st.Size() == 400_000 },
				)
				cancel()
				<-r.Context().Done()
				return false
			})
			if err := s.unpack(ctx, lost.request(img.ID)); !errors.Is(err, context.Canceled) {
				t.Fatalf("got %v", err)
			}
			eventually(t, "the download has ended", func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return len(s.downloads) == 0
			})
			check(t, s.collect())
			f.set(nil)
			f.reset()
			check(t, again(s, lost.request(img.ID), lost.request(f.ref)))
			if _, sent := f.reset(); sent > 210_000 {
				t.Errorf("%d bytes came, the rest was 200_000", sent)
			}
			eventually(t, "nothing is left", func() bool {
				l, err := os.ReadDir(filepath.Join(s.o.Root, ingestName))
				s.mu.Lock()
				defer s.mu.Unlock()
				return err == nil && len(l) == 0 && len(pendings(s)) == 0
			})
		})
	}
}

// small mounts a file system of that size.
func small(t testing.TB, size string) string {
	t.Helper()
	must.BeRoot(t)
	dir := t.TempDir()
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A full disk fails the pull, not the store.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 3<<20, 3<<20)
	fits := f.push(t, "team/small:1", imageOf(t, "x", layerOf(t, "s", 1<<20, 9, types.OCILayer)))
	root := small(t, "5m")
	s := openAt(t, root)
	var k sink
	interrupt := func() {
		t.Helper()
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if f.isLayer(r, 0) && r.Header.Get("Range") == "" {
				f.sentSome(w, f.layers[0].packed, 2<<20)
			}
			return !f.anyLayer(r) || func() bool { w.WriteHeader(http.StatusServiceUnavailable); return false }()
		})
		defer f.set(nil)
		if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	}
	empty := func() bool {
		l, err := filepath.Glob(filepath.Join(root, ingestName, "*"))
		return err == nil && len(l) == 0 && s.Usage() == Usage{}
	}
	interrupt()
	for range 2 {
		if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("got %v", err)
		}
		half(t, s)
	}
	eventually(t, "nothing is left", empty)
	fill, err := os.Create(filepath.Join(root, "fill"))
	check(t, err)
	fillUp := func() {
		for b, err := make([]byte, 4096), error(nil); err == nil; {
			_, err = fill.Write(b)
		}
	}
	// There is not even room for a manifest, but what a pull left would do.
	interrupt()
	left := []digest.Digest{descOf(f.layers[0]).Digest}
	s.hold(left) // the collector does not make room before the pull asks for it
	fillUp()
	if _, err := s.Pull(t.Context(), k.request(fits)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	s.release(left)
	eventually(t, "nothing is left", empty)
	mustPull(t, s, k.request(fits))
	verify(t, s)
	// Full to the last byte, and with an image: it can be listed and removed.
	fillUp()
	if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	mustPull(t, s, k.request(fits)) // it is here already
	s.Close()
	s = openAt(t, root)
	if len(s.List()) != 1 {
		t.Fatalf("images %+v", s.List())
	}
	verify(t, s)
	s.Close()
	s = openAt(t, root, dropping) // there is no room to write that down
	if len(s.List()) != 1 {
		t.Fatalf("images %+v", s.List())
	}
	verify(t, s)
	s.Close()
	s = openAt(t, root)
	if _, err := s.Remove(fits); err != nil {
		t.Errorf("remove on a full disk: %v", err)
	}
	noRefs(t, s)
	eventually(t, "its room is free", func() bool { return s.Usage() == Usage{} })
	check(t, errors.Join(fill.Close(), os.Remove(fill.Name())))
	mustPull(t, s, k.request(fits))
	verify(t, s)
}

// What interrupted pulls leave takes no more than is free, parts and whole blobs together: the
// oldest goes first, without another pull.
func TestInterruptedPullsLeaveRoom(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 1<<20, 1<<20)
	g := newFaulty(t, 1<<20+1, 1<<20+1)
	root := small(t, "16m")
	s := openAt(t, root)
	var k sink
	var parts []string
	for _, f := range []*faulty{f, g} {
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if f.isLayer(r, 0) && r.Header.Get("Range") == "" {
				f.sentSome(w, f.layers[0].packed, 512<<10)
			}
			if !f.isLayer(r, 0) {
				return true
			}
			eventually(t, "the other layer is here", func() bool { return s.hasBlob(descOf(f.layers[1])) })
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		})
		if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		parts = append(parts, filepath.Join(root, ingestName, partName(f.host, descOf(f.layers[0]))))
	}
	there := func(path string) bool { _, err := os.Lstat(path); return err == nil }
	for i, free := range []string{"4m", "2m"} {
		check(t, s.collect())
		if !there(parts[i]) || len(pendings(s)) != 2-i {
			t.Errorf("with room for it, %d: %v", i, pendings(s))
		}
		check(t, unix.Mount("", root, "tmpfs", unix.MS_REMOUNT, "size="+free))
		s.kick()
		eventually(t, "the oldest is gone", func() bool { return !there(parts[i]) && len(pendings(s)) == 1-i })
	}
	eventually(t, "nothing is left", func() bool { return s.Usage() == Usage{} })
}

// Whoever looks sees how far a pull is.
func TestProgress(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 200_000, 100_000)
	gate := make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if f.isLayer(r, 0) {
			b := f.layers[0].packed
			w.Write(b[:100_000])
			http.NewResponseController(w).Flush()
			<-gate
			w.Write(b[100_000:])
			return false
		}
		return true
	})
	dir := filepath.Join(t.TempDir(), "pulls")
	check(t, errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "1-1.json"), nil, 0o600)))
	var log lines
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressDir, o.ProgressEvery, o.Log = dir, 1e6, log.logger() })
	records := func() (l []records.Pull) {
		files, _ := filepath.Glob(filepath.Join(dir, "[^.]*"))
		for _, name := range files {
			var p records.Pull
			if record.Read(name, &p) == nil {
				l = append(l, p)
			}
		}
		return l
	}
	if l, _ := os.ReadDir(dir); len(l) != 0 {
		t.Errorf("left of another process: %v", l)
	}
	var k sink
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.Pull(t.Context(), k.request(f.ref)); err != nil {
			t.Error(err)
		}
	})
	total := int64(len(f.layers[0].packed) + len(f.layers[1].packed))
	eventually(t, "it is half way", func() bool {
		l := records()
		return len(l) == 1 && l[0].Asked == f.ref && l[0].Ref == f.ref && l[0].TotalBytes == total &&
			l[0].TotalLayers == 2 &&
			l[0].Layers == 1 &&
			l[0].Bytes == total-int64(len(f.layers[0].packed))+100_000
	})
	eventually(t, "the log tells", func() bool { return strings.Contains(log.String(), "ofLayers=2") })
	eventually(t, "one download has ended", func() bool { return s.Stats().Downloads == 1 })
	if st := s.Stats(); len(st.Running) != 1 || st.Running[0].Ref != f.ref || st.Bytes < 100_000 ||
		st.Pulls["success"] != 0 {
		t.Errorf("%+v", st)
	}
	close(gate)
	wg.Wait()
	if l, _ := os.ReadDir(dir); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
	if st := s.Stats(); st.Pulls["success"] != 1 || len(st.Running) != 0 || st.Bytes != uint64(total) ||
		st.Unpacked != 2 || st.Images != 1 || (Usage{st.BlobBytes, st.Blobs}) != s.Usage() {
		t.Errorf("%+v", st)
	}
	if _, err := s.Pull(t.Context(), k.request(f.host+"/none:1")); err == nil || s.Stats().Pulls["not_found"] != 1 {
		t.Errorf("%v %+v", err, s.Stats())
	}
}

// lines is a log to look at.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
