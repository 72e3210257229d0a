package shims

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// endTimeout is how long a shim may take to end: it kills a container, writes a
// few files and has the OCI runtime clean up.
const endTimeout = 30 * time.Second

// End ends the shim of a run directory, and the container with it, and returns
// when the process is gone. No shim is no error. One that cannot be reached is
// asked to put its socket back, and killed only if it lives and says nothing:
// whoever calls End wants the container gone. What stands in the place of the
// lock and is none is removed once there is no shim.
func End(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	held, damaged := dir.Held()
	if damaged == nil && !held {
		// The common case is found out without looking at every process.
		if id, err := dir.ReadIdentity(); err == nil && !id.Shim.Alive() {
			return nil
		}
	}
	shim, err := find(ctx, dir)
	if err == nil {
		err = end(ctx, dir, c, shim)
	} else if errors.Is(err, rundir.ErrNoProcess) {
		err = nil
	}
	if err == nil && damaged != nil {
		err = os.RemoveAll(dir.Path(rundir.LockName))
	}
	return err
}

// find is Find, but it waits while there is no process and the lock is held: a
// killed process is a zombie before its last thread has let go of the lock.
func find(ctx context.Context, dir rundir.Dir) (rundir.Process, error) {
	for wait := time.Millisecond; ; wait *= 2 {
		shim, err := dir.FindShim()
		if !errors.Is(err, rundir.ErrNoProcess) {
			return shim, err
		}
		if held, lerr := dir.Held(); lerr != nil || !held {
			return shim, err
		}
		if wait > time.Second {
			return shim, fmt.Errorf("the lock of %s is held, but no process is its shim", dir)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return shim, fmt.Errorf("the lock of %s is held by a shim that is ending: %w", dir, ctx.Err())
		}
	}
}

func end(ctx context.Context, dir rundir.Dir, c *client.Client, shim rundir.Process) error {
	p, err := pidfd.Open(shim.PID, shim.Alive)
	if errors.Is(err, pidfd.ErrEnded) {
		return End(ctx, dir, c) // a zombie by now, the threads of which may still have the lock
	}
	if err != nil {
		return err
	}
	defer p.Close()
	// A call that a shim answers from memory comes first, so that silence means
	// something. Any other failure does not: a shim that is ending by itself has
	// no socket and may still be making the exit record durable.
	if err = reach(ctx, dir, c, p); err == nil {
		_, err = c.Delete(ctx, true)
	}
	silent := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
	limited, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if !silent && p.Wait(limited) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("the shim of %s (process %d) has not ended: %w", dir.ID(), shim.PID, errors.Join(ctx.Err(),
			err))
	}
	limited, cancel = context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if kerr := p.Kill(limited); kerr != nil {
		return fmt.Errorf("cannot kill the shim of %s, which does not answer: %w", dir.ID(), errors.Join(kerr, err))
	}
	return nil
}

// Reach makes sure that the shim of a run directory can be called. One whose
// socket was removed is asked to put it back, with its lock and its files. The
// error is rundir.ErrNoProcess if there is no shim, or none any more, and
// client.ErrUnreachable if it lives and says nothing for ten seconds.
func Reach(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	shim, err := dir.FindShim()
	if err != nil {
		return err
	}
	p, err := pidfd.Open(shim.PID, shim.Alive)
	if err == nil {
		defer p.Close()
		err = reach(ctx, dir, c, p)
	}
	if errors.Is(err, pidfd.ErrEnded) {
		err = fmt.Errorf("the shim of %s has ended: %w", dir.ID(), rundir.ErrNoProcess)
	}
	return err
}

// reach is Reach for a process that is held. pidfd.ErrEnded: it has ended.
func reach(ctx context.Context, dir rundir.Dir, c *client.Client, p *pidfd.Process) error {
	err := ask(ctx, dir, c)
	if err == nil || !errors.Is(err, client.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	// Nobody listens. A shim that is ending does nothing about the signal.
	if err := p.Signal(rundir.SignalReappear); err != nil {
		return err
	}
	const limit = 10 * time.Second
	giveUp := time.Now().Add(limit)
	for wait := time.Millisecond; time.Now().Before(giveUp); wait = min(2*wait, 100*time.Millisecond) {
		turn, cancel := context.WithTimeout(ctx, wait)
		ended := p.Wait(turn) == nil
		cancel()
		if ended {
			return fmt.Errorf("the shim of %s: %w", dir.ID(), pidfd.ErrEnded)
		}
		err = ask(ctx, dir, c)
		if !errors.Is(err, client.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	return fmt.Errorf("%w, and does not put its socket back within %s: %w", client.ErrUnreachable, limit, err)
}

// ask calls a shim. It connects anew as well: a connection outlives the socket that
// it was made by.
func ask(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	conn, err := dir.Dial(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", client.ErrUnreachable, err)
	}
	conn.Close()
	_, err = c.State(ctx)
	return err
}
