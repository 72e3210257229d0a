package orders

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// pair is two calls at a time: the second one is made while the first one is held at a step.
type pair struct {
	from   int // in starts
	first  call
	at     step.Step
	second call
}

func (p pair) String() string {
	return fmt.Sprintf("%s: %s held at %s, and %s", starts[p.from].name, nameOf(p.first), p.at, nameOf(p.second))
}

// pairs are all whose first call has something to do.
func pairs() (all []pair) {
	const nothing, oneCreated, oneRuns = 0, 2, 3
	for _, first := range alphabet {
		from := oneRuns
		switch first.verb {
		case runPod:
			from = nothing
		case create:
			from = oneCreated
		}
		for _, at := range cuts[first.verb] {
			for _, second := range alphabet {
				if at != "" {
					all = append(all, pair{from, first, at, second})
				}
			}
		}
	}
	return all
}

// Whatever comes while a call is at a step, there is an order of both that explains the answers, and in the end
// nothing is left.
func TestPairs(t *testing.T) {
	tally := harness.Drill(t, "every two calls at a time, one held at a step")
	all := pairs()
	onNodes(t, len(all), 8*time.Second, time.Hour, func(t *testing.T, n *harness.Node, j int) {
		all[j].run(t, n, tally, fmt.Sprintf("pair%d", j))
	})
}

func (p pair) run(t *testing.T, n *harness.Node, tally *harness.Tally, name string) {
	g := newTarget(n, name, new(sync.Map))
	for _, c := range starts[p.from].calls {
		if made := g.do(c); made == nil || made.failed {
			t.Fatalf("%s: %s fails: %v", p, nameOf(c), made)
		}
	}
	const hold = time.Second // a whole creation fits into it
	n.Arm(fmt.Sprintf("%s %s 1", p.at, hold))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		g.do(p.first)
	}()
	p.awaitHeld(n, answered)
	p.second.client = 1
	g.do(p.second)
	g.look(1)
	<-answered
	n.Arm()
	g.look(0)
	for _, v := range []verb{stopPod, removePod} {
		if made := g.do(call{verb: v, slot: thePod}); made == nil || made.failed {
			tally.Lost(harness.Statuses, "%s: %s at the end fails: %v\n%s", p, v, made, dump(g.all()))
		}
		g.look(0)
	}
	if err := g.check(name); err != nil {
		tally.Lost(harness.Statuses, "%s: %v\n%s", p, err, dump(g.all()))
	}
	if left := n.AwaitClean(func() {}); left != "" {
		tally.Lost(harness.Leaks, "%s: %s", p, left)
	}
	if t.Failed() {
		n.RemoveAllPods()
		n.Mark()
	}
}

// awaitHeld waits until the first call is at its step, or does not come there.
func (p pair) awaitHeld(n *harness.Node, answered chan struct{}) {
	for n.Reached()[string(p.at)] == 0 {
		select {
		case <-answered:
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
}
