// Package events tells subscribers what happens to pods and containers, in order and
// without a gap. A subscriber that cannot be told of all is not told less, but ended, with
// an error: it has to read all states anew then, as it does when it subscribes.
//
// What happened while no daemon ran, and after the start, is told as well: to each
// subscriber that comes soon after that, before anything else.
package events

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Event is a message of the CRI. Subscribers share it, so it must not be changed.
type Event = *runtimeapi.ContainerEventResponse

const (
	maxSubscribers = 32
	// maxWaiting bounds the events that wait for one subscriber, in bytes of protobuf
	// with something for each. One event always fits.
	maxWaiting = 8 << 20
	eachEvent  = 512
	// foundFor is for how long what was found at the start is told, and what has happened
	// since. maxSince bounds the events of the latter.
	foundFor = 10 * time.Minute
	maxSince = 1024
)

// Hub has the subscribers. Its lock is the last one that is taken before those of the
// managers' maps: a state changes, and is told of, under a lock of its own.
type Hub struct {
	mu      sync.Mutex
	all     map[*subscriber]struct{}
	closed  bool
	foundAt time.Time // zero: nothing is kept
	found   []func() Event
	since   []func() Event
}

// New makes a hub without subscribers.
func New() *Hub { return &Hub{all: map[*subscriber]struct{}{}} }

// subscriber is guarded by the lock of its hub.
type subscriber struct {
	waiting []sized
	bytes   int
	wake    chan struct{} // gets one when something waits
	over    chan struct{} // closed with err: nothing more is sent
	err     error
}

// sized is an event, and what it counts in bytes.
type sized struct {
	Event
	bytes int
}

func (s *subscriber) endLocked(err error) {
	if s.err == nil {
		s.err = err
		close(s.over)
		s.waiting = nil
	}
}

// Publish tells all subscribers of what describe gives. It is called under the hub's lock,
// so that the order of events is that of what they say; without subscribers it is not. For
// those who come soon it may be called again.
func (h *Hub) Publish(describe func() Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keepsLocked() {
		h.since = append(h.since, describe)
		h.since = h.since[max(0, len(h.since)-maxSince):]
	}
	if len(h.all) == 0 {
		return
	}
	e := describe()
	size := proto.Size(e) + eachEvent
	for s := range h.all {
		if len(s.waiting) > 0 && s.bytes+size > maxWaiting {
			s.endLocked(kind.Errorf(kind.Exhausted, "the subscriber does not keep up: %d events wait for it; "+
				"subscribe again, and read the states of all pods and containers then", len(s.waiting)))
			delete(h.all, s)
			continue
		}
		s.waiting = append(s.waiting, sized{e, size})
		s.bytes += size
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// keepsLocked says whether what happens is kept for those who subscribe later. When the
// time is over it forgets all that was.
func (h *Hub) keepsLocked() bool {
	if !h.foundAt.IsZero() && time.Since(h.foundAt) > foundFor {
		h.foundAt, h.found, h.since = time.Time{}, nil, nil
	}
	return !h.foundAt.IsZero()
}

// Found keeps what a daemon has found at its start that happened while none ran. Each
// describes an event as of when it is told; nil: it is not worth telling any more.
func (h *Hub) Found(all []func() Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.found, h.foundAt = all, time.Now()
}

// Close ends all subscriptions, and those that come.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.all {
		s.endLocked(kind.Errorf(kind.Closing, "the daemon shuts down"))
		delete(h.all, s)
	}
}

// Serve sends events to one subscriber until ctx ends, it does not keep up, or the hub is
// closed. A call of send that is under way when Serve returns has to end soon after.
func (h *Hub) Serve(ctx context.Context, send func(Event) error) error {
	s, found, err := h.subscribe()
	if err != nil {
		return err
	}
	defer h.leave(s)
	sent := make(chan error, 1)
	go func() { sent <- h.deliver(ctx, s, found, send) }()
	select {
	case err := <-sent:
		return err
	case <-s.over:
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *Hub) subscribe() (s *subscriber, found []func() Event, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, nil, kind.Errorf(kind.Closing, "the daemon shuts down")
	case len(h.all) >= maxSubscribers:
		return nil, nil, kind.Errorf(kind.Exhausted, "there are %d subscribers, and no more are served", maxSubscribers)
	}
	s = &subscriber{wake: make(chan struct{}, 1), over: make(chan struct{})}
	h.all[s] = struct{}{}
	h.keepsLocked()
	return s, slices.Concat(h.found, h.since), nil
}

// leave ends a subscription. Nothing is sent from then on.
func (h *Hub) leave(s *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, s)
	s.endLocked(context.Canceled)
}

// deliver sends what was found and then what waits. It ends with the subscription.
func (h *Hub) deliver(ctx context.Context, s *subscriber, found []func() Event, send func(Event) error) error {
	for _, describe := range found {
		if ctx.Err() != nil || h.over(s) {
			return ctx.Err()
		}
		if e := describe(); e != nil {
			if err := send(e); err != nil {
				return err
			}
		}
	}
	for {
		e, ok := h.next(s)
		if ok {
			if err := step.Reach(step.EventSending); err != nil {
				return kind.As(kind.Unavailable, err)
			}
			if err := send(e); err != nil {
				return err
			}
			continue
		}
		select {
		case <-s.wake:
		case <-s.over:
			return s.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *Hub) over(s *subscriber) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return s.err != nil
}

// next takes the first event that waits.
func (h *Hub) next(s *subscriber) (Event, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(s.waiting) == 0 {
		return nil, false
	}
	first := s.waiting[0]
	s.waiting[0] = sized{}
	s.waiting = s.waiting[1:]
	s.bytes -= first.bytes
	return first.Event, true
}
