package crash

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// The daemon is killed at random moments while images are pulled and removed and
// containers come and go. After each restart the store is whole, has all that
// was acknowledged and nothing that nobody needs, and a pull that was
// interrupted goes on where it was.
func TestStoreKilledAtRandom(t *testing.T) {
	tally := harness.Drill(t, "StoreKilledAtRandom")
	for _, c := range []struct {
		name, config string
		kills, drill int
	}{
		{"blobs kept", "", 8, 200},
		{"blobs dropped", "[images]\nkeep_blobs = false\n", 4, 50},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStoreDrill(t, c.config, chance(t))
			s.tally = tally
			kills := c.kills
			if drill {
				kills = c.drill
			}
			for range kills {
				s.round(t)
				if t.Failed() {
					return
				}
			}
			s.end(t)
		})
	}
}

// storeDrill is a node whose store is used and killed.
type storeDrill struct {
	n      *harness.Node
	d      *depot
	tally  *harness.Tally
	pod    *harness.Pod
	chance *rand.Rand

	mu         sync.Mutex
	names      map[*picture]*names
	broken     map[string]bool // pulls without an answer
	containers map[string]*picture
	fetched    int64 // bytes, over all
	resumed    int
	finished   int
}

// names is what has to be true of an image's references, by what was answered.
type names struct {
	here  map[string]bool // not in it: nobody knows
	calls int             // that run
	turn  int             // counts beginnings and ends of calls
}

func newStoreDrill(t *testing.T, config string, chance *rand.Rand) *storeDrill {
	n := harness.New(t, harness.Options{Config: config})
	s := &storeDrill{n: n, d: openDepot(t, n), chance: chance,
		names: map[*picture]*names{}, broken: map[string]bool{}, containers: map[string]*picture{}}
	for _, p := range s.d.pictures {
		s.names[p] = &names{here: map[string]bool{}}
	}
	removeAllImages(t, n)
	s.pod = n.RunPod("drill")
	settle(t, n, s.d)
	return s
}

// call does something to references of an image, and takes down what is known
// after it: here or not, if no other call was under way meanwhile.
func (s *storeDrill) call(p *picture, refs []string, here bool, f func() error) error {
	k := s.names[p]
	s.mu.Lock()
	k.calls++
	k.turn++
	turn, alone := k.turn, k.calls == 1
	for _, ref := range refs {
		delete(k.here, ref)
	}
	s.mu.Unlock()
	err := f()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && alone && k.turn == turn {
		for _, ref := range refs {
			k.here[ref] = here
		}
	}
	k.calls--
	k.turn++
	return err
}

func (s *storeDrill) pull(ctx context.Context, ref string) error {
	p := s.d.of(ref)
	refs := []string{p.digestRef(ref)}
	if refs[0] != ref {
		refs = append(refs, ref)
	}
	err := s.call(p, refs, true, func() error { return pull(ctx, s.n, ref) })
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.broken[ref] = true
	} else {
		delete(s.broken, ref)
	}
	return err
}

func (s *storeDrill) remove(ctx context.Context, p *picture, by string) error {
	var refs []string
	for _, tag := range p.refs {
		refs = append(refs, tag, p.digestRef(tag))
	}
	// By a name it has not, nothing is removed; by its id all is.
	if by != p.id {
		s.mu.Lock()
		known := s.names[p].here[by]
		s.mu.Unlock()
		if !known {
			by = p.id
		}
	}
	return s.call(p, refs, false, func() error { return remove(ctx, s.n, by) })
}

// work makes one call after the other until the daemon is gone.
func (s *storeDrill) work(ctx context.Context, t *testing.T, chance *rand.Rand, containers bool) {
	refs := s.d.refs()
	for ctx.Err() == nil {
		ref := refs[chance.IntN(len(refs))]
		p := s.d.of(ref)
		var err error
		switch i := chance.IntN(10); {
		case containers && i < 6:
			err = s.container(ctx, ref, chance)
		case i < 7:
			err = s.pull(ctx, ref)
		default:
			by := []string{ref, p.id, p.digestRef(p.refs[0])}[chance.IntN(3)]
			err = s.remove(ctx, p, by)
		}
		if status.Code(err) == codes.Unavailable || ctx.Err() != nil {
			return
		}
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			return
		}
	}
}

// container removes one that runs, or makes one more. One worker calls it.
func (s *storeDrill) container(ctx context.Context, ref string, chance *rand.Rand) error {
	if len(s.containers) > chance.IntN(4) {
		for id := range s.containers {
			delete(s.containers, id) // whatever the answer: nobody counts on it any more
			_, err := s.n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
			return err
		}
	}
	if err := s.pull(ctx, ref); err != nil {
		return err
	}
	name := fmt.Sprintf("c%d", chance.Int64())
	config := harness.ContainerConfig(name, []string{"/bin/busybox", "sleep", "100000"}, func(c *cri.ContainerConfig) {
		c.Image.Image = ref
	})
	r, err := s.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: s.pod.ID, Config: config,
		SandboxConfig: s.pod.Config})
	if status.Code(err) == codes.NotFound {
		return nil // another worker has removed the image
	}
	if err == nil {
		s.containers[r.ContainerId] = s.d.of(ref)
		_, err = s.n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
	}
	return err
}

// round is one life of the daemon, its end, and what is left of it.
func (s *storeDrill) round(t *testing.T) {
	t.Helper()
	rates := []int{0, 2 << 20, 8 << 20, 30 << 20}
	s.d.slow(rates[s.chance.IntN(len(rates))])
	ctx, cancel := harness.Deadline()
	defer cancel()
	var wg sync.WaitGroup
	for w := range 4 {
		chance := rand.New(rand.NewPCG(s.chance.Uint64(), 0))
		wg.Go(func() { s.work(ctx, t, chance, w == 0) })
	}
	life := time.Duration(s.chance.Int64N(int64(600*time.Millisecond))) * slow
	time.Sleep(life)
	s.n.Kill()
	s.tally.Kill()
	cancel()
	wg.Wait()
	before := take(s.n)
	s.n.Start()
	s.removeUnknown(t)
	about := fmt.Sprintf("after a life of %s", life)
	h := settle(t, s.n, s.d)
	s.d.checkKept(t, about, before, h)
	s.checkAnswers(t, h)
	s.checkContainers(t)
	for _, a := range s.d.taken() {
		s.fetched += a.n
	}
	if s.chance.IntN(2) == 0 {
		s.repeat(t, about, h)
	}
}

// repeat repeats all pulls that were interrupted, one after the other.
func (s *storeDrill) repeat(t *testing.T, about string, h *holdings) {
	t.Helper()
	s.d.slow(0)
	ctx, cancel := harness.Deadline()
	defer cancel()
	for ref := range s.broken {
		for _, b := range h.pending[ref].Blobs {
			if h.partial[b] > 0 {
				s.resumed++
			}
			if _, ok := h.blobs[b]; ok {
				s.finished++
			}
		}
		if err := s.pull(ctx, ref); err != nil {
			t.Errorf("%s: %v", about, err)
		}
	}
	s.d.checkResumed(t, about, h)
	if h = settle(t, s.n, s.d); len(h.pending) > 0 {
		t.Errorf("%s: all pulls went well, and %d are pending: %v", about, len(h.pending), h.pending)
	}
	s.checkAnswers(t, h)
	s.checkContainers(t)
}

// removeUnknown removes containers of whose creation no answer came, as the
// kubelet would in the end.
func (s *storeDrill) removeUnknown(t *testing.T) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := s.n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		t.Fatalf("ListContainers: %v", err)
	}
	listed := map[string]bool{}
	for _, c := range list.Containers {
		listed[c.Id] = true
		if s.containers[c.Id] != nil && c.State == cri.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if _, err := s.n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.Id}); err != nil {
			t.Errorf("RemoveContainer: %v", err)
		}
		delete(s.containers, c.Id)
	}
	for id := range s.containers {
		if !listed[id] {
			s.tally.Lost(harness.Statuses, "container %s is lost", id)
		}
	}
}

// checkAnswers compares the records with what the calls were answered.
func (s *storeDrill) checkAnswers(t *testing.T, h *holdings) {
	t.Helper()
	for p, k := range s.names {
		for ref, here := range k.here {
			if _, ok := h.refs[ref]; ok != here {
				s.tally.Lost(harness.Statuses, "image %s: %s is here: %v, by the answers: %v", p.name, ref, ok, here)
			}
		}
	}
}

// checkContainers: each runs, and its root has all files of its image.
func (s *storeDrill) checkContainers(t *testing.T) {
	t.Helper()
	for id, p := range s.containers {
		c := &harness.Container{N: s.n.With(t), Pod: s.pod, ID: id}
		c.Config = harness.ContainerConfig(id, nil)
		if st := c.Status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("a container of %s is %s", p.name, st.State)
		}
		want := map[string]node{}
		for _, l := range p.layers {
			maps.Copy(want, l.tree)
		}
		if _, _, err := compareTree(filepath.Join(s.n.State, "containers", id, "rootfs"), want, false); err != nil {
			t.Errorf("the root of a container of %s: %v", p.name, err)
		}
	}
}

// end removes all: first the images, which the containers outlive.
func (s *storeDrill) end(t *testing.T) {
	t.Helper()
	h := take(s.n)
	s.repeat(t, "in the end", h)
	removeAllImages(t, s.n)
	h = settle(t, s.n, s.d)
	if len(h.blobs)+len(h.refs) > 0 {
		t.Errorf("after all images are removed there are %v and %v", h.blobs, h.refs)
	}
	s.checkContainers(t)
	s.n.RemoveAllPods()
	if h = settle(t, s.n, s.d); len(h.layers) > 0 {
		t.Errorf("after all containers are removed there are %v", h.layers)
	}
	s.tally.CheckClean(s.n)
	t.Logf("%d bytes were sent in interrupted lives; %d finished blobs were found again, %d partial ones went on",
		s.fetched, s.finished, s.resumed)
}
