package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"slices"
	"sync"
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
		if len(args) > 0 {
			dirs = nil
		}
		for _, arg := range args {
			var dir rundir.Dir
			if err == nil {
				dir, err = a.dir(arg)
			}
			dirs = append(dirs, dir)
		}
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
		return a.followEvents(ctx, last, len(args) > 0)
	}
}

// pastEvents gives what has happened so far, in the order of time, and the last
// event of each container.
func (a *app) pastEvents(ctx context.Context, dirs []rundir.Dir) ([]client.Event, map[rundir.Dir]client.Event) {
	var mu sync.Mutex // guards all of these
	var all []client.Event
	last := map[rundir.Dir]client.Event{}
	atOnce(dirs, func(_ int, dir rundir.Dir) {
		c := client.New(dir)
		defer c.Close()
		events, err := c.Past(ctx)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			fmt.Fprintf(a.stderr, "holdfastctl: cannot read the events: %v\n", about(dir, err))
		}
		last[dir] = client.Event{}
		if n := len(events); n > 0 {
			all, last[dir] = append(all, events...), events[n-1]
		}
	})
	slices.SortStableFunc(all, func(x, y client.Event) int { return x.At.Compare(y.At) })
	return all, last
}

// followEvents prints events as they come. With one fixed set of containers it
// ends with the last of them.
func (a *app) followEvents(ctx context.Context, last map[rundir.Dir]client.Event, fixed bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out, finished := make(chan client.Event), make(chan struct{})
	var wg sync.WaitGroup
	follow := func(dir rundir.Dir, from client.Event) {
		c := client.New(dir)
		defer c.Close()
		if from.Type == client.Exited {
			return
		}
		c.Follow(ctx, from.Seq, func(e client.Event) {
			select {
			case out <- e:
			case <-ctx.Done():
			}
		})
	}
	for dir, e := range last {
		wg.Go(func() { follow(dir, e) })
	}
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
			dirs, err := a.dirs()
			if err != nil {
				return err
			}
			for _, dir := range dirs {
				if _, known := last[dir]; !known {
					last[dir] = client.Event{}
					wg.Go(func() { follow(dir, client.Event{}) })
				}
			}
		}
	}
}
