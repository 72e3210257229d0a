package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// eventView is one line of `events`; its JSON is one line too.
type eventView struct {
	ID   string         `json:"id"`
	Seq  uint64         `json:"seq,omitempty"` // none: from the exit record
	At   time.Time      `json:"at"`
	Type string         `json:"type"`
	Init rundir.Process `json:"init,omitzero"`
	Exit *rundir.Exit   `json:"exit,omitempty"`
}

func newEvent(id string, e *proto.Event) eventView {
	v := eventView{ID: id, Seq: e.GetSeq(), At: wireTime(e.GetAt()), Init: process(e.GetInit()),
		Type: strings.ToLower(strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_"))}
	if e.GetExit() != nil {
		exit := exitRecord(e.GetExit(), time.Time{})
		v.Exit = &exit
	}
	return v
}

const typeExited = "exited"

func (a *app) printEvent(e eventView) error {
	if a.json {
		return json.NewEncoder(a.stdout).Encode(e)
	}
	detail := ""
	if e.Exit != nil {
		detail = "  exit code " + exitText(e.Exit)
	} else if e.Init.PID != 0 {
		detail = fmt.Sprintf("  pid %d", e.Init.PID)
	}
	return writeString(a.stdout, fmt.Sprintf("%s  %s  %s%s\n", timeText(e.At), short(e.ID), e.Type, detail))
}

func setupEvents(a *app, fs *flag.FlagSet) runFunc {
	follow := fs.Bool("f", false, "go on with what happens from now")
	return func(ctx context.Context, args []string) error {
		find := a.dirs
		if len(args) > 0 {
			var dirs []rundir.Dir
			for _, arg := range args {
				dir, err := a.dir(arg)
				if err != nil {
					return err
				}
				dirs = append(dirs, dir)
			}
			find = func() ([]rundir.Dir, error) { return dirs, nil }
		}
		dirs, err := find()
		if err != nil {
			return err
		}
		past, last := a.pastEvents(ctx, dirs)
		for _, e := range past {
			if err := a.printEvent(e); err != nil {
				return err
			}
		}
		if !*follow {
			return nil
		}
		return a.followEvents(ctx, find, last, len(args) > 0)
	}
}

// pastEvents gives what has happened so far, in the order of time, and where to
// go on with each container that has not ended.
func (a *app) pastEvents(ctx context.Context, dirs []rundir.Dir) ([]eventView, map[rundir.Dir]*cursor) {
	last := map[rundir.Dir]*cursor{}
	var mu sync.Mutex
	var all []eventView
	slots := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for _, dir := range dirs {
		c := &cursor{dir: dir}
		last[dir] = c
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			events, err := c.next(ctx, 0)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fmt.Fprintf(a.stderr, "holdfastctl: cannot read the events of %s: %v\n", short(dir.ID()), err)
			}
			all = append(all, events...)
		})
	}
	wg.Wait()
	slices.SortStableFunc(all, func(x, y eventView) int { return x.At.Compare(y.At) })
	return all, last
}

// followEvents prints events as they come. With one fixed set of containers it
// ends with the last of them.
func (a *app) followEvents(ctx context.Context, find func() ([]rundir.Dir, error), last map[rundir.Dir]*cursor, fixed bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := make(chan eventView)
	var wg sync.WaitGroup
	watch := func(c *cursor) {
		wg.Go(func() { c.watch(ctx, out) })
	}
	for _, c := range last {
		watch(c)
	}
	finished := make(chan struct{})
	if fixed {
		go func() {
			wg.Wait()
			close(finished)
		}()
	}
	rescan := time.NewTicker(time.Second)
	defer rescan.Stop()
	for {
		select {
		case e := <-out:
			if err := a.printEvent(e); err != nil {
				return err
			}
		case <-finished:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-rescan.C:
			if fixed {
				continue
			}
			dirs, err := find()
			if err != nil {
				return err
			}
			for _, dir := range dirs {
				if last[dir] == nil {
					last[dir] = &cursor{dir: dir}
					watch(last[dir])
				}
			}
			for dir := range last {
				if !slices.Contains(dirs, dir) {
					delete(last, dir) // removed; its watcher ends by itself
				}
			}
		}
	}
}

// cursor reads the events of one container. It belongs to one goroutine.
type cursor struct {
	dir   rundir.Dir
	after uint64
	ended bool
}

// next gives the events after the last ones, waiting up to wait for the first.
// Where the shim is gone it gives the exit record, once.
func (c *cursor) next(ctx context.Context, wait time.Duration) ([]eventView, error) {
	if c.ended {
		return nil, nil
	}
	held, err := c.dir.Held()
	if err != nil {
		return nil, err
	}
	if !held {
		return c.fromFiles()
	}
	s, err := connect(ctx, c.dir)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	resp, err := call(ctx, s, wait+quick, proto.ShimService.Events,
		&proto.EventsRequest{Id: c.dir.ID(), After: c.after, WaitMs: uint32(wait.Milliseconds())})
	if err != nil {
		return nil, err
	}
	var events []eventView
	for _, e := range resp.GetEvents() {
		c.after = e.GetSeq()
		v := newEvent(c.dir.ID(), e)
		c.ended = c.ended || v.Type == typeExited
		events = append(events, v)
	}
	return events, nil
}

func (c *cursor) fromFiles() ([]eventView, error) {
	exit, err := c.dir.ReadExit()
	if err != nil {
		return nil, noRecord(c.dir)
	}
	c.ended = true
	return []eventView{{ID: c.dir.ID(), At: exit.ExitedAt, Type: typeExited, Exit: &exit}}, nil
}

// watch sends events until the container has ended or is removed. A shim that is
// silent or starting is asked again.
func (c *cursor) watch(ctx context.Context, out chan<- eventView) {
	for !c.ended && ctx.Err() == nil {
		events, err := c.next(ctx, waitPoll)
		for _, e := range events {
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
		if err != nil && (c.removed() || !pause(ctx, time.Second)) {
			return
		}
	}
}

// removed says whether the run directory is gone.
func (c *cursor) removed() bool {
	_, err := os.Stat(string(c.dir))
	return errors.Is(err, fs.ErrNotExist)
}
