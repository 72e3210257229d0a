package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// shortID is how much of an id a table shows.
const shortID = 13

func short(id string) string { return id[:min(len(id), shortID)] }

// printJSON prints one value, indented for people.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (a *app) table() *tabwriter.Writer { return tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0) }

func setupShims(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, _ []string) error {
		dirs, err := a.dirs()
		if err != nil {
			return err
		}
		views := lookAll(ctx, dirs)
		slices.SortStableFunc(views, func(x, y view) int { return y.CreatedAt.Compare(x.CreatedAt) })
		if a.json {
			if views == nil {
				views = []view{}
			}
			return a.printJSON(views)
		}
		w := a.table()
		fmt.Fprintln(w, "ID\tSTATE\tAGE\tEXIT\tSHIM\tINIT\tPOD\tNAME\tNOTE")
		for _, v := range views {
			fmt.Fprintln(w, strings.Join([]string{
				short(v.ID), v.shownState(), age(v.CreatedAt), exitText(v.Exit), pidText(v.Shim), pidText(v.Init),
				dash(v.podName()), dash(v.Name), v.Note}, "\t"))
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
	if v.Source == sourceFiles && v.Exit == nil {
		return "(" + state + ")"
	}
	return state
}

func (v *view) podName() string {
	switch {
	case v.Pod != "" && v.Namespace != "":
		return v.Namespace + "/" + v.Pod
	case v.Pod != "":
		return v.Pod
	}
	return short(v.PodID)
}

func exitText(e *rundir.Exit) string {
	if e == nil {
		return "-"
	}
	text := fmt.Sprintf("%d %s", e.Code, e.Reason)
	if e.Source == rundir.SourceInferred {
		text += " (inferred)"
	}
	return text
}

func pidText(p rundir.Process) string {
	if p.PID == 0 {
		return "-"
	}
	return fmt.Sprint(p.PID)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return ageText(time.Since(t))
}

// ageText is a duration in its largest unit that gives two or more, as a table
// has room for.
func ageText(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", max(d, 0)/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
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
	number := func(n uint64) string {
		if n == 0 {
			return ""
		}
		return fmt.Sprint(n)
	}
	identity := func(p rundir.Process) string {
		if p.PID == 0 {
			return ""
		}
		return fmt.Sprintf("pid %d, start time %d", p.PID, p.StartTime)
	}
	fields := [][2]string{
		{"id", v.ID},
		{"name", v.Name},
		{"attempt", number(uint64(v.Attempt))},
		{"pod", strings.Trim(v.Namespace+"/"+v.Pod, "/")},
		{"pod id", v.PodID},
		{"state", v.State},
		{"source", v.Source},
		{"note", v.Note},
		{"shim", identity(v.Shim)},
		{"shim version", v.Version},
		{"init", identity(v.Init)},
		{"created", timeText(v.CreatedAt)},
		{"started", timeText(v.StartedAt)},
	}
	if e := v.Exit; e != nil {
		fields = append(fields, [][2]string{
			{"exit code", fmt.Sprint(e.Code)},
			{"exit reason", e.Reason},
			{"exit message", e.Message},
			{"exit source", e.Source},
			{"exited", timeText(e.ExitedAt)},
		}...)
	}
	if s := v.Stop; s != nil {
		fields = append(fields, [2]string{"stop", fmt.Sprintf("signal %d, SIGKILL at %s", s.Signal, timeText(s.KillAt))})
	}
	if v.Terminal {
		fields = append(fields, [2]string{"terminal", "yes"})
	}
	fields = append(fields, [][2]string{
		{"oom kills", number(v.OOMKills)},
		{"execs", number(uint64(v.Execs))},
		{"log", v.LogFile},
	}...)
	if l := v.Log; l != nil {
		fields = append(fields, [][2]string{
			{"log written", fmt.Sprintf("%d bytes, %d lines", l.Bytes, l.Lines)},
			{"log dropped", number(l.DroppedBytes)},
			{"log error", l.Error},
		}...)
	}
	fields = append(fields, [2]string{"last event", number(v.LastEvent)})
	for _, name := range slices.Sorted(maps.Keys(v.Cgroups)) {
		label := "cgroup " + name
		if name == "" {
			label = "cgroup v2"
		}
		fields = append(fields, [2]string{label, v.Cgroups[name]})
	}
	return append(fields, [2]string{"directory", v.Dir})
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

// processView is one line of `pids`.
type processView struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

func setupPids(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		var processes []processView
		err := a.withShim(ctx, args[0], func(s *shim) error {
			resp, err := call(ctx, s, quick, proto.ShimService.Pids, &proto.PidsRequest{Id: s.dir.ID()})
			for _, pid := range resp.GetPids() {
				processes = append(processes, processView{int(pid), commandLine(int(pid))})
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
		fmt.Fprintln(w, "PID\tCOMMAND")
		for _, p := range processes {
			fmt.Fprintf(w, "%d\t%s\n", p.PID, p.Command)
		}
		return w.Flush()
	}
}

// commandLine is empty for a process that has ended meanwhile.
func commandLine(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
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
		return writeString(a.stdout, fmt.Sprintf("holdfastctl %s, %s, shim protocol %d to %d\n", v.Version, v.Go, v.ProtocolMin, v.ProtocolMax))
	}
}

// buildVersion is the linker's, or the commit that go build saw.
func buildVersion() string {
	if version != "unknown" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return version
}

func writeString(w io.Writer, s string) error {
	_, err := io.WriteString(w, s)
	return err
}
