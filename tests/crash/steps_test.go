package crash

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// pull and remove are single calls, whose failure is the caller's to judge.
func pull(ctx context.Context, n *harness.Node, ref string) error {
	_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return err
}

func remove(ctx context.Context, n *harness.Node, ref string) error {
	_, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return err
}

func removeAllImages(t *testing.T, n *harness.Node) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		t.Fatalf("ListImages: %v", err)
	}
	for _, i := range list.Images {
		if err := remove(ctx, n, i.Id); err != nil {
			t.Fatalf("RemoveImage %s: %v", i.Id, err)
		}
	}
}

// emptyStore removes all images, and waits until their layers are deleted: a daemon that
// is started leaves those alone that another node on this machine has mounted too.
func emptyStore(t *testing.T, n *harness.Node) {
	t.Helper()
	removeAllImages(t, n)
	harness.Eventually(t, limit, "all layers are gone", func() bool {
		left, _ := filepath.Glob(n.Root + "/layers/*/*")
		return len(left) == 0
	})
}

// storeCall is one call of a scenario.
type storeCall struct {
	remove bool
	name   string // of a pull: a reference; of a removal: anything it takes
}

// scenario has pulls that share layers, removals by tag, digest and id, and a
// second pull of what was removed. It begins and ends with an empty store.
func scenario(d *depot) []storeCall {
	indexed, other, small := d.of(depotHost+"/multi:1"), d.of(depotHost+"/other:1"), d.of(depotHost+"/small:1")
	return []storeCall{
		{false, indexed.refs[0]},
		{false, other.refs[0]}, // shares two layers
		{false, indexed.refs[2]},
		{true, indexed.refs[0]}, // has three names more
		{false, indexed.refs[1]},
		{true, other.id},
		{false, small.refs[0]},
		{true, small.digestRef(small.refs[0])},
		{true, indexed.id},
	}
}

// play plays a scenario up to the first call that fails, and gives its number.
func play(n *harness.Node, steps []storeCall) (int, error) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	for i, s := range steps {
		call := pull
		if s.remove {
			call = remove
		}
		if err := call(ctx, n, s.name); err != nil {
			return i, fmt.Errorf("%v: %w", s, err)
		}
	}
	return len(steps), nil
}

// some are the numbers 1 to n, or a sample of them where this is no drill.
func some(n, sample int) (l []int) {
	every := 1
	if !drill {
		every = max(1, n/sample)
	}
	for i := 1; i <= n; i += every {
		l = append(l, i)
	}
	return l
}

// supervisedStore is a node with an empty store, its daemon supervised, and the
// calls of the scenario when all goes well.
func supervisedStore(t *testing.T, config string) (*harness.Node, *depot, *supervisor, []storeCall, int) {
	n := harness.New(t, harness.Options{Config: config})
	d := openDepot(t, n)
	emptyStore(t, n)
	s, end := supervise(t, n, storeScope(n))
	t.Cleanup(end) // the daemon has ended by then: cleanups run last first
	t.Cleanup(n.Kill)
	steps := scenario(d)
	n.Restart()
	settle(t, n, d)
	s.allow()
	if _, err := play(n, steps); err != nil {
		t.Fatal(err)
	}
	settle(t, n, d)
	calls := s.allow()
	kinds := map[string]int{}
	for _, c := range calls {
		kinds[strings.Fields(c)[0]]++
	}
	t.Logf("%d calls: %v", len(calls), kinds)
	return n, d, s, steps, len(calls)
}

// storeScope are the system calls by which the stores of images and layers change, but
// for writes.
func storeScope(n *harness.Node) scope {
	kinds := map[string]bool{}
	for k := range strings.FieldsSeq("rename unlink mkdir fsync syncfs create") {
		kinds[k] = true
	}
	return scope{kinds: kinds, place: func(path string) string {
		p, ok := strings.CutPrefix(path, n.Root+"/")
		if !ok || p != "layers" && !strings.HasPrefix(p, "images/") && !strings.HasPrefix(p, "layers/") {
			return ""
		}
		// One file of a tree that has no name yet, or no more, is as good as another.
		if strings.HasPrefix(p, "layers/tmp/") && strings.Count(p, "/") > 4 {
			return ""
		}
		return p
	}}
}

// The daemon is killed before each of the system calls by which pulls and
// removals change the store, and a second time while it recovers from that.
// Whatever the moment, a removal is done or not begun, the store is whole, and
// what was interrupted can be done.
func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	t.Parallel()
	tally := harness.Drill(t, "StoreKilledAtEachCall")
	for name, config := range map[string]string{"blobs kept": "", "blobs dropped": "[images]\nkeep_blobs = false\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, d, s, steps, count := supervisedStore(t, config)
			for _, at := range some(count, 14) {
				if t.Failed() {
					return
				}
				killAtStep(t, n, d, s, steps, at)
				tally.Kills(2) // the recovery as well
			}
		})
	}
}

// nth names a call for people; it may not have come.
func nth(calls []string, n int) string {
	if n > len(calls) {
		return "a call that never came"
	}
	return calls[n-1]
}

func killAtStep(t *testing.T, n *harness.Node, d *depot, s *supervisor, steps []storeCall, at int) {
	t.Helper()
	s.expect(at, die)
	killed, err := play(n, steps)
	where := nth(s.allow(), at)
	if err == nil {
		// It was killed in the background, after the last answer, or is now.
		n.Restart()
		if h := settle(t, n, d); len(h.refs)+len(h.pending)+len(h.blobs)+len(h.layers) > 0 {
			t.Fatalf("killed at %d, before %s, in the end: there are %v, %v, %v, %v", at, where, h.refs, h.pending,
				h.blobs, h.layers)
		}
		return
	}
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("killed at %d, before %s: %v", at, where, err)
	}
	n.Kill() // reap it
	atKill := take(n)
	// Recovery is killed too, early or late.
	s.expect(1+at%7, die)
	n.Bounce() // an error: it was killed before it served
	n.Kill()
	s.allow()
	n.Start()
	h := settle(t, n, d)
	about := fmt.Sprintf("killed at %d, before %s, in %v", at, where, steps[killed])
	d.checkKept(t, about, atKill, h)
	if p := d.of(steps[killed].name); steps[killed].remove && p != nil {
		left := 0
		for ref := range h.refs {
			if d.of(ref) == p {
				left++
			}
		}
		before := 0
		for ref := range refsAfter(d, steps[:killed]) {
			if d.of(ref) == p {
				before++
			}
		}
		if left != 0 && left != before {
			t.Errorf("%s: the image has %d of its %d names left", about, left, before)
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(refsAfter(d, steps[:killed]))) {
		if _, ok := h.refs[ref]; !ok && (!steps[killed].remove || d.of(ref) != d.of(steps[killed].name)) {
			t.Errorf("%s: %s is lost", about, ref)
		}
	}
	d.taken()
	if _, err := play(n, steps[killed:killed+1]); err != nil {
		t.Fatalf("%s: again: %v", about, err)
	}
	d.checkResumed(t, about, h)
	if _, err := play(n, steps[killed+1:]); err != nil {
		t.Fatalf("%s: after that: %v", about, err)
	}
	if h := settle(t, n, d); len(h.refs)+len(h.pending)+len(h.blobs)+len(h.layers) > 0 {
		t.Fatalf("%s: after all is removed there are %v, %v, %v, %v", about, h.refs, h.pending, h.blobs, h.layers)
	}
}

// refsAfter are the references that there have to be after some steps.
func refsAfter(d *depot, steps []storeCall) map[string]bool {
	refs := map[string]bool{}
	for _, s := range steps {
		p := d.of(s.name)
		if s.remove {
			for ref := range refs {
				if d.of(ref) == p {
					delete(refs, ref)
				}
			}
			continue
		}
		refs[s.name], refs[p.digestRef(s.name)] = true, true
	}
	return refs
}

// checkKept: what an interrupted pull had finished is still there, and what it
// had in part as well. One whose reference is there, by another pull of the same
// name, has nothing left to resume.
func (d *depot) checkKept(t *testing.T, about string, before, after *holdings) {
	t.Helper()
	for _, p := range before.pending {
		if _, waits := after.pending[p.Ref]; !waits {
			if _, done := after.refs[p.Ref]; !done {
				t.Errorf("%s: the pull of %s was interrupted, which is forgotten", about, p.Ref)
			}
			continue
		}
		for _, b := range p.Blobs {
			if _, had := before.blobs[b]; had {
				if _, ok := after.blobs[b]; !ok {
					t.Errorf("%s: the pull of %s had finished %s, which is gone", about, p.Ref, b)
				}
			}
			if size := before.partial[b]; after.partial[b] < size {
				t.Errorf("%s: the pull of %s had %d bytes of %s, and %d are left", about, p.Ref, size, b,
					after.partial[b])
			}
		}
	}
}

// checkResumed: of the layers that were here before some pulls, nothing has come
// again. A config may have: a pull that was interrupted has to show again that it
// may have it.
func (d *depot) checkResumed(t *testing.T, about string, before *holdings) {
	t.Helper()
	for _, answer := range d.taken() {
		config := d.of(answer.blob.String()) != nil
		if _, ok := before.blobs[answer.blob]; ok && !config {
			t.Errorf("%s: %s was finished, and is fetched again", about, answer.blob)
		}
		if partial := before.partial[answer.blob]; answer.from < partial {
			t.Errorf("%s: %d bytes of %s were here, and it is fetched from %d on", about, partial, answer.blob,
				answer.from)
		}
	}
}

// Each of the system calls fails once, as on a full or a broken disk. The call
// of the scenario may fail, the store never: it is whole, and the next try works.
func TestEveryStepFailsOnce(t *testing.T) {
	t.Parallel()
	tally := harness.Drill(t, "EachCallOfStoreFails")
	n, d, s, steps, count := supervisedStore(t, "")
	for k, at := range some(count, 14) {
		errno := []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS}[k%3]
		s.expect(at, errno)
		tally.Kill()
		done, err := play(n, steps)
		if err != nil {
			checkUnseen(t, n, d, steps, done, fmt.Sprintf("%v at %d", errno, at))
		}
		for tries := 1; err != nil; tries++ {
			if tries == 3 {
				t.Fatalf("%v once at %d, %s: still after three times: %v", errno, at, nth(s.allow(), at), err)
			}
			var more int
			more, err = play(n, steps[done:])
			done += more
		}
		if t.Failed() {
			return
		}
		h := settle(t, n, d)
		if len(h.refs)+len(h.blobs)+len(h.layers) > 0 {
			t.Fatalf("%v once at %d, %s: after all is removed there are %v, %v, %v", errno, at, nth(s.allow(), at),
				h.refs, h.blobs, h.layers)
		}
	}
}

// checkUnseen: a pull that failed has left no name that was not there before.
func checkUnseen(t *testing.T, n *harness.Node, d *depot, steps []storeCall, failed int, about string) {
	t.Helper()
	before := refsAfter(d, steps[:failed])
	for ref := range take(n).refs {
		if !before[ref] {
			t.Errorf("%s: %v failed, and left %s", about, steps[failed], ref)
		}
	}
}
