package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// The daemon is killed before each of the system calls by which it changes what lies below
// ROOT and STATE in the life of a pod and an image, and a second time some calls later.
func TestKilledAtEachCall(t *testing.T) { eachCall(t, false, true) }

// Each of these calls fails once, as on a full disk or a broken one. What the kubelet asked
// for fails or not, and works when it is repeated.
func TestEachCallFails(t *testing.T) { eachCall(t, false, false) }

// A shim is killed before each of the system calls by which it changes its run directory.
// Its container is undone, or ends with it.
func TestShimKilledAtEachCall(t *testing.T) { eachCall(t, true, true) }

// Each of these calls fails once. The container lives on, or is undone.
func TestEachCallOfShimFails(t *testing.T) { eachCall(t, true, false) }

// eachCall has something happen at each call, on several nodes at a time. A quick form
// takes a sample.
func eachCall(t *testing.T, ofShim, kill bool) {
	const sample = 10 // of each node
	nodes := 1
	if drill {
		nodes = 3
	}
	t.Parallel()
	tally := harness.Drill(t, strings.TrimPrefix(t.Name(), "Test"))
	lots := chance(t)
	for i := range nodes {
		lots := rand.New(rand.NewPCG(lots.Uint64(), 0))
		t.Run(fmt.Sprintf("node %d", i), func(t *testing.T) {
			t.Parallel()
			d := newCallDrill(t, tally, lots, ofShim)
			var list []int
			for at := 1 + i; at <= d.calls; at += nodes {
				list = append(list, at)
			}
			lots.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			if !drill {
				list = list[:min(sample, len(list))]
			}
			for _, at := range list {
				d.happen(t, at, kill)
			}
			d.s.allow()
			tally.CheckClean(d.n)
		})
	}
}

// callDrill is a node the calls of which are supervised.
type callDrill struct {
	n      *harness.Node
	s      *supervisor
	tally  *harness.Tally
	chance *rand.Rand
	ofShim bool
	calls  int // of a life in which all goes well
	lives  int
}

func newCallDrill(t *testing.T, tally *harness.Tally, chance *rand.Rand, ofShim bool) *callDrill {
	d := &callDrill{n: harness.New(t), tally: tally, chance: chance, ofShim: ofShim}
	check(t, d.n.Registry.OwnImage())
	emptyStore(t, d.n)
	d.n.Mark()
	var end func()
	d.s, end = supervise(t, d.n, lifeScope(d.n, ofShim))
	t.Cleanup(end) // the daemon has ended by then: cleanups run last first
	t.Cleanup(d.n.Kill)
	d.n.Restart()
	d.s.allow()
	k := d.kubelet(t)
	k.story("well")
	calls := d.s.allow()
	d.calls = len(calls)
	kinds := map[string]int{}
	for _, c := range calls {
		kinds[strings.Fields(c)[0]]++
	}
	t.Logf("%d calls: %v", len(calls), kinds)
	checkListed(t, calls, ofShim)
	if path := os.Getenv("HOLDFAST_CALLS"); path != "" {
		check(t, os.WriteFile(path, []byte(strings.Join(calls, "\n")+"\n"), 0o644))
	}
	return d
}

func (d *callDrill) kubelet(t *testing.T) *kubelet {
	return &kubelet{n: d.n.With(t), t: t, tally: d.tally}
}

// happen lives a life with one disaster in it, or two.
func (d *callDrill) happen(t *testing.T, at int, kill bool) {
	d.lives++
	name := fmt.Sprintf("pod%d", d.lives)
	t.Run(fmt.Sprintf("call %d", at), func(t *testing.T) {
		k := d.kubelet(t)
		defer k.leave()
		var said []string // calls that were not made
		note := func() {
			if call := d.s.happened(); call != "" {
				said = append(said, call)
			}
		}
		defer func() {
			note()
			d.s.allow()
			t.Logf("not made: %s", strings.Join(said, ", then "))
		}()
		switch {
		case kill && d.ofShim:
			k.action, k.lost, k.lossOf, k.neverRan = "kill", ending, d.lossOf, d.neverRan
			d.s.expect(at, die)
		case kill:
			k.action = "kill"
			second := 1 + d.chance.IntN(d.calls)
			k.dead = func() {
				note()
				at := second
				if len(said) > 1 {
					at = 0
				}
				d.s.expect(at, die)
			}
			d.s.expect(at, die)
		default:
			why := []syscall.Errno{unix.ENOSPC, unix.EIO}[d.chance.IntN(2)]
			k.action, k.excuse = "fail", why.Error()
			d.s.expect(at, why)
			d.tally.Kill()
		}
		k.story(name)
		if kill && d.ofShim && d.s.happened() != "" {
			d.tally.Kill()
		}
	})
}

// neverRan says whether the shim was killed just before it let init go on: the container
// ends without having run, and it is to say so. After that nobody may say it.
func (d *callDrill) neverRan(id string) bool {
	killed, _ := d.s.killed(id)
	return killed && strings.HasPrefix(d.s.happened(), "rename STATE/runc/ID/exec.fifo ")
}

// lossOf says what may be lost of a container: its end, if its shim was killed before that
// was on record, or else the rest of its output.
func (d *callDrill) lossOf(id string) loss {
	killed, recorded := d.s.killed(id)
	switch {
	case !killed:
		return nothing
	case recorded:
		return output
	}
	return ending
}

// story is the life of an image and of a pod with two containers, from nothing to nothing.
func (k *kubelet) story(name string) {
	k.t.Helper()
	var image string // its id, by which a kubelet removes it
	k.do("PullImage", func(ctx context.Context) error {
		r, err := k.n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: harness.Image}})
		image = r.GetImageRef()
		return err
	})
	pod := k.runPod(name)
	ends, stays := k.runContainers(pod)
	k.awaitExit(ends)
	k.checkLiving(pod, ends, stays)
	for _, l := range []life{visited, updated, reopened, stopped} {
		k.disturb(stays, l)
	}
	k.awaitExit(stays)
	k.life = stopped
	k.checkEnds(ends, stays)
	k.removeContainer(stays.ID)
	k.stopPod(pod.ID)
	k.removePod(pod.ID)
	k.do("RemoveImage", func(ctx context.Context) error { return remove(ctx, k.n, image) })
	k.clean()
}

// lifeScope are all system calls that change what lies below ROOT and STATE, or a pinned
// network; of a shim those about its run directory and its part of ROOT. Logs are left out.
func lifeScope(n *harness.Node, ofShim bool) scope {
	trees := []struct{ path, name string }{
		{n.State + "-userns", "STATE-userns"}, {n.State, "STATE"}, {n.Root, "ROOT"}, {"/run/netns", "NETNS"},
	}
	return scope{ofShim: ofShim, place: func(path string) string {
		for _, tree := range trees {
			rest, below := strings.CutPrefix(path, tree.path)
			if !below || rest != "" && rest[0] != '/' {
				continue
			}
			return placeName(tree.name + rest)
		}
		return ""
	}}
}

var (
	idPattern     = regexp.MustCompile("[0-9a-f]{64}")
	randomPattern = regexp.MustCompile(`(\.|-)[0-9]{5,}`)
)

// placeName is a path with what is by chance replaced, "" for one that does not count: a
// log, or a file of a tree that has no name yet or no more.
func placeName(path string) string {
	path = randomPattern.ReplaceAllString(idPattern.ReplaceAllString(path, "ID"), "${1}N")
	parts := strings.Split(path, "/")
	switch {
	case strings.HasSuffix(path, ".log"):
		return ""
	case strings.HasPrefix(path, "ROOT/layers/tmp/") && len(parts) > 5:
		return ""
	case slices.ContainsFunc(parts[:len(parts)-1], func(p string) bool { return strings.HasPrefix(p, ".del-") }):
		return ""
	}
	return path
}
