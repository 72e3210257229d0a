package crash

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// What lies below ROOT/images and ROOT/layers is read here as docs/images.md and
// docs/files.md have it, with none of the daemon's code.

// reference is images/refs/HASH.json.
type reference struct {
	Ref           string             `json:"ref"`
	Target        ocispec.Descriptor `json:"target"`
	Manifest      ocispec.Descriptor `json:"manifest"`
	LayersDropped bool               `json:"layersDropped"`
}

// interrupted is images/pending/HASH.json.
type interrupted struct {
	Ref   string          `json:"ref"`
	Blobs []digest.Digest `json:"blobs"`
}

// holdings is what a store has on the disk.
type holdings struct {
	refs    map[string]reference
	pending map[string]interrupted
	blobs   map[digest.Digest]int64 // that have their names: size
	partial map[digest.Digest]int64 // in ingest/
	layers  map[digest.Digest]bool
	faults  []string
}

func (h *holdings) fault(format string, args ...any) {
	h.faults = append(h.faults, fmt.Sprintf(format, args...))
}

// take reads the names in the stores of a node, and the records.
func take(n *harness.Node) *holdings {
	h := &holdings{refs: map[string]reference{}, pending: map[string]interrupted{},
		blobs: map[digest.Digest]int64{}, partial: map[digest.Digest]int64{}, layers: map[digest.Digest]bool{}}
	images, layers := filepath.Join(n.Root, "images"), filepath.Join(n.Root, "layers")
	for _, e := range h.list(images, "refs") {
		var r reference
		if h.record(filepath.Join(images, "refs", e.Name()), &r) {
			if want := digest.FromString(r.Ref).Encoded() + ".json"; e.Name() != want {
				h.fault("the record of %s is called %s", r.Ref, e.Name())
			}
			h.refs[r.Ref] = r
		}
	}
	for _, e := range h.list(images, "pending") {
		var p interrupted
		if h.record(filepath.Join(images, "pending", e.Name()), &p) {
			h.pending[p.Ref] = p
		}
	}
	for _, e := range h.list(images, "blobs", "sha256") {
		if st, err := e.Info(); err == nil {
			h.blobs[digest.Digest("sha256:"+e.Name())] = st.Size()
		}
	}
	for _, e := range h.list(images, "ingest") {
		if st, err := e.Info(); err == nil {
			part := strings.Split(e.Name(), "-") // ALGORITHM-HEX-REGISTRY-SIZE
			h.partial[digest.NewDigestFromEncoded(digest.Algorithm(part[0]), part[min(1, len(part)-1)])] = st.Size()
		}
	}
	for _, e := range h.list(layers, "sha256") {
		h.layers[digest.Digest("sha256:"+e.Name())] = true
	}
	for _, dir := range []string{filepath.Join(images, "quarantine"), filepath.Join(layers, "tmp"),
		filepath.Join(layers, "empty"),
		filepath.Join(n.Root, "quarantine"), filepath.Join(n.State, "pulls")} {
		for _, e := range h.list(dir) {
			h.fault("%s is not empty: %s", dir, e.Name())
		}
	}
	for dir, known := range map[string][]string{
		images: {"refs", "blobs", "oci-layout", "index.json", "ingest", "pending", "quarantine"},
		layers: {"sha256", "tmp", "empty"},
	} {
		for _, e := range h.list(dir) {
			if !slices.Contains(known, e.Name()) {
				h.fault("%s has a file %s that no document knows", dir, e.Name())
			}
		}
	}
	return h
}

func (h *holdings) list(elem ...string) []fs.DirEntry {
	path := filepath.Join(elem...)
	l, err := os.ReadDir(path)
	if err != nil && !os.IsNotExist(err) {
		h.fault("%v", err)
	}
	return l
}

func (h *holdings) record(path string, v any) bool {
	if strings.HasPrefix(filepath.Base(path), ".") {
		h.fault("%s was being written, and is still there", path)
		return false
	}
	b, err := os.ReadFile(path)
	var r struct {
		Version  int             `json:"version"`
		Checksum string          `json:"checksum"`
		Body     json.RawMessage `json:"body"`
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	want := fmt.Sprintf("crc32c:%08x", crc32.Checksum(r.Body, crc32.MakeTable(crc32.Castagnoli)))
	if err == nil && (r.Checksum != want || r.Version != 1) {
		err = fmt.Errorf("version %d, checksum %s, want %s", r.Version, r.Checksum, want)
	}
	if err == nil {
		err = json.Unmarshal(r.Body, v)
	}
	if err != nil {
		h.fault("record %s: %v", path, err)
	}
	return err == nil
}

// inspect checks all that holds for a store at rest: every reference whole,
// every digest right, nothing that nobody refers to, and CRI tells the same.
func inspect(n *harness.Node, d *depot) *holdings {
	h := take(n)
	neededBlobs, neededLayers := map[digest.Digest]bool{}, map[digest.Digest]bool{}
	for _, r := range h.refs {
		h.reference(d, r, neededBlobs, neededLayers)
	}
	for _, p := range h.pending {
		if d.of(p.Ref) == nil {
			h.fault("a pull of %q is pending, which nobody asked for", p.Ref)
		}
		for _, b := range p.Blobs {
			neededBlobs[b] = true
		}
	}
	for b := range h.partial {
		if !neededBlobs[b] {
			h.fault("a partial download of %s that nobody resumes", b)
		}
	}
	for b := range h.blobs {
		if !neededBlobs[b] {
			h.fault("blob %s is referred to by nothing", b)
		}
		if content, err := os.ReadFile(h.blobPath(n, b)); err != nil || digest.FromBytes(content) != b {
			h.fault("blob %s has another content: %v", b, err)
		}
	}
	for _, id := range containerImages(n, h) {
		if p := d.of(id); p != nil {
			for _, l := range p.layers {
				neededLayers[l.diffID] = true
				if !h.layers[l.diffID] {
					h.fault("layer %s is gone, and a container uses it", l.diffID)
				}
			}
		}
	}
	var bytes, inodes uint64
	for l := range h.layers {
		if !neededLayers[l] {
			h.fault("layer %s is referred to by nothing", l)
		}
		b, i := h.layer(n, d, l)
		bytes, inodes = bytes+b, inodes+i
	}
	for _, size := range h.blobs {
		bytes, inodes = bytes+uint64(size), inodes+1
	}
	h.layout(n)
	h.compareCRI(n, bytes, inodes)
	return h
}

func (h *holdings) blobPath(n *harness.Node, b digest.Digest) string {
	return filepath.Join(n.Root, "images", "blobs", "sha256", b.Encoded())
}

// reference checks that all that one reference needs is here.
func (h *holdings) reference(d *depot, r reference, blobs, layers map[digest.Digest]bool) {
	p := d.of(r.Ref)
	if p == nil {
		h.fault("%s was never pulled", r.Ref)
		return
	}
	if r.Target.Digest != p.target.Digest || r.Manifest.Digest != p.manifest.Digest {
		h.fault("%s is %s and %s, want %s and %s", r.Ref, r.Target.Digest, r.Manifest.Digest, p.target.Digest,
			p.manifest.Digest)
	}
	need := []digest.Digest{r.Target.Digest, r.Manifest.Digest, digest.Digest(p.id)}
	for _, l := range p.layers {
		if !r.LayersDropped {
			need = append(need, l.blob.Digest)
		}
		layers[l.diffID] = true
		if !h.layers[l.diffID] {
			h.fault("%s lacks the layer %s", r.Ref, l.diffID)
		}
	}
	for _, b := range need {
		blobs[b] = true
		if size, ok := h.blobs[b]; !ok || size != int64(len(d.blobs[b])) {
			h.fault("%s lacks the blob %s (%d bytes)", r.Ref, b, size)
		}
	}
}

// layer compares an unpacked layer with what it has to be, and measures it.
func (h *holdings) layer(n *harness.Node, d *depot, id digest.Digest) (size, inodes uint64) {
	var want *layer
	for _, p := range d.pictures {
		for _, l := range p.layers {
			if l.diffID == id {
				want = l
			}
		}
	}
	dir := filepath.Join(n.Root, "layers", "sha256", id.Encoded())
	var r struct {
		DiffID digest.Digest `json:"diffId"`
	}
	if h.record(filepath.Join(dir, "layer.json"), &r) && r.DiffID != id {
		h.fault("%s has the record of %s", id, r.DiffID)
	}
	for _, e := range h.list(dir) {
		if !slices.Contains([]string{"diff", "layer.json", "synced"}, e.Name()) {
			h.fault("layer %s has a file %s that no document knows", id, e.Name())
		}
	}
	if want == nil {
		h.fault("layer %s is of no image", id)
		return 0, 0
	}
	size, inodes, err := compareTree(filepath.Join(dir, "diff"), want.tree, true)
	if err != nil {
		h.fault("layer %s: %v", id, err)
	}
	return size, inodes
}

// compareTree compares a directory with what it has to hold, and nothing else if
// it is all. It counts as ImageFsInfo does: whole blocks, each inode once.
func compareTree(dir string, want map[string]node, all bool) (size, inodes uint64, err error) {
	var errs []string
	seen, linked := 0, map[uint64]bool{}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		ino := st.Sys().(*syscall.Stat_t).Ino
		first := !linked[ino]
		linked[ino] = true
		if first {
			inodes++
		}
		if path == dir {
			return nil
		}
		name := strings.TrimPrefix(path, dir+"/")
		w, ok := want[name]
		if !ok && all {
			errs = append(errs, name+" does not belong there")
		}
		if !ok {
			return nil
		}
		seen++
		got := node{mode: st.Mode(), size: w.size}
		switch {
		case st.IsDir():
			size += 4096
		case st.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			got.size, got.sum = int64(len(b)), digest.FromBytes(b)
			if first {
				size += uint64(len(b)+4095) / 4096 * 4096
			}
		}
		if got != w {
			errs = append(errs, fmt.Sprintf("%s is %v, want %v", name, got, w))
		}
		return nil
	})
	if err == nil && seen != len(want) {
		errs = append(errs, fmt.Sprintf("%d files, want %d", seen, len(want)))
	}
	if len(errs) > 0 {
		err = fmt.Errorf("%d differences, first: %s", len(errs), errs[0])
	}
	return size, inodes, err
}

// layout checks that images/ is an OCI image layout of just the references.
func (h *holdings) layout(n *harness.Node) {
	read := func(name string, v any) {
		b, err := os.ReadFile(filepath.Join(n.Root, "images", name))
		if err == nil {
			err = json.Unmarshal(b, v)
		}
		if err != nil {
			h.fault("%s: %v", name, err)
		}
	}
	var l ocispec.ImageLayout
	read("oci-layout", &l)
	if l.Version != "1.0.0" {
		h.fault("the layout has version %q", l.Version)
	}
	var x ocispec.Index
	read("index.json", &x)
	got, digests := map[string]digest.Digest{}, map[digest.Digest]bool{}
	for _, m := range x.Manifests {
		if size, ok := h.blobs[m.Digest]; !ok || size != m.Size {
			h.fault("index.json names %s, %d bytes; the blob has %d", m.Digest, m.Size, size)
		}
		if name := m.Annotations[ocispec.AnnotationRefName]; name != "" {
			got[name] = m.Digest
		}
		digests[m.Digest] = true
	}
	for name, d := range got {
		if r, ok := h.refs[name]; !ok || r.Manifest.Digest != d {
			h.fault("index.json has %s, which is %q by the records", name, r.Manifest.Digest)
		}
	}
	for _, r := range h.refs {
		if !digests[r.Manifest.Digest] {
			h.fault("index.json lacks %s", r.Ref)
		}
		if !strings.Contains(r.Ref, "@") {
			if got[r.Ref] != r.Manifest.Digest {
				h.fault("index.json has %q for %s, want %s", got[r.Ref], r.Ref, r.Manifest.Digest)
			}
		}
	}
}

func containerImages(n *harness.Node, h *holdings) (ids []string) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		h.fault("ListContainers: %v", err)
	}
	for _, c := range r.GetContainers() {
		ids = append(ids, c.ImageId)
	}
	return ids
}

func (h *holdings) compareCRI(n *harness.Node, bytes, inodes uint64) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	want := map[string][]string{} // by id
	for _, r := range h.refs {
		var m ocispec.Manifest
		if b, err := os.ReadFile(h.blobPath(n, r.Manifest.Digest)); err != nil || json.Unmarshal(b, &m) != nil {
			h.fault("cannot read the manifest of %s: %v", r.Ref, err)
			continue
		}
		id := m.Config.Digest.String()
		want[id] = append(want[id], r.Ref)
		for _, name := range []string{r.Ref, id} {
			s, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
			if err != nil || s.GetImage().GetId() != id {
				h.fault("ImageStatus of %s is %v, %v; want %s", name, s, err, id)
			}
		}
	}
	list, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil || len(list.Images) != len(want) {
		h.fault("ListImages has %d images, want %d: %v", len(list.GetImages()), len(want), err)
	}
	for _, i := range list.GetImages() {
		got := slices.Sorted(slices.Values(slices.Concat(i.RepoTags, i.RepoDigests)))
		slices.Sort(want[i.Id])
		if !slices.Equal(got, want[i.Id]) {
			h.fault("ListImages has %s as %v, the records as %v", i.Id, got, want[i.Id])
		}
	}
	u, err := n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	if err != nil || len(u.ImageFilesystems) != 1 {
		h.fault("ImageFsInfo: %v, %v", u, err)
		return
	}
	f := u.ImageFilesystems[0]
	if got := f.InodesUsed.GetValue(); got != inodes {
		h.fault("ImageFsInfo says %d inodes, there are %d", got, inodes)
	}
	if got := f.UsedBytes.GetValue(); got != bytes {
		h.fault("ImageFsInfo says %d bytes, there are %d", got, bytes)
	}
}

// settle waits until the store is at rest and faultless: what is unreferenced
// goes in the background.
func settle(t *testing.T, n *harness.Node, d *depot) *holdings {
	t.Helper()
	var h *holdings
	for deadline := time.Now().Add(2 * time.Minute * slow); ; time.Sleep(5 * harness.Tick) {
		if h = inspect(n, d); len(h.faults) == 0 {
			return h
		}
		if time.Now().After(deadline) {
			break
		}
	}
	var b bytes.Buffer
	for _, f := range h.faults[:min(len(h.faults), 20)] {
		fmt.Fprintf(&b, "\n  %s", f)
	}
	t.Fatalf("the store has %d faults:%s", len(h.faults), b.Bytes())
	return nil
}

var check = must.Succeed
