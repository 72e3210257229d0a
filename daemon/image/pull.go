package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// unpackers is how many layers of one pull are unpacked at a time. Each takes two
// processors when it is not waiting, and with zstd a window of megabytes.
var unpackers = min(max(runtime.GOMAXPROCS(0), 2), 4)

// maxDepth of indexes within indexes.
const maxDepth = 4

// Pull makes an image present under a reference: the manifest is always
// resolved with this caller's credentials, the blobs that are missing are
// downloaded, layers that r.Layers has not are unpacked. Blobs are kept also
// for layers that it has: the layout is complete, and a layer lost can be
// unpacked again.
func (s *Store) Pull(ctx context.Context, r PullRequest) (Image, error) {
	name, err := parse(r.Ref)
	if err != nil {
		s.count.pulled(err)
		return Image{}, err
	}
	began := time.Now()
	p := &pull{s: s, req: r, name: name}
	how, stop := s.follow(r.Ref, name.String(), r.Pod)
	p.how = how
	img, err := p.run(ctx)
	stop()
	if full(err) { // at whatever step; also of what this pull has left
		s.makeRoom()
	}
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	s.count.pulled(err)
	took := time.Since(began)
	log := s.o.Log.With("image", name.String())
	if r.Pod != "" {
		log = log.With("pod", r.Pod)
	}
	if err != nil {
		err = told(err)
		if errors.Is(ctx.Err(), context.Canceled) {
			// What was interrupted says nothing about the image or the registry.
			log.Info("image pull called off, the next one goes on from here", "after", took.Round(time.Millisecond))
		} else {
			log.Warn("cannot pull image", "after", took.Round(time.Millisecond), "error", err)
		}
		return Image{}, fmt.Errorf("cannot pull %s: %w", name, err)
	}
	if s.o.Pulled != nil {
		s.o.Pulled(took)
	}
	log.Info("image pulled", "id", img.ID, "size", img.Size, "took", took.Round(time.Millisecond))
	return img, nil
}

// pull is one call of Pull.
type pull struct {
	s     *Store
	req   PullRequest
	name  reference.Named
	reg   *registry
	how   *progress       // nil: nobody is told
	blank bool            // an index does not say what machine its manifest is for
	held  []digest.Digest // blobs and diff ids kept from the collector; see hold
}

func (p *pull) run(ctx context.Context) (img Image, err error) {
	if err := p.s.makeDirs(); err != nil {
		return img, err
	}
	if p.reg, err = p.s.newRegistry(ctx, p.name, p.req.Auth); err != nil {
		return img, err
	}
	defer p.reg.close()
	defer func() { p.s.release(p.held) }()

	target, b, err := p.resolve(ctx)
	if err != nil {
		return img, err
	}
	p.how.is(rundir.PullVerifying)
	if err := p.s.verify(ctx, p.name.String(), target); err != nil {
		return img, err
	}
	p.how.is(rundir.PullResolving)
	manifest, m, err := p.choose(ctx, target, b, 0)
	if err != nil {
		return img, err
	}
	blobs := blobsOf(target.Digest, manifest.Digest, m)
	p.hold(blobs...)
	// What is here already needs no record, and no room for one: on a full disk a
	// pod whose image is here is to start.
	if !p.s.hasAll(m) {
		if err := p.s.beginPending(p.name, blobs); err != nil {
			return img, err
		}
		defer func() { p.s.endPending(p.name.String(), err) }()
	}
	p.how.needs(m.Layers)
	if err := p.blobs(ctx, m); err != nil {
		return img, err
	}
	if err := p.s.syncBlobNames(); err != nil {
		return img, err
	}
	return p.s.commit(p.name, target, manifest)
}

// hold keeps blobs or layers from the collector until the pull has ended.
func (p *pull) hold(l ...digest.Digest) {
	p.s.hold(l)
	p.held = append(p.held, l...)
}

// resolve finds out what the name stands for now. If that is in the store, or to be
// had from a mirror by its digest, only the digest is asked for, which registries
// do not count as a pull.
func (p *pull) resolve(ctx context.Context) (ocispec.Descriptor, []byte, error) {
	known, have := p.s.target(p.name)
	object := ""
	switch n := p.name.(type) {
	case reference.Digested:
		object = n.Digest().String()
	case reference.Tagged:
		object = n.Tag()
	}
	fromMirror := capability(object) == docker.HostCapabilityResolve && p.reg.pullsFirst()
	if have || fromMirror {
		d, err := p.reg.head(ctx, object)
		if errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
			return ocispec.Descriptor{}, nil, err
		} // any other error: some registries do not know, or refuse, HEAD
		if have && d == known.Digest {
			p.hold(d)
			if b, err := p.s.readBlob(known, maxManifest); err == nil {
				return known, b, nil
			}
		}
		if fromMirror && d != "" {
			object = d.String()
		}
	}
	desc, b, err := p.reg.manifest(ctx, object)
	if err != nil {
		return desc, nil, err
	}
	return desc, b, p.keep(&desc, b)
}

// keep stores a manifest or index.
func (p *pull) keep(desc *ocispec.Descriptor, b []byte) error {
	desc.MediaType = mediaType(b, desc.MediaType)
	p.hold(desc.Digest)
	return p.s.addBlob(*desc, b)
}

// choose goes from what the name stands for to the manifest of this platform.
func (p *pull) choose(ctx context.Context, desc ocispec.Descriptor, b []byte, depth int) (ocispec.Descriptor, *ocispec.Manifest, error) {
	doc, err := parseDocument(b, desc.MediaType)
	if err != nil || doc.manifest != nil {
		p.blank = depth > 0 && desc.Platform == nil
		return desc, doc.manifest, err
	}
	if depth == maxDepth {
		return desc, nil, fmt.Errorf("%w: indexes within indexes", ErrUnsupported)
	}
	child, err := choose(doc.index, *p.s.o.Platform)
	if err != nil {
		return desc, nil, err
	}
	p.hold(child.Digest)
	// Nothing but the digest of what an index says is to be believed.
	got := ocispec.Descriptor{MediaType: child.MediaType, Digest: child.Digest}
	b, err = p.ours(child, maxManifest)
	if err != nil {
		if got, b, err = p.reg.manifest(ctx, child.Digest.String()); err != nil {
			return desc, nil, err
		}
	}
	got.Size, got.Platform = int64(len(b)), child.Platform
	if err := p.keep(&got, b); err != nil {
		return desc, nil, err
	}
	return p.choose(ctx, got, b, depth+1)
}

// ours reads a small blob of the store if an image from the same repository has
// it, or an interrupted pull had got it from there. Who knows no more than a
// digest, of an image that somebody else may pull, does not get it by naming that
// in a repository of his own.
func (p *pull) ours(d ocispec.Descriptor, limit int64) ([]byte, error) {
	if !p.s.inRepository(p.name, d.Digest) {
		return nil, ErrNotFound
	}
	return p.s.readBlob(d, limit)
}

// config gives the image's config, from the store or the registry.
func (p *pull) config(ctx context.Context, m *ocispec.Manifest) (ocispec.Image, error) {
	b, err := p.ours(m.Config, maxConfig)
	fetched := err != nil
	if fetched {
		if b, err = p.reg.blob(ctx, m.Config, maxConfig); err != nil {
			return ocispec.Image{}, err
		}
	}
	// Noted before the blob has its name, or loses the image that it was known by.
	err = p.s.notePending(p.name.String(), m.Config.Digest)
	if err == nil && fetched {
		err = p.s.addBlob(m.Config, b)
	}
	if err != nil {
		return ocispec.Image{}, err
	}
	c, err := parseConfig(b, m)
	if want := *p.s.o.Platform; err == nil && p.blank && c.Architecture != "" && !platforms.Only(want).Match(c.Platform) {
		err = fmt.Errorf("%w: no image for %s, the one that the index has without a platform is for %s", ErrUnsupported, platforms.Format(want), platforms.FormatAll(c.Platform))
	}
	return c, err
}

// blobs brings the config and all layers. The layers begin to flow before the
// config is known, which says what they have to be once uncompressed.
func (p *pull) blobs(ctx context.Context, m *ocispec.Manifest) error {
	g, ctx := errgroup.WithContext(ctx)
	var diffIDs []digest.Digest
	known := make(chan struct{}) // closed when diffIDs is set
	slots := make(chan struct{}, unpackers)
	g.Go(func() error {
		c, err := p.config(ctx, m)
		if err != nil {
			return err
		}
		p.hold(c.RootFS.DiffIDs...)
		diffIDs = c.RootFS.DiffIDs
		close(known)
		return nil
	})
	seen := map[digest.Digest]bool{}
	for i, desc := range m.Layers {
		// A layer that an image has twice is one; see parseConfig.
		if seen[desc.Digest] {
			continue
		}
		seen[desc.Digest] = true
		g.Go(func() error {
			l := &layer{p: p, desc: desc, slots: slots, diffID: func() (digest.Digest, error) {
				select {
				case <-known:
					return diffIDs[i], nil
				case <-ctx.Done():
					return "", ctx.Err()
				}
			}}
			if err := l.bring(ctx); err != nil {
				return fmt.Errorf("layer %s: %w", desc.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// layer is one layer on its way through a pull.
type layer struct {
	p      *pull
	desc   ocispec.Descriptor
	diffID func() (digest.Digest, error) // waits for the config
	slots  chan struct{}
}

func (l *layer) bring(ctx context.Context) (err error) {
	defer func() { l.p.how.ended(l.desc.Digest, err == nil) }()
	if l.p.s.o.DropLayers && l.p.req.Layers != nil {
		diffID, err := l.diffID()
		if err != nil {
			return err
		}
		if l.p.req.Layers.Has(diffID) && l.p.s.isProven(l.desc.Digest, diffID) {
			l.p.how.has(l.desc.Digest)
			return nil // its blob is not kept, so it is not fetched either
		}
	}
	for try := 1; ; try++ {
		d, joined, err := l.p.s.join(ctx, l.p.reg, l.desc)
		if err != nil {
			return err
		}
		if d == nil {
			l.p.how.has(l.desc.Digest)
			if err = l.unpackBlob(ctx); err == nil || try == 3 || !errors.Is(err, errBlobLost) {
				return err
			}
			continue
		}
		l.p.how.flows(d)
		err = l.follow(ctx, d)
		if err != nil {
			l.p.how.stopped(l.desc.Digest)
		}
		failed := d.over() && d.err != nil
		doubtful := d.doubtful()
		l.p.s.leave(d)
		// Somebody else's download failed for reasons that may be theirs, their
		// credentials for one.
		retry := failed && ctx.Err() == nil && (joined || doubtful && errors.Is(err, ErrCorrupt))
		if err == nil || !retry || try == 3 {
			return err
		}
	}
}

// follow unpacks the layer while it is downloaded.
func (l *layer) follow(ctx context.Context, d *download) error {
	// A slot is for work, not for waiting.
	d.turn(ctx)
	err := l.unpack(ctx, &follower{ctx: ctx, d: d})
	// A download that failed is the cause of err. What is wrong with the
	// content of a doubtful one shows at its end only.
	if err == nil || d.over() || d.doubtful() || errors.Is(err, ErrCorrupt) {
		if derr := d.wait(ctx); derr != nil {
			return derr
		}
	}
	return err
}

// errBlobLost says that a blob of the store was not what its name says, and is
// gone now.
var errBlobLost = errors.New("the blob was damaged on the disk")

func (l *layer) unpackBlob(ctx context.Context) error {
	f, err := os.Open(l.p.s.blobPath(l.desc.Digest))
	if err != nil {
		return fmt.Errorf("%w: %w", errBlobLost, err)
	}
	defer f.Close()
	err = l.unpack(ctx, &ctxReader{ctx, f})
	if err != nil && ctx.Err() == nil && l.p.s.dropIfDamaged(l.desc) {
		err = fmt.Errorf("%w: %w", errBlobLost, err)
	}
	return err
}

// unpack hands the layer to the caller of Pull if it wants it. Where it is
// unpacked already, the blob has to be that layer all the same: it may be needed
// to unpack it again, and who pulls the image has to have it.
func (l *layer) unpack(ctx context.Context, r io.Reader) error {
	diffID, err := l.diffID()
	if err != nil {
		return err
	}
	if l.p.req.Layers == nil {
		return nil
	}
	have := l.p.req.Layers.Has(diffID)
	if have && l.p.s.isProven(l.desc.Digest, diffID) {
		return nil
	}
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	u, err := decompress(r)
	if err != nil {
		return err
	}
	defer u.Close()
	read := &readFlag{r: u}
	if !have {
		if err := l.p.req.Layers.Apply(ctx, diffID, read); err != nil {
			return err
		}
		l.p.s.count.unpacked.Add(1)
	}
	if !read.begun { // another pull has unpacked it, from whatever blob
		got, err := diffID.Algorithm().FromReader(u)
		if err != nil {
			return err
		}
		if got != diffID {
			return fmt.Errorf("%w: its content is %s, the config says %s", ErrCorrupt, got, diffID)
		}
	}
	l.p.s.proves(l.desc.Digest, diffID)
	return nil
}

// readFlag notes whether anybody has begun to read.
type readFlag struct {
	r     io.Reader
	begun bool
}

func (f *readFlag) Read(p []byte) (int, error) {
	f.begun = true
	return f.r.Read(p)
}

// Unpack hands the layers that r.Layers has not to it, from the store's own blobs; r.Ref is anything Get takes. It is for layers that went
// missing: after a power cut, or removed by mistake. A blob that is missing as
// well is fetched, with r.Auth or as the node. Where that fails the error is
// ErrNotFound, and the image has to be pulled by somebody who may.
func (s *Store) Unpack(ctx context.Context, r PullRequest) (err error) {
	img, m, held, err := s.holdImage(r.Ref)
	if err != nil {
		return fmt.Errorf("cannot unpack %s: %w", r.Ref, told(err))
	}
	defer s.release(held)
	diffIDs := img.DiffIDs
	p := &pull{s: s, req: r}
	if p.name, err = parse(slices.Concat(img.RepoDigests, img.RepoTags)[0]); err == nil {
		p.reg, err = s.newRegistry(ctx, p.name, r.Auth)
	}
	if err != nil {
		return fmt.Errorf("cannot unpack %s: %w", r.Ref, told(err))
	}
	defer p.reg.close()
	// As in a pull; without a record, an interruption costs what has come.
	if !s.hasAll(m) && s.beginPending(p.name, held[:len(held)-len(diffIDs)]) == nil {
		defer func() { s.endPending(p.name.String(), err) }()
	}
	slots := make(chan struct{}, unpackers)
	g, ctx := errgroup.WithContext(ctx)
	for i, desc := range m.Layers {
		if slices.Contains(diffIDs[:i], diffIDs[i]) {
			continue
		}
		g.Go(func() error {
			if r.Layers != nil && r.Layers.Has(diffIDs[i]) {
				return nil // nor is its blob of interest
			}
			l := &layer{p: p, desc: desc, slots: slots, diffID: func() (digest.Digest, error) { return diffIDs[i], nil }}
			err := l.bring(ctx)
			registry := errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnauthorized) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrCorrupt)
			if registry && ctx.Err() == nil && !s.hasBlob(desc) {
				err = fmt.Errorf("%w: pull it again: its layer %s is neither here nor to be had: %w", ErrNotFound, desc.Digest, err)
			}
			return err
		})
	}
	if err = g.Wait(); err != nil {
		if full(err) {
			s.makeRoom()
		}
		return fmt.Errorf("cannot unpack %s: %w", r.Ref, told(err))
	}
	return nil
}

// ctxReader ends with its context. A file is always ready, so nothing blocks.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicSkip = []byte{0x2a, 0x4d, 0x18} // after 0x50 to 0x5f: a frame of zstd to skip
)

// maxWindow bounds the memory that a zstd stream may ask for.
const maxWindow = 128 << 20

// source notes whether reading failed, as opposed to what was read.
type source struct {
	r      io.Reader
	failed bool
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.failed = true
	}
	return n, err
}

// decompressor gives errors of the format their kind.
type decompressor struct {
	io.ReadCloser
	source *source
}

func (d decompressor) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !d.source.failed {
		err = fmt.Errorf("%w: cannot decompress it: %w", ErrCorrupt, err)
	}
	return n, err
}

// decompress decides by the content, as media types are known to be wrong.
func decompress(r io.Reader) (io.ReadCloser, error) {
	src := &source{r: r}
	br := bufio.NewReaderSize(src, 32<<10)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, magicGzip):
		z, err := gzip.NewReader(br)
		if err != nil && !src.failed {
			err = fmt.Errorf("%w: cannot decompress it: %w", ErrCorrupt, err)
		}
		if err != nil {
			return nil, err
		}
		return decompressor{z, src}, nil
	case bytes.HasPrefix(magic, magicZstd), len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.HasPrefix(magic[1:], magicSkip):
		z := idleZstd.Get().(zstdReader)
		if err := z.Reset(br); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		return decompressor{z, src}, nil
	}
	return io.NopCloser(br), nil
}

// idleZstd are decoders between two layers. Each has a window of megabytes;
// made anew for every layer, most of them would be garbage at any time.
var idleZstd = sync.Pool{New: func() any {
	// It works in the goroutine that reads, so it needs no end.
	z, err := zstd.NewReader(nil, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err) // the options are wrong
	}
	return zstdReader{z}
}}

type zstdReader struct{ *zstd.Decoder }

func (z zstdReader) Close() error {
	err := z.Reset(nil) // lets go of what it read from
	idleZstd.Put(z)
	return err
}

// syncBlobNames puts the names of blobs on the disk; their content is.
func (s *Store) syncBlobNames() error {
	algorithms, err := os.ReadDir(filepath.Join(s.o.Root, blobsName))
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !a.IsDir() {
			continue // not ours; a fifo would block the open
		}
		if err := record.SyncDir(filepath.Join(s.o.Root, blobsName, a.Name())); err != nil {
			return fmt.Errorf("cannot sync the blobs: %w", err)
		}
	}
	return nil
}
