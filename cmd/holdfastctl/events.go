package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func (a *app) printEvent(e client.Event) error {
	if a.json { // one line each
		return json.NewEncoder(a.stdout).Encode(e)
	}
	detail := ""
	if e.Exit != nil {
		detail = "  exit code " + exitText(e.Exit)
	} else if e.Init.PID != 0 {
		detail = fmt.Sprintf("  pid %d", e.Init.PID)
	}
	return a.print(nil, fmt.Sprintf("%s  %s  %s%s\n", timeText(e.At), records.ShortID(e.ID), e.Type, detail))
}

func setupEvents(a *app, fs *flag.FlagSet) runFunc {
	follow := fs.Bool("f", false, "go on with what happens from now")
	return func(ctx context.Context, _ rundir.Dir, args []string) error {
		dirs, err := a.dirs()
		if len(args) > 0 && err == nil {
			dirs = make([]rundir.Dir, len(args))
			for i, arg := range args {
				if dirs[i], err = a.dir(arg); err != nil {
					return err
				}
			}
		}
		if err != nil {
			return err
		}
		last, err := a.pastEvents(ctx, dirs)
		if err != nil || !*follow {
			return err
		}
		return a.followEvents(ctx, dirs, last, len(args) > 0)
	}
}

// pastEvents prints what has happened so far, in the order of time, and gives the
// last event of each container.
func (a *app) pastEvents(ctx context.Context, dirs []rundir.Dir) ([]client.Event, error) {
	past, last := make([][]client.Event, len(dirs)), make([]client.Event, len(dirs))
	errs := make([]error, len(dirs))
	atOnce(dirs, func(i int, dir rundir.Dir) {
		c := client.New(dir)
		defer c.Close()
		past[i], errs[i] = c.Past(ctx)
	})
	for i, events := range past {
		if n := len(events); n > 0 {
			last[i] = events[n-1]
		}
		if errs[i] != nil {
			fmt.Fprintf(a.stderr, "holdfastctl: cannot read the events: %v\n", about(dirs[i], errs[i]))
		}
	}
	all := slices.Concat(past...)
	slices.SortStableFunc(all, func(x, y client.Event) int { return x.At.Compare(y.At) })
	for _, e := range all {
		if err := a.printEvent(e); err != nil {
			return nil, err
		}
	}
	return last, nil
}

// followEvents prints events as they come, after the last ones. With one fixed set
// of containers it ends with the last of them.
func (a *app) followEvents(ctx context.Context, dirs []rundir.Dir, last []client.Event, fixed bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, ended := make(chan client.Event), make(chan struct{})
	known := map[rundir.Dir]bool{}
	follow := func(dir rundir.Dir, from client.Event) {
		known[dir] = true
		go func() {
			c := client.New(dir)
			defer c.Close()
			if from.Type != client.Exited {
				c.Follow(ctx, from.Seq, func(e client.Event) { send(ctx, events, e) })
			}
			send(ctx, ended, struct{}{})
		}()
	}
	for i, dir := range dirs {
		follow(dir, last[i])
	}
	rescan := time.NewTicker(time.Second)
	defer rescan.Stop()
	for live := len(dirs); live > 0 || !fixed; {
		select {
		case e := <-events:
			if err := a.printEvent(e); err != nil {
				return err
			}
		case <-ended:
			live--
		case <-ctx.Done():
			return ctx.Err()
		case <-rescan.C:
			if fixed {
				continue
			}
			dirs, err := a.dirs()
			if err != nil {
				return err
			}
			for _, dir := range dirs {
				if !known[dir] {
					follow(dir, client.Event{})
				}
			}
		}
	}
	return nil
}

// send gives up when ctx is done.
func send[T any](ctx context.Context, to chan<- T, v T) {
	select {
	case to <- v:
	case <-ctx.Done():
	}
}
