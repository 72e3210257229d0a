package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// printJSON prints one value, indented for people.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (a *app) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(a.stdout, format, args...)
	return err
}

// row prints a line of a table; what is empty shows as a dash.
func row(w io.Writer, cells ...string) {
	for i := range cells[:len(cells)-1] { // the last one is a note
		cells[i] = cmp.Or(cells[i], "-")
	}
	fmt.Fprintln(w, strings.Join(cells, "\t"))
}

func setupShims(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, _ []string) error {
		dirs, err := a.dirs()
		if err != nil {
			return err
		}
		views := make([]view, len(dirs))
		atOnce(dirs, func(i int, dir rundir.Dir) { views[i] = look(ctx, dir) })
		views = slices.DeleteFunc(views, func(v view) bool { // the daemon has removed it meanwhile
			_, err := os.Stat(v.Dir)
			return errors.Is(err, fs.ErrNotExist)
		})
		slices.SortStableFunc(views, func(x, y view) int { return y.CreatedAt.Compare(x.CreatedAt) })
		if a.json {
			return a.printJSON(views)
		}
		w := a.table()
		row(w, "ID", "STATE", "AGE", "EXIT", "SHIM", "INIT", "POD", "NAME", "NOTE")
		for _, v := range views {
			row(w, records.ShortID(v.ID), v.shownState(), age(v.CreatedAt), exitText(v.Exit),
				number(v.Shim.PID), number(v.Init.PID), cmp.Or(v.podName(), records.ShortID(v.PodID)), v.Name, v.Note)
		}
		return w.Flush()
	}
}

// shownState marks what no shim has confirmed. An exit record needs no shim.
func (v *view) shownState() string {
	state := v.State
	if v.Stop != nil && v.Exit == nil {
		state += ", stopping"
	}
	if v.Source == client.FromFiles && v.Exit == nil {
		return "(" + state + ")"
	}
	return state
}

func (v *view) podName() string { return strings.Trim(v.Namespace+"/"+v.Pod, "/") }

func exitText(e *rundir.Exit) string {
	switch {
	case e == nil:
		return ""
	case e.Source == rundir.SourceInferred:
		return fmt.Sprintf("%d %s (inferred)", e.Code, e.Reason)
	}
	return fmt.Sprintf("%d %s", e.Code, e.Reason)
}

// number is empty for zero.
func number[T int | uint32 | uint64](n T) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return records.Age(time.Since(t))
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

func processText(p rundir.Process) string {
	if p.PID == 0 {
		return ""
	}
	return fmt.Sprintf("pid %d, start time %d", p.PID, p.StartTime)
}

func setupState(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		v := look(ctx, dir)
		if a.json {
			return a.printJSON(v)
		}
		w := a.table()
		for _, f := range v.fields() {
			if f[1] != "" {
				fmt.Fprintf(w, "%s:\t%s\n", f[0], f[1])
			}
		}
		return w.Flush()
	}
}

// fields are what `state` prints, in order; those without a value are left out.
func (v *view) fields() [][2]string {
	fields := [][2]string{
		{"id", v.ID},
		{"name", v.Name},
		{"attempt", number(v.Attempt)},
		{"pod", v.podName()},
		{"pod id", v.PodID},
		{"state", v.State},
		{"source", v.Source},
		{"note", v.Note},
		{"shim", processText(v.Shim)},
		{"shim version", v.Version},
		{"init", processText(v.Init)},
		{"created", timeText(v.CreatedAt)},
		{"started", timeText(v.StartedAt)},
	}
	add := func(name, value string) { fields = append(fields, [2]string{name, value}) }
	if e := v.Exit; e != nil {
		add("exit code", fmt.Sprint(e.Code))
		add("exit reason", e.Reason)
		add("exit message", e.Message)
		add("exit source", e.Source)
		add("exited", timeText(e.ExitedAt))
	}
	if s := v.Stop; s != nil {
		add("stop", fmt.Sprintf("signal %d, SIGKILL at %s", s.Signal, timeText(s.KillAt)))
	}
	if v.Terminal {
		add("terminal", "yes")
	}
	add("oom kills", number(v.OOMKills))
	add("execs", number(v.Execs))
	add("log", v.LogFile)
	if l := v.Log; l != nil {
		add("log written", fmt.Sprintf("%d bytes, %d lines", l.Bytes, l.Lines))
		add("log dropped", number(l.DroppedBytes))
		add("log error", l.Error)
	}
	add("last event", number(v.LastEvent))
	for _, name := range slices.Sorted(maps.Keys(v.Cgroups)) {
		add("cgroup "+cmp.Or(name, "v2"), v.Cgroups[name])
	}
	add("directory", v.Dir)
	return fields
}

// processView is one line of `pids`.
type processView struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

func setupPids(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		var processes []processView
		err := a.withShim(ctx, args[0], func(c *client.Client) error {
			pids, err := c.Pids(ctx)
			for _, pid := range pids {
				processes = append(processes, processView{pid, commandLine(pid)})
			}
			return err
		})
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(processes)
		}
		w := a.table()
		row(w, "PID", "COMMAND")
		for _, p := range processes {
			row(w, number(p.PID), p.Command)
		}
		return w.Flush()
	}
}

// commandLine is empty for a process that has ended meanwhile.
func commandLine(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	b = bytes.TrimRight(b, "\x00")
	return printable(string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
}

// printable keeps what a container or a registry chose from driving the
// terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

func setupVersion(a *app, _ *flag.FlagSet) runFunc {
	return func(context.Context, []string) error {
		v := struct {
			Version     string `json:"version"`
			Go          string `json:"go"`
			ProtocolMin int    `json:"protocolMin"`
			ProtocolMax int    `json:"protocolMax"`
		}{buildVersion(), runtime.Version(), proto.ProtocolMin, proto.ProtocolMax}
		if a.json {
			return a.printJSON(v)
		}
		return a.printf("holdfastctl %s, %s, shim protocol %d to %d\n", v.Version, v.Go, v.ProtocolMin, v.ProtocolMax)
	}
}

// buildVersion is the linker's, or the commit that go build saw.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "unknown" {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return version
}
