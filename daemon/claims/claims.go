// Package claims keeps the names that are taken, from the first request for one
// until its object is gone. It makes creation idempotent: a repeated request
// joins the first one or gets its result, so a kubelet that gave up waiting and
// asks again never reads that the name is reserved.
package claims

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// createLimit bounds an attempt to create a pod or a container. It is longer than
// the kubelet's patience, and no shorter than the shim's with the OCI runtime.
const createLimit = 5 * time.Minute

// unclaimedLimit is for how long an object is kept whose creator gave up waiting. A
// kubelet asks again within two minutes.
const unclaimedLimit = 5 * time.Minute

// Name is a name and what it is asked for with.
type Name struct {
	Name        string
	Group       string // the pod of a container, for Await
	Fingerprint string // of the request; empty: the name is only waited for
}

// Creation is how the object of a name is made. Nobody knows of it before somebody
// who asked for it gets its id: a kubelet that gave up waiting would otherwise find
// it in a list, and make another one beside it.
type Creation struct {
	// Make makes the object.
	Make func(ctx context.Context, c *Claim) error
	// Give makes it known, before the first caller gets its id. It may be called
	// again after an error.
	Give func(ctx context.Context) error
	// Remove removes it, as nobody came for it.
	Remove func(ctx context.Context) error
}

// Claim is a name that is taken.
type Claim struct {
	Name
	ID    string
	Since time.Time

	done chan struct{} // closed when the attempt is over
	err  error         // why it failed; set before done is closed

	making  Creation
	waiting atomic.Int32  // callers that wait for the object
	giving  Lock          // held by whoever gives the object, or withdraws it
	given   chan struct{} // closed when somebody got the object; under giving
	removed bool          // nobody gets it any more; guarded by giving

	mu    sync.Mutex
	stage step.Step // what the attempt has reached
}

// errAgain ends a claim that was undone: whoever waits for it makes a new attempt.
var errAgain = errors.New("undone")

// NewClaim makes a claim that no table knows, for what nobody else can ask for.
func NewClaim(n Name, id string) *Claim {
	return &Claim{
		Name:   n,
		ID:     id,
		Since:  time.Now(),
		done:   make(chan struct{}),
		giving: NewLock(),
		given:  make(chan struct{}),
		stage:  "beginning",
	}
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

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Table is the names of a daemon. Its methods may be called at the same time.
type Table struct {
	log       *slog.Logger
	unclaimed time.Duration  // for how long what nobody came for is kept
	work      sync.WaitGroup // attempts, and what waits for somebody
	quit      chan struct{}  // closed by Close

	mu     sync.Mutex
	claims map[string]*Claim
	closed bool
}

// NewTable makes a table without names.
func NewTable(log *slog.Logger) *Table {
	return &Table{log: log, unclaimed: unclaimedLimit, quit: make(chan struct{}), claims: map[string]*Claim{}}
}

// Close lets no attempt begin any more and returns when those under way are over.
// What nobody has come for is for the next start to remove.
func (t *Table) Close() {
	t.mu.Lock()
	if !t.closed {
		close(t.quit)
	}
	t.closed = true
	t.mu.Unlock()
	t.work.Wait()
}

// Once makes the object of a name unless that was done already, and gives its id.
// The attempt goes on when ctx ends: it belongs to the name, not to the caller. What
// it has made waits for somebody to ask again, and is removed when nobody does. The
// same name with another fingerprint is kind.Exists, as long as somebody has the object
// or waits for it; else it takes the place of what nobody came for.
func (t *Table) Once(ctx context.Context, n Name, making Creation) (string, error) {
	for {
		c, err := t.join(n, making)
		if err != nil {
			return "", err
		}
		if c.Fingerprint != "" && c.Fingerprint != n.Fingerprint {
			if err := t.replace(ctx, c); err != nil {
				return "", err
			}
			continue
		}
		if err = c.await(ctx); err != errAgain {
			return c.ID, err
		}
	}
}

// await waits for an attempt and makes the object known. It is errAgain if that is nobody's
// any more.
func (c *Claim) await(ctx context.Context) error {
	c.waiting.Add(1)
	defer c.waiting.Add(-1)
	if err := c.over(ctx); err != nil {
		return err
	}
	if c.err != nil { // written before the attempt was over
		return c.err
	}
	return c.give(ctx)
}

// over waits until the attempt is over.
func (c *Claim) over(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return kind.Errorf(kind.Unavailable,
			"%s has been at %q for %s and goes on; ask again for its result: %w",
			c.Name.Name, c.reached(), time.Since(c.Since).Round(time.Millisecond), ctx.Err())
	}
}

// replace removes what was made of another config, when that is done, if nobody came for it. A
// kubelet that gave up waiting may ask again with another one: a plugin of the network has
// changed the annotations of the pod meanwhile.
func (t *Table) replace(ctx context.Context, c *Claim) error {
	exists := func() error {
		if c.waiting.Load() == 0 && !closed(c.given) {
			return nil
		}
		return kind.Errorf(kind.Exists,
			"metadata: %s exists already, as %s, with another config: remove it, or ask for another attempt",
			c.Name.Name, c.ID)
	}
	if err := exists(); err != nil {
		return err
	}
	if err := c.over(ctx); err != nil || c.err != nil {
		return err // a name whose attempt has failed is free
	}
	if err := exists(); err != nil {
		return err
	}
	remove := t.withdraw(ctx, c)
	if remove == nil {
		return ctx.Err() // or somebody has it by now
	}
	t.log.Info("removing what was made and is asked for with another config", "name", c.Name.Name, "id", c.ID)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createLimit)
	defer cancel()
	return remove(ctx)
}

// give makes the object known. It is errAgain if nobody came for it in time.
func (c *Claim) give(ctx context.Context) error {
	if err := c.giving.Lock(ctx, c.Name.Name); err != nil {
		return err
	}
	defer c.giving.Unlock()
	switch {
	case c.removed:
		return errAgain
	case closed(c.given):
		return nil
	}
	if err := ctx.Err(); err != nil { // nobody would get the answer
		return kind.Errorf(kind.Unavailable, "%s is there, ask again for it: %w", c.Name.Name, err)
	}
	if err := c.making.Give(ctx); err != nil {
		return err
	}
	close(c.given)
	return nil
}

// join gives the claim of a name, and begins an attempt if there is none.
func (t *Table) join(n Name, making Creation) (*Claim, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.claims[n.Name]; c != nil {
		return c, nil
	}
	if t.closed {
		return nil, kind.Errorf(kind.Unavailable, "the daemon is shutting down")
	}
	c := NewClaim(n, NewID())
	c.making = making
	t.claims[n.Name] = c
	t.work.Go(func() {
		if t.attempt(c) {
			t.expire(c)
		}
	})
	return c, nil
}

// attempt says whether there is an object now.
func (t *Table) attempt(c *Claim) bool {
	ctx, cancel := context.WithTimeout(context.Background(), createLimit)
	defer cancel()
	c.err = c.making.Make(ctx, c)
	if c.err != nil {
		t.log.Warn("creation failed", "name", c.Name.Name, "id", c.ID, "reached", c.reached(), "error", c.err)
		t.Release(c.Name.Name, c.ID)
	}
	close(c.done)
	return c.err == nil
}

// expire removes an object that nobody came for. A request for its name that comes
// meanwhile waits for that and begins afresh.
func (t *Table) expire(c *Claim) {
	timer := time.NewTimer(t.unclaimed)
	defer timer.Stop()
	select {
	case <-c.given:
		return
	case <-t.quit:
		return
	case <-timer.C:
	}
	ctx, cancel := context.WithTimeout(context.Background(), createLimit)
	defer cancel()
	remove := t.withdraw(ctx, c)
	if remove == nil {
		return
	}
	t.log.Warn("removing what was made and nobody asked for again", "name", c.Name.Name, "id", c.ID)
	if err := remove(ctx); err != nil {
		t.log.Error("cannot remove what nobody asked for", "name", c.Name.Name, "id", c.ID, "error", err)
	}
}

// withdraw takes an object away from those who may ask for it, and gives the
// function that removes it; nil if it is somebody's, or gone.
func (t *Table) withdraw(ctx context.Context, c *Claim) func(context.Context) error {
	if err := c.giving.Lock(ctx, c.Name.Name); err != nil {
		return nil
	}
	defer c.giving.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if closed(c.given) || t.claims[c.Name.Name] != c {
		return nil
	}
	c.removed = true
	delete(t.claims, c.Name.Name)
	return t.undoLocked(c.Name, c.ID, c.making.Remove)
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
	close(c.given)
	t.claims[n.Name] = c
	return true
}

// Undo takes the name of a creation that was never acknowledged. The function it
// returns runs undo and gives the name back; a request for the name waits for
// that and then begins afresh. Undo may find the name taken, by an object that
// has it rightly, and leaves it alone then.
func (t *Table) Undo(n Name, id string, undo func(context.Context) error) func(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.undoLocked(n, id, undo)
}

func (t *Table) undoLocked(n Name, id string, undo func(context.Context) error) func(context.Context) error {
	n.Fingerprint = ""
	c := NewClaim(n, id)
	if t.claims[n.Name] == nil {
		t.claims[n.Name] = c
	}
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
		if c.Group == group && !closed(c.done) {
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
