package image

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Library is a Store together with the unpacked layers of its images. A layer
// stays as long as an image, a container or a call under way needs it:
//
//	image       its references are in the Store
//	pull        its layers are held until its reference is written
//	creation    Hold, until the container is known to inUse
//	container   inUse
//
// The methods of the Store are the Library's too, apart from those that it has
// itself. Close ends both.
type Library struct {
	*Store
	layers   Layers
	inUse    func(diffID digest.Digest) bool
	pulls    context.Context // of all pulls; ended by EndPulls
	endPulls context.CancelFunc
}

// NewLibrary joins a store and its layers. inUse says whether a container needs a
// layer; it is called with locks of the Library held, so it must not call it, nor
// wait for anything that does. Nothing is collected before the first call of
// Collect, CollectAll or Remove, so that containers can be loaded before.
func NewLibrary(s *Store, layers Layers, inUse func(diffID digest.Digest) bool) *Library {
	l := &Library{Store: s, layers: layers, inUse: inUse}
	l.pulls, l.endPulls = context.WithCancel(context.Background())
	return l
}

// EndPulls calls off the pulls that run and those that come; their error is a
// kind.Closing. The next process goes on where they were.
func (l *Library) EndPulls() { l.endPulls() }

// Pull makes an image present and unpacked, see Store.Pull.
func (l *Library) Pull(ctx context.Context, r PullRequest) (Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.pulls, cancel)()
	r.Layers = l.layers
	img, err := l.Store.Pull(ctx, r)
	if err == nil {
		return img, nil
	}
	l.CollectAll() // what it has unpacked
	if l.pulls.Err() != nil && errors.Is(err, context.Canceled) {
		err = kind.Errorf(kind.Closing, "cannot pull %s: the daemon is shutting down", r.Ref)
	}
	return img, err
}

// Ensure unpacks again what a power cut, or a person, took away of an image's
// layers. The caller holds them. An image that is not whole and cannot be made
// whole here is forgotten, and the error is ErrNotFound: while it is listed, the
// kubelet would not pull it with credentials that may help.
func (l *Library) Ensure(ctx context.Context, img Image) error {
	if !slices.ContainsFunc(img.DiffIDs, func(d digest.Digest) bool { return !l.layers.Has(d) }) {
		return nil
	}
	err := l.unpack(ctx, PullRequest{Ref: img.ID, Layers: l.layers})
	if errors.Is(err, ErrNotFound) {
		l.o.Log.Error("image forgotten, it has to be pulled again", "id", img.ID, "tags", img.RepoTags, "error", err)
		err = errors.Join(err, l.Remove(img.ID))
	}
	return err
}

// Remove removes an image, found as by Get, with all its references, and the
// layers that only it needed. Removing what is not there is no error.
func (l *Library) Remove(ref string) error {
	freed, err := l.Store.Remove(ref)
	if err != nil {
		return err
	}
	l.Collect(freed)
	return nil
}

// Hold keeps layers until release is called, once. What nothing else needs by
// then is removed: the image may be gone, and the creation have failed.
func (l *Library) Hold(layers []digest.Digest) (release func()) {
	l.hold(layers)
	return func() {
		l.release(layers)
		l.Collect(layers)
	}
}

// CollectAll removes all layers that nothing needs.
func (l *Library) CollectAll() { l.Collect(l.layers.List()) }

// Collect removes those of the layers that nothing needs. What the disk refuses
// is tried again in the background, less and less often, until Close.
func (l *Library) Collect(layers []digest.Digest) {
	failed := l.removeUnneeded(layers)
	if len(failed) == 0 {
		return
	}
	l.background(func() {
		const first, longest = time.Second, 10 * time.Minute
		for wait := first; len(failed) > 0; wait = min(2*wait, longest) {
			select {
			case <-time.After(wait):
			case <-l.ctx.Done():
				return // the next start does it
			}
			failed = l.removeUnneeded(failed)
		}
	})
}

func (l *Library) removeUnneeded(layers []digest.Digest) (failed []digest.Digest) {
	for _, d := range layers {
		err := l.ifUnneeded(d, func() error {
			// After ifUnneeded has seen that no call holds it: a creation releases
			// a layer when its container is in use.
			if l.inUse(d) {
				return nil
			}
			return l.layers.Remove(d)
		})
		if err != nil {
			l.o.Log.Warn("cannot remove a layer, trying again", "layer", d, "error", err)
			failed = append(failed, d)
		}
	}
	return failed
}
