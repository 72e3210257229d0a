package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
)

// unpackers is how many layers of one pull are unpacked at a time. Each takes two
// processors when it is not waiting, and with zstd a window of megabytes.
var unpackers = min(max(runtime.GOMAXPROCS(0), 2), 4)

// layerAttempts is how often a layer is brought anew where that may help.
const layerAttempts = 3

// layer is one layer on its way through a pull.
type layer struct {
	p      *pull
	desc   ocispec.Descriptor
	diffID func(context.Context) (digest.Digest, error) // may wait for the config
	slots  chan struct{}
}

// bring makes the layer present and unpacked.
func (l *layer) bring(ctx context.Context) (err error) {
	defer func() { l.p.how.finished(l.desc.Digest, err == nil) }()
	if l.p.s.o.DropLayers && l.p.req.Layers != nil {
		diffID, err := l.diffID(ctx)
		if err != nil {
			return err
		}
		if l.p.req.Layers.Has(diffID) && l.p.s.isProven(l.desc.Digest, diffID) {
			l.p.how.present(l.desc.Digest)
			return nil // its blob is not kept, so it is not fetched either
		}
	}
	for try := 1; ; try++ {
		again, err := l.try(ctx)
		if err == nil || !again || ctx.Err() != nil || try == layerAttempts {
			return err
		}
	}
}

// try is one attempt. again says that another attempt may succeed.
func (l *layer) try(ctx context.Context) (again bool, err error) {
	d, joined, err := l.p.s.join(ctx, l.p.reg, l.desc)
	if err != nil {
		return false, err
	}
	if d == nil {
		l.p.how.present(l.desc.Digest)
		err = l.unpackBlob(ctx)
		return errors.Is(err, errBlobLost), err
	}
	defer l.p.s.leave(d)
	l.p.how.downloading(d)
	if err = l.follow(ctx, d); err == nil {
		return false, nil
	}
	l.p.how.stopped(l.desc.Digest)
	if !d.over() || d.err == nil {
		return false, err
	}
	// The download of another pull may have failed for a reason that this pull
	// does not have, such as wrong credentials.
	return joined || d.doubtful() && errors.Is(err, ErrCorrupt), err
}

// follow unpacks the layer while it is downloaded.
func (l *layer) follow(ctx context.Context, d *download) error {
	// A slot is for work, not for waiting.
	d.waitStarted(ctx)
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

// unpack hands the layer to the caller's Layers if they need it. Where it is
// unpacked already, the blob has to be that layer all the same: the layer may have
// to be unpacked again from it, and a caller that has only the diff id must not get
// the layer for it.
func (l *layer) unpack(ctx context.Context, r io.Reader) error {
	layers := l.p.req.Layers
	diffID, err := l.diffID(ctx)
	if err != nil || layers == nil {
		return err
	}
	have := layers.Has(diffID)
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
		if err := layers.Apply(ctx, diffID, read); err != nil {
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
	l.p.s.prove(l.desc.Digest, diffID)
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

// unpack hands the layers that r.Layers has not to it, from the store's own blobs;
// r.Ref is anything Get takes. It is for layers that went missing: after a power
// cut, or removed by mistake. A blob that is missing as well is fetched, with
// r.Auth or as the node. Where that fails the error is ErrNotFound, and the image
// has to be pulled by a caller with the right credentials.
func (s *Store) unpack(ctx context.Context, r PullRequest) error {
	err := s.unpackAgain(ctx, r)
	if full(err) {
		s.makeRoom()
	}
	if err != nil {
		return fmt.Errorf("cannot unpack %s: %w", r.Ref, registry.Printable(err))
	}
	return nil
}

func (s *Store) unpackAgain(ctx context.Context, r PullRequest) (err error) {
	img, m, held, err := s.holdImage(r.Ref)
	if err != nil {
		return err
	}
	defer s.release(held)
	p := &pull{s: s, req: r}
	if p.name, err = parse(slices.Concat(img.RepoDigests, img.RepoTags)[0]); err != nil {
		return err
	}
	if p.reg, err = s.registry.Open(ctx, p.name, r.Auth); err != nil {
		return err
	}
	defer p.reg.Close()
	// As in a pull; without a record, an interruption costs what has come.
	blobs := held[:len(held)-len(img.DiffIDs)]
	if !s.hasAll(m) && s.beginPending(p.name.String(), blobs) == nil {
		defer func() { s.endPending(p.name.String(), err) }()
	}
	slots := make(chan struct{}, unpackers)
	g, ctx := errgroup.WithContext(ctx)
	for i, desc := range m.Layers {
		diffID := img.DiffIDs[i]
		if slices.Contains(img.DiffIDs[:i], diffID) || r.Layers.Has(diffID) {
			continue // nor is its blob of interest
		}
		l := &layer{p: p, desc: desc, slots: slots}
		l.diffID = func(context.Context) (digest.Digest, error) { return diffID, nil }
		g.Go(func() error {
			err := l.bring(ctx)
			if fromRegistry(err) && ctx.Err() == nil && !s.hasBlob(desc) {
				err = fmt.Errorf("%w: pull it again: its layer %s is neither here nor to be had: %w",
					ErrNotFound, desc.Digest, err)
			}
			return err
		})
	}
	return g.Wait()
}

// fromRegistry says whether it is the registry that did not give what was needed.
func fromRegistry(err error) bool {
	return errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnauthorized) ||
		errors.Is(err, ErrUnavailable) || errors.Is(err, ErrCorrupt)
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
