package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// A claim is a name that is taken, from the first request for it until the
// object is gone. It makes creation idempotent: a repeated request joins the
// first one or gets its result, so a kubelet that gave up waiting and asks again
// never reads "the name is reserved".
type claim struct {
	name        string
	id          string
	fingerprint string // empty while the name is only waited for
	podID       string // of a container
	since       time.Time
	done        chan struct{} // closed when the attempt is over
	err         error         // why it failed; set before done is closed
	stage       string        // what the attempt is at; guarded by Daemon.mu
}

// errAgain ends a claim that was undone by a restart: whoever waits on it makes
// a new attempt.
var errAgain = errors.New("undone")

// enter notes what an attempt is at, for those who wait for it.
func (d *Daemon) enter(c *claim, stage string) {
	d.mu.Lock()
	c.stage = stage
	d.mu.Unlock()
}

// once runs create for a name unless it was run already, and gives the id. The
// attempt goes on when ctx ends: it belongs to the name, not to the caller.
func (d *Daemon) once(ctx context.Context, name, podID, fingerprint string, create func(context.Context, *claim) error) (string, error) {
	for {
		d.mu.Lock()
		c, taken := d.claims[name]
		if !taken {
			if d.closing {
				d.mu.Unlock()
				return "", errorf(ErrUnavailable, "the daemon is shutting down")
			}
			c = newClaim(name, podID, fingerprint)
			d.claims[name] = c
			d.work.Add(1)
			go func() {
				defer d.work.Done()
				d.attempt(c, create)
			}()
		}
		stage := c.stage
		d.mu.Unlock()
		if c.fingerprint != "" && c.fingerprint != fingerprint {
			return "", errorf(ErrExists, "metadata: %s exists already, as %s, with another config: remove it, or ask for another attempt", name, c.id)
		}
		select {
		case <-c.done:
			if c.err == errAgain {
				continue
			}
			return c.id, c.err
		case <-ctx.Done():
			return "", errorf(ErrUnavailable, "%s has been at %q for %s and goes on; ask again for its result: %w",
				name, stage, time.Since(c.since).Round(time.Millisecond), ctx.Err())
		}
	}
}

func newClaim(name, podID, fingerprint string) *claim {
	return &claim{name: name, id: newID(), podID: podID, fingerprint: fingerprint, since: time.Now(),
		done: make(chan struct{}), stage: "begin"}
}

// createLimit bounds an attempt to create a pod or a container. It is longer
// than the kubelet's patience, and no shorter than the shim's with the runtime.
const createLimit = 5 * time.Minute

func (d *Daemon) attempt(c *claim, create func(context.Context, *claim) error) {
	ctx, cancel := context.WithTimeout(context.Background(), createLimit)
	defer cancel()
	c.err = create(ctx, c)
	if c.err != nil {
		d.log.Warn("creation failed", "name", c.name, "id", c.id, "error", c.err)
		d.release(c)
	}
	close(c.done)
}

// settle takes a name for an object that was found at the start. It is false if
// the name is taken.
func (d *Daemon) settle(name, podID, id, fingerprint string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, taken := d.claims[name]; taken {
		return false
	}
	c := newClaim(name, podID, fingerprint)
	c.id = id
	close(c.done)
	d.claims[name] = c
	return true
}

// release gives a name back.
func (d *Daemon) release(c *claim) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.claims[c.name] == c {
		delete(d.claims, c.name)
	}
}

// releaseName gives back the name of an object that is gone.
func (d *Daemon) releaseName(name, id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.claims[name]; c != nil && c.id == id {
		delete(d.claims, name)
	}
}

// newID makes the id of a pod or container: 64 hex digits, the form that log
// collectors and monitors look for in file and cgroup names.
func newID() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// oplock is held by whoever changes an object. Unlike a mutex it can be waited
// for with a deadline.
type oplock chan struct{}

func newOplock() oplock { return make(oplock, 1) }

func (l oplock) lock(ctx context.Context, what string) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errorf(ErrUnavailable, "another call is at work on %s: %w", what, ctx.Err())
	}
}

func (l oplock) unlock() { <-l }

func shortID(id string) string { return id[:min(13, len(id))] }

func podName(m interface {
	GetName() string
	GetNamespace() string
	GetUid() string
	GetAttempt() uint32
}) string {
	return fmt.Sprintf("pod %s/%s uid %s attempt %d", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

func containerName(podID string, m interface {
	GetName() string
	GetAttempt() uint32
}) string {
	return fmt.Sprintf("container %s attempt %d of pod %s", m.GetName(), m.GetAttempt(), shortID(podID))
}
