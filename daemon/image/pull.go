package image

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

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
	ctx, cancel := context.WithTimeoutCause(ctx, s.o.PullTimeout,
		fmt.Errorf("%w: the pull has taken %s, and the next one goes on from here", context.DeadlineExceeded,
			s.o.PullTimeout))
	defer cancel()
	p := &pull{s: s, req: r, name: name}
	how, stop := s.follow(r.Ref, name.String(), r.Pod)
	p.how = how
	img, err := p.run(ctx)
	stop()
	if full(err) { // at whatever step; also of what this pull has left
		s.makeRoom()
	}
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	s.count.pulled(err)
	took := time.Since(began)
	log := s.o.Log.With("image", name.String())
	if r.Pod != "" {
		log = log.With("pod", r.Pod)
	}
	if err != nil {
		err = registry.Printable(err)
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
	s    *Store
	req  PullRequest
	name reference.Named
	reg  *registry.Repository
	how  *progress       // nil: not shown
	held []digest.Digest // blobs and diff ids kept from the collector; see hold
	// unchanged: the registry has under the name what it had when the store's image
	// of that name was pulled, so this caller may have all of that image.
	unchanged bool
	// unlabelled: an index does not say what machine its manifest is for.
	unlabelled bool
}

func (p *pull) run(ctx context.Context) (img Image, err error) {
	if err := p.s.makeDirs(); err != nil {
		return img, err
	}
	if p.reg, err = p.s.registry.Open(ctx, p.name, p.req.Auth); err != nil {
		return img, err
	}
	defer p.reg.Close()
	defer func() { p.s.release(p.held) }()

	target, b, err := p.resolve(ctx)
	if err != nil {
		return img, err
	}
	p.how.setPhase(records.PullVerifying)
	if err := p.s.verify(ctx, p.name.String(), target); err != nil {
		return img, err
	}
	p.how.setPhase(records.PullResolving)
	manifest, m, err := p.manifest(ctx, target, b)
	if err != nil {
		return img, err
	}
	blobs := blobsOf(target.Digest, manifest.Digest, m)
	p.hold(blobs...)
	// What is here already needs no record, and no room for one: on a full disk a
	// pod whose image is here is to start.
	if !p.s.hasAll(m) {
		if err := p.s.beginPending(p.name.String(), blobs); err != nil {
			return img, err
		}
		defer func() { p.s.endPending(p.name.String(), err) }()
	}
	p.how.setLayers(m.Layers)
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
	fromMirror := p.reg.AsksMirror(object)
	if have || fromMirror {
		d, err := p.reg.Head(ctx, object)
		if errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
			return ocispec.Descriptor{}, nil, err
		} // any other error: some registries do not know, or refuse, HEAD
		if have && d == known.Digest {
			p.hold(d)
			p.unchanged = true
			if b, err := p.s.readBlob(known, registry.MaxManifest); err == nil {
				return known, b, nil
			}
		}
		if fromMirror && d != "" {
			object = d.String()
		}
	}
	desc, b, err := p.reg.Manifest(ctx, object)
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

// manifest goes from what the name stands for to the manifest of this platform.
func (p *pull) manifest(ctx context.Context, desc ocispec.Descriptor, b []byte) (
	ocispec.Descriptor, *ocispec.Manifest, error) {
	for depth := 0; depth <= maxDepth; depth++ {
		doc, err := parseDocument(b, desc.MediaType)
		if err != nil || doc.manifest != nil {
			p.unlabelled = depth > 0 && desc.Platform == nil
			return desc, doc.manifest, err
		}
		child, err := choose(doc.index, *p.s.o.Platform)
		if err != nil {
			return desc, nil, err
		}
		if desc, b, err = p.child(ctx, child); err != nil {
			return desc, nil, err
		}
	}
	return desc, nil, fmt.Errorf("%w: indexes within indexes", ErrUnsupported)
}

// child brings what an index names.
func (p *pull) child(ctx context.Context, child ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	p.hold(child.Digest)
	// Nothing but the digest of what an index says is to be believed.
	got := ocispec.Descriptor{MediaType: child.MediaType, Digest: child.Digest}
	b, err := p.ours(child, registry.MaxManifest)
	if err != nil {
		if got, b, err = p.reg.Manifest(ctx, child.Digest.String()); err != nil {
			return got, nil, err
		}
	}
	got.Size, got.Platform = int64(len(b)), child.Platform
	return got, b, p.keep(&got, b)
}

// ours reads a small blob of the store, if this caller may have it. A caller who
// knows no more than a digest, of an image that others may pull, does not get it
// by naming that in a repository of their own: the registry has to send it.
func (p *pull) ours(d ocispec.Descriptor, limit int64) ([]byte, error) {
	if !p.unchanged {
		return nil, ErrNotFound
	}
	return p.s.readBlob(d, limit)
}

// config gives the image's config, from the store or the registry.
func (p *pull) config(ctx context.Context, m *ocispec.Manifest) (ocispec.Image, error) {
	b, err := p.ours(m.Config, maxConfig)
	if err != nil {
		if b, err = p.reg.Blob(ctx, m.Config, maxConfig); err != nil {
			return ocispec.Image{}, err
		}
		if err := p.s.addBlob(m.Config, b); err != nil {
			return ocispec.Image{}, err
		}
	}
	c, err := parseConfig(b, m)
	want := *p.s.o.Platform
	if err == nil && p.unlabelled && c.Architecture != "" && !platforms.Only(want).Match(c.Platform) {
		err = fmt.Errorf("%w: no image for %s, the one that the index has without a platform is for %s",
			ErrUnsupported, platforms.Format(want), platforms.FormatAll(c.Platform))
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
		l := &layer{p: p, desc: desc, slots: slots}
		l.diffID = func(ctx context.Context) (digest.Digest, error) {
			select {
			case <-known:
				return diffIDs[i], nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		g.Go(func() error {
			if err := l.bring(ctx); err != nil {
				return fmt.Errorf("layer %s: %w", desc.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}
