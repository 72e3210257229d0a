package orders

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// call is one call of a history, or one object that an answer has shown.
type call struct {
	client int
	verb   verb
	slot   int    // which container of the pod, or thePod
	pod    string // the id of the pod, as far as the caller knows it
	id     string // of the object that is named; empty: a creation, or it was a list that has it not
	script script // of a creation
	shares int64  // of an update
	grace  int64  // of a stop, in seconds

	began, ended int64 // nanoseconds of the wall clock
	code         codes.Code
	failed       bool   // no answer, or one that leaves open what happened
	text         string // of the error
	got          string // the id that a creation has answered with
	seen         *view  // nil: it is not there
	may          asked
}

// never is the end of a call without an answer.
const never = math.MaxInt64

// id2 is the id of what was created; a creation without an answer has one that nobody knows.
func (c *call) id2() string { return cmp.Or(c.got, unknown) }

// finish takes the answer of a call.
func (c *call) finish(err error) {
	c.ended = time.Now().UnixNano()
	switch c.code = status.Code(err); c.code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown, codes.Internal, codes.Aborted,
		codes.ResourceExhausted:
		c.failed = true
	}
	if err != nil {
		c.text = status.Convert(err).Message()
	}
}

func short(id string) string { return id[:min(len(id), 8)] }

func (c *call) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", c.verb)
	if c.slot == thePod {
		fmt.Fprintf(&b, " pod %s", short(c.id))
	} else {
		fmt.Fprintf(&b, " %c %s", 'a'+c.slot, short(c.id))
	}
	switch c.verb {
	case create:
		fmt.Fprintf(&b, " %+v", c.script)
	case update:
		fmt.Fprintf(&b, " shares=%d", c.shares)
	case stop:
		fmt.Fprintf(&b, " grace=%d", c.grace)
	}
	switch {
	case c.failed:
		fmt.Fprintf(&b, " = unanswered or failed: %s %.200s", c.code, c.text)
	case c.verb == see && c.seen == nil:
		b.WriteString(" = not there")
	case c.verb == see:
		fmt.Fprintf(&b, " = %s", c.seen)
	case c.code != codes.OK:
		fmt.Fprintf(&b, " = %s %.200s", c.code, c.text)
	default:
		fmt.Fprintf(&b, " = OK %s", short(c.got))
	}
	if c.may != (asked{}) {
		fmt.Fprintf(&b, " (%s)", c.may)
	}
	return b.String()
}

func (o object) String() string {
	if o.phase == absent {
		return "none"
	}
	s := fmt.Sprintf("%s %s shares=%d", short(o.id), o.phase, o.shares)
	if o.finished != 0 {
		s += fmt.Sprintf(" exit=%d %s", o.exit, o.reason)
	}
	return s
}

func (s state) String() string {
	return fmt.Sprintf("pod %v, a %v, b %v", s.pod, s.containers[0], s.containers[1])
}

// history is all calls to one pod name. Its methods may be called by several goroutines.
type history struct {
	mu     sync.Mutex
	calls  []*call
	asked  map[string]asked // by id of a pod or container
	making [2]map[*call]bool
	died   *sync.Map // the ids of all containers whose shim was killed, of any pod
}

func newHistory(died *sync.Map) *history {
	return &history{asked: map[string]asked{}, making: [2]map[*call]bool{{}, {}}, died: died}
}

// begin notes what a call asks for, before it is made.
func (h *history) begin(c *call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.began = time.Now().UnixNano()
	a := h.asked[c.id]
	switch c.verb {
	default:
		return
	case stop:
		a.term, a.kill = a.term || c.grace > 0, true
	case remove:
		a.kill, a.remove = true, true
	case stopPod:
		a.podStop = true
	case removePod:
		a.podStop, a.remove = true, true
	case create:
		for other := range h.making[c.slot] {
			other.may.creating, c.may.creating = true, true
		}
		h.making[c.slot][c] = true
		return
	}
	if c.id != noSuchID {
		h.asked[c.id] = a
	}
}

// end records a call that was answered, or will not be.
func (h *history) end(c *call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.verb == create {
		delete(h.making[c.slot], c)
	}
	c.may = h.mayLocked(c)
	h.calls = append(h.calls, c)
}

// forget is end for a call that was never sent.
func (h *history) forget(c *call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.verb == create {
		delete(h.making[c.slot], c)
	}
}

// mayLocked is what was asked of the object of a call so far. What was asked of its pod was asked of
// it, too.
func (h *history) mayLocked(c *call) asked {
	may := asked{creating: c.may.creating}
	ids := []string{c.id, c.pod}
	if c.seen != nil {
		ids = append(ids, c.seen.id)
	}
	if c.verb == runPod || c.slot == thePod && c.id == "" { // whichever pod has the name
		for id := range h.asked {
			ids = append(ids, id)
		}
	}
	for _, id := range ids {
		a := h.asked[id]
		may.term = may.term || a.term
		may.kill = may.kill || a.kill
		may.remove = may.remove || a.remove
		may.podStop = may.podStop || a.podStop
		_, died := h.died.Load(id)
		may.shimDied = may.shimDied || died
	}
	if c.slot != thePod && c.id == "" && c.seen == nil { // a list has none of that name, whichever it was
		for _, a := range h.asked {
			may.remove = may.remove || a.remove
		}
	}
	return may
}

// all gives the calls in the order of their beginnings. Of a call without an answer it says until when
// it can have an effect: until the object that it names is known to be gone.
func (h *history) all() []*call {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := slices.Clone(h.calls)
	gone := map[string]int64{}
	for _, c := range list {
		proof := !c.failed && (c.code == codes.NotFound || c.verb == remove || c.verb == removePod ||
			c.verb == see && c.seen == nil)
		id := c.id
		if c.verb == create {
			id = c.pod
		}
		if at, ok := gone[id]; proof && id != "" && (!ok || c.ended < at) {
			gone[id] = c.ended
		}
	}
	list = slices.DeleteFunc(list, func(c *call) bool {
		return c.failed && (c.verb == exec || c.verb == reopen) // whatever happened, the state is the same
	})
	for _, c := range list {
		if !c.failed {
			continue
		}
		c.ended = never
		c.may = h.mayLocked(c)
		for _, id := range []string{c.id, c.pod} {
			if at, ok := gone[id]; ok && id != "" {
				c.ended = min(c.ended, max(at, c.began))
			}
		}
	}
	slices.SortStableFunc(list, func(a, b *call) int { return cmp.Compare(a.began, b.began) })
	return useful(list)
}

// useful leaves out calls without an answer that cannot explain more than earlier ones like them do: what is
// done once for an id needs one of them, and a creation one for each removal, and one more.
func useful(list []*call) []*call {
	type like struct {
		verb    verb
		slot    int
		pod, id string
		script  script
	}
	removals := 0
	for _, c := range list {
		if c.verb == remove || c.verb == removePod {
			removals++
		}
	}
	seen := map[like]int{}
	return slices.DeleteFunc(list, func(c *call) bool {
		if !c.failed || c.verb == update {
			return false
		}
		key := like{c.verb, c.slot, c.pod, c.id, c.script}
		if c.verb == stop {
			key.script.variant = int(c.grace)
		}
		seen[key]++
		if c.verb == create || c.verb == runPod {
			return seen[key] > removals+1
		}
		return seen[key] > 1
	})
}

// model is the model as the checker takes it.
var model = porcupine.Model{
	Init: func() any { return state{} },
	Step: func(s, input, _ any) (bool, any) {
		next, ok := s.(state).step(input.(*call))
		return ok, next
	},
	DescribeOperation: func(input, _ any) string { return input.(*call).String() },
	DescribeState:     func(s any) string { return s.(state).String() },
}

// checkLimit bounds the search for an order. One that is found takes a moment.
const checkLimit = 3 * time.Minute

// check looks for an order of all calls in which the model allows each answer. Without one it leaves the
// history in files, and says where.
func (h *history) check(name string) error {
	list := h.all()
	ops := make([]porcupine.Operation, 0, len(list))
	for _, c := range list {
		ops = append(ops, porcupine.Operation{ClientId: c.client, Input: c, Call: c.began, Return: c.ended})
	}
	result := porcupine.CheckOperationsTimeout(model, ops, checkLimit)
	if result == porcupine.Ok {
		return nil
	}
	_, info := porcupine.CheckOperationsVerbose(model, ops, checkLimit)
	what := "no order of the calls explains the answers"
	if result == porcupine.Unknown {
		what = fmt.Sprintf("no order of the calls that explains the answers was found in %s", checkLimit)
	}
	path, err := h.leave(name, info)
	if err != nil {
		return fmt.Errorf("%s: %s (and the history cannot be written: %w)", name, what, err)
	}
	return fmt.Errorf("%s: %s\n  history: %s\n  drawn: %s", name, what, path+".txt", path+".html")
}

// leave writes a history, and the drawing of how far an order was found.
func (h *history) leave(name string, info porcupine.LinearizationInfo) (string, error) {
	dir := cmp.Or(os.Getenv("HOLDFAST_HISTORIES"), filepath.Join(os.TempDir(), "holdfast-histories"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, fmt.Sprintf("seed%d-%s", seed, name))
	if err := os.WriteFile(path+".txt", []byte(dump(h.all())), 0o644); err != nil {
		return "", err
	}
	return path, porcupine.VisualizePath(model, info, path+".html")
}

// dump is a history as text, with times in milliseconds since its beginning. What is seen again and
// again is told once.
func dump(list []*call) string {
	var b strings.Builder
	last := map[string]string{}
	for _, c := range list {
		ended, text := "never", c.String()
		if c.ended != never {
			ended = fmt.Sprintf("%.3f", float64(c.ended-list[0].began)/1e6)
		}
		if c.verb == see {
			kind := fmt.Sprint(c.client, c.slot, c.id, c.seen != nil && c.seen.whole)
			if last[kind] == text {
				continue
			}
			last[kind] = text
		}
		fmt.Fprintf(&b, "%10.3f %10s client %d: %s\n", float64(c.began-list[0].began)/1e6, ended, c.client, text)
	}
	return b.String()
}

func (v *view) String() string {
	s := fmt.Sprintf("%s %s created=%d", short(v.id), v.phase, v.created)
	if v.whole {
		s += fmt.Sprintf(" started=%d finished=%d exit=%d %s shares=%d", v.started, v.finished, v.exit, v.reason,
			v.shares)
	}
	return s
}

func (a asked) String() string {
	var names []string
	for _, f := range []struct {
		is   bool
		name string
	}{
		{a.term, "term"}, {a.kill, "kill"}, {a.remove, "remove"}, {a.podStop, "podStop"}, {a.shimDied, "shimDied"},
		{a.creating, "creating"},
	} {
		if f.is {
			names = append(names, f.name)
		}
	}
	return "asked for: " + strings.Join(names, ", ")
}
