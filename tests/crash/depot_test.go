package crash

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// depotHost is the host of the depot's images, for a node that knows it.
const depotHost = "depot.test"

// node is a file of a layer, as it has to look once it is unpacked.
type node struct {
	mode os.FileMode // with its type
	size int64
	sum  digest.Digest // of a regular file's content
}

// layer is one layer, and the tree it unpacks to.
type layer struct {
	diffID digest.Digest
	blob   ocispec.Descriptor
	packed []byte
	tree   map[string]node // by path; the root left out
}

// picture is one image: all that a store has to have of it.
type picture struct {
	name     string // to be read by people
	id       string // digest of the config
	manifest ocispec.Descriptor
	target   ocispec.Descriptor // the index, where there is one
	layers   []*layer
	refs     []string // all tags, with the host
}

// digestRef is the name by digest in the repository of a reference.
func (p *picture) digestRef(ref string) string {
	if strings.Contains(ref, "@") {
		return ref
	}
	return ref[:strings.LastIndexByte(ref, ':')] + "@" + p.target.Digest.String()
}

// depot is a registry that writes down what it is asked for, and sends as slowly
// as it is told to.
type depot struct {
	pictures []*picture
	blobs    map[digest.Digest][]byte
	names    map[string]ocispec.Descriptor // manifests, by REPO:TAG or DIGEST

	mu   sync.Mutex
	rate int // bytes per second and connection; 0: no limit
	sent []sent
}

// sent is one answer to a request for a blob.
type sent struct {
	blob digest.Digest
	from int64
	n    int64 // that were written before the connection broke
}

// openDepot serves pictures that share layers, to a node.
func openDepot(t *testing.T, n *harness.Node) *depot {
	t.Helper()
	d := &depot{blobs: map[digest.Digest][]byte{}, names: map[string]ocispec.Descriptor{}}
	if err := d.fill(); err != nil {
		t.Fatalf("cannot make images: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	server := &http.Server{Handler: d, ReadHeaderTimeout: time.Minute}
	go server.Serve(l) // ends with Close
	t.Cleanup(func() { server.Close() })
	path := n.Path(filepath.Join("certs.d", depotHost, "hosts.toml"))
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, fmt.Appendf(nil, "server = \"http://%s\"\n", l.Addr()), 0o644))
	return d
}

// fill makes the images: gzip, zstd and plain layers, small ones and some that
// take a while, shared by several images; several tags for one image, also in
// two repositories; an index with a second platform.
func (d *depot) fill() error {
	const kib, mib = 1 << 10, 1 << 20
	box, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(box)
	if err != nil {
		return err
	}
	made := map[string]*layer{}
	for i, spec := range []struct {
		name, media string
		large       int
		more        map[string][]byte
	}{
		{"base", ocispec.MediaTypeImageLayerGzip, 10 * kib, map[string][]byte{"bin/busybox": busybox}},
		{"big", ocispec.MediaTypeImageLayerGzip, 4 * mib, nil},
		{"zstd", ocispec.MediaTypeImageLayerZstd, 2 * mib, nil},
		{"plain", ocispec.MediaTypeImageLayer, 1 * mib, nil},
		{"one", ocispec.MediaTypeImageLayerGzip, 100 * kib, nil},
		{"two", ocispec.MediaTypeImageLayerZstd, 300 * kib, nil},
		{"three", ocispec.MediaTypeImageLayer, 1 * kib, nil},
	} {
		if made[spec.name], err = makeLayer(spec.name, spec.media, spec.large, uint64(i), spec.more); err != nil {
			return err
		}
		d.blobs[made[spec.name].blob.Digest] = made[spec.name].packed
	}
	for _, spec := range []struct {
		name, layers string
		index        bool
		tags         []string
	}{
		{"large", "base big", false, []string{"app:large", "app:latest"}},
		{"most", "base big zstd plain one", false, []string{"app:most"}},
		{"indexed", "base zstd", true, []string{"multi:1", "multi:latest", "mirrored/multi:1"}},
		{"plain", "base plain", false, []string{"plain:1"}},
		{"small", "base three", false, []string{"small:1", "small:2"}},
		{"two", "base one two", true, []string{"two:1"}},
		{"same", "base one two", false, []string{"same:1"}}, // its layers are all another's
		{"twice", "base three one three", false, []string{"twice:1"}},
		{"other", "two zstd base", false, []string{"other:1", "else/other:2"}},
	} {
		p := &picture{name: spec.name}
		for l := range strings.FieldsSeq(spec.layers) {
			p.layers = append(p.layers, made[l])
		}
		d.describe(p, spec.index)
		for _, tag := range spec.tags {
			p.refs = append(p.refs, depotHost+"/"+tag)
			d.names[tag] = p.target
		}
		d.pictures = append(d.pictures, p)
	}
	return nil
}

// describe makes the documents of an image.
func (d *depot) describe(p *picture, index bool) {
	add := func(media string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err) // it is all ours
		}
		desc := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(b), Size: int64(len(b))}
		d.blobs[desc.Digest] = b
		d.names[desc.Digest.String()] = desc
		return desc
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: ocispec.ImageConfig{Labels: map[string]string{"name": p.name}}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range p.layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
		m.Layers = append(m.Layers, l.blob)
	}
	m.Config = add(ocispec.MediaTypeImageConfig, config)
	p.id = m.Config.Digest.String()
	p.manifest = add(m.MediaType, m)
	p.target = p.manifest
	if index {
		ours, other := p.manifest, p.manifest
		ours.Platform = &config.Platform
		other.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
		other.Digest = digest.FromString("of another platform " + p.name)
		p.target = add(ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, ours}})
	}
}

// makeLayer makes a layer of many kinds of files below a directory of its name.
// The large file does not compress.
func makeLayer(name, media string, large int, seed uint64, more map[string][]byte) (*layer, error) {
	l := &layer{tree: map[string]node{}}
	chance := rand.NewChaCha8([32]byte{byte(seed), 1})
	random := func(n int) []byte {
		b := make([]byte, n)
		chance.Read(b)
		return b
	}
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	add := func(h tar.Header, content []byte) error {
		h.Size, h.ModTime = int64(len(content)), time.Unix(int64(seed)*1000, 0)
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
		n := node{mode: h.FileInfo().Mode(), size: h.Size}
		if h.Typeflag == tar.TypeReg {
			n.sum = digest.FromBytes(content)
		}
		if h.Typeflag == tar.TypeLink {
			n = l.tree[h.Linkname]
		}
		l.tree[strings.TrimSuffix(h.Name, "/")] = n
		return nil
	}
	var errs []error
	dir := func(path string, mode int64) {
		errs = append(errs, add(tar.Header{Typeflag: tar.TypeDir, Name: path + "/", Mode: mode}, nil))
	}
	file := func(path string, mode int64, b []byte) {
		errs = append(errs, add(tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode}, b))
	}
	dirs := map[string]bool{}
	for path, b := range more {
		if parent := filepath.Dir(path); !dirs[parent] {
			dirs[parent] = true
			dir(parent, 0o755)
		}
		file(path, 0o755, b)
	}
	dir(name, 0o755)
	file(name+"/large", 0o644, random(large))
	for i := range 12 {
		sub := fmt.Sprintf("%s/%d", name, i)
		dir(sub, 0o700|int64(i))
		file(sub+"/setuid", 0o4755, random(10*i))
		file(sub+"/file", 0o600|int64(i), random(300*i))
		errs = append(errs, add(tar.Header{Typeflag: tar.TypeLink, Name: sub + "/hard", Linkname: sub + "/file",
			Mode: 0o600 | int64(i)}, nil),
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: sub + "/soft", Linkname: "file", Mode: 0o777}, nil))
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	l.diffID = digest.FromBytes(plain.Bytes())
	var packed bytes.Buffer
	var z io.WriteCloser
	switch media {
	case ocispec.MediaTypeImageLayerGzip:
		z = gzip.NewWriter(&packed)
	case ocispec.MediaTypeImageLayerZstd:
		var err error
		if z, err = zstd.NewWriter(&packed); err != nil {
			return nil, err
		}
	default:
		packed = plain
	}
	if z != nil {
		if _, err := z.Write(plain.Bytes()); err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
	}
	l.packed = packed.Bytes()
	l.blob = ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(l.packed), Size: int64(len(l.packed))}
	return l, nil
}

// refs are all tags, and a name by digest of each image.
func (d *depot) refs() (refs []string) {
	for _, p := range d.pictures {
		refs = append(append(refs, p.refs...), p.digestRef(p.refs[0]))
	}
	return refs
}

// of is the image that a reference, or an id, names.
func (d *depot) of(ref string) *picture {
	for _, p := range d.pictures {
		if p.id == ref || slices.Contains(p.refs, ref) || strings.HasSuffix(ref, "@"+p.target.Digest.String()) {
			return p
		}
	}
	return nil
}

// slow limits each transfer from now on; 0: no limit.
func (d *depot) slow(bytesPerSecond int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rate = bytesPerSecond
}

// taken gives the answers so far, and forgets them.
func (d *depot) taken() []sent {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.sent
	d.sent = nil
	return s
}

func (d *depot) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	repo, name, isManifest := strings.Cut(path, "/manifests/")
	if !isManifest {
		_, name, _ = strings.Cut(path, "/blobs/")
	}
	switch {
	case path == "":
	case isManifest:
		desc, ok := d.names[name]
		if !ok {
			desc, ok = d.names[repo+":"+name]
		}
		if !ok {
			http.Error(w, "no such manifest", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", desc.MediaType)
		w.Header().Set("Docker-Content-Digest", desc.Digest.String())
		w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
		if r.Method == http.MethodGet {
			w.Write(d.blobs[desc.Digest])
		}
	default:
		if b, ok := d.blobs[digest.Digest(name)]; ok {
			d.sendBlob(w, r, digest.Digest(name), b)
			return
		}
		http.Error(w, "no such blob", http.StatusNotFound)
	}
}

func (d *depot) sendBlob(w http.ResponseWriter, r *http.Request, name digest.Digest, b []byte) {
	s := sent{blob: name}
	status := http.StatusOK
	if first, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		first, _, _ = strings.Cut(first, "-")
		from, err := strconv.ParseInt(first, 10, 64)
		if err != nil || from >= int64(len(b)) {
			http.Error(w, "no such range", http.StatusRequestedRangeNotSatisfiable)
			return
		}
		s.from, status = from, http.StatusPartialContent
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
	}
	b = b[s.from:]
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	d.mu.Lock()
	rate := d.rate
	d.mu.Unlock()
	for began := time.Now(); len(b) > 0 && r.Context().Err() == nil; {
		n, err := w.Write(b[:min(len(b), 32<<10)])
		s.n += int64(n)
		if err != nil {
			break
		}
		b = b[n:]
		if rate > 0 {
			w.(http.Flusher).Flush()
			due := began.Add(time.Duration(s.n) * time.Second / time.Duration(rate))
			select {
			case <-time.After(time.Until(due)):
			case <-r.Context().Done():
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sent = append(d.sent, s)
}
