package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func (a *app) pullsDir() string { return filepath.Join(a.state, rundir.PullsName) }

// readPulls gives the records of all pulls, the oldest first. A killed daemon
// leaves those of its pulls until the next start.
func readPulls(dir string) ([]rundir.Pull, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []rundir.Pull
	for _, f := range files {
		var p rundir.Pull
		// One that does not read has just gone, or is of no use; it is also not
		// worth an error.
		if strings.HasSuffix(f.Name(), ".json") && record.Read(filepath.Join(dir, f.Name()), &p) == nil {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(x, y rundir.Pull) int { return x.Since.Compare(y.Since) })
	return list, nil
}

func setupPulls(a *app, _ *flag.FlagSet) runFunc {
	return func(context.Context, []string) error {
		list, err := readPulls(a.pullsDir())
		if errors.Is(err, fs.ErrNotExist) {
			if _, serr := os.Stat(a.state); serr != nil {
				return fmt.Errorf("cannot find pulls: there is no %s; is --state right?", a.state)
			}
			err = nil // a daemon that has not come that far
		}
		if err != nil {
			return fmt.Errorf("cannot find pulls: %w", err)
		}
		// For scripts: fields are added, not renamed.
		type view struct {
			rundir.Pull
			Alive bool `json:"alive"` // the daemon that pulls
		}
		views := []view{}
		for _, p := range list {
			views = append(views, view{p, p.Daemon.Alive()})
		}
		if a.json {
			return a.printJSON(views)
		}
		w := a.table()
		fmt.Fprintln(w, "IMAGE\tPOD\tPHASE\tDONE\tOF\tRATE\tLAYERS\tAGE\tNOTE")
		for _, v := range views {
			phase, note := string(v.Phase), printable(v.Trouble)
			if !v.Alive {
				phase, note = "("+phase+")", "the daemon that pulled it has died; the next pull goes on from here"
			}
			done, of, rate, layers := "-", "-", "-", "-"
			if v.TotalLayers > 0 {
				done, of = fmt.Sprintf("%d%%", percent(v.Pull)), sizeText(v.TotalBytes)
				rate, layers = sizeText(v.Rate)+"/s", fmt.Sprintf("%d/%d", v.Layers, v.TotalLayers)
			}
			fmt.Fprintln(w, strings.Join([]string{v.Ref, dash(v.Pod), phase, done, of, rate, layers, age(v.Since), note}, "\t"))
		}
		return w.Flush()
	}
}
