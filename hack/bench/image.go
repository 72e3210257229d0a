package main

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// made is a folder of images: blobs/HEX, and manifest-N for each image.
type made struct {
	Packed, Unpacked int64 // bytes of all layers
	Files            int
}

// makeImages generates images into dir, or takes those that an earlier run left
// there. The same options give the same content.
func makeImages(dir string, o options) (m made, err error) {
	if b, err := os.ReadFile(filepath.Join(dir, "made.json")); err == nil {
		return m, json.Unmarshal(b, &m)
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "blobs"), 0o755)); err != nil {
		return m, err
	}
	layers := make([]layer, o.images*o.layers)
	for i, size := range split(o.bytes, len(layers)) {
		layers[i] = layer{seed: uint64(i), bytes: size}
	}
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	for i := range layers {
		g.Go(func() error { return layers[i].make(dir, o.compress) })
	}
	if err := g.Wait(); err != nil {
		return m, fmt.Errorf("cannot make a layer: %w", err)
	}
	for _, l := range layers {
		m.Packed += l.desc.Size
		m.Unpacked += l.bytes
		m.Files += l.files
	}
	for i := range o.images {
		if err := writeManifest(dir, i, ocispec.ImageConfig{}, layers[i*o.layers:][:o.layers]); err != nil {
			return m, err
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return m, err
	}
	return m, os.WriteFile(filepath.Join(dir, "made.json"), b, 0o644)
}

// split shares bytes among layers as images have them: a few hold most of it.
func split(bytes int64, n int) []int64 {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	weights := make([]float64, n)
	sum := 0.0
	for i := range weights {
		weights[i] = math.Exp(1.2 * r.NormFloat64())
		sum += weights[i]
	}
	sizes := make([]int64, n)
	for i, w := range weights {
		sizes[i] = int64(float64(bytes) * w / sum)
	}
	return sizes
}

func writeManifest(dir string, n int, run ocispec.ImageConfig, layers []layer) error {
	config := ocispec.Image{
		Config:   run,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
		m.Layers = append(m.Layers, l.desc)
	}
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	d := digest.FromBytes(b)
	if err := os.WriteFile(filepath.Join(dir, "blobs", d.Encoded()), b, 0o644); err != nil {
		return err
	}
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: d, Size: int64(len(b))}
	if b, err = json.Marshal(m); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, fmt.Sprintf("manifest-%d", n)), b, 0o644)
}

// layer is one generated layer.
type layer struct {
	seed    uint64
	bytes   int64  // of the files in it
	program string // a file that is all there is in it; empty: generated ones

	desc   ocispec.Descriptor
	diffID digest.Digest
	files  int
}

var mediaTypes = map[string]string{
	"gzip": ocispec.MediaTypeImageLayerGzip,
	"zstd": ocispec.MediaTypeImageLayerZstd,
	"none": ocispec.MediaTypeImageLayer,
}

func (l *layer) make(dir, compression string) error {
	f, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return err
	}
	defer f.Close()
	packed, plain := sha256.New(), sha256.New()
	z, err := compressor(io.MultiWriter(f, packed), compression)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(io.MultiWriter(z, plain), 1<<20)
	fill := l.fill
	if l.program != "" {
		fill = l.fillProgram
	}
	if err := fill(tar.NewWriter(w)); err != nil {
		return err
	}
	if err := errors.Join(w.Flush(), z.Close()); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	l.diffID = sum(plain)
	l.desc = ocispec.Descriptor{MediaType: mediaTypes[compression], Digest: sum(packed), Size: size}
	return os.Rename(f.Name(), filepath.Join(dir, "blobs", l.desc.Digest.Encoded()))
}

func sum(h hash.Hash) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(h.Sum(nil)))
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func compressor(w io.Writer, compression string) (io.WriteCloser, error) {
	switch compression {
	case "gzip":
		return gzip.NewWriter(w), nil
	case "zstd":
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	case "none":
		return nopCloser{w}, nil
	}
	return nil, fmt.Errorf("compression %q is none of gzip, zstd and none", compression)
}

// fill writes the entries: half of the bytes in files of 1 to 48 MiB, as
// programs and archives are, the rest in files of a few KiB, 16 to a directory,
// one link for 20 of them.
func (l *layer) fill(w *tar.Writer) error {
	r := rand.New(rand.NewPCG(2, l.seed))
	c := newContent(r)
	large := l.bytes / 2
	dir := ""
	for left := l.bytes; left > 0; l.files++ {
		if l.files%16 == 0 {
			dir = fmt.Sprintf("usr/lib/part-%d/%d/", l.seed, l.files/16)
			if err := writeHeader(w, &tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
				return err
			}
		}
		size := int64(math.Exp(math.Log(4<<10) + 1.5*r.NormFloat64()))
		if large > 1<<20 && left <= l.bytes-int64(float64(l.bytes)*r.Float64()*0.02) && r.IntN(40) == 0 {
			size = min(1<<20+int64(r.ExpFloat64()*(4<<20)), 48<<20, large)
			large -= size
		}
		size = min(max(size, 16), left)
		left -= size
		name := fmt.Sprintf("%sfile-%d", dir, l.files)
		if err := writeHeader(w, &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		if err := c.write(w, size); err != nil {
			return err
		}
		if l.files%20 == 0 {
			link := &tar.Header{Typeflag: tar.TypeSymlink, Name: name + ".link", Linkname: filepath.Base(name)}
			if err := writeHeader(w, link); err != nil {
				return err
			}
		}
	}
	return w.Close()
}

// fillProgram writes the program as /program.
func (l *layer) fillProgram(w *tar.Writer) error {
	b, err := os.ReadFile(l.program)
	if err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "program", Mode: 0o755, Size: int64(len(b))}
	if err := writeHeader(w, h); err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return err
	}
	return w.Close()
}

func writeHeader(w *tar.Writer, h *tar.Header) error {
	h.ModTime = time.Unix(1_700_000_000, 0)
	return w.WriteHeader(h)
}

// content makes what compresses as images do, by a factor of about 2.8: text,
// records as in programs, and what is compressed already.
type content struct {
	r     *rand.Rand
	zipf  *rand.Zipf
	words [][]byte
	buf   []byte
}

func newContent(r *rand.Rand) *content {
	c := &content{r: r, zipf: rand.NewZipf(r, 1.4, 3, 1<<12-1), words: make([][]byte, 1<<12)}
	for i := range c.words {
		w := make([]byte, 3+r.IntN(9))
		for j := range w {
			w[j] = "etaoinshrdlucmfw"[r.IntN(16)]
		}
		c.words[i] = append(w, ' ')
	}
	return c
}

func (c *content) write(w io.Writer, size int64) error {
	kind := c.r.IntN(20)
	for size > 0 {
		c.buf = c.buf[:0]
		for n := int(min(size, 64<<10)); len(c.buf) < n; {
			switch {
			case kind < 11: // text
				c.buf = append(c.buf, c.words[c.zipf.Uint64()]...)
			case kind < 19: // records
				v := c.r.Uint64()
				c.buf = append(c.buf, 0x48, 0x8b, byte(v)&0x3f, byte(v>>8), 0, 0, 0,
					byte(v>>16)&7, 0xe8, byte(v>>24)&0x3f, 0, 0, 0, 0xc3)
			default: // random
				v := c.r.Uint64()
				c.buf = binary.LittleEndian.AppendUint64(c.buf, v)
			}
		}
		n, err := w.Write(c.buf[:min(size, int64(len(c.buf)))])
		if err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}
