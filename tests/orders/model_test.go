package orders

import (
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
)

// The model: a pod of one name with two containers, as the CRI has it. A rule has the text
// of k8s.io/cri-api (api.proto) that it comes from; where that text leaves something open,
// docs/architecture.md does not. The state moves by calls. What happens by itself (a program
// ends, a removal goes on) is seen by the first call that shows it, if there is a reason for it.

// verb is what a call of a history is.
type verb string

const (
	runPod    verb = "RunPodSandbox"
	stopPod   verb = "StopPodSandbox"
	removePod verb = "RemovePodSandbox"
	create    verb = "CreateContainer"
	start     verb = "StartContainer"
	stop      verb = "StopContainer"
	remove    verb = "RemoveContainer"
	exec      verb = "ExecSync"
	update    verb = "UpdateContainerResources"
	reopen    verb = "ReopenContainerLog"
	see       verb = "seen" // in a status, a list or an event
)

// thePod is the slot of a call that is to the pod itself. The others are containers.
const thePod = -1

// phase is the state of a container, in its order. That of a pod is running, or exited for
// NOTREADY.
type phase int

const (
	absent phase = iota
	created
	running
	exited
)

func (p phase) String() string { return [...]string{"absent", "created", "running", "exited"}[p] }

// script is what a container does: numbered lines, and then an exit. With 0 lines it prints
// until it is ended. It stands for the whole config: with another one it is another request.
type script struct {
	variant, lines int
	exit           int32
}

// Exit codes and reasons that nobody scripted.
const (
	codeKilled  = 137
	codeUnknown = 255
	codeEarly   = 2 // a program of Go that gets SIGTERM before it has a handler for it
	shimDied    = "ShimDied"
)

// object is the pod or one of its containers.
type object struct {
	id       string // unknown: of a creation without an answer
	phase    phase
	script   script
	ran      bool
	stopped  bool // of the pod: StopPodSandbox was answered, or may have been done whole
	shares   int64
	created  int64 // the times are 0 until somebody has seen them
	started  int64
	finished int64 // 0: nobody has seen the end
	exit     int32
	reason   string
}

const unknown = "?"

// state is comparable, as the checker wants it.
type state struct {
	pod        object
	containers [2]object
	gone       string // the ids of what was removed
}

// asked is what had been asked of an object before an answer was given, and may be at work.
type asked struct {
	term     bool // StopContainer: the program gets a signal, and ends with 0
	kill     bool // StopContainer, RemoveContainer
	remove   bool // RemoveContainer, RemovePodSandbox
	podStop  bool // StopPodSandbox, RemovePodSandbox: its containers are killed
	shimDied bool // the shim was killed
	creating bool // another CreateContainer for the name
}

// view is what an answer says of an object.
type view struct {
	id       string
	phase    phase
	whole    bool // a status. A list says no more than id, phase and created
	created  int64
	started  int64
	finished int64
	exit     int32
	reason   string
	shares   int64
}

// step is the state after a call that was answered as it was; false: the CRI does not allow
// that answer in this state. A call that failed, or has no answer, may have been done, now or
// later: the checker tries all instants, and after the last one it does not matter.
func (s state) step(c *call) (state, bool) {
	switch {
	case c.failed:
		if next, ok := s.accept(c); ok {
			return next, true
		}
		return s, true
	case c.verb == see:
		return s.see(c)
	case c.code == codes.OK:
		return s.accept(c)
	}
	return s.refuse(c)
}

// accept is the state after a call that succeeded.
func (s state) accept(c *call) (state, bool) {
	switch c.verb {
	case runPod, stopPod, removePod:
		return s.acceptPod(c)
	case create:
		return s.create(c)
	}
	o := &s.containers[c.slot]
	there := s.is(o, c.id)
	switch c.verb {
	case stop:
		// "This call is idempotent, and must not return an error if the container has already been
		// stopped. The runtime must forcibly kill the container after the grace period is reached."
		if there && (o.phase == running || o.phase == created && c.grace == 0) {
			o.phase = exited
		}
		return s, true
	case remove:
		// "If the container is running, the container must be forcibly removed. This call is
		// idempotent, and must not return an error if the container has already been removed."
		if there {
			s.remove(o)
		}
		return s, true
	case start:
		// CONTAINER_CREATED becomes CONTAINER_RUNNING. Again: the result of the first call.
		if there && o.phase == created && s.takes(c.may) {
			o.phase, o.ran = running, true
		}
		return s, there && o.phase == running
	case exec, reopen:
		return s, there && o.phase == running
	case update:
		// "If runtime fails to transactionally update the requested resources, an error is
		// returned." One that was under way when the container ended may be seen later.
		if there {
			o.shares = c.shares
		}
		return s, there && (o.phase != exited || o.finished > c.began)
	}
	return s, false
}

func (s state) acceptPod(c *call) (state, bool) {
	if c.verb == runPod {
		// "Runtimes must ensure the sandbox is in the ready state on success."
		if s.pod.phase == absent {
			s.pod = object{id: c.id2(), phase: running}
			return s, !s.isGone(c.got)
		}
		return s, s.pod.phase == running && s.is(&s.pod, c.id2())
	}
	// "This call is idempotent, and must not return an error if" it was done already.
	if !s.is(&s.pod, c.id) {
		return s, true
	}
	if c.verb == removePod {
		// "If there are any running containers in the sandbox, they must be forcibly terminated
		// and removed."
		s.removePod()
		return s, true
	}
	// "If there are any running containers in the sandbox, they must be forcibly terminated."
	s.pod.phase, s.pod.stopped = exited, true
	for i := range s.containers {
		if o := &s.containers[i]; o.phase != absent {
			o.phase = exited
		}
	}
	return s, true
}

// takes says whether the pod may take a container, or let one start. One that is being stopped may do so for
// calls that have come before.
func (s state) takes(may asked) bool { return s.pod.phase == running || may.podStop && !s.pod.stopped }

// create: the name of a container is unique in its pod. The same request again gets the result of the
// first one.
func (s state) create(c *call) (state, bool) {
	if !s.is(&s.pod, c.pod) || !s.takes(c.may) {
		return s, false
	}
	o := &s.containers[c.slot]
	if o.phase == absent {
		*o = object{id: c.id2(), phase: created, script: c.script}
		return s, !s.isGone(c.got)
	}
	return s, o.phase != exited && o.script == c.script && s.is(o, c.id2())
}

// refuse is the state after a call that was refused: as before, but for what the refusal
// tells.
func (s state) refuse(c *call) (state, bool) {
	o := s.at(c.slot)
	switch {
	case c.code == codes.NotFound && c.verb == create:
		return s.lacks(thePod, c.pod, c.may)
	case c.code == codes.NotFound:
		return s.lacks(c.slot, c.id, c.may)
	case c.code == codes.AlreadyExists && c.verb == runPod:
		if s.pod.phase == running && c.may.podStop {
			s.pod.phase = exited
		}
		return s, s.pod.phase == exited
	case c.code == codes.AlreadyExists && c.verb == create:
		switch ended := strings.Contains(c.text, "has ended"); {
		case ended && o.phase == absent: // before the call was answered that has made it
			return s.create(c)
		case ended: // its status says how
			o.phase = exited
		}
		return s, c.may.creating || o.phase != absent && (o.script != c.script || o.phase == exited)
	case c.code != codes.FailedPrecondition:
		return s, false
	case c.verb == create:
		return s, s.is(&s.pod, c.pod) && s.pod.phase == exited || c.may.podStop
	case !s.is(o, c.id):
		return s, false // NotFound is right
	case o.phase == exited || c.may.remove:
		return s, true
	case c.verb == start && (s.pod.phase == exited || c.may.podStop):
		return s, true
	case c.verb == exec && o.phase == created, c.verb == reopen && o.phase == created:
		return s, true
	case c.verb == update && o.phase == created && o.script.lines > 0: // a start is under way, the program is over
		return s, true
	}
	// It has ended by itself. It counts as such when its output is in the log, which may be later.
	after := s
	return s, after.end(after.at(c.slot), c.may)
}

// end has a container end by itself, if it can. One that is killed with its pod shows that the pod is not
// ready any more: that is on record before anything is killed.
func (s *state) end(o *object, may asked) bool {
	switch {
	case may.kill || may.shimDied || o.phase == running && o.script.lines > 0:
	case may.podStop:
		s.pod.phase = exited
	default:
		return false
	}
	o.phase = exited
	return true
}

// lacks is the state after an answer that says that there is no object of that id.
func (s state) lacks(slot int, id string, may asked) (state, bool) {
	o := s.at(slot)
	if o.phase == absent || id != "" && o.id != id {
		return s, true
	}
	if slot == thePod {
		s.removePod()
	} else {
		s.remove(o)
	}
	return s, may.remove
}

// see is the state after an answer that shows an object. States only go forward, what was
// seen once is seen again, and what is gone does not come back.
func (s state) see(c *call) (state, bool) {
	v, o := c.seen, s.at(c.slot)
	if v == nil {
		if c.slot != thePod && c.id == "" && !s.is(&s.pod, c.pod) {
			return s, true // a list of what is in another pod
		}
		return s.lacks(c.slot, c.id, c.may)
	}
	if !s.is(o, v.id) || v.phase < o.phase || !same(&o.created, v.created) {
		return s, false
	}
	if c.slot == thePod {
		good := v.phase == o.phase || c.may.podStop
		o.phase = v.phase
		return s, good
	}
	if v.phase == running && o.phase != running {
		return s, false // nobody has started it
	}
	if v.phase == exited && o.phase != exited && !s.end(o, c.may) {
		return s, false
	}
	return s, !v.whole || o.agrees(v, c.may)
}

// agrees says whether a status is right for a container of its phase, and notes what it says.
func (o *object) agrees(v *view, may asked) bool {
	unclear := may.shimDied && v.phase == exited // whether it had been started
	switch {
	case v.shares != o.shares:
		return false
	case !o.ran && v.started != 0 && !unclear, o.ran && v.started == 0:
		return false
	case v.started != 0 && !same(&o.started, v.started), v.started == 0 && o.started != 0:
		return false
	case v.phase != exited:
		return v.finished == 0 && v.exit == 0 && v.reason == ""
	case o.finished != 0: // "an exit is written once"
		return v.finished == o.finished && v.exit == o.exit && v.reason == o.reason
	}
	o.finished, o.exit, o.reason = v.finished, v.exit, v.reason
	return v.finished != 0 && v.finished >= v.started && o.plausible(v, may)
}

// plausible says whether a container can have ended so.
func (o *object) plausible(v *view, may asked) bool {
	scripted := o.script.lines > 0 && v.exit == o.script.exit
	killed := may.kill || may.podStop
	switch {
	case may.shimDied && v.reason == shimDied:
		return v.exit == codeKilled || v.exit == codeUnknown
	case !o.ran: // killed before it was started
		return killed || may.shimDied
	case v.exit == 0:
		return v.reason == "Completed" && (scripted || may.term)
	case v.exit == codeKilled:
		return v.reason == "Error" && killed
	case v.exit == codeEarly && may.term:
		return v.reason == "Error"
	}
	return v.reason == "Error" && scripted
}

// same says whether what was seen is what was seen before, if it was.
func same(before *int64, now int64) bool {
	if *before == 0 {
		*before = now
	}
	return *before == now && now != 0
}

func (s *state) at(slot int) *object {
	if slot == thePod {
		return &s.pod
	}
	return &s.containers[slot]
}

// is says whether an object is there and has that id. An object whose id nobody knows yet
// has it from now on.
func (s *state) is(o *object, id string) bool {
	if o.phase != absent && o.id == unknown && !s.isGone(id) {
		o.id = id
	}
	return o.phase != absent && o.id == id
}

func (s *state) isGone(id string) bool { return slices.Contains(strings.Fields(s.gone), id) }

func (s *state) remove(o *object) {
	if o.phase != absent && o.id != unknown {
		s.gone += o.id + " "
	}
	*o = object{}
}

func (s *state) removePod() {
	for i := range s.containers {
		s.remove(&s.containers[i])
	}
	s.remove(&s.pod)
}
