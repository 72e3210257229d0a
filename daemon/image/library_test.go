package image

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// shelf is a sink whose disk may refuse, and that a test can hold up.
type shelf struct {
	sink
	refusals atomic.Int32              // removals that fail
	removing func(digest.Digest)       // called in each removal, if set
	applied  func(digest.Digest) error // called after each Apply, if set
}

func (k *shelf) Apply(ctx context.Context, d digest.Digest, r io.Reader) error {
	err := k.sink.Apply(ctx, d, r)
	if err == nil && k.applied != nil {
		err = k.applied(d)
	}
	return err
}

func (k *shelf) Remove(d digest.Digest) error {
	if k.removing != nil {
		k.removing(d)
	}
	if k.refusals.Add(-1) >= 0 {
		return errors.New("the disk refuses")
	}
	return k.sink.Remove(d)
}

// users are the layers of containers.
type users struct {
	mu     sync.Mutex
	layers []digest.Digest
	asked  []digest.Digest
}

func (u *users) set(layers ...digest.Digest) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.layers = layers
}

func (u *users) use(d digest.Digest) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked = append(u.asked, d)
	return slices.Contains(u.layers, d)
}

// newLibrary has an image of two layers, of which one is also another image's.
func newLibrary(t *testing.T) (h *hub, l *Library, k *shelf, u *users, img, other Image) {
	t.Helper()
	h = newHub(t)
	shared := layerOf(t, "shared", 1000, 1, types.OCILayer)
	k, u = &shelf{}, &users{}
	l = NewLibrary(openAt(t, t.TempDir()), k, u.use)
	pull := func(ref string) Image {
		img, err := l.Pull(t.Context(), PullRequest{Ref: ref})
		check(t, err)
		return img
	}
	img = pull(h.push(t, "app:1", imageOf(t, "x", shared, layerOf(t, "own", 1000, 2, types.OCILayer))))
	other = pull(h.push(t, "other:1", imageOf(t, "y", shared)))
	return h, l, k, u, img, other
}

// A layer stays as long as an image, a container or a call needs it.
func TestLayersStayWhileNeeded(t *testing.T) {
	t.Parallel()
	_, l, k, u, img, other := newLibrary(t)
	shared, own := img.DiffIDs[0], img.DiffIDs[1]
	release := l.Hold(img.DiffIDs)
	if err := l.Remove(img.ID); err != nil || !k.Has(own) {
		t.Fatalf("a call holds the layer: %v, %v", err, k.List())
	}
	l.CollectAll()
	// Asked before it is let go, a container that is about to be known would not
	// be seen, nor its layer be held any more.
	if slices.Contains(u.asked, own) {
		t.Error("asked for the containers of a layer that is held")
	}
	u.set(own)
	release()
	if !k.Has(own) {
		t.Fatal("a container uses the layer")
	}
	u.set()
	l.Collect([]digest.Digest{own, shared})
	if k.Has(own) || !k.Has(shared) {
		t.Fatalf("left: %v", k.List())
	}
	if err := l.Remove(other.ID); err != nil || len(k.List()) != 0 {
		t.Fatalf("left: %v, %v", k.List(), err)
	}
	if err := l.Remove(img.ID); err != nil {
		t.Errorf("removed twice: %v", err)
	}
}

// What cannot be removed now is removed later.
func TestRemovalOfLayersIsTriedAgain(t *testing.T) {
	t.Parallel()
	_, l, k, _, img, _ := newLibrary(t)
	k.refusals.Store(1)
	if err := l.Remove(img.ID); err != nil || !k.Has(img.DiffIDs[1]) {
		t.Fatalf("removed: %v", err)
	}
	eventually(t, "the layer is gone", func() bool { return !k.Has(img.DiffIDs[1]) })
}

// A creation that begins while a layer is removed finds out that it is gone.
func TestHoldWaitsForARemoval(t *testing.T) {
	t.Parallel()
	_, l, k, _, img, _ := newLibrary(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	k.removing = func(digest.Digest) { once.Do(func() { close(begun); <-goOn }) }
	var wg sync.WaitGroup
	wg.Go(func() { l.Remove(img.ID) })
	<-begun
	held := make(chan bool, 1)
	wg.Go(func() {
		defer l.Hold(img.DiffIDs)()
		held <- k.Has(img.DiffIDs[1])
	})
	select {
	case <-held:
		t.Error("held a layer in the middle of its removal")
	default:
	}
	close(goOn)
	if <-held {
		t.Error("held a layer, and it was removed all the same")
	}
	wg.Wait()
}

// Creations and removals in any order: a layer that is there once it is held
// stays there until it is released.
func TestHoldAgainstCollect(t *testing.T) {
	t.Parallel()
	_, l, k, u, img, other := newLibrary(t)
	check(t, errors.Join(l.Remove(img.ID), l.Remove(other.ID)))
	d := img.DiffIDs[0]
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				l.CollectAll()
			}
		}
	})
	for range 2000 {
		k.mu.Lock()
		k.layers[d]++
		k.mu.Unlock()
		release := l.Hold([]digest.Digest{d})
		here := k.Has(d)
		if here {
			u.set(d)
		}
		release()
		if here && !k.Has(d) {
			t.Fatal("the layer of a container was removed")
		}
		u.set()
	}
	close(stop)
	wg.Wait()
}

// What a failed pull has unpacked goes, but for what others need.
func TestFailedPullLeavesNoLayers(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	k, u := &shelf{}, &users{}
	l := NewLibrary(openAt(t, t.TempDir()), k, u.use)
	a, b := layerOf(t, "a", 1000, 1, types.OCILayer), layerOf(t, "b", 1000, 2, types.OCILayer)
	wrong := errors.New("wrong")
	failed := make(chan struct{})
	first := digest.FromBytes(a.(*testLayer).raw)
	k.applied = func(d digest.Digest) error {
		if d == first {
			close(failed)
			return nil
		}
		<-failed
		return wrong
	}
	_, err := l.Pull(t.Context(), PullRequest{Ref: h.push(t, "app:1", imageOf(t, "x", a, b))})
	if !errors.Is(err, wrong) {
		t.Fatalf("got %v", err)
	}
	if left := k.List(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// A shutdown is told apart from a caller that went away.
func TestEndPulls(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 1000)
	asked := make(chan struct{}, 10)
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		asked <- struct{}{}
		<-r.Context().Done()
		return false
	})
	l := NewLibrary(openAt(t, t.TempDir()), &shelf{}, (&users{}).use)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { _, err := l.Pull(ctx, PullRequest{Ref: f.ref}); ended <- err }()
	<-asked
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) || errors.Is(err, kind.Closing) {
		t.Errorf("its caller is gone: %v", err)
	}
	go func() { _, err := l.Pull(t.Context(), PullRequest{Ref: f.ref}); ended <- err }()
	<-asked
	l.EndPulls()
	for range 2 { // the one that runs, and one that comes
		if err := <-ended; !errors.Is(err, kind.Closing) {
			t.Errorf("the daemon ends: %v", err)
		}
		go func() { _, err := l.Pull(t.Context(), PullRequest{Ref: f.ref}); ended <- err }()
	}
	<-ended
}

// Layers that are lost are unpacked again, or the image is forgotten.
func TestEnsure(t *testing.T) {
	t.Parallel()
	h, l, k, _, img, other := newLibrary(t)
	shared, own := img.DiffIDs[0], img.DiffIDs[1]
	k.sink.Remove(own)
	defer l.Hold(img.DiffIDs)()
	if err := l.Ensure(t.Context(), img); err != nil || !k.Has(own) {
		t.Fatalf("from the store's blobs: %v", err)
	}
	if k.layers[shared] > 2 {
		t.Errorf("a layer that was there was unpacked again")
	}
	gone := img
	gone.ID = digest.FromString("gone").String()
	k.sink.Remove(own)
	if err := l.Ensure(t.Context(), gone); !errors.Is(err, kind.NotFound) {
		t.Errorf("an image that was removed: %v", err)
	}
	// Neither here nor to be had.
	for _, m := range l.refs[other.RepoTags[0]].manifest.Layers {
		check(t, l.removeBlobLocked(l.blobPath(m.Digest), m.Digest))
	}
	h.set(func(w http.ResponseWriter, r *http.Request) bool { http.NotFound(w, r); return false })
	k.sink.Remove(shared)
	if err := l.Ensure(t.Context(), other); !errors.Is(err, kind.NotFound) {
		t.Errorf("an image that cannot be made whole: %v", err)
	}
	if _, ok := l.Get(other.ID); ok {
		t.Error("it is still listed")
	}
	if _, ok := l.Get(img.ID); !ok {
		t.Error("another was forgotten")
	}
}
