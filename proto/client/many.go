package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// AtOnce calls f for many containers at the same time, so that a few silent shims
// cost the time of one.
func AtOnce(dirs []rundir.Dir, f func(i int, dir rundir.Dir)) {
	slots := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i, d := range dirs {
		slots <- struct{}{}
		wg.Go(func() {
			f(i, d)
			<-slots
		})
	}
	wg.Wait()
}

// PastOf gives what has happened so far to many containers, in the order of time,
// and the last event of each. errs says, for each, why its events cannot be read.
func PastOf(ctx context.Context, dirs []rundir.Dir) (all, last []Event, errs []error) {
	past := make([][]Event, len(dirs))
	last, errs = make([]Event, len(dirs)), make([]error, len(dirs))
	AtOnce(dirs, func(i int, dir rundir.Dir) {
		c := New(dir)
		defer c.Close()
		past[i], errs[i] = c.Past(ctx)
	})
	for i, events := range past {
		if n := len(events); n > 0 {
			last[i] = events[n-1]
		}
	}
	all = slices.Concat(past...)
	slices.SortStableFunc(all, func(x, y Event) int { return x.At.Compare(y.At) })
	return all, last, errs
}

// FollowAll calls f with the events of containers as they come, after the last ones
// of dirs. It ends with the last container, with ctx, or with an error of f. If more
// is not nil it lists all containers, once a second, and new ones are followed too;
// then it does not end by itself.
func FollowAll(ctx context.Context, dirs []rundir.Dir, last []Event, more func() ([]rundir.Dir, error),
	f func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, ended := make(chan Event), make(chan struct{})
	known := map[rundir.Dir]bool{}
	follow := func(dir rundir.Dir, from Event) {
		known[dir] = true
		go followOne(ctx, dir, from, events, ended)
	}
	for i, dir := range dirs {
		follow(dir, last[i])
	}
	rescan := time.NewTicker(time.Second)
	defer rescan.Stop()
	for live := len(dirs); live > 0 || more != nil; {
		select {
		case e := <-events:
			if err := f(e); err != nil {
				return err
			}
		case <-ended:
			live--
		case <-ctx.Done():
			return ctx.Err()
		case <-rescan.C:
			if more == nil {
				continue
			}
			dirs, err := more()
			if err != nil {
				return err
			}
			for _, dir := range slices.DeleteFunc(dirs, func(d rundir.Dir) bool { return known[d] }) {
				follow(dir, Event{})
			}
		}
	}
	return nil
}

// followOne sends the events of one container, and then to ended. It ends with ctx.
func followOne(ctx context.Context, dir rundir.Dir, from Event, events chan<- Event, ended chan<- struct{}) {
	c := New(dir)
	defer c.Close()
	if from.Type != Exited {
		c.Follow(ctx, from.Seq, func(e Event) { send(ctx, events, e) })
	}
	send(ctx, ended, struct{}{})
}

// send gives up when ctx is done.
func send[T any](ctx context.Context, to chan<- T, v T) {
	select {
	case to <- v:
	case <-ctx.Done():
	}
}

// ErrUser says that a user is not given as Change wants it.
var ErrUser = errors.New("want numbers, UID or UID:GID")

// Change sets environment and user of a process to those of the container, with
// changes: KEY=VALUE each, and UID or UID:GID. Without any, the shim does. Names of
// users are those of the container's files, which only the container should read.
func Change(p *specs.Process, dir rundir.Dir, env []string, user string) error {
	if len(env) == 0 && user == "" {
		return nil
	}
	own, err := Process(dir)
	if err != nil {
		return err
	}
	p.Env, p.User = own.Env, own.User
	for _, e := range env {
		key, _, _ := strings.Cut(e, "=")
		p.Env = slices.DeleteFunc(p.Env, func(old string) bool { return strings.HasPrefix(old, key+"=") })
		p.Env = append(p.Env, e)
	}
	if user == "" {
		return nil
	}
	uid, gid, both := strings.Cut(user, ":")
	if !both {
		gid = fmt.Sprint(p.User.GID)
	}
	u, errU := strconv.ParseUint(uid, 10, 32)
	g, errG := strconv.ParseUint(gid, 10, 32)
	if errU != nil || errG != nil {
		return ErrUser
	}
	p.User.UID, p.User.GID, p.User.AdditionalGids = uint32(u), uint32(g), []uint32{uint32(g)}
	return nil
}
