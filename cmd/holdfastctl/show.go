package main

import (
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
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// view is what is known about a container. Its JSON is for scripts: fields are
// added, not renamed.
type view struct {
	client.View
	Name      string `json:"name,omitempty"`
	Attempt   uint32 `json:"attempt"`
	PodID     string `json:"podId,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// dirs lists the run directories.
func (a *app) dirs() ([]rundir.Dir, error) {
	dirs, err := rundir.List(a.state)
	if errors.Is(err, fs.ErrNotExist) {
		err = a.missing("containers") // nil: a daemon that never had one
	}
	return dirs, err
}

// missing is the error about things that are not there, if that is because the
// state directory is not there either.
func (a *app) missing(things string) error {
	if _, err := os.Stat(a.state); err != nil {
		return fmt.Errorf("cannot find %s: %w; is --state right?", things, err)
	}
	return nil
}

// dir finds the container whose id begins with prefix.
func (a *app) dir(prefix string) (rundir.Dir, error) {
	dirs, err := a.dirs()
	if err != nil {
		return "", err
	}
	found := rundir.Match(dirs, prefix)
	switch n := len(found); n {
	case 0:
		return "", fmt.Errorf("no container matches %q in %s; is --state right? (holdfastctl shims lists them)",
			prefix, a.state)
	case 1:
		return found[0], nil
	default:
		return "", fmt.Errorf("%d containers match %q, such as %s and %s; give more of the id",
			n, prefix, found[0].ID(), found[1].ID())
	}
}

// look is what can be seen of a container, with the names out of the records that
// the shim keeps for the daemon. What does not read there, because another version
// wrote it, stays empty.
func look(ctx context.Context, dir rundir.Dir) view {
	c := client.New(dir)
	defer c.Close()
	v := view{View: c.Look(ctx)}
	var container records.Container
	if json.Unmarshal(v.Launch.Container.Value, &container) == nil {
		m := container.Config.M.GetMetadata()
		v.Name, v.Attempt, v.PodID = m.GetName(), m.GetAttempt(), container.PodID
	}
	var pod records.Pod
	if json.Unmarshal(v.Launch.Sandbox.Value, &pod) == nil {
		m := pod.Config.M.GetMetadata()
		v.PodID, v.Pod, v.Namespace = cmp.Or(v.PodID, pod.ID), m.GetName(), m.GetNamespace()
	}
	return v
}

// print prints a value, as JSON if that was asked for.
func (a *app) print(v any, text string) error {
	if !a.json {
		_, err := io.WriteString(a.stdout, lines(text))
		return err
	}
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ") // for people
	return e.Encode(v)
}

// table sets rows in columns. What is empty shows as a dash, but for the last.
func table(rows [][]string) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, cells := range rows {
		for i, cell := range cells {
			if cells[i] = printable(cell); cell == "" && i < len(cells)-1 {
				cells[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	w.Flush()
	return b.String()
}

func setupShims(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, _ rundir.Dir, _ []string) error {
		dirs, err := a.dirs()
		if err != nil {
			return err
		}
		views := make([]view, len(dirs))
		client.AtOnce(dirs, func(i int, dir rundir.Dir) { views[i] = look(ctx, dir) })
		views = slices.DeleteFunc(views, func(v view) bool { // the daemon has removed it meanwhile
			_, err := os.Stat(v.Dir)
			return errors.Is(err, fs.ErrNotExist)
		})
		slices.SortStableFunc(views, func(x, y view) int { return y.CreatedAt.Compare(x.CreatedAt) })
		rows := [][]string{{"ID", "STATE", "AGE", "EXIT", "SHIM", "INIT", "POD", "NAME", "NOTE"}}
		for _, v := range views {
			rows = append(rows, []string{
				records.ShortID(v.ID),
				v.shownState(),
				age(v.CreatedAt),
				exitText(v.Exit),
				number(v.Shim.PID),
				number(v.Init.PID),
				cmp.Or(v.podName(), records.ShortID(v.PodID)),
				v.Name,
				v.Note,
			})
		}
		return a.print(views, table(rows))
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
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		v := look(ctx, dir)
		return a.print(v, table(v.fields()))
	}
}

// fields are what `state` prints, in order; those without a value are left out.
func (v *view) fields() (rows [][]string) {
	add := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name + ":", value})
		}
	}
	add("id", v.ID)
	add("name", v.Name)
	add("attempt", number(v.Attempt))
	add("pod", v.podName())
	add("pod id", v.PodID)
	add("state", v.State)
	add("source", v.Source)
	add("note", v.Note)
	add("shim", processText(v.Shim))
	add("shim version", v.Version)
	add("init", processText(v.Init))
	add("created", timeText(v.CreatedAt))
	add("started", timeText(v.StartedAt))
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
	return rows
}

// processView is one line of `pids`.
type processView struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

func setupPids(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		var processes []processView
		rows := [][]string{{"PID", "COMMAND"}}
		err := withShim(ctx, dir, func(c *client.Client) error {
			pids, err := c.Pids(ctx)
			for _, pid := range pids {
				p := processView{pid, commandLine(pid)}
				processes, rows = append(processes, p), append(rows, []string{number(pid), p.Command})
			}
			return err
		})
		if err != nil {
			return err
		}
		return a.print(processes, table(rows))
	}
}

// commandLine is empty for a process that has ended meanwhile.
func commandLine(pid int) string {
	return printable(strings.Join(rundir.CommandLine(pid), " "))
}

// printable keeps what a container or a registry chose from driving the
// terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // also marks that turn the direction of a line
			return '?'
		}
		return r
	}, s)
}

// lines is printable for a text of several lines.
func lines(text string) string {
	all := strings.Split(text, "\n")
	for i, line := range all {
		all[i] = printable(line)
	}
	return strings.Join(all, "\n")
}

func setupVersion(a *app, _ *flag.FlagSet) runFunc {
	return func(context.Context, rundir.Dir, []string) error {
		v := struct {
			Version     string `json:"version"`
			Go          string `json:"go"`
			ProtocolMin int    `json:"protocolMin"`
			ProtocolMax int    `json:"protocolMax"`
		}{version, runtime.Version(), proto.ProtocolMin, proto.ProtocolMax}
		const text = "holdfastctl %s, %s, shim protocol %d to %d\n"
		return a.print(v, fmt.Sprintf(text, v.Version, v.Go, v.ProtocolMin, v.ProtocolMax))
	}
}
