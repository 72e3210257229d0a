package claims

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func newTable() *Table { return NewTable(slog.New(slog.DiscardHandler)) }

func nothing(context.Context) error { return nil }

// by is a creation with nothing to do but to make.
func by(make func(context.Context, *Claim) error) Creation {
	return Creation{Make: make, Give: nothing, Remove: nothing}
}

var succeed = by(func(context.Context, *Claim) error { return nil })

func TestOnce(t *testing.T) {
	table, ctx := newTable(), t.Context()
	same := Name{Name: "x", Fingerprint: "same"}
	begun, proceed := make(chan struct{}), make(chan struct{})
	runs := 0
	create := by(func(_ context.Context, c *Claim) error {
		runs++
		c.Reach(step.PodRecord)
		close(begun)
		<-proceed
		return nil
	})
	type result struct {
		id  string
		err error
	}
	results := make(chan result, 2)
	ask := func() {
		id, err := table.Once(ctx, same, create)
		results <- result{id, err}
	}
	go ask()
	<-begun
	awaited(t, table, "x")
	go ask()

	// A caller that gives up leaves the attempt going, and learns what it is at.
	short, cancel := context.WithCancel(ctx)
	cancel()
	_, err := table.Once(short, same, create)
	if !errors.Is(err, kind.Unavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("impatient caller: %v", err)
	}
	if _, err := table.Once(ctx, Name{Name: "x", Fingerprint: "other"}, create); !errors.Is(err, kind.Exists) {
		t.Errorf("another config under the name: %v", err)
	}
	close(proceed)
	a, b := <-results, <-results
	if a.err != nil || b.err != nil || a.id != b.id || runs != 1 {
		t.Errorf("two callers got %v and %v from %d attempts", a, b, runs)
	}
	// The name is taken until the object is gone.
	if id, err := table.Once(ctx, same, Creation{}); err != nil || id != a.id {
		t.Errorf("later request: %s, %v", id, err)
	}
	table.Release("x", a.id)
	boom := errors.New("boom")
	_, err = table.Once(ctx, Name{Name: "x", Fingerprint: "third"}, by(func(context.Context,
		*Claim) error {
		return boom
	}))
	if !errors.Is(err, boom) {
		t.Errorf("failing attempt: %v", err)
	}
	if _, err := table.Once(ctx, Name{Name: "x", Fingerprint: "fourth"}, succeed); err != nil {
		t.Errorf("a failed attempt keeps the name: %v", err)
	}
	table.Close()
	if _, err := table.Once(ctx, Name{Name: "y"}, succeed); !errors.Is(err, kind.Unavailable) {
		t.Errorf("a closed table: %v", err)
	}
}

// awaited returns when a caller waits for the object of a name.
func awaited(t *testing.T, table *Table, name string) {
	t.Helper()
	must.Come(t, "somebody waits for "+name, func() bool {
		table.mu.Lock()
		defer table.mu.Unlock()
		c := table.claims[name]
		return c != nil && c.waiting.Load() > 0
	})
}

// abandon has a creation finished whose only caller has given up.
func abandon(t *testing.T, table *Table, n Name, making Creation) {
	t.Helper()
	gone, cancel := context.WithCancel(t.Context())
	made := make(chan struct{})
	proceed := make(chan struct{})
	given := make(chan error)
	go func() {
		_, err := table.Once(gone, n, Creation{
			Make:   func(context.Context, *Claim) error { close(made); <-proceed; return nil },
			Give:   making.Give,
			Remove: making.Remove,
		})
		given <- err
	}()
	<-made
	cancel()
	if err := <-given; !errors.Is(err, kind.Unavailable) {
		t.Fatalf("a caller that gave up: %v", err)
	}
	close(proceed)
}

// What a caller did not wait for is given to the next one, once it can be.
func TestGivenToWhoeverAsksAgain(t *testing.T) {
	table, n := newTable(), Name{Name: "x", Fingerprint: "f"}
	full, gives := errors.New("the disk is full"), 0
	abandon(t, table, n, Creation{
		Give: func(context.Context) error {
			if gives++; gives == 1 {
				return full
			}
			return nil
		},
		Remove: func(context.Context) error { t.Error("it was removed"); return nil },
	})
	if _, err := table.Once(t.Context(), n, Creation{}); !errors.Is(err, full) {
		t.Errorf("it could not be made known: %v", err)
	}
	one, err := table.Once(t.Context(), n, Creation{})
	two, err2 := table.Once(t.Context(), n, Creation{})
	if err != nil || err2 != nil || one != two || one == "" || gives != 2 {
		t.Errorf("got %q, %v and %q, %v after %d gives", one, err, two, err2, gives)
	}
	table.Close()
}

// What nobody comes for is removed, and a request for its name waits for that.
func TestRemovedWhenNobodyAsksAgain(t *testing.T) {
	for name, failure := range map[string]error{"removed": nil, "not removed": errors.New("busy")} {
		t.Run(name, func(t *testing.T) {
			table, n := newTable(), Name{Name: "x", Fingerprint: "f"}
			table.unclaimed = time.Millisecond
			removing, proceed := make(chan struct{}), make(chan struct{})
			abandon(t, table, n, Creation{
				Give:   func(context.Context) error { t.Error("it was given to nobody"); return nil },
				Remove: func(context.Context) error { close(removing); <-proceed; return failure },
			})
			<-removing
			table.unclaimed = time.Hour // the next one is kept until its caller has it
			runs := 0
			id := make(chan string)
			go func() {
				got, err := table.Once(t.Context(), n, by(func(context.Context, *Claim) error { runs++; return nil }))
				if err != nil {
					t.Error(err)
				}
				id <- got
			}()
			close(proceed)
			if got := <-id; got == "" || runs != 1 {
				t.Errorf("the next request got %q from %d attempts", got, runs)
			}
			table.Close()
		})
	}
}

// Another config takes the place of what nobody came for, once that is made, and not of what
// somebody has or waits for.
func TestReplacesWhatNobodyHas(t *testing.T) {
	table, other := newTable(), Name{Name: "x", Fingerprint: "other"}
	gone, cancel := context.WithCancel(t.Context())
	making, proceed, removed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	first := make(chan error)
	go func() {
		_, err := table.Once(gone, Name{Name: "x", Fingerprint: "first"}, Creation{
			Make:   func(context.Context, *Claim) error { close(making); <-proceed; return nil },
			Give:   func(context.Context) error { t.Error("it was given to nobody"); return nil },
			Remove: func(context.Context) error { close(removed); return nil },
		})
		first <- err
	}()
	<-making
	awaited(t, table, "x")
	if _, err := table.Once(t.Context(), other, succeed); !errors.Is(err, kind.Exists) {
		t.Errorf("somebody waits for the first one, and another config gets %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, kind.Unavailable) {
		t.Errorf("a caller that gave up: %v", err)
	}
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := table.Once(impatient, other, succeed); !errors.Is(err, kind.Unavailable) {
		t.Errorf("the first one is still being made, and an impatient caller gets %v", err)
	}
	second := make(chan string)
	go func() {
		id, err := table.Once(t.Context(), other, by(func(context.Context, *Claim) error { <-removed; return nil }))
		if err != nil {
			t.Error(err)
		}
		second <- id
	}()
	close(proceed)
	id := <-second
	if again, err := table.Once(t.Context(), other, Creation{}); err != nil || again != id || id == "" {
		t.Errorf("got %q, and then %q, %v", id, again, err)
	}
	if _, err := table.Once(t.Context(), Name{Name: "x", Fingerprint: "third"}, succeed); !errors.Is(err, kind.Exists) {
		t.Errorf("somebody has the second one, and another config gets %v", err)
	}
	busy := errors.New("busy")
	abandon(t, table, Name{Name: "y", Fingerprint: "first"}, Creation{Remove: func(context.Context) error { return busy }})
	if _, err := table.Once(t.Context(), Name{Name: "y", Fingerprint: "other"}, succeed); !errors.Is(err, busy) {
		t.Errorf("what cannot be removed: %v", err)
	}
	table.Close()
}

// A closed table waits for nobody to come.
func TestCloseKeepsWhatNobodyHas(t *testing.T) {
	table := newTable()
	abandon(t, table, Name{Name: "x"}, Creation{
		Remove: func(context.Context) error { t.Error("it was removed"); return nil },
	})
	table.Close()
	table.Close()
}

// A request for a name whose creation is being undone waits and begins afresh.
func TestOnceWaitsForUndo(t *testing.T) {
	table := newTable()
	proceed := make(chan struct{})
	undo := table.Undo(Name{Name: "x"}, "old", func(context.Context) error { <-proceed; return nil })
	go undo(t.Context())
	got := make(chan string)
	go func() {
		id, err := table.Once(t.Context(), Name{Name: "x", Fingerprint: "same"}, succeed)
		if err != nil {
			t.Error(err)
		}
		got <- id
	}()
	close(proceed)
	if id := <-got; id == "old" || id == "" {
		t.Errorf("got id %q", id)
	}
}

// An object that was found has its name, also when a creation under that name is
// undone.
func TestTake(t *testing.T) {
	table := newTable()
	n := Name{Name: "x", Fingerprint: "f"}
	if !table.Take(n, "one") || table.Take(n, "two") {
		t.Error("a name was given twice, or not at all")
	}
	if err := table.Undo(n, "three", func(context.Context) error { return nil })(t.Context()); err != nil {
		t.Error(err)
	}
	if id, err := table.Once(t.Context(), n, Creation{}); err != nil || id != "one" {
		t.Errorf("got %s, %v", id, err)
	}
}

func TestAwait(t *testing.T) {
	table := newTable()
	begun, proceed := make(chan struct{}), make(chan struct{})
	go table.Once(t.Context(), Name{Name: "c", Group: "pod"}, by(func(context.Context, *Claim) error {
		close(begun)
		<-proceed
		return nil
	}))
	<-begun
	short, cancel := context.WithCancel(t.Context())
	cancel()
	if err := table.Await(short, "pod"); !errors.Is(err, kind.Unavailable) {
		t.Errorf("while a creation is under way: %v", err)
	}
	if err := table.Await(short, "another"); err != nil {
		t.Errorf("another pod: %v", err)
	}
	close(proceed)
	if err := table.Await(t.Context(), "pod"); err != nil {
		t.Error(err)
	}
}

func TestLockGivesUp(t *testing.T) {
	l := NewLock()
	must.Succeed(t, l.Lock(t.Context(), "x"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := l.Lock(ctx, "x"); !errors.Is(err, kind.Unavailable) {
		t.Errorf("got %v", err)
	}
	l.Unlock()
	if err := l.Lock(t.Context(), "x"); err != nil {
		t.Error(err)
	}
}
