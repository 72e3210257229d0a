package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"

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
		all, last, errs := client.PastOf(ctx, dirs)
		for i, err := range errs {
			if err != nil {
				fmt.Fprintf(a.stderr, "holdfastctl: cannot read the events: %s\n", lines(about(dirs[i], err).Error()))
			}
		}
		for _, e := range all {
			if err := a.printEvent(e); err != nil {
				return err
			}
		}
		more := a.dirs
		if len(args) > 0 {
			more = nil // it ends with the last of these
		}
		if !*follow {
			return nil
		}
		return client.FollowAll(ctx, dirs, last, more, a.printEvent)
	}
}
