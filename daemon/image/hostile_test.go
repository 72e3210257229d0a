package image

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path"
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
	if err != nil {
		t.Fatal(err)
	}
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
	return ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: layers}
}

// configOf is a config with these diff ids, and more in the way of JSON.
func (h *hostile) configOf(t testing.TB, more string, diffIDs ...digest.Digest) ocispec.Descriptor {
	t.Helper()
	ids, err := json.Marshal(diffIDs)
	if err != nil {
		t.Fatal(err)
	}
	return h.has(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"os":"linux","architecture":"amd64"%s,"rootfs":{"type":"layers","diff_ids":%s}}`, more, ids))
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
	s := openAt(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	var k sink
	go func() { _, err := s.Pull(ctx, k.request(slow)); ended <- err }()
	for range layers {
		<-bad.asked
	}
	soon, stop := context.WithTimeout(t.Context(), 20*time.Second)
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
