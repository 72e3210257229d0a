package events

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// client is one subscriber. It takes events only while it is open.
type client struct {
	cancel context.CancelFunc
	gate   chan struct{} // closed: it takes all
	got    []string
	done   chan error // the end of Serve
}

func subscribe(t *testing.T, h *Hub, open bool) *client {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &client{cancel: cancel, gate: make(chan struct{}), done: make(chan error, 1)}
	if open {
		close(c.gate)
	}
	over, end := context.WithCancel(ctx) // as a stream's, it ends with Serve
	go func() {
		defer end()
		c.done <- h.Serve(ctx, func(e Event) error {
			select {
			case <-c.gate:
				c.got = append(c.got, e.ContainerId)
				return nil
			case <-over.Done():
				return over.Err()
			}
		})
	}()
	synctest.Wait()
	return c
}

func event(id string) func() Event {
	return func() Event { return &runtimeapi.ContainerEventResponse{ContainerId: id} }
}

func numbers(from, to int) (ids []string) {
	for i := from; i < to; i++ {
		ids = append(ids, fmt.Sprint(i))
	}
	return ids
}

// In a bubble of synctest a goroutine that is left fails the test.

// Each subscriber gets all that happens while it is there, in order.
func TestServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		h.Publish(func() Event { t.Error("described without subscribers"); return nil })
		a := subscribe(t, h, true)
		b := subscribe(t, h, false)
		for i := range 10 {
			h.Publish(event(fmt.Sprint(i)))
		}
		c := subscribe(t, h, true)
		for i := 10; i < 20; i++ {
			h.Publish(event(fmt.Sprint(i)))
		}
		close(b.gate)
		synctest.Wait()
		for name, c := range map[string]struct {
			*client
			from int
		}{"a": {a, 0}, "b": {b, 0}, "c": {c, 10}} {
			if want := numbers(c.from, 20); !slices.Equal(c.got, want) {
				t.Errorf("%s got %v, want %v", name, c.got, want)
			}
		}
		b.cancel()
		if err := <-b.done; !errors.Is(err, context.Canceled) {
			t.Errorf("one that goes away: %v", err)
		}
		h.Close()
		for _, c := range []*client{a, c, subscribe(t, h, true)} {
			if err := <-c.done; !errors.Is(err, kind.Closing) {
				t.Errorf("at the end: %v", err)
			}
		}
	})
}

// One that does not keep up is ended, with an error, and gets nothing after a gap. It is
// no matter to the others.
func TestServeSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		slow, quick := subscribe(t, h, false), subscribe(t, h, true)
		const size = 1 << 20
		text := strings.Repeat("x", size)
		h.Publish(event(text)) // is being sent
		synctest.Wait()
		h.Publish(event(strings.Repeat("x", 2*maxWaiting))) // one always fits
		synctest.Wait()
		select {
		case err := <-slow.done:
			t.Fatalf("ended by one event: %v", err)
		default:
		}
		h.Publish(event(text))
		err := <-slow.done
		if !errors.Is(err, kind.Exhausted) || !strings.Contains(err.Error(), "subscribe again") {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		if len(slow.got) != 0 || len(quick.got) != 3 {
			t.Errorf("the slow one got %d events, the other one %d", len(slow.got), len(quick.got))
		}
		// What is taken makes room.
		const room = maxWaiting/size - 1
		again := subscribe(t, h, false)
		for range room {
			h.Publish(event(text))
		}
		close(again.gate)
		synctest.Wait()
		for range room {
			h.Publish(event(text))
			synctest.Wait()
		}
		if len(again.got) != 2*room {
			t.Errorf("one that takes what comes got %d events", len(again.got))
		}
		h.Close()
	})
}

func TestServeMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		var all []*client
		for range maxSubscribers {
			all = append(all, subscribe(t, h, true))
		}
		if err := <-subscribe(t, h, true).done; !errors.Is(err, kind.Exhausted) {
			t.Errorf("one too many: %v", err)
		}
		all[0].cancel()
		<-all[0].done
		one := subscribe(t, h, true)
		h.Publish(event("x"))
		synctest.Wait()
		if len(one.got) != 1 {
			t.Errorf("after another one has left: %v", one.got)
		}
		h.Close()
	})
}

// A client that is gone ends its own subscription.
func TestServeGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		gone := errors.New("gone")
		done := make(chan error)
		go func() { done <- h.Serve(t.Context(), func(Event) error { return gone }) }()
		synctest.Wait()
		h.Publish(event("x"))
		if err := <-done; err != gone {
			t.Errorf("got %v", err)
		}
	})
}

// What was found at the start comes first, to all that subscribe soon, as it is then, and
// after it what has happened since.
func TestFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		removed := false
		h.Found([]func() Event{event("1"), func() Event {
			if removed {
				return nil
			}
			return event("2")()
		}, event("3")})
		h.Publish(event("since"))
		a := subscribe(t, h, false)
		h.Publish(event("4"))
		close(a.gate)
		synctest.Wait()
		removed = true
		b := subscribe(t, h, true)
		time.Sleep(foundFor + time.Second)
		c := subscribe(t, h, true)
		h.Publish(event("5"))
		synctest.Wait()
		for _, c := range []struct {
			*client
			want string
		}{{a, "1 2 3 since 4 5"}, {b, "1 3 since 4 5"}, {c, "5"}} {
			if got := strings.Join(c.got, " "); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		}
		h.Close()
	})
}

// Of what has happened since the start the latest is kept.
func TestSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		h.Found([]func() Event{event("found")})
		for i := range 3 * maxSince {
			h.Publish(event(fmt.Sprint(i)))
		}
		c := subscribe(t, h, true)
		if want := append([]string{"found"}, numbers(2*maxSince, 3*maxSince)...); !slices.Equal(c.got, want) {
			t.Errorf("got %d events: %v", len(c.got), c.got)
		}
		h.Close()
	})
}
