package orders

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// Eight clients, two of them for each pod, make calls at random while the daemon, shims, the OCI runtime
// and CNI plugins are killed at random instants. Whatever each of them was answered, there is an order of
// all calls that explains it (model_test.go); each line is in its log once; in the end nothing is left.
func TestTraffic(t *testing.T) {
	const pairs = 4
	t.Logf("HOLDFAST_SEED=%d", seed)
	w := &world{
		t:       t,
		n:       harness.New(t, harness.Options{Failpoints: true}),
		tally:   harness.Drill(t, "random traffic of eight clients, and kills"),
		until:   lasts(t, 15*time.Second, 15*time.Minute),
		targets: map[string]*target{},
	}
	w.restarted.Store(time.Now().UnixNano())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var listening, killing, working sync.WaitGroup
	listening.Go(func() { w.listen(ctx) })
	stop := make(chan struct{})
	killing.Go(func() { w.killAtRandom(stop) })
	for pair := range pairs {
		working.Go(func() { w.work(pair) })
	}
	working.Wait()
	close(stop)
	killing.Wait()
	must.Succeed(t, w.n.AwaitReady())
	w.n.RemoveAllPods()
	w.tally.CheckClean(w.n)
	if t.Failed() {
		t.Logf("HOLDFAST_SEED=%d", seed)
	}
	t.Logf("%d pods, %d calls, %d events; kills: %v", w.rounds.Load(), w.calls.Load(), w.events.Load(), w.kills)
}

// world is a node under traffic.
type world struct {
	t     *testing.T
	n     *harness.Node
	tally *harness.Tally
	until time.Time
	died  sync.Map // the ids of containers whose shim was killed
	kills map[string]int

	rounds, calls, events atomic.Int64
	broken                atomic.Bool  // the daemon does not come back
	restarted             atomic.Int64 // when the daemon that runs was started, in nanoseconds

	mu      sync.Mutex
	targets map[string]*target // by name, of the pods that calls are made to
}

func (w *world) over() bool { return w.broken.Load() || w.t.Failed() || time.Now().After(w.until) }

// work has two clients make calls to one pod after the other. The history of a pod is checked when the one
// after it is over: events may come late.
func (w *world) work(pair int) {
	var before *target
	for round := 0; !w.over(); round++ {
		name := fmt.Sprintf("traffic-%d-%d", pair, round)
		g := newTarget(w.n, name, &w.died)
		w.mu.Lock()
		w.targets[name] = g
		w.mu.Unlock()
		var clients sync.WaitGroup
		for client := range 2 {
			chance := rand.New(rand.NewPCG(seed, uint64(pair)<<40|uint64(round)<<8|uint64(client)))
			clients.Go(func() { w.converse(g, client, chance) })
		}
		clients.Wait()
		w.finish(g)
		w.rounds.Add(1)
		w.conclude(before)
		before = g
	}
	w.conclude(before)
}

// conclude checks the history and the logs of a pod that is gone.
func (w *world) conclude(g *target) {
	if g == nil {
		return
	}
	name := g.config.Metadata.Name
	w.mu.Lock()
	delete(w.targets, name)
	w.mu.Unlock()
	if err := g.check(name); err != nil {
		w.tally.Lost(harness.Statuses, "HOLDFAST_SEED=%d: %v", seed, err)
		return
	}
	if err := g.checkLogs(); err != nil {
		w.tally.Lost(harness.Lines, "HOLDFAST_SEED=%d: %s: %v\n%s", seed, name, err, dump(g.all()))
		return
	}
	os.RemoveAll(g.config.LogDirectory)
}

// converse makes some calls. One of the two clients stops the pod in the end, and the other one may still be at it.
func (w *world) converse(g *target, client int, chance *rand.Rand) {
	const calls = 14
	for n := 0; n < calls && !w.over(); {
		c, look := choose(g, chance)
		c.client = client
		answered := false
		if look {
			answered = g.look(client)
		} else {
			answered = g.do(c) != nil
		}
		if !answered {
			time.Sleep(harness.Tick) // until there is a daemon again
			continue
		}
		w.calls.Add(1)
		n++
	}
	if client == 0 {
		g.do(call{verb: stopPod, slot: thePod, client: client})
	}
}

// choose gives the next call, or says that it is a look.
func choose(g *target, chance *rand.Rand) (c call, look bool) {
	if pod, _ := g.known(thePod); pod == "" {
		return call{verb: runPod, slot: thePod}, false
	}
	c.slot = chance.IntN(len(slotNames))
	switch n := chance.IntN(100); {
	case n < 20:
		return c, true
	case n < 42:
		c.verb, c.script = create, g.script(c.slot, chance)
	case n < 62:
		c.verb = start
	case n < 72:
		c.verb = exec
	case n < 78:
		c.verb, c.shares = update, int64(2+chance.IntN(1000))
	case n < 83:
		c.verb = reopen
	case n < 88:
		c.verb, c.grace = stop, int64(chance.IntN(2)*20)
	case n < 95:
		c.verb = remove
		g.nextScript(c.slot)
	case n < 98:
		c.verb, c.slot = runPod, thePod
	case n < 99:
		c.verb, c.slot = stopPod, thePod
	default:
		c.verb, c.slot = removePod, thePod
	}
	return c, false
}

// finish stops and removes the pod, as often as that takes.
func (w *world) finish(g *target) {
	for _, v := range []verb{stopPod, removePod} {
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(harness.Tick) {
			c := g.do(call{verb: v, slot: thePod})
			if c != nil && !c.failed {
				break
			}
			if w.broken.Load() || time.Now().After(deadline) {
				w.tally.Lost(harness.Statuses, "%s of %s still fails: %v", v, g.config.Metadata.Name, c)
				return
			}
		}
		for !g.look(0) && !w.broken.Load() {
			time.Sleep(harness.Tick)
		}
	}
}

// script is what a container does. Most callers ask for the same at a time.
func (g *target) script(slot int, chance *rand.Rand) script {
	g.mu.Lock()
	s := script{variant: g.variant[slot]}
	g.mu.Unlock()
	if chance.IntN(8) == 0 {
		s.variant++
	}
	own := rand.New(rand.NewPCG(seed, uint64(s.variant)<<1|uint64(slot)))
	if own.IntN(3) > 0 {
		s.lines, s.exit = 1+own.IntN(40), int32(own.IntN(100))
	}
	return s
}

// nextScript has the next container be another one.
func (g *target) nextScript(slot int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.variant[slot]++
}

// checkLogs: the lines of a container are numbered from 1 on, without a gap, over all the files that its log
// was renamed to. If it ended as its script says, all are there.
func (g *target) checkLogs() error {
	scripts := map[[2]int]script{}
	tries := map[[2]int]int{} // creations that may have been another container
	ends := map[[2]int]bool{} // one has ended as its script says
	ids := map[string][2]int{}
	for _, c := range g.all() {
		key := [2]int{c.slot, c.script.variant}
		switch {
		case c.verb == create && (c.failed || c.code == codes.OK && ids[c.got] != key):
			scripts[key] = c.script
			tries[key]++
			ids[c.got] = key
		case c.verb == see && c.seen != nil && c.seen.whole && c.seen.phase == exited:
			key, known := ids[c.seen.id]
			s := scripts[key]
			clear := c.seen.exit == s.exit && c.seen.started != 0 && (s.exit != 0 || !c.may.term)
			ends[key] = ends[key] || known && s.lines > 0 && clear
		}
	}
	for key, s := range scripts {
		runs, last, err := g.readLog(filepath.Join(g.config.LogDirectory, s.logPath(key[0])))
		switch {
		case err != nil && tries[key] == 1:
			return err
		case runs > tries[key]:
			return fmt.Errorf("the log of %s %+v begins %d times", slotNames[key[0]], s, runs)
		case ends[key] && tries[key] == 1 && last != s.lines:
			return fmt.Errorf("the log of %s %+v has %d lines", slotNames[key[0]], s, last)
		}
	}
	return nil
}

// readLog reads a log and what it was renamed to before. It says how often the numbers begin anew, and
// which is the last one.
func (g *target) readLog(path string) (runs, last int, err error) {
	files, _ := filepath.Glob(path + ".*")
	slices.Sort(files)
	for _, file := range append(files, path) {
		lines, err := harness.ReadLog(file)
		if err != nil && !os.IsNotExist(err) {
			return runs, last, err
		}
		for _, l := range lines {
			if l.Text == fmt.Sprintf("line %08d", 1) {
				runs, last = runs+1, 0
			}
			if last++; l.Text != fmt.Sprintf("line %08d", last) {
				return runs, last, fmt.Errorf("%s: after line %d: %.60q", file, last-1, l.Text)
			}
		}
	}
	return runs, last, nil
}

// listen records what events say, until ctx ends.
func (w *world) listen(ctx context.Context) {
	for ctx.Err() == nil {
		stream, err := w.n.Runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{})
		told := map[string]cri.ContainerEventType{}
		for err == nil {
			var e *cri.ContainerEventResponse
			if e, err = stream.Recv(); err != nil {
				break
			}
			w.events.Add(1)
			// An end that a daemon has found at its start may be told twice.
			last, ok := told[e.ContainerId]
			twice := e.ContainerEventType == last && last == cri.ContainerEventType_CONTAINER_STOPPED_EVENT
			if ok && e.ContainerEventType <= last && !twice {
				w.tally.Lost(harness.Statuses, "an event %s comes after %s of the same: %v", e.ContainerEventType, last,
					e)
			}
			told[e.ContainerId] = e.ContainerEventType
			w.hear(e)
		}
		time.Sleep(harness.Tick)
	}
}

// hear records an event. What it says was so at some time since it was made.
func (w *world) hear(e *cri.ContainerEventResponse) {
	p := e.PodSandboxStatus
	if p == nil {
		return
	}
	if p.Metadata == nil {
		w.tally.Lost(harness.Statuses, "an event of a pod that nobody asked for: %v", e)
		return
	}
	w.mu.Lock()
	g := w.targets[p.Metadata.Name]
	w.mu.Unlock()
	if g == nil {
		return // its history is closed
	}
	const listener = 2
	c := &call{client: listener, verb: see, slot: thePod, pod: p.Id, id: p.Id, began: e.CreatedAt,
		ended: time.Now().UnixNano()}
	if e.ContainerId == p.Id && e.ContainerEventType == cri.ContainerEventType_CONTAINER_DELETED_EVENT {
		g.end(c) // what it says of the state is the last one
		return
	}
	g.showAll(c, e.ContainersStatuses)
	// Whoever subscribes is told what has happened since the start, as if it were now: the pod may be gone.
	c.seen, c.began = podView(p.Id, p.State, p.CreatedAt), min(c.began, w.restarted.Load())
	g.end(c)
}
