package orders

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A sequence is made by one caller. All its calls but the last one are answered, and have an
// effect: a call that has none leaves a shorter sequence. At the last one the daemon is killed.
type sequence struct {
	from  int // in starts
	calls []call
	at    step.Step // where the daemon is killed; empty, or not reached: right after the answer
	again bool      // the last call is repeated
}

func (q sequence) String() string {
	var names []string
	for _, c := range q.calls {
		names = append(names, nameOf(c))
	}
	s := fmt.Sprintf("%s: %s", starts[q.from].name, strings.Join(names, ", "))
	if q.at != "" {
		s += " killed at " + string(q.at)
	}
	if q.again {
		s += ", again"
	}
	return s
}

func nameOf(c call) string {
	if c.slot == thePod {
		return string(c.verb)
	}
	return string(c.verb) + " " + slotNames[c.slot]
}

// alphabet is what a sequence is made of.
var alphabet = []call{
	{verb: runPod, slot: thePod},
	{verb: stopPod, slot: thePod},
	{verb: removePod, slot: thePod},
	{verb: create, slot: 0},
	{verb: create, slot: 1},
	{verb: start, slot: 0},
	{verb: start, slot: 1},
	{verb: stop, slot: 0, grace: 20},
	{verb: stop, slot: 1},
	{verb: remove, slot: 0},
	{verb: remove, slot: 1},
	{verb: exec, slot: 0},
	{verb: update, slot: 0, shares: 512},
	{verb: reopen, slot: 0},
}

// starts are the states that sequences begin in, each as the calls that lead there.
var starts = []struct {
	name  string
	calls []call
}{
	{"nothing", nil},
	{"a pod", alphabet[:1]},
	{"one created", []call{{verb: runPod, slot: thePod}, {verb: create, slot: 0}}},
	{"one runs, one is created", []call{{verb: runPod, slot: thePod}, {verb: create, slot: 0},
		{verb: create, slot: 1}, {verb: start, slot: 0}}},
	{"one has ended, one runs", []call{{verb: runPod, slot: thePod}, {verb: create, slot: 0},
		{verb: start, slot: 0}, {verb: stop, slot: 0, grace: 20}, {verb: create, slot: 1}, {verb: start, slot: 1}}},
	{"a stopped pod", []call{{verb: runPod, slot: thePod}, {verb: create, slot: 0}, {verb: start, slot: 0},
		{verb: stopPod, slot: thePod}}},
}

// cuts are the steps that a call can reach: of the daemon, which is killed there, and of a
// shim, which is held there while the daemon is killed. With none it is killed after the answer.
var cuts = map[verb][]step.Step{
	runPod: {"", step.PodRecord, step.PodNamespaces, step.PodIntent, step.PodNetwork, step.PodAttached,
		step.PodPlugins, step.PodReady},
	stopPod: {"", step.PodStopping, step.ShimExitSeen, step.PodKilled, step.PodDetached, step.PodStopped},
	removePod: {"", step.PodStopping, step.PodDetached, step.ContainerRemoving, step.ContainerEnded,
		step.ContainerErased, step.PodErased},
	create: {"", step.ContainerImage, step.ContainerRecord, step.ContainerPlugins, step.ContainerRoot,
		step.ContainerShim, step.ShimCreating, step.ShimRuntime, step.ShimCreated, step.ContainerRuntime,
		step.ContainerCreated},
	start: {"", step.ShimReleased, step.ShimStarted, step.ContainerStarted},
	stop: {"", step.ShimStopping, step.ShimSignalled, step.ContainerStopping, step.ShimExitSeen,
		step.ShimExitRecorded, step.ShimReaped, step.ShimExitAnnounced, step.ShimCleaned},
	remove: {"", step.ContainerRemoving, step.ShimExitSeen, step.ContainerEnded, step.ContainerErased},
	exec:   {"", step.ShimExecRecord, step.ShimExecStarted},
	update: {"", step.ContainerUpdating, step.ShimUpdated, step.ShimUpdateKept, step.ContainerUpdated},
	reopen: {"", step.ShimReopened, step.ContainerReopened},
}

// sequences are all that there are. Where each is cut, and whether its last call is repeated,
// goes round.
func sequences(length int) (all []sequence) {
	turns := map[verb]int{}
	for from := range starts {
		var s state
		for _, c := range starts[from].calls {
			s, _ = s.accept(symbolic(c))
		}
		var extend func(s state, before []call)
		extend = func(s state, before []call) {
			for _, c := range alphabet {
				calls := append(slices.Clone(before), c)
				turn := turns[c.verb]
				turns[c.verb]++
				at := cuts[c.verb]
				all = append(all, sequence{from, calls, at[turn%len(at)], turn/len(at)%2 == 0})
				next, ok := s.accept(symbolic(c))
				if len(calls) < length && ok && (next != s || c.verb == exec || c.verb == reopen) {
					extend(next, calls)
				}
			}
		}
		extend(s, nil)
	}
	return all
}

// symbolic is a call with ids that nobody knows.
func symbolic(c call) *call {
	c.id, c.pod = unknown, unknown
	return &c
}

// Whatever the calls, and wherever the daemon is killed at the last one: what was acknowledged stays, what
// was not is as if it never was or done completely, and in the end nothing is left.
func TestSequences(t *testing.T) {
	const length = 3
	tally := harness.Drill(t, "every order of three calls, cut by a kill")
	all := sequences(length)
	onNodes(t, len(all), 15*time.Second, 3*time.Hour, func(t *testing.T, n *harness.Node, j int) {
		o := &order{sequence: all[j], t: t, n: n, tally: tally}
		o.run(fmt.Sprintf("pod%d", j))
	})
}

// order is one sequence under way.
type order struct {
	sequence
	t     *testing.T
	n     *harness.Node
	tally *harness.Tally
	g     *target
	may   []branch
	read  int // how much of the history is in may
	// recorded says that the cut call has reached a step by which its stop or removal is on record. Then a
	// container goes without being asked again, and a pod is not ready any more.
	recorded bool
}

// branch is a state that the model can be in. A call without an answer may still be done, until it has been.
type branch struct {
	state
	owes *call
}

func (o *order) run(name string) {
	o.g = newTarget(o.n, name, new(sync.Map))
	o.may = []branch{{}}
	defer o.leave()
	last := len(o.calls) - 1
	for _, c := range slices.Concat(starts[o.from].calls, o.calls[:last]) {
		if made := o.g.do(c); made == nil || made.failed {
			o.t.Fatalf("%s: %s fails: %v", o, nameOf(c), made)
		}
		o.follow("a call before")
	}
	made := o.cut(o.calls[last])
	o.follow("the call that was cut")
	o.look("what is seen after the restart")
	ready := func(b branch) bool { return b.pod.phase == running }
	if o.recorded && o.calls[last].slot == thePod && slices.ContainsFunc(o.may, ready) {
		o.tally.Lost(harness.Statuses, "%s: the pod is ready after its stop was recorded\n%s", o, dump(o.g.all()))
	}
	if o.again {
		o.call(o.calls[last], "the repeated call")
		o.look("what is seen after the repeated call")
	}
	// Half of the end of a pod waits for the caller, who asks until it is answered.
	if half := made != nil && made.failed && (made.verb == stopPod || made.verb == removePod); o.again || !half {
		o.machine()
	}
	for _, v := range []verb{stopPod, removePod} {
		o.call(call{verb: v, slot: thePod}, "the end")
		o.look("what is seen at the end")
	}
	o.checkClean()
}

// leave leaves the node to the next sequence as it should be.
func (o *order) leave() {
	o.n.Arm()
	if !o.t.Failed() {
		return
	}
	if o.n.Ended() {
		o.n.Restart()
	}
	o.n.RemoveAllPods()
	o.n.Mark()
}

// call makes a call that has to be answered. One that cannot be granted may be refused.
func (o *order) call(c call, what string) {
	o.t.Helper()
	if made := o.g.do(c); made == nil || made.failed {
		o.tally.Lost(harness.Statuses, "%s: %s fails: %v\n%s", o, what, made, dump(o.g.all()))
		o.t.FailNow()
	}
	o.follow(what)
}

func (o *order) look(what string) {
	o.t.Helper()
	if !o.g.look(0) {
		o.tally.Lost(harness.Statuses, "%s: %s: the daemon does not answer", o, what)
		o.t.FailNow()
	}
	o.follow(what)
}

// follow takes what was answered since the last time through the model.
func (o *order) follow(what string) {
	o.t.Helper()
	list := o.g.all()
	for _, c := range list[o.read:] {
		was := o.may
		o.may = nil
		for _, b := range was {
			o.add(b, c)
			if b.owes != nil {
				if late, ok := b.step(b.owes); ok {
					o.add(branch{state: late}, c)
				}
			}
		}
		if len(o.may) == 0 {
			o.tally.Lost(harness.Statuses, "%s: %s: the model does not allow\n%s\nin any of\n%v\n%s", o, what, c, was,
				dump(list))
			o.t.FailNow()
		}
	}
	o.read = len(list)
}

// add adds the branch after a call.
func (o *order) add(b branch, c *call) {
	next, ok := b.step(c)
	done := branch{next, b.owes}
	if ok && !slices.Contains(o.may, done) {
		o.may = append(o.may, done)
	}
	if c.failed && next != b.state {
		o.may = append(o.may, branch{b.state, c})
	}
}

// holdFor is how long a shim takes at the step at which the daemon is killed.
const holdFor = 150 * time.Millisecond

// cut makes a call, and has the daemon killed meanwhile, or after it, and started again.
func (o *order) cut(c call) *call {
	o.t.Helper()
	held := strings.HasPrefix(string(o.at), "shim-")
	stop, stopped := make(chan struct{}), make(chan struct{})
	switch {
	case o.at == "":
		close(stopped)
	case held:
		o.n.Arm(fmt.Sprintf("%s %s 1", o.at, holdFor))
		go o.killWhenReached(stop, stopped)
	default:
		o.n.Arm(string(o.at) + " kill 1")
		close(stopped)
	}
	made := o.g.do(c)
	close(stop)
	<-stopped
	o.n.Kill() // if it still lives
	o.tally.Kill()
	o.recorded = (c.verb == remove || c.verb == stopPod || c.verb == removePod) && o.n.Reached()[string(o.at)] > 0
	o.n.Arm()
	o.n.Start()
	return made
}

// killWhenReached kills the daemon while a shim is held at the step, until stop is closed.
func (o *order) killWhenReached(stop, stopped chan struct{}) {
	defer close(stopped)
	pid := o.n.PID()
	for {
		if o.n.Reached()[string(o.at)] > 0 {
			unix.Kill(pid, unix.SIGKILL)
			return
		}
		select {
		case <-stop:
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// machine compares the machine with what is seen: shims of containers that live, and one of each thing of
// a pod that is ready. What is undone, and what a shim was asked for, goes on in the background.
func (o *order) machine() {
	o.t.Helper()
	slot := o.calls[len(o.calls)-1].slot
	stays := func(b branch) bool { return slot != thePod && b.at(slot).phase != absent }
	var got, want string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(harness.Tick) {
		o.look("what is seen before the end")
		got, want = o.things(), things(o.may[0].state)
		if o.recorded && slices.ContainsFunc(o.may, stays) {
			got += ", and a container whose removal is on record"
		}
		if got == want {
			return
		}
	}
	o.tally.Lost(harness.Leaks, "%s: the machine has %s, and the model %s\n%s", o, got, want, dump(o.g.all()))
}

// things is what there has to be in a state.
func things(s state) string {
	pods := 0
	if s.pod.phase == running {
		pods = 1
	}
	shims := []string{}
	for _, c := range s.containers {
		if c.phase == created || c.phase == running {
			shims = append(shims, short(c.id))
		}
	}
	slices.Sort(shims)
	return fmt.Sprintf("shims %v, namespaces %d, addresses %d", shims, pods, pods)
}

// things is what there is.
func (o *order) things() string {
	count := map[string]int{}
	for _, thing := range o.n.Leftovers() {
		count[strings.Fields(thing)[0]]++
	}
	shims := []string{}
	for id := range o.n.ShimPIDs() {
		shims = append(shims, short(id))
	}
	slices.Sort(shims)
	return fmt.Sprintf("shims %v, namespaces %d, addresses %d", shims, count["netns"], count["lease"])
}

func (o *order) checkClean() {
	o.t.Helper()
	o.n.CheckClean()
	if o.t.Failed() {
		o.tally.Lost(harness.Leaks, "%s: something is left behind\n%s", o, dump(o.g.all()))
	}
}
