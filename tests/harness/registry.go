package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is the reference of the image that tests run: busybox and testbox. Its
// host exists nowhere: hosts.toml sends every host to the loopback registry.
const Image = "registry.test/tests/box:1"

// Registry is an image registry on a loopback address, in memory. It holds
// Image when Start returns.
type Registry struct {
	Host string // host:port

	server  *http.Server
	handler http.Handler
	mu      sync.Mutex
	broken  func(*http.Request) bool
}

// StartRegistry serves until t ends.
func StartRegistry(t T) *Registry {
	t.Helper()
	r, err := startRegistry()
	if err != nil {
		t.Fatalf("cannot start a registry: %v", err)
	}
	t.Cleanup(func() { r.server.Close() })
	return r
}

func startRegistry() (*Registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &Registry{Host: l.Addr().String(), handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go r.server.Serve(l) // ends with Close
	layer, err := BoxLayer()
	if err == nil {
		err = r.pushBox(layer)
	}
	if err != nil {
		r.server.Close()
		return nil, err
	}
	return r, nil
}

func (r *Registry) pushBox(layer Layer) error {
	_, err := r.Push(Image, ocispec.ImageConfig{
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Cmd: []string{"sh"},
	}, layer)
	return err
}

// OwnImage replaces Image by one whose layer no other node has. Several nodes on one
// machine see each other's mounts, and keep garbage that might be in use there.
func (r *Registry) OwnImage() error {
	layer, err := makeBox(r.Host)
	if err != nil {
		return err
	}
	return r.pushBox(layer)
}

// Break answers 500 to the requests that f picks. Nil mends it.
func (r *Registry) Break(f func(*http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = f
}

func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	broken := r.broken != nil && r.broken(req)
	r.mu.Unlock()
	if broken {
		http.Error(w, "broken on purpose", http.StatusInternalServerError)
		return
	}
	r.handler.ServeHTTP(w, req)
}

// Push puts an image of gzipped tar layers under ref, HOST/NAME:TAG, and gives
// the digest of its manifest.
func (r *Registry) Push(ref string, config ocispec.ImageConfig, layers ...Layer) (digest.Digest, error) {
	return r.PushAnnotated(ref, config, nil, layers...)
}

// PushAnnotated is Push with annotations on the manifest.
func (r *Registry) PushAnnotated(ref string, config ocispec.ImageConfig, annotations map[string]string,
	layers ...Layer) (digest.Digest, error) {
	_, rest, _ := strings.Cut(ref, "/")
	name, tag, ok := strings.Cut(rest, ":")
	if !ok {
		return "", fmt.Errorf("cannot push %s: it has no tag", ref)
	}
	img := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: goarch},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	m := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Annotations: annotations,
	}
	for _, l := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, l.diffID)
		d, err := r.blob(name, l.gzipped)
		if err != nil {
			return "", err
		}
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: int64(len(l.gzipped))})
	}
	b, err := json.Marshal(img)
	if err != nil {
		return "", err
	}
	d, err := r.blob(name, b)
	if err != nil {
		return "", err
	}
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: d, Size: int64(len(b))}
	if b, err = json.Marshal(m); err != nil {
		return "", err
	}
	url := fmt.Sprintf("http://%s/v2/%s/manifests/%s", r.Host, name, tag)
	return digest.FromBytes(b), send(http.MethodPut, url, m.MediaType, b)
}

func (r *Registry) blob(name string, b []byte) (digest.Digest, error) {
	d := digest.FromBytes(b)
	url := fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?digest=%s", r.Host, name, d)
	return d, send(http.MethodPost, url, "application/octet-stream", b)
}

func send(method, url, contentType string, b []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("cannot push to %s: %s", url, resp.Status)
	}
	return nil
}

// Layer is one layer of an image.
type Layer struct {
	gzipped []byte
	diffID  digest.Digest
}

// MakeLayer packs files. Names that end with a slash are directories.
func MakeLayer(files map[string]string) (Layer, error) {
	return packLayer(func(w *tar.Writer) error {
		for name, content := range files {
			h := &tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg, Size: int64(len(content))}
			if strings.HasSuffix(name, "/") {
				h.Typeflag = tar.TypeDir
			}
			if err := writeEntry(w, h, []byte(content)); err != nil {
				return err
			}
		}
		return nil
	})
}

// LinkLayer packs symbolic links, from their names to where they lead.
func LinkLayer(links map[string]string) (Layer, error) {
	return packLayer(func(w *tar.Writer) error {
		for name, target := range links {
			h := &tar.Header{Name: name, Linkname: target, Mode: 0o777, Typeflag: tar.TypeSymlink}
			if err := writeEntry(w, h, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

func packLayer(fill func(*tar.Writer) error) (Layer, error) {
	var plain, gzipped bytes.Buffer
	w := tar.NewWriter(&plain)
	if err := fill(w); err != nil {
		return Layer{}, err
	}
	if err := w.Close(); err != nil {
		return Layer{}, err
	}
	z, err := gzip.NewWriterLevel(&gzipped, gzip.BestSpeed)
	if err != nil {
		return Layer{}, err
	}
	if _, err = z.Write(plain.Bytes()); err == nil {
		err = z.Close()
	}
	return Layer{gzipped: gzipped.Bytes(), diffID: digest.FromBytes(plain.Bytes())}, err
}

func writeEntry(w *tar.Writer, h *tar.Header, content []byte) error {
	h.ModTime = time.Unix(0, 0)
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

// BoxLayer holds busybox, a hard link for each applet, testbox, and the files
// that users and groups are looked up in.
var BoxLayer = sync.OnceValues(func() (Layer, error) { return makeBox("") })

// makeBox makes that layer. A mark makes it another one.
func makeBox(mark string) (Layer, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return Layer{}, fmt.Errorf("cannot make an image without busybox: install busybox-static: %w", err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return Layer{}, err
	}
	applets, err := exec.Command(path, "--list").Output()
	if err != nil {
		return Layer{}, err
	}
	box, err := testbox()
	if err != nil {
		return Layer{}, err
	}
	return packLayer(func(w *tar.Writer) error {
		for _, d := range []string{"bin/", "dev/", "etc/", "home/", "proc/", "root/", "run/", "sys/", "tmp/", "usr/",
			"usr/bin/", "var/"} {
			mode := int64(0o755)
			if d == "tmp/" {
				mode = 0o1777
			}
			if err := writeEntry(w, &tar.Header{Name: d, Mode: mode, Typeflag: tar.TypeDir}, nil); err != nil {
				return err
			}
		}
		for _, f := range []struct {
			name    string
			mode    int64
			content []byte
		}{
			{"bin/busybox", 0o755, busybox},
			{"bin/testbox", 0o755, box},
			{"etc/passwd", 0o644,
				[]byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" +
					"box:x:1000:1000:box:/home:/bin/sh\n")},
			{"etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\nbox:x:1000:\nextra:x:2000:box\n")},
		} {
			h := &tar.Header{Name: f.name, Mode: f.mode, Typeflag: tar.TypeReg, Size: int64(len(f.content))}
			if err := writeEntry(w, h, f.content); err != nil {
				return err
			}
		}
		if mark != "" {
			h := &tar.Header{Name: "etc/mark", Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(mark))}
			if err := writeEntry(w, h, []byte(mark)); err != nil {
				return err
			}
		}
		for _, a := range strings.Fields(string(applets)) {
			if a == "busybox" || strings.Contains(a, "/") {
				continue
			}
			h := &tar.Header{Name: "bin/" + a, Mode: 0o755, Typeflag: tar.TypeLink, Linkname: "bin/busybox"}
			if err := writeEntry(w, h, nil); err != nil {
				return err
			}
		}
		return nil
	})
}
