// Package claims keeps the names that are taken, from the first request for one
// until its object is gone. It makes creation idempotent: a repeated request
// joins the first one or gets its result, so a kubelet that gave up waiting and
// asks again never reads that the name is reserved (R21).
package claims

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// createLimit bounds an attempt to create a pod or a container. It is longer than
// the kubelet's patience, and no shorter than the shim's with the OCI runtime.
const createLimit = 5 * time.Minute

// Name is a name and what it is asked for with.
type Name struct {
	Name        string
	Group       string // the pod of a container, for Await
	Fingerprint string // of the request; empty: the name is only waited for
}

// Claim is a name that is taken.
type Claim struct {
	Name
	ID    string
	Since time.Time

	done chan struct{} // closed when the attempt is over
	err  error         // why it failed; set before done is closed

	mu    sync.Mutex
	stage step.Step // what the attempt has reached
}

// errAgain ends a claim that was undone: whoever waits for it makes a new attempt.
var errAgain = errors.New("undone")

// NewClaim makes a claim that no table knows, for what nobody else can ask for.
func NewClaim(n Name, id string) *Claim {
	return &Claim{Name: n, ID: id, Since: time.Now(), done: make(chan struct{}), stage: "beginning"}
}

// Reach notes what the attempt has reached, for those who wait for it.
func (c *Claim) Reach(s step.Step) error {
	c.mu.Lock()
	c.stage = s
	c.mu.Unlock()
	return step.Reach(s)
}

func (c *Claim) reached() step.Step {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stage
}

func (c *Claim) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Table is the names of a daemon. Its methods may be called at the same time.
type Table struct {
	log  *slog.Logger
	work sync.WaitGroup // attempts

	mu     sync.Mutex
	claims map[string]*Claim
	closed bool
}

// NewTable makes a table without names.
func NewTable(log *slog.Logger) *Table { return &Table{log: log, claims: map[string]*Claim{}} }

// Close lets no attempt begin any more and returns when those under way are over.
func (t *Table) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.work.Wait()
}

// Once runs create for a name unless it was run already, and gives the id. The
// attempt goes on when ctx ends: it belongs to the name, not to the caller. The
// same name with another fingerprint is kind.Exists.
func (t *Table) Once(ctx context.Context, n Name, create func(context.Context, *Claim) error) (string, error) {
	for {
		c, err := t.join(n, create)
		if err != nil {
			return "", err
		}
		if c.Fingerprint != "" && c.Fingerprint != n.Fingerprint {
			return "", kind.Errorf(kind.Exists,
				"metadata: %s exists already, as %s, with another config: remove it, or ask for another attempt", n.Name, c.ID)
		}
		select {
		case <-c.done:
			if c.err == errAgain {
				continue
			}
			return c.ID, c.err
		case <-ctx.Done():
			return "", kind.Errorf(kind.Unavailable, "%s has been at %q for %s and goes on; ask again for its result: %w",
				n.Name, c.reached(), time.Since(c.Since).Round(time.Millisecond), ctx.Err())
		}
	}
}

// join gives the claim of a name, and begins an attempt if there is none.
func (t *Table) join(n Name, create func(context.Context, *Claim) error) (*Claim, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.claims[n.Name]; c != nil {
		return c, nil
	}
	if t.closed {
		return nil, kind.Errorf(kind.Unavailable, "the daemon is shutting down")
	}
	c := NewClaim(n, NewID())
	t.claims[n.Name] = c
	t.work.Go(func() { t.attempt(c, create) })
	return c, nil
}

func (t *Table) attempt(c *Claim, create func(context.Context, *Claim) error) {
	ctx, cancel := context.WithTimeout(context.Background(), createLimit)
	defer cancel()
	c.err = create(ctx, c)
	if c.err != nil {
		t.log.Warn("creation failed", "name", c.Name.Name, "id", c.ID, "reached", c.reached(), "error", c.err)
		t.Release(c.Name.Name, c.ID)
	}
	close(c.done)
}

// Take takes a name for an object that exists. It is false if the name is taken.
func (t *Table) Take(n Name, id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.claims[n.Name] != nil {
		return false
	}
	c := NewClaim(n, id)
	close(c.done)
	t.claims[n.Name] = c
	return true
}

// Undo takes the name of a creation that was never acknowledged. The function it
// returns runs undo and gives the name back; a request for the name waits for
// that and then begins afresh. Undo may find the name taken, by an object that
// has it rightly, and leaves it alone then.
func (t *Table) Undo(n Name, id string, undo func(context.Context) error) func(context.Context) error {
	n.Fingerprint = ""
	c := NewClaim(n, id)
	t.mu.Lock()
	if t.claims[n.Name] == nil {
		t.claims[n.Name] = c
	}
	t.mu.Unlock()
	return func(ctx context.Context) error {
		err := undo(ctx)
		c.err = errAgain
		t.Release(n.Name, id)
		close(c.done)
		return err
	}
}

// Release gives back the name of an object that is gone.
func (t *Table) Release(name, id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.claims[name]; c != nil && c.ID == id {
		delete(t.claims, name)
	}
}

// Await waits until no attempt of a group is under way.
func (t *Table) Await(ctx context.Context, group string) error {
	for {
		busy := t.busy(group)
		if busy == nil {
			return nil
		}
		select {
		case <-busy.done:
		case <-ctx.Done():
			return kind.Errorf(kind.Unavailable, "%s is still being created: %w", busy.Name.Name, ctx.Err())
		}
	}
}

func (t *Table) busy(group string) *Claim {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.claims {
		if c.Group == group && !c.over() {
			return c
		}
	}
	return nil
}

// NewID makes the id of a pod or container: 64 hex digits, the form that log
// collectors and monitors look for in the names of files and cgroups.
func NewID() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Lock is held by whoever changes an object. Unlike a mutex it can be waited for
// with a deadline.
type Lock chan struct{}

// NewLock makes a lock that nobody holds.
func NewLock() Lock { return make(Lock, 1) }

// Lock takes the lock, or says kind.Unavailable when ctx ends first.
func (l Lock) Lock(ctx context.Context, what string) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return kind.Errorf(kind.Unavailable, "another call is at work on %s: %w", what, ctx.Err())
	}
}

// Unlock gives the lock to the next one.
func (l Lock) Unlock() { <-l }
