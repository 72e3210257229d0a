package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// faulty is a hub in front of which a fault is put for each test. It knows the
// layers of one image, and counts how often each blob was sent.
type faulty struct {
	*hub
	ref    string
	img    v1.Image
	layers []*testLayer
}

func newFaulty(t testing.TB, sizes ...int) *faulty {
	t.Helper()
	f := &faulty{hub: newHub(t)}
	var l []v1.Layer
	for i, size := range sizes {
		typ := []types.MediaType{types.OCILayer, types.OCILayerZStd}[i%2]
		layer := layerOf(t, fmt.Sprint(i), size, uint64(i+1), typ).(*testLayer)
		f.layers, l = append(f.layers, layer), append(l, layer)
	}
	f.img = imageOf(t, "x", l...)
	f.ref = f.push(t, "team/app:1", f.img)
	return f
}

func (f *faulty) digest(i int) digest.Digest { return digest.FromBytes(f.layers[i].packed) }

// isLayer says whether a request is for this layer.
func (f *faulty) isLayer(r *http.Request, i int) bool {
	return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+f.digest(i).String())
}

func (f *faulty) anyLayer(r *http.Request) bool {
	for i := range f.layers {
		if f.isLayer(r, i) {
			return true
		}
	}
	return false
}

// half checks that nothing of an image that failed can be seen.
func half(t testing.TB, s *Store) {
	t.Helper()
	noRefs(t, s)
	verify(t, s)
}

// Blobs that are complete are not fetched again, neither by the next pull of
// this process nor by one after a kill, and the others go on where they were.
func TestInterruptedPullKeepsFinishedBlobs(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 600_000, 600_000, 600_000)
	root := t.TempDir()
	finished := func(s *Store) bool {
		return s.hasBlob(descOf(f.layers[0])) && s.hasBlob(descOf(f.layers[1]))
	}
	fail := func(s *Store) {
		t.Helper()
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if !f.isLayer(r, 2) {
				return true
			}
			if r.Header.Get("Range") == "" {
				f.hub.sentSome(w, f.layers[2].packed, 100_000)
			}
			eventually(t, "the others", func() bool { return finished(s) })
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		})
		var k sink
		if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
		half(t, s)
		check(t, s.collect())
		if !finished(s) {
			t.Fatal("finished blobs were removed")
		}
	}
	s := openAt(t, root)
	fail(s)
	f.reset()
	fail(s) // in the same process
	if hits, _ := f.reset(); count(
		hits,
		"GET blobs "+f.digest(0).String(),
	)+count(
		hits,
		"GET blobs "+f.digest(1).String(),
	) != 0 {
		t.Errorf("fetched again: %v", hits)
	}
	s.Close()
	s = openAt(t, root)
	f.set(nil)
	var k sink
	mustPull(t, s, k.request(f.ref))
	hits, sent := f.reset()
	if count(hits, "GET blobs "+f.digest(0).String())+count(hits, "GET blobs "+f.digest(1).String()) != 0 ||
		sent > 510_000 {
		t.Errorf("%d bytes came, the rest was 500_000: %v", sent, hits)
	}
	if l, _ := os.ReadDir(filepath.Join(root, pendingName)); len(l) != 0 || len(pendings(s)) != 0 {
		t.Errorf("still pending: %v", l)
	}
	verify(t, s)
}

// sentSome sends the begin of a blob.
func (h *hub) sentSome(w http.ResponseWriter, b []byte, n int) {
	w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	w.Write(b[:n])
	http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// What an abandoned pull left goes when it is stale.
func TestAbandonedPullIsForgotten(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 10_000, 10_000)
	root := t.TempDir()
	s := openAt(t, root)
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !f.isLayer(r, 1) {
			return true
		}
		eventually(t, "the other", func() bool { return s.hasBlob(descOf(f.layers[0])) })
		w.WriteHeader(http.StatusForbidden)
		return false
	})
	var k sink
	if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrUnauthorized) { // nothing to come back for
		t.Fatal(err)
	}
	eventually(t, "all of it is collected", func() bool { return s.Usage() == Usage{} })
	ctx, cancel := context.WithCancel(t.Context())
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if f.isLayer(r, 1) {
			eventually(t, "the other", func() bool { return s.hasBlob(descOf(f.layers[0])) })
			cancel()
			<-r.Context().Done()
			return false
		}
		return true
	})
	if _, err := s.Pull(ctx, k.request(f.ref)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := s.collect(); err != nil || !s.hasBlob(descOf(f.layers[0])) {
		t.Fatalf("the finished blob is gone: %v", err)
	}
	s.Close()
	s = openAt(t, root, func(o *Options) { o.StaleIngest = 100 * time.Millisecond })
	eventually(t, "all of it is collected", func() bool { return s.Usage() == Usage{} })
	eventually(t, "nothing is left", func() bool { // partial downloads go after the blobs
		l, _ := filepath.Glob(filepath.Join(root, "[ip]n*", "*"))
		return len(l) == 0
	})
}

// Connections break at every 64 KiB, on the registry and on the storage that it
// redirects to. No byte comes twice.
func TestCutsBehindARedirect(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 1<<20, 700_000, 300_000)
	storage := httptest.NewServer(f.Config.Handler)
	storage.Config.ErrorLog = f.Config.ErrorLog
	defer storage.Close()
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if f.anyLayer(r) && r.Host == f.host {
			http.Redirect(w, r, storage.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return false
		}
		return true
	})
	f.setCut(64 << 10)
	s := openAt(t, t.TempDir())
	var k sink
	img := mustPull(t, s, k.request(f.ref))
	// What was in flight when the connection was cut may be lost, so more than
	// the size may have been sent, by less than a cut each.
	hits, sent := f.reset()
	if n := count(hits, "GET blobs"); sent > int64(img.Size)*3/2 || n < 30 {
		t.Errorf("%d bytes for %d in %d requests", sent, img.Size, n)
	}
	if len(k.layers) != 3 {
		t.Errorf("unpacked %v", k.layers)
	}
	verify(t, s)
}

// Each answer of a registry in trouble, for ever.
func TestBusyForEver(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"/manifests/", "/blobs/"} {
		for _, code := range []int{
			http.StatusTooManyRequests,
			http.StatusInternalServerError,
			http.StatusServiceUnavailable,
		} {
			t.Run(fmt.Sprint(strings.Trim(what, "/"), code), func(t *testing.T) {
				t.Parallel()
				f := newFaulty(t, 10_000)
				s := openAt(t, t.TempDir())
				f.set(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, what) {
						return true
					}
					w.WriteHeader(code)
					io.WriteString(w, `{"errors":[{"code":"TOOMANYREQUESTS","message":"come back later"}]}`)
					return false
				})
				var k sink
				_, err := s.Pull(t.Context(), k.request(f.ref))
				if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "come back later") ||
					!strings.Contains(err.Error(), fmt.Sprint(code)) {
					t.Errorf("got %v", err)
				}
				half(t, s)
			})
		}
	}
}

// Retry-After is heeded: the pause is as long as the registry asks, and a
// cancel ends it.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 10_000)
	s := openAt(t, t.TempDir())
	asked := make(chan struct{}, 10)
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if f.isLayer(r, 0) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusTooManyRequests)
			asked <- struct{}{}
			return false
		}
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	var k sink
	if _, err := s.Pull(ctx, k.request(f.ref)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	half(t, s)
}

// A transfer that never stands still, and never ends either.
func TestTrickle(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 1<<20, 10_000)
	var mu sync.Mutex
	trickled := 0
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !f.isLayer(r, 0) {
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(f.layers[0].packed)))
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for _, b := range f.layers[0].packed {
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return false
			}
			if _, err := w.Write([]byte{b}); err != nil {
				return false
			}
			http.NewResponseController(w).Flush()
			mu.Lock()
			trickled++
			mu.Unlock()
		}
		return false
	})
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout, o.MinRate = 2*time.Second, 10_000 })
	var k sink
	_, err := s.Pull(t.Context(), k.request(f.ref))
	if !errors.Is(err, ErrUnavailable) ||
		!errors.Is(err, registry.ErrTooSlow) {
		t.Errorf("got %v", err)
	}
	mu.Lock()
	if trickled == 0 {
		t.Error("no byte came")
	}
	mu.Unlock()
	half(t, s)
	// A cancel does not wait for the deadline.
	s2 := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout = time.Hour })
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		eventually(t, "bytes come", func() bool {
			s2.mu.Lock()
			defer s2.mu.Unlock()
			d := s2.downloadOf(f.digest(0))
			return d != nil && d.status().n > 10
		})
		cancel()
	}()
	if _, err := s2.Pull(ctx, k.request(f.ref)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	half(t, s2)
	// One that is fast enough for ever has a deadline too.
	s3 := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout, o.PullTimeout = time.Hour, time.Second })
	if _, err := s3.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "has taken 1s") {
		t.Errorf("got %v", err)
	}
	half(t, s3)
}

// A registry that knows no ranges sends again what is here. That takes its time
// and is no standstill.
func TestNoRanges(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 1<<20)
	b := f.layers[0].packed
	// All of it takes longer than the timeout, and each part much less.
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout, o.MinRate = 3*time.Second, 10_000 })
	if err := os.WriteFile(
		filepath.Join(s.o.Root, ingestName, partName(f.host, descOf(f.layers[0]))),
		b[:len(b)-10],
		0o600,
	); err != nil {
		t.Fatal(err)
	}
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !f.isLayer(r, 0) {
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		for part := range slices.Chunk(b, 64<<10) {
			w.Write(part)
			http.NewResponseController(w).Flush()
			time.Sleep(300 * time.Millisecond)
		}
		return false
	})
	var k sink
	mustPull(t, s, k.request(f.ref))
}

// A registry that lies about the blob once is not believed, and a mirror that
// lies does not keep the image from coming.
func TestMirrorLies(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]func(w http.ResponseWriter, b []byte){
		"length": func(w http.ResponseWriter, b []byte) { w.Write(b[:len(b)/2]) },
		"digest": func(w http.ResponseWriter, b []byte) {
			b = bytes.Clone(b)
			b[len(b)/2] ^= 1
			w.Write(b)
		},
		"another host": func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Location", "http://127.0.0.1:1/blob")
			w.WriteHeader(http.StatusFound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, origin := newFaulty(t, 100_000), newHub(t)
			origin.push(t, "team/app:1", f.img)
			certs := t.TempDir()
			hostsToml(t, certs, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL, f.URL))
			f.set(func(w http.ResponseWriter, r *http.Request) bool {
				if f.isLayer(r, 0) {
					lie(w, f.layers[0].packed)
					return false
				}
				return true
			})
			img, err := pullOnce(t, certs, "registry.example/team/app:1", nil)
			if err != nil || img.ID != idOf(t, f.img) {
				t.Errorf("%v", err)
			}
		})
	}
}

// A mirror that lies about a manifest is not asked for the rest.
func TestMirrorLiesOnce(t *testing.T) {
	t.Parallel()
	mirror, origin := newHub(t), newHub(t)
	origin.push(t, "team/app:1", imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer)))
	certs := t.TempDir()
	hostsToml(
		t,
		certs,
		"registry.example",
		fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", origin.URL, mirror.URL),
	)
	mirror.set(func(w http.ResponseWriter, r *http.Request) bool {
		io.WriteString(w, "{}")
		return false
	})
	if _, err := pullOnce(t, certs, "registry.example/team/app:1", nil); err != nil {
		t.Fatal(err)
	}
	if hits, _ := mirror.reset(); len(hits) != 1 {
		t.Errorf("asked for %v", hits)
	}
}

func descOf(l *testLayer) ocispec.Descriptor { return descOfBytes(l.packed) }

func descOfBytes(b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// pendings are the pulls that were interrupted.
func pendings(s *Store) (l []pending) {
	s.eachPending(func(_ string, p pending, err error) error {
		if err == nil {
			l = append(l, p)
		}
		return nil
	})
	return l
}
