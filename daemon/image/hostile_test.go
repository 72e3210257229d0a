package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// hostile is a registry that serves what it is told to, true or not.
type hostile struct {
	*httptest.Server
	host string

	mu      sync.Mutex
	content map[string][]byte // by tag or digest
	trickle map[digest.Digest]int64
	asked   chan string // for something that trickles
}

func newHostile(t testing.TB) *hostile {
	h := &hostile{content: map[string][]byte{}, trickle: map[digest.Digest]int64{}, asked: make(chan string, 100)}
	h.Server = httptest.NewServer(h)
	t.Cleanup(h.CloseClientConnections)
	t.Cleanup(h.Close)
	h.host = strings.TrimPrefix(h.URL, "http://")
	return h
}

func (h *hostile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := path.Base(r.URL.Path)
	h.mu.Lock()
	b, ok := h.content[name]
	size := h.trickle[digest.Digest(name)]
	h.mu.Unlock()
	switch {
	case size > 0:
		w.Header().Set("Content-Length", fmt.Sprint(size))
		for h.asked <- name; r.Context().Err() == nil; time.Sleep(50 * time.Millisecond) {
			w.Write(make([]byte, 100))
			http.NewResponseController(w).Flush()
		}
	case ok:
		w.Write(b)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// has serves b under its digest.
func (h *hostile) has(typ string, b []byte) ocispec.Descriptor {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := descOfBytes(b)
	d.MediaType = typ
	h.content[d.Digest.String()] = b
	return d
}

// tag serves a manifest or an index, and gives its full name.
func (h *hostile) tag(t testing.TB, name string, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	check(t, err)
	h.has("", b)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.content[name] = b
	return h.host + "/app:" + name
}

// slowly names a layer that comes at a trickle.
func (h *hostile) slowly(d digest.Digest, size int64) ocispec.Descriptor {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trickle[d] = size
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: size}
}

func manifestOf(config ocispec.Descriptor, layers ...ocispec.Descriptor) ocispec.Manifest {
	return ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config,
		Layers:    layers,
	}
}

// configOf is a config with these diff ids, and more in the way of JSON.
func (h *hostile) configOf(t testing.TB, more string, diffIDs ...digest.Digest) ocispec.Descriptor {
	t.Helper()
	ids, err := json.Marshal(diffIDs)
	check(t, err)
	return h.has(
		ocispec.MediaTypeImageConfig,
		fmt.Appendf(nil, `{"os":"linux","architecture":"amd64"%s,"rootfs":{"type":"layers","diff_ids":%s}}`, more, ids),
	)
}

// A registry that hardly sends anything, though it names the digests of others,
// keeps no image from coming from elsewhere.
func TestSlowRegistryHindersNoOther(t *testing.T) {
	t.Parallel()
	h, bad := newHub(t), newHostile(t)
	l := layerOf(t, "f", 100_000, 1, types.OCILayer).(*testLayer)
	ref := h.push(t, "app:1", imageOf(t, "x", l))
	layers := []ocispec.Descriptor{bad.slowly(digest.FromBytes(l.packed), int64(len(l.packed)))}
	for i := range 5 {
		layers = append(layers, bad.slowly(digest.FromString(fmt.Sprint(i)), 1<<30))
	}
	var diffIDs []digest.Digest
	for _, l := range layers {
		diffIDs = append(diffIDs, l.Digest)
	}
	slow := bad.tag(t, "1", manifestOf(bad.configOf(t, "", diffIDs...), layers...))
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout = time.Hour })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	var k sink
	go func() { _, err := s.Pull(ctx, k.request(slow)); ended <- err }()
	for range layers {
		<-bad.asked
	}
	soon, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	if _, err := s.Pull(soon, k.request(ref)); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the slow one came")
	}
	verify(t, s)
}

// Who knows the digests of a private image, which the status of its pods tells,
// does not get it, nor can it be spoiled, by an image that names them.
func TestDigestsAreNoKeys(t *testing.T) {
	t.Parallel()
	for _, drop := range []bool{false, true} {
		t.Run(fmt.Sprint("drop=", drop), func(t *testing.T) {
			h, bad := newHub(t), newHostile(t)
			l := layerOf(t, "f", 1000, 1, types.OCILayer).(*testLayer)
			private := imageOf(t, "x", l)
			ref := h.push(t, "private:1", private)
			h.set(basicAuth("me", "secret"))
			root := t.TempDir()
			s := openAt(t, root, func(o *Options) { o.DropLayers = drop })
			var k sink
			r := k.request(ref)
			r.Auth = &Auth{Username: "me", Password: "secret"}
			img := mustPull(t, s, r)
			manifest, err := private.Digest()
			check(t, err)
			raw, err := private.RawConfigFile()
			check(t, err)
			config := ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageConfig,
				Digest:    digest.Digest(img.ID),
				Size:      int64(len(raw)),
			}
			junk := bad.has(ocispec.MediaTypeImageLayerGzip, []byte("junk"))
			other := layerOf(t, "g", 1000, 2, types.OCILayer).(*testLayer)
			own := bad.has(ocispec.MediaTypeImageLayerGzip, other.packed)
			for name, ref := range map[string]string{
				"config": bad.tag(t, "1", manifestOf(config, junk)),
				"manifest": bad.tag(
					t,
					"2",
					ocispec.Index{
						Versioned: specs.Versioned{SchemaVersion: 2},
						Manifests: []ocispec.Descriptor{{Digest: digest.Digest(manifest.String()), Size: 7}},
					},
				),
				"diff id": bad.tag(t, "3", manifestOf(bad.configOf(t, "", img.DiffIDs[0]), junk)),
				"one blob as two layers": bad.tag(t, "4", manifestOf(
					bad.configOf(t, "", digest.FromBytes(other.raw), img.DiffIDs[0]), own, own)),
			} {
				if _, err := s.Pull(t.Context(), k.request(ref)); err == nil {
					t.Errorf("it came for its %s", name)
				}
			}
			k = sink{}
			r.Ref = img.ID
			if err := s.unpack(t.Context(), r); err != nil {
				t.Errorf("the layer is lost: %v", err)
			}
			if len(s.List()) != 1 {
				t.Errorf("%v", s.List())
			}
		})
	}
}

// What an index says about a manifest, beside the digest, is not passed on.
func TestIndexLies(t *testing.T) {
	t.Parallel()
	h := newHostile(t)
	b, err := json.Marshal(manifestOf(h.configOf(t, "")))
	check(t, err)
	d := h.has(ocispec.MediaTypeImageManifest, b)
	s := openAt(t, t.TempDir())
	for i, size := range []int64{1, 1 << 40} { // the manifest is here the second time
		x := ocispec.Descriptor{
			MediaType:   "application/x",
			Digest:      d.Digest,
			Size:        size,
			Data:        []byte("data"),
			URLs:        []string{"http://elsewhere.example"},
			Annotations: map[string]string{"k": "v"},
		}
		mustPull(
			t,
			s,
			PullRequest{
				Ref: h.tag(
					t,
					fmt.Sprint(i),
					ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{x}},
				),
			},
		)
	}
	for ref, l := range s.refs {
		if m := l.Manifest; m.Size != d.Size || m.Data != nil || m.URLs != nil || m.Annotations != nil ||
			m.MediaType != ocispec.MediaTypeImageManifest {
			t.Errorf("%s: %+v", ref, m)
		}
	}
	verify(t, s)
}

// A small image does not take much memory, not while it is pulled nor later.
func TestImagesTakeLittleMemory(t *testing.T) { // not parallel: it measures
	h := newHostile(t)
	s := openAt(t, t.TempDir())
	history := func(n int) string { return `,"history":[{}` + strings.Repeat(",{}", n) + `]` }
	before := heapInUse()
	mustPull(t, s, PullRequest{Ref: h.tag(t, "1", manifestOf(h.configOf(t, history(maxValues/2-100))))})
	if took := heapInUse() - before; took > 4<<20 {
		t.Errorf("%d bytes for an image without layers", took)
	}
	_, err := s.Pull(t.Context(), PullRequest{Ref: h.tag(t, "3", manifestOf(h.configOf(t, history(maxValues))))})
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("a config of very many values: %v", err)
	}
	for name, text := range map[string]string{"layers": `"config":{},"layers"`, "manifests": `"manifests"`} {
		b := fmt.Appendf(nil, `{"schemaVersion":2,%s:[{}%s]}`, text, strings.Repeat(",{}", (3<<20)/3))
		var began, ended runtime.MemStats
		runtime.ReadMemStats(&began)
		_, err := parseDocument(b, "")
		runtime.ReadMemStats(&ended)
		if took := ended.TotalAlloc - began.TotalAlloc; !errors.Is(err, ErrUnsupported) || took > 1<<20 {
			t.Errorf("very many %s: %d bytes and %v", name, took, err)
		}
	}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	for i := range maxLayers + 1 {
		d := digest.FromString(fmt.Sprint(i))
		diffIDs = append(diffIDs, d)
		layers = append(layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: 1})
	}
	_, err = s.Pull(t.Context(), PullRequest{Ref: h.tag(t, "2", manifestOf(h.configOf(t, "", diffIDs...), layers...))})
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("%d layers: %v", len(layers), err)
	}
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what a finalizer or a pool held on to
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A registry on loopback may speak plain HTTP; whom it names by https may not.
// And no address tells the next host what the one before had in its query.
func TestOthersGetNothingInTheClear(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var got []string
	note := func(r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		got = append(got, fmt.Sprint(r.Method, " ", r.URL, " ", r.Header, " ", string(b)))
	}
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note(r)
		w.Write([]byte(`{"token":"x","access_token":"x"}`))
	}))
	t.Cleanup(plain.Close)
	for realm, want := range map[string]string{
		"https://" + strings.TrimPrefix(plain.URL, "http://") + "/token": "",
		"/redirect?signature=secret":                                     "GET /token",
	} {
		h := newHub(t)
		h.set(func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case r.URL.Path == "/redirect" && r.Method == http.MethodPost:
				w.WriteHeader(http.StatusNotFound) // only the older way
			case r.URL.Path == "/redirect":
				http.Redirect(w, r, plain.URL+"/token", http.StatusTemporaryRedirect)
			default:
				w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=\"s\"", realm))
				w.WriteHeader(http.StatusUnauthorized)
			}
			return false
		})
		s := openAt(t, t.TempDir())
		secret := &Auth{Username: "me", Password: "secret"}
		_, err := s.Pull(t.Context(), PullRequest{Ref: h.host + "/app:1", Auth: secret})
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", realm, err)
		}
		mu.Lock()
		for _, r := range got {
			if want == "" || !strings.HasPrefix(r, want) || strings.Contains(r, "secret") {
				t.Errorf("%s: sent in the clear: %s", realm, r)
			}
		}
		got = nil
		mu.Unlock()
	}
}

// A pull leaves no connection behind.
func TestConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "f", 1000, 1, types.OCILayer)))
	proxy := httptest.NewUnstartedServer(h.Config.Handler)
	proxy.Config.ConnState = func(c net.Conn, st http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		open[c] = st != http.StateClosed && st != http.StateHijacked
	}
	proxy.Start()
	t.Cleanup(proxy.Close)
	s := openAt(t, t.TempDir())
	mustPull(t, s, PullRequest{Ref: strings.Replace(ref, h.host, strings.TrimPrefix(proxy.URL, "http://"), 1)})
	began := time.Now()
	eventually(t, "all are closed", func() bool {
		mu.Lock()
		defer mu.Unlock()
		for _, still := range open {
			if still {
				return false
			}
		}
		return true
	})
	if took := time.Since(began); took > 25*time.Second { // an idle one would stay for 30
		t.Errorf("after %s", took)
	}
}
