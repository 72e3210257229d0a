package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// hub is a registry on loopback that tests can look at and interfere with.
type hub struct {
	*httptest.Server
	host string

	mu    sync.Mutex
	hits  map[string]int                                     // "METHOD what" -> requests
	sent  int64                                              // bytes of blobs
	fault func(http.ResponseWriter, *http.Request) (ok bool) // before the registry, if set
	cut   int64                                              // blobs break off after so many bytes, if > 0
}

func newHub(t testing.TB) *hub {
	h := &hub{hits: map[string]int{}}
	reg := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.hits[r.Method+" "+what(r.URL.Path)]++
		fault, cut := h.fault, h.cut
		h.mu.Unlock()
		if fault != nil && !fault(w, r) {
			return
		}
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			w = &counter{ResponseWriter: w, h: h, left: cut, cut: cut > 0}
		}
		reg.ServeHTTP(w, r)
	}))
	h.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(h.Close)
	h.host = strings.TrimPrefix(h.URL, "http://")
	return h
}

// what shortens a path: "/v2/a/b/blobs/x" to "blobs x".
func what(path string) string {
	p := strings.Split(path, "/")
	if len(p) < 4 {
		return path
	}
	return p[len(p)-2] + " " + p[len(p)-1]
}

type counter struct {
	http.ResponseWriter
	h    *hub
	left int64
	cut  bool
}

func (c *counter) Write(b []byte) (int, error) {
	if c.cut && int64(len(b)) > c.left {
		b = b[:c.left]
	}
	n, err := c.ResponseWriter.Write(b)
	c.left -= int64(n)
	c.h.mu.Lock()
	c.h.sent += int64(n)
	c.h.mu.Unlock()
	if c.cut && c.left == 0 {
		http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func (h *hub) set(fault func(http.ResponseWriter, *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = fault
}

func (h *hub) setCut(n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cut = n
}

// reset forgets the counts and gives those there were.
func (h *hub) reset() (map[string]int, int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hits, sent := h.hits, h.sent
	h.hits, h.sent = map[string]int{}, 0
	return hits, sent
}

func count(hits map[string]int, prefix string) (n int) {
	for k, v := range hits {
		if strings.HasPrefix(k, prefix) {
			n += v
		}
	}
	return n
}

func (h *hub) push(t testing.TB, ref string, img remote.Taggable) string {
	t.Helper()
	full := h.host + "/" + ref
	r, err := name.ParseReference(full)
	check(t, err)
	switch x := img.(type) {
	case v1.Image:
		err = remote.Write(r, x)
	case v1.ImageIndex:
		err = remote.WriteIndex(r, x)
	default:
		err = remote.Put(r.(name.Tag), x)
	}
	check(t, err)
	h.reset()
	return full
}

// layerOf makes a layer of one file of incompressible content.
func layerOf(t testing.TB, file string, size int, seed uint64, typ types.MediaType) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(content)
	check(t, w.WriteHeader(&tar.Header{Name: file, Size: int64(size), Mode: 0o644}))
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	check(t, w.Close())
	return &testLayer{raw: b.Bytes(), packed: pack(t, b.Bytes(), typ), typ: typ}
}

func pack(t testing.TB, b []byte, typ types.MediaType) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch {
	case strings.HasSuffix(string(typ), "zstd"):
		w, _ = zstd.NewWriter(&out)
	case strings.HasSuffix(string(typ), "gzip"):
		w = gzip.NewWriter(&out)
	default:
		return b
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	check(t, w.Close())
	return out.Bytes()
}

type testLayer struct {
	raw, packed []byte
	typ         types.MediaType
}

func (l *testLayer) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.packed))
	return h, err
}
func (l *testLayer) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.raw))
	return h, err
}
func (l *testLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.packed)), nil
}
func (l *testLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.raw)), nil
}
func (l *testLayer) Size() (int64, error)                { return int64(len(l.packed)), nil }
func (l *testLayer) MediaType() (types.MediaType, error) { return l.typ, nil }

func imageOf(t testing.TB, cmd string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(
		mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1),
		layers...)
	check(t, err)
	c, err := img.ConfigFile()
	check(t, err)
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	c.Config.Cmd = []string{cmd}
	c.Config.User = "1000:1000"
	c.Config.StopSignal = "SIGINT"
	c.Config.Labels = map[string]string{"k": "v"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func idOf(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	check(t, err)
	return h.String()
}

// sink is where layers are unpacked to.
type sink struct {
	mu     sync.Mutex
	layers map[digest.Digest]int // how often each came
}

func (k *sink) Has(d digest.Digest) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.layers[d] > 0
}

func (k *sink) Remove(d digest.Digest) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.layers, d)
	return nil
}

func (k *sink) List() []digest.Digest {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Collect(maps.Keys(k.layers))
}

func (k *sink) Apply(ctx context.Context, d digest.Digest, r io.Reader) error {
	got, err := d.Algorithm().FromReader(r)
	if err != nil {
		return err
	}
	if got != d {
		return fmt.Errorf("digest %s, want %s", got, d)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.layers == nil {
		k.layers = map[digest.Digest]int{}
	}
	k.layers[d]++
	return nil
}

func (k *sink) request(ref string) PullRequest { return PullRequest{Ref: ref, Layers: k} }

func openAt(t testing.TB, root string, change ...func(*Options)) *Store {
	t.Helper()
	o := Options{
		Root:     root,
		Log:      slog.New(slog.DiscardHandler),
		Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"},
	}
	for _, f := range change {
		f(&o)
	}
	s, err := Open(o)
	check(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func mustPull(t testing.TB, s *Store, r PullRequest) Image {
	t.Helper()
	img, err := s.Pull(t.Context(), r)
	check(t, err)
	return img
}

// downloadOf finds a download by its blob; mu is held.
func (s *Store) downloadOf(d digest.Digest) *download {
	for _, x := range s.downloads {
		if x.desc.Digest == d {
			return x
		}
	}
	return nil
}

var eventually = must.Come

// verify checks the store from outside: every blob is what its name says, no
// record is in quarantine, and crane's library can read it.
func verify(t testing.TB, s *Store) {
	t.Helper()
	err := s.eachBlob(func(path string, d digest.Digest) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		got, err := d.Algorithm().FromReader(f)
		if err == nil && got != d {
			err = fmt.Errorf("%s has the content of %s", path, got)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	p, err := layout.FromPath(s.o.Root)
	check(t, err)
	x, err := p.ImageIndex()
	check(t, err)
	m, err := x.IndexManifest()
	check(t, err)
	for _, d := range m.Manifests {
		img, err := x.Image(d.Digest)
		check(t, err)
		if err := validate.Image(img, validate.Fast); err != nil {
			t.Errorf("%s in the layout: %v", d.Digest, err)
		}
	}
	files, _ := os.ReadDir(filepath.Join(s.o.Root, quarantineName))
	if len(files) > 0 {
		t.Errorf("quarantined: %v", files)
	}
}

func noRefs(t testing.TB, s *Store) {
	t.Helper()
	if l := s.List(); len(l) != 0 {
		t.Errorf("images: %+v", l)
	}
	if f, _ := os.ReadDir(filepath.Join(s.o.Root, refsName)); len(f) != 0 {
		t.Errorf("records: %v", f)
	}
}

func TestPull(t *testing.T) {
	h := newHub(t)
	layers := []v1.Layer{
		layerOf(t, "gzip", 300_000, 1, types.OCILayer),
		layerOf(t, "zstd", 300_000, 2, types.OCILayerZStd),
		layerOf(t, "plain", 300_000, 3, types.OCIUncompressedLayer),
		layerOf(t, "docker", 300_000, 4, types.DockerLayer),
	}
	src := imageOf(t, "run", append(layers, layers[0])...) // one twice
	ref := h.push(t, "library/app:v1", src)
	root := t.TempDir()
	s := openAt(t, root)
	var k sink
	img := mustPull(t, s, k.request(ref))

	hash, _ := src.Digest()
	if img.ID != idOf(t, src) || !slices.Equal(img.RepoTags, []string{ref}) ||
		!slices.Equal(img.RepoDigests, []string{h.host + "/library/app@" + hash.String()}) {
		t.Errorf("%+v", img)
	}
	if img.Config.User != "1000:1000" || img.Config.StopSignal != "SIGINT" || img.Config.Cmd[0] != "run" ||
		img.Config.Labels["k"] != "v" ||
		len(img.DiffIDs) != 5 {
		t.Errorf("config %+v", img.Config)
	}
	if img.Size < 1_500_000 || img.Size > 1_600_000 {
		t.Errorf("size %d", img.Size)
	}
	if len(k.layers) != 4 {
		t.Errorf("unpacked %v", k.layers)
	}
	hits, sent := h.reset()
	if n := count(hits, "GET blobs"); n != 5 || sent > 1_300_000 || count(hits, "GET manifests") != 1 {
		t.Errorf("%d blobs, %d bytes: %v", n, sent, hits)
	}
	verify(t, s)

	// Again: one HEAD, and nothing else.
	if again := mustPull(t, s, k.request(ref)); again.ID != img.ID {
		t.Errorf("%+v", again)
	}
	if hits, _ := h.reset(); count(hits, "GET") > 1 || count(hits, "GET manifests") != 0 ||
		count(hits, "HEAD manifests") != 1 { // GET /v2/ is not asked for
		t.Errorf("again: %v", hits)
	}
	// By its digest: another reference to the same image.
	mustPull(t, s, k.request(img.RepoDigests[0]))
	// A reference with a tag and a digest counts as the digest.
	mustPull(t, s, k.request(ref+"@"+hash.String()))
	if l := s.List(); len(l) != 1 || len(l[0].RepoTags) != 1 || len(l[0].RepoDigests) != 1 {
		t.Errorf("%+v", l)
	}
	hex := strings.TrimPrefix(img.ID, "sha256:")
	for _, q := range []string{ref, img.RepoDigests[0], img.ID, hex, hex[:12], "sha256:" + hex[:20]} {
		if got, ok := s.Get(q); !ok || got.ID != img.ID {
			t.Errorf("Get(%q): %v", q, ok)
		}
	}
	for _, q := range []string{
		"",
		"sha256:",
		h.host + "/library/app",
		ref + "x",
		"sha256:" + strings.Repeat("0", 64),
		"UPPER CASE",
	} {
		if _, ok := s.Get(q); ok {
			t.Errorf("Get(%q) found something", q)
		}
	}
	usage := s.Usage()
	s.Close()

	// After a restart all is there, and layers can be unpacked without network.
	h.Close()
	s = openAt(t, root)
	if l := s.List(); len(l) != 1 || fmt.Sprint(l[0]) != fmt.Sprint(img) {
		t.Errorf("after a restart: %+v, want %+v", l, img)
	}
	if s.Usage() != usage || usage.Inodes != 6 {
		t.Errorf("usage %+v, before %+v", s.Usage(), usage)
	}
	var k2 sink
	if err := s.unpack(t.Context(), k2.request(hex[:12])); err != nil || len(k2.layers) != 4 {
		t.Errorf("unpacked %v: %v", k2.layers, err)
	}
	verify(t, s)
}

// What people ask for is read from the config, and not only what runs it.
func TestSpec(t *testing.T) {
	h := newHub(t)
	img := imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer))
	c, err := img.ConfigFile()
	check(t, err)
	c = c.DeepCopy()
	c.Author, c.History = "somebody", []v1.History{{CreatedBy: "RUN x"}, {CreatedBy: "CMD y", EmptyLayer: true}}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	h.push(t, "team/app:1", img)
	s := openAt(t, t.TempDir())
	pulled := mustPull(t, s, PullRequest{Ref: h.host + "/team/app:1"})
	spec, err := s.Spec(pulled)
	check(t, err)
	b, err := json.Marshal(spec)
	check(t, err)
	var got ocispec.Image
	if err := json.Unmarshal(b, &got); err != nil || got.Author != "somebody" || got.Config.Cmd[0] != "x" ||
		len(got.History) != 2 || !got.History[1].EmptyLayer || got.RootFS.DiffIDs[0] != pulled.DiffIDs[0] {
		t.Errorf("%s: %v", b, err)
	}
	check(t, os.Remove(s.blobPath(digest.Digest(pulled.ID))))
	if _, err := s.Spec(pulled); err == nil {
		t.Error("no error without the blob")
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"busybox":             "docker.io/library/busybox:latest",
		"a/b:c":               "docker.io/a/b:c",
		"localhost:5000/x":    "localhost:5000/x:latest",
		"quay.io/a/b/c:v1.2":  "quay.io/a/b/c:v1.2",
		"index.docker.io/a/b": "docker.io/a/b:latest",
	} {
		if n, err := parse(in); err != nil || n.String() != want {
			t.Errorf("%s: %v %v, want %s", in, n, err, want)
		}
		if s := openAt(t, t.TempDir(), func(o *Options) { o.Pinned = []string{in} }); !s.pinned[want] {
			t.Errorf("%s pins %v", in, s.pinned)
		}
	}
	s := openAt(t, t.TempDir())
	for _, in := range []string{"", "A/B", "a:b:c", "a@sha256:123", strings.Repeat("0", 64), "a b"} {
		if _, err := s.Pull(t.Context(), PullRequest{Ref: in}); !errors.Is(err, ErrInvalidReference) {
			t.Errorf("%q: %v", in, err)
		}
		if _, err := Open(Options{Root: t.TempDir(), Pinned: []string{in}}); !errors.Is(err, ErrInvalidReference) {
			t.Errorf("pinned %q: %v", in, err)
		}
	}
}

func TestIndex(t *testing.T) {
	h := newHub(t)
	var add []mutate.IndexAddendum
	ids := map[string]string{}
	for i, p := range []v1.Platform{
		{OS: "linux", Architecture: "arm", Variant: "v5"},
		{OS: "linux", Architecture: "arm", Variant: "v7"},
		{OS: "linux", Architecture: "arm", Variant: "v6"},
		{OS: "linux", Architecture: "amd64"},
		{OS: "windows", Architecture: "amd64"},
		{OS: "unknown", Architecture: "unknown"},
	} {
		img := imageOf(t, p.String(), layerOf(t, "f", 1000, uint64(i), types.OCILayer))
		ids[p.String()] = idOf(t, img)
		add = append(add, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	x := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), add...)
	ref := h.push(t, "multi:latest", x)
	list := h.push(t, "list:latest", mutate.IndexMediaType(x, types.DockerManifestList))
	hash, _ := x.Digest()
	for _, c := range []struct {
		ref  string
		p    ocispec.Platform
		want string
	}{
		{ref, ocispec.Platform{OS: "linux", Architecture: "amd64"}, "linux/amd64"},
		{list, ocispec.Platform{OS: "linux", Architecture: "amd64"}, "linux/amd64"},
		{ref, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, "linux/arm/v7"},
		{ref, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v8"}, "linux/arm/v7"},
		{ref, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v6"}, "linux/arm/v6"},
	} {
		root := t.TempDir()
		s := openAt(t, root, func(o *Options) { o.Platform = &c.p })
		var k sink
		if img := mustPull(t, s, k.request(c.ref)); img.ID != ids[c.want] {
			t.Errorf("%v: got %s, want %s", c.p, img.Config.Cmd, c.want)
		} else if c.ref == ref && img.RepoDigests[0] != h.host+"/multi@"+hash.String() {
			t.Errorf("digest %v, want that of the index", img.RepoDigests)
		}
		verify(t, s)
		s.Close()
		if s = openAt(t, root); len(s.List()) != 1 {
			t.Error("gone after a restart")
		}
	}
	s := openAt(t, t.TempDir(), func(o *Options) { o.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"} })
	_, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "linux/arm/v7") ||
		strings.Contains(err.Error(), "unknown") {
		t.Errorf("no platform: %v", err)
	}
	noRefs(t, s)
}

func TestTagsMoveAndRemove(t *testing.T) {
	h := newHub(t)
	shared := layerOf(t, "shared", 1000, 1, types.OCILayer)
	one, two := imageOf(t, "one", shared, layerOf(t, "one", 1000, 2, types.OCILayer)), imageOf(t, "two", shared)
	root := t.TempDir()
	s := openAt(t, root, func(o *Options) { o.Pinned = []string{h.host + "/elsewhere/app:pin"} })
	var k sink
	ref := h.push(t, "app:latest", one)
	img1 := mustPull(t, s, k.request(ref))
	other := h.push(t, "elsewhere/app:pin", one)
	img := mustPull(t, s, k.request(other))
	if img.ID != img1.ID || len(img.RepoTags) != 2 || len(img.RepoDigests) != 2 || !img.Pinned ||
		img1.Pinned {
		t.Errorf("%+v", img)
	}
	h.push(t, "app:latest", two)
	img2 := mustPull(t, s, k.request(h.host+"/app"))
	if old, ok := s.Get(img1.ID); !ok || !slices.Equal(old.RepoTags, []string{other}) || len(old.RepoDigests) != 2 {
		t.Errorf("the tag moved: %+v", old)
	}
	if got, _ := s.Get(ref); got.ID != img2.ID {
		t.Errorf("tag is of %s", got.ID)
	}
	// By one tag, all go.
	free, err := s.Remove(other)
	if err != nil || !slices.Equal(free, []digest.Digest{img1.DiffIDs[1]}) {
		t.Errorf("freed %v, want what is not shared: %v", free, err)
	}
	if _, ok := s.Get(img1.ID); ok || needed(s, img1.DiffIDs[1]) || !needed(s, img1.DiffIDs[0]) {
		t.Error("not removed")
	}
	verify(t, s)
	eventually(t, "blobs are collected", func() bool { return s.Usage().Inodes == 3 })
	if free, err = s.Remove(other); err != nil || free != nil {
		t.Errorf("again: %v %v", free, err)
	}
	if free, err = s.Remove(img2.ID); err != nil || len(free) != 1 {
		t.Errorf("by id: %v %v", free, err)
	}
	eventually(t, "all is collected", func() bool { return s.Usage() == Usage{} })
	noRefs(t, s)
	s.Close()
	noRefs(t, openAt(t, root))
}

// Different layers, same config bytes: two references, one image.
func TestRecompressedImageIsTheSame(t *testing.T) {
	h := newHub(t)
	a := layerOf(t, "f", 1000, 1, types.OCILayer).(*testLayer)
	b := &testLayer{raw: a.raw, packed: pack(t, a.raw, types.OCILayerZStd), typ: types.OCILayerZStd}
	s := openAt(t, t.TempDir())
	var k sink
	img1 := mustPull(t, s, k.request(h.push(t, "a:1", imageOf(t, "x", a))))
	img2 := mustPull(t, s, k.request(h.push(t, "b:1", imageOf(t, "x", b))))
	if img1.ID != img2.ID || len(s.List()) != 1 || k.layers[img1.DiffIDs[0]] != 1 {
		t.Errorf("%v %v %v", img1.ID, img2.ID, k.layers)
	}
	verify(t, s)
}

func basicAuth(user, password string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, ok := r.BasicAuth(); ok && u == user && p == password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"say who you are"}]}`)
		return false
	}
}

// Blobs are behind a redirect to another host, as with object stores.
func TestRedirectsGetNoCredentials(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "f", 1000, 1, types.OCILayer)))
	var mu sync.Mutex
	var secrets []string
	asks := false
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if a := r.Header.Get("Authorization") + r.Header.Get("X-Secret"); a != "" {
			secrets = append(secrets, a)
		}
		ask := asks
		mu.Unlock()
		if ask {
			w.Header().Set("WWW-Authenticate", `Basic realm="give me"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		q := r.Clone(r.Context())
		q.SetBasicAuth("me", "secret")
		h.Config.Handler.ServeHTTP(w, q)
	}))
	defer storage.Close()
	login := basicAuth("me", "secret")
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !login(w, r) {
			return false
		}
		if strings.Contains(r.URL.Path, "/blobs/") && r.Host == h.host {
			http.Redirect(w, r, storage.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return false
		}
		return true
	})
	certs := t.TempDir()
	hostsToml(t, certs, h.host, fmt.Sprintf("server = %q\n[host.%q.header]\nx-secret = \"header\"\n", h.URL, h.URL))
	a := &Auth{Username: "me", Password: "secret"}
	if _, err := pullOnce(t, certs, ref, a); err != nil {
		t.Error(err)
	}
	mu.Lock()
	asks = true
	mu.Unlock()
	if _, err := pullOnce(t, "", ref, a); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("the storage asks: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(secrets) > 0 {
		t.Errorf("the other host saw %q", secrets)
	}
}

func TestResume(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "big:1", imageOf(t, "x",
		layerOf(t, "a", 3<<20, 1, types.OCILayer), layerOf(t, "b", 2<<20, 2, types.OCILayerZStd)))
	h.setCut(64 << 10)
	s := openAt(t, t.TempDir())
	var k sink
	img := mustPull(t, s, k.request(ref))
	hits, sent := h.reset()
	if n := count(hits, "GET blobs"); n < 70 || sent > int64(img.Size)+(1<<20) {
		t.Errorf("%d requests for %d bytes of %d", n, sent, img.Size)
	}
	verify(t, s)
}

// A pull that failed half way leaves its part; the next one goes on from there,
// also in another process.
func TestResumeAcrossPulls(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "big:1", imageOf(t, "x", layerOf(t, "a", 4<<20, 1, types.OCILayer)))
	root := t.TempDir()
	s := openAt(t, root)
	h.setCut(3 << 20)
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" { // after the first cut, nothing
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		}
		return true
	})
	var k sink
	if _, err := s.Pull(t.Context(), k.request(ref)); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("got %v", err)
	}
	noRefs(t, s)
	if _, ok := s.Get(ref); ok || len(k.layers) != 0 {
		t.Error("half an image is visible")
	}
	verify(t, s)
	s.Close()
	h.set(nil)
	h.setCut(0)
	h.reset()
	s = openAt(t, root)
	mustPull(t, s, k.request(ref))
	if _, sent := h.reset(); sent > 1300<<10 {
		t.Errorf("%d bytes came again", sent)
	}
	if f, _ := os.ReadDir(filepath.Join(root, ingestName)); len(f) != 0 {
		t.Errorf("left in ingest: %v", f)
	}
}

func TestDamageIsMended(t *testing.T) {
	h := newHub(t)
	l := layerOf(t, "a", 1<<20, 1, types.OCILayer).(*testLayer)
	ref := h.push(t, "app:1", imageOf(t, "x", l))
	d := digest.FromBytes(l.packed)
	bad := bytes.Repeat([]byte("bad "), 100_000)
	t.Run("partial", func(t *testing.T) {
		for name, b := range map[string][]byte{
			"garbage":    bad,
			"good begin": append(slices.Clone(l.packed[:1000]), bad...),
			"too long":   append(slices.Clone(l.packed), bad...),
		} {
			t.Run(name, func(t *testing.T) {
				s := openAt(t, t.TempDir())
				if err := os.WriteFile(
					filepath.Join(s.o.Root, ingestName, partName(h.host, descOfBytes(l.packed))),
					b,
					0o600,
				); err != nil {
					t.Fatal(err)
				}
				var k sink
				mustPull(t, s, k.request(ref))
				verify(t, s)
			})
		}
	})
	t.Run("blob", func(t *testing.T) {
		root := t.TempDir()
		s := openAt(t, root)
		var k sink
		img := mustPull(t, s, k.request(ref))
		b := bytes.Clone(l.packed)
		b[len(b)/2] ^= 1
		check(t, os.WriteFile(s.blobPath(d), b, 0o600))
		var k2 sink
		h.set(func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusNotFound); return false })
		if err := s.unpack(t.Context(), k2.request(img.ID)); !errors.Is(err, ErrNotFound) || len(k2.layers) != 0 {
			t.Errorf("unpack, and the registry has it no more: %v", err)
		}
		h.set(nil)
		if err := s.unpack(t.Context(), k2.request(img.ID)); err != nil || len(k2.layers) != 1 {
			t.Errorf("unpack: %v", err)
		}
		verify(t, s)
		check(t, os.Remove(s.blobPath(d)))
		var k3 sink
		mustPull(t, s, k3.request(ref))
		if len(k3.layers) != 1 {
			t.Error("not unpacked")
		}
		verify(t, s)
	})
	t.Run("records", func(t *testing.T) {
		root := t.TempDir()
		s := openAt(t, root)
		var k sink
		mustPull(t, s, k.request(ref))
		s.Close()
		refs, _ := filepath.Glob(filepath.Join(root, refsName, "*.json"))
		if len(refs) != 2 {
			t.Fatalf("%v", refs)
		}
		if err := os.WriteFile(refs[0], nil, 0o600); err != nil { // as a power cut leaves it
			t.Fatal(err)
		}
		check(t, os.WriteFile(filepath.Join(root, "index.json"), []byte("?"), 0o600))
		s = openAt(t, root)
		if len(s.List()) != 1 {
			t.Errorf("%+v", s.List())
		}
		q, _ := os.ReadDir(filepath.Join(root, quarantineName))
		if len(q) != 1 {
			t.Errorf("quarantine %v", q)
		}
		s.Close()
		// A blob that is gone takes its references along.
		check(t, os.Remove(s.blobPath(d)))
		s = openAt(t, root)
		noRefs(t, s)
		eventually(t, "what is left is collected", func() bool { return s.Usage() == Usage{} })
		mustPull(t, s, k.request(ref))
	})
}

// Two pulls see the same damage, and the second one says so when the first has
// mended it already.
func TestDamageIsMendedOnce(t *testing.T) {
	t.Parallel()
	s := openAt(t, t.TempDir())
	good := []byte("good")
	d := ocispec.Descriptor{Digest: digest.FromBytes(good), Size: int64(len(good))}
	s.hold([]digest.Digest{d.Digest})
	if err := syscall.Mkfifo(s.blobPath(d.Digest), 0o600); err != nil { // is read for as long as the test wants
		t.Fatal(err)
	}
	gone := make(chan bool, 1)
	go func() { gone <- s.dropIfDamaged(d) }()
	f, err := os.OpenFile(s.blobPath(d.Digest), os.O_WRONLY, 0)
	check(t, err)
	check(t, errors.Join(os.Remove(s.blobPath(d.Digest)), s.addBlob(d, good)))
	if err := f.Close(); err != nil { // its content is another one
		t.Fatal(err)
	}
	if !<-gone || !s.hasBlob(d) {
		t.Error("the good one was removed")
	}
}

func TestConcurrentPullsShareBlobs(t *testing.T) {
	h := newHub(t)
	ref := h.push(
		t,
		"app:1",
		imageOf(t, "x", layerOf(t, "a", 1<<20, 1, types.OCILayer), layerOf(t, "b", 1<<20, 2, types.OCILayer)),
	)
	// Blobs stand still until everybody has resolved the name.
	const pulls = 8
	login := basicAuth("me", "secret")
	var mu sync.Mutex
	resolved := 0
	all := make(chan struct{})
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !login(w, r) {
			return false
		}
		if strings.Contains(r.URL.Path, "/manifests/") {
			mu.Lock()
			if resolved++; resolved == pulls {
				close(all)
			}
			mu.Unlock()
		} else {
			<-all
		}
		return true
	})
	s := openAt(t, t.TempDir())
	var k sink
	errs := make([]error, pulls)
	var denied error
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			r := k.request(ref)
			r.Auth = &Auth{Username: "me", Password: "secret"}
			_, errs[i] = s.Pull(t.Context(), r)
		})
	}
	wg.Go(func() { _, denied = s.Pull(t.Context(), k.request(ref)) })
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	if !errors.Is(denied, ErrUnauthorized) {
		t.Errorf("without credentials: %v", denied)
	}
	// The first request for each layer of each new connection may be a 401.
	if _, sent := h.reset(); sent > 3<<20 {
		t.Errorf("%d bytes came", sent)
	}
	if _, err := s.Pull(t.Context(), k.request(ref)); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("without credentials, all being here: %v", err)
	}
	verify(t, s)
}

// Whoever joins a download is not lost when the one who started it goes.
func TestJoinerOutlivesStarter(t *testing.T) {
	h := newHub(t)
	l := layerOf(t, "a", 1<<20, 1, types.OCILayer).(*testLayer)
	ref := h.push(t, "app:1", imageOf(t, "x", l))
	gate := make(chan struct{})
	path := "/blobs/" + digest.FromBytes(l.packed).String()
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, path) {
			<-gate
		}
		return true
	})
	s := openAt(t, t.TempDir())
	users := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		if d := s.downloadOf(digest.FromBytes(l.packed)); d != nil {
			return d.users
		}
		return 0
	}
	var k sink
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.Pull(ctx, k.request(ref)); first <- err }()
	eventually(t, "the first", func() bool { return users() == 1 })
	go func() { _, err := s.Pull(t.Context(), k.request(ref)); second <- err }()
	eventually(t, "the second", func() bool { return users() == 2 })
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("first: %v", err)
	}
	close(gate)
	if err := <-second; err != nil {
		t.Errorf("second: %v", err)
	}
}

func TestCancelEndsTheDownload(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "a", 1<<20, 1, types.OCILayer)))
	blocked, ended := make(chan struct{}, 10), make(chan struct{}, 10)
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			blocked <- struct{}{}
			<-r.Context().Done()
			ended <- struct{}{}
			return false
		}
		return true
	})
	s := openAt(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-blocked; cancel() }()
	var k sink
	if _, err := s.Pull(ctx, k.request(ref)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-ended
	eventually(t, "no download is left", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.downloads) == 0 && len(s.holds.n) == 0
	})
	ctx, cancel = context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	if _, err := s.Pull(ctx, k.request(ref)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	noRefs(t, s)
}

func TestStandstillEnds(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "a", 1<<20, 1, types.OCILayer)))
	img, err := remote.Image(mustRef(t, ref))
	check(t, err)
	m, err := img.Manifest()
	check(t, err)
	cfg := digest.Digest(m.Config.Digest.String())
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") ||
			strings.HasSuffix(r.URL.Path, cfg.String()) {
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(m.Layers[0].Size))
		w.Write([]byte("x")) // and never more
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return false
	})
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressTimeout = 50 * time.Millisecond })
	var k sink
	_, err = s.Pull(t.Context(), k.request(ref))
	if !errors.Is(err, ErrUnavailable) ||
		!errors.Is(err, registry.ErrTooSlow) {
		t.Errorf("got %v", err)
	}
	noRefs(t, s)
}

func mustRef(t testing.TB, ref string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(ref)
	check(t, err)
	return r
}

func TestBusyRegistryIsAskedAgain(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer)))
	var mu sync.Mutex
	seen := map[string]int{}
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		seen[r.URL.Path]++
		n := seen[r.URL.Path]
		mu.Unlock()
		if n > 3 {
			return true
		}
		w.WriteHeader(
			[]int{http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusInternalServerError}[n-1],
		)
		return false
	})
	s := openAt(t, t.TempDir())
	var k sink
	mustPull(t, s, k.request(ref))
}

func TestLiesAreNotKept(t *testing.T) {
	h := newHub(t)
	l := layerOf(t, "a", 100_000, 1, types.OCILayer).(*testLayer)
	ref := h.push(t, "app:1", imageOf(t, "x", l))
	hash := digest.FromBytes(l.packed)
	for name, fault := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"content": func(w http.ResponseWriter, r *http.Request) bool {
			b := bytes.Clone(l.packed)
			b[len(b)-1] ^= 1
			w.Write(b)
			return false
		},
		"shorter": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(l.packed)-1))
			w.Write(l.packed[:len(l.packed)-1])
			return false
		},
		"longer": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(l.packed)+1))
			w.Write(append(bytes.Clone(l.packed), 'x'))
			return false
		},
		"range": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 5-10/100")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(l.packed)
			return false
		},
		"config": nil,
	} {
		t.Run(name, func(t *testing.T) {
			h.set(func(w http.ResponseWriter, r *http.Request) bool {
				if fault == nil && strings.Contains(r.URL.Path, "/blobs/") &&
					!strings.HasSuffix(r.URL.Path, hash.String()) {
					io.WriteString(w, `{"config":{"Cmd":["evil"]}}`)
					return false
				}
				if fault != nil && strings.HasSuffix(r.URL.Path, hash.String()) {
					return fault(w, r)
				}
				return true
			})
			s := openAt(t, t.TempDir())
			var k sink
			if _, err := s.Pull(t.Context(), k.request(ref)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v", err)
			}
			noRefs(t, s)
			verify(t, s)
			if f, _ := filepath.Glob(filepath.Join(s.o.Root, ingestName, "*")); fault != nil && len(f) != 0 {
				t.Errorf("left %v", f)
			}
		})
	}
	t.Run("manifest", func(t *testing.T) {
		h.set(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/manifests/") {
				io.WriteString(w, `{"schemaVersion":2,"config":{},"layers":[]}`)
				return false
			}
			return true
		})
		s := openAt(t, t.TempDir())
		_, err := s.Pull(t.Context(), PullRequest{Ref: h.host + "/app@" + digest.FromString("x").String()})
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
	h.set(nil)
	t.Run("diff id", func(t *testing.T) {
		b := layerOf(t, "b", 1000, 2, types.OCILayer).(*testLayer)
		ref := h.push(
			t,
			"liar:1",
			imageOf(t, "x", &testLayer{raw: []byte("something else"), packed: b.packed, typ: b.typ}),
		)
		s := openAt(t, t.TempDir())
		var k sink
		if _, err := s.Pull(t.Context(), k.request(ref)); err == nil || len(k.layers) != 0 {
			t.Errorf("taken: %v", err)
		}
		noRefs(t, s)
		eventually(t, "its blobs are collected", func() bool { return s.Usage() == Usage{} })
	})
	t.Run("too large a manifest", func(t *testing.T) {
		h.set(func(w http.ResponseWriter, r *http.Request) bool {
			for range 5 << 10 {
				w.Write(make([]byte, 1<<10))
			}
			return false
		})
		s := openAt(t, t.TempDir())
		if _, err := s.Pull(t.Context(), PullRequest{Ref: ref}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	})
}

func TestUnsupportedImages(t *testing.T) {
	h := newHub(t)
	s := openAt(t, t.TempDir())
	layer := layerOf(t, "f", 100, 1, types.OCILayer).(*testLayer)
	for name, img := range map[string]v1.Image{
		"foreign": imageOf(
			t,
			"x",
			&testLayer{raw: layer.raw, packed: layer.packed, typ: types.OCIUncompressedRestrictedLayer},
		),
		"unknown": imageOf(
			t,
			"x",
			&testLayer{raw: layer.raw, packed: layer.packed, typ: "application/vnd.oci.image.layer.v1.tar+encrypted"},
		),
		"artifact": mutate.ConfigMediaType(
			imageOf(t, "x", static.NewLayer([]byte("x"), types.OCILayer)),
			"application/vnd.oci.empty.v1+json",
		),
	} {
		if _, err := s.Pull(t.Context(), PullRequest{Ref: h.push(t, name+":1", img)}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"schema1": `{"schemaVersion":1,"fsLayers":[],"history":[]}`,
		"both":    `{"schemaVersion":2,"manifests":[],"layers":[]}`,
		"neither": `{"schemaVersion":2}`,
	} {
		h.set(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			io.WriteString(w, text)
			return false
		})
		if _, err := s.Pull(t.Context(), PullRequest{Ref: h.host + "/" + name}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	h.set(nil)
	if _, err := s.Pull(t.Context(), PullRequest{Ref: h.host + "/none:1"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("none: %v", err)
	}
	host := h.host
	h.Close()
	if _, err := s.Pull(t.Context(), PullRequest{Ref: host + "/none:1"}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("down: %v", err)
	}
	noRefs(t, s)
}

func TestMirrors(t *testing.T) {
	mirror, origin := newHub(t), newHub(t)
	img := imageOf(t, "x", layerOf(t, "a", 100_000, 1, types.OCILayer))
	mirror.push(t, "team/app:1", img)
	origin.push(t, "team/app:1", img)
	certs := t.TempDir()
	pull := func(ref string) error {
		img, err := pullOnce(t, certs, ref, nil)
		if err == nil && img.RepoTags[0] != ref {
			t.Errorf("tags %v, want the name without the mirror", img.RepoTags)
		}
		return err
	}
	traffic := func(h *hub) (manifests, blobs int) {
		hits, _ := h.reset()
		return count(hits, "GET manifests"), count(hits, "GET blobs")
	}
	const ref = "registry.example/team/app:1"

	hostsToml(t, certs, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL, mirror.URL))
	check(t, pull(ref))
	if m, b := traffic(mirror); m != 1 || b != 2 {
		t.Errorf("mirror: %d manifests, %d blobs", m, b)
	}
	if m, b := traffic(origin); m != 0 || b != 0 {
		t.Errorf("origin: %d manifests, %d blobs", m, b)
	}
	// The mirror may not say what a tag means.
	hostsToml(
		t,
		certs,
		"registry.example",
		fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", origin.URL, mirror.URL),
	)
	check(t, pull(ref))
	if m, b := traffic(mirror); m != 1 || b != 2 {
		t.Errorf("mirror: %d manifests, %d blobs", m, b)
	}
	if hits, _ := origin.reset(); len(hits) != 1 || hits["HEAD manifests 1"] != 1 {
		t.Errorf("origin: %v", hits)
	}
	// What a digest names it may say, the second time too.
	hash, err := img.Digest()
	check(t, err)
	s := openAt(t, t.TempDir(), func(o *Options) { o.RegistryConfigDir = certs })
	for range 2 {
		mustPull(t, s, PullRequest{Ref: "registry.example/team/app@" + hash.String()})
	}
	if hits, _ := origin.reset(); len(hits) != 0 {
		t.Errorf("origin: %v", hits)
	}
	mirror.reset()
	// The mirror breaks off in the middle: the origin gives the rest.
	hostsToml(t, certs, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL, mirror.URL))
	mirror.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusNotFound)
			return false
		}
		return true
	})
	mirror.setCut(50_000)
	check(t, pull(ref))
	if _, sent := origin.reset(); sent < 40_000 || sent > 60_000 {
		t.Errorf("the origin sent %d bytes", sent)
	}
	// The mirror is down, and the default for all hosts is used; override_path.
	mirror.Close()
	check(t, os.RemoveAll(filepath.Join(certs, "registry.example")))
	hostsToml(
		t,
		certs,
		"_default",
		fmt.Sprintf("[host.%q]\n[host.\"%s/v2\"]\noverride_path = true\n", mirror.URL, origin.URL),
	)
	if err := pull(ref); err != nil {
		t.Error(err)
	}
	hostsToml(t, certs, "_default", "this is not toml")
	if err := pull(ref); err == nil {
		t.Error("a broken hosts.toml was ignored")
	}
}

func TestPartsAreRemoved(t *testing.T) {
	root := t.TempDir()
	s := openAt(t, root)
	s.Close()
	part := func(s string) string {
		return filepath.Join(root, ingestName, partName("registry.example", descOfBytes([]byte(s))))
	}
	resumed, orphan, small := part("resumed"), part("orphan"), filepath.Join(root, ingestName, smallPrefix+"1")
	check(t, s.beginPending("registry.test/a:1", []digest.Digest{digest.FromString("resumed")}))
	for _, p := range []string{resumed, orphan, small} {
		check(t, os.WriteFile(p, []byte("x"), 0o600))
	}
	gone := func(path string) bool { _, err := os.Stat(path); return errors.Is(err, os.ErrNotExist) }
	s = openAt(t, root)
	eventually(t, "what no interrupted pull has is gone", func() bool { return gone(orphan) && gone(small) })
	if gone(resumed) {
		t.Error("what an interrupted pull has is gone")
	}
	s.endPending("registry.test/a:1", nil)
	s.kick()
	eventually(t, "it is gone when the pull went well", func() bool { return gone(resumed) })
}

// What was being written goes, whatever the directory is called.
func TestUnfinishedFilesAreRemoved(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a[b")
	openAt(t, root).Close()
	for _, name := range []string{
		filepath.Join(ingestName, smallPrefix+"1"),
		".index.json.1",
		filepath.Join(refsName, ".x.json.1"),
	} {
		path := filepath.Join(root, name)
		check(t, os.WriteFile(path, []byte("x"), 0o600))
		openAt(t, root).Close()
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A container that finds no room for its layers is worth more than what an
// interrupted pull left.
func TestUnpackMakesRoom(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	s := openAt(t, t.TempDir())
	img := mustPull(
		t,
		s,
		PullRequest{Ref: h.push(t, "app:1", imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer)))},
	)
	part := filepath.Join(s.o.Root, ingestName, partName(h.host, descOfBytes([]byte("part"))))
	check(t, os.WriteFile(part, []byte("x"), 0o600))
	err := s.unpack(t.Context(), PullRequest{Ref: img.ID, Layers: noRoom{&sink{}}})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	eventually(t, "the part is gone", func() bool { _, err := os.Stat(part); return errors.Is(err, os.ErrNotExist) })
}

// noRoom has no room for another layer.
type noRoom struct{ *sink }

func (noRoom) Apply(context.Context, digest.Digest, io.Reader) error { return syscall.ENOSPC }

// needed says whether a layer may not be collected.
func needed(s *Store, d digest.Digest) bool {
	unneeded := false
	s.ifUnneeded(d, func() error { unneeded = true; return nil })
	return !unneeded
}

var check = must.Succeed
