package main

import (
	"cmp"
	"context"
	_ "embed" // help.txt
	"flag"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// command is one entry of the table.
type command struct {
	name string
	args string // as in the usage line: [ARG] may be left out, ARG... repeated
	// setup declares the flags and gives what runs the command with their values.
	setup func(*app, *flag.FlagSet) runFunc
}

// runFunc runs a command. dir is the container of the ID among its arguments, if
// it has one; args are the others.
type runFunc func(ctx context.Context, dir rundir.Dir, args []string) error

// commands is a function because help refers to it. help.txt explains each.
func commands() []*command {
	return []*command{
		{"shims", "", setupShims},
		{"state", "ID", setupState},
		{"wait", "ID", setupWait},
		{"kill", "ID", setupKill},
		{"stop", "ID", setupStop},
		{"exec", "ID COMMAND [ARG...]", setupExec},
		{"attach", "ID", setupAttach},
		{"port-forward", "ID PORT...", setupPortForward},
		{"resize", "ID [WIDTHxHEIGHT]", setupResize},
		{"logs", "ID", setupLogs},
		{"events", "[ID...]", setupEvents},
		{"pids", "ID", setupPids},
		{"delete", "ID", setupDelete},
		{"pull", "IMAGE", setupPull},
		{"pulls", "", setupPulls},
		{"doctor", "", setupDoctor},
		{"explain", "NAME", setupExplain},
		{"version", "", setupVersion},
	}
}

func find(name string) (*command, error) {
	for _, c := range commands() {
		if c.name == name {
			return c, nil
		}
	}
	return nil, usagef("there is no command %q; see: holdfastctl help", name)
}

//go:embed help.txt
var helpText string

// help is what a command does in one line; then, after empty lines, more of that
// and examples, which are indented.
func (c *command) help() string {
	_, text, _ := strings.Cut(helpText, "# "+c.name+"\n")
	text, _, _ = strings.Cut(text, "\n\n# ")
	return strings.TrimSpace(text)
}

// flags gives the command's flags and what to run once they are parsed.
func (c *command) flags(a *app) (*flag.FlagSet, runFunc) {
	fs := newFlags(c.name)
	fs.BoolVar(&a.json, "json", a.json, "print JSON")
	return fs, c.setup(a, fs)
}

func (c *command) checkArgs(args []string) error {
	most := strings.Fields(c.args)
	least := slices.DeleteFunc(slices.Clone(most), func(s string) bool { return s[0] == '[' })
	if len(args) >= len(least) && (len(args) <= len(most) || strings.Contains(c.args, "...")) {
		if c.name == "resize" && len(args) == 2 {
			_, err := size(args[1:])
			return err
		}
		return nil
	}
	want, hint := cmp.Or(c.args, "no arguments"), ""
	if slices.ContainsFunc(args, func(s string) bool { return strings.HasPrefix(s, "-") }) {
		hint = " (flags go before it)"
	}
	return usagef("%s: want %s%s; see: holdfastctl help %s", c.name, want, hint, c.name)
}

func (a *app) printHelp() {
	fmt.Fprint(a.stdout, `holdfastctl looks at containers and acts on them through their shims. It works
with the daemon dead.

Usage: holdfastctl [--config FILE | --state DIR] [--json] COMMAND [FLAGS] [ARGS]

Commands:
`)
	var rows [][]string
	for _, c := range commands() {
		summary, _, _ := strings.Cut(c.help(), "\n")
		rows = append(rows, []string{"  " + c.name, summary})
	}
	fmt.Fprintf(a.stdout, `%s
ID is the beginning of a container's id, as long as no other begins so.
The state directory is that of --state, of the config file (%s
if there is one), or %s.
Exit codes: 0 done, 1 error, 2 wrong usage; exec passes on its command's.

More about a command, with examples: holdfastctl help COMMAND
`, table(rows), defaultConfig, defaultState)
}

func (a *app) printCommand(c *command) {
	about, examples, _ := strings.Cut(c.help(), "\n\n  ")
	usage := strings.TrimSpace(c.name + " [FLAGS] " + c.args)
	fmt.Fprintf(a.stdout, "%s: %s\n\nUsage: holdfastctl %s\n\nFlags:\n", c.name, about, usage)
	fs, _ := c.flags(a)
	var rows [][]string
	fs.VisitAll(func(f *flag.Flag) {
		arg, text := flag.UnquoteUsage(f)
		dash := "--"
		if len(f.Name) == 1 {
			dash = "-"
		}
		rows = append(rows, []string{"  " + strings.TrimSpace(dash+f.Name+" "+arg), text})
	})
	fmt.Fprintf(a.stdout, "%s\nExamples:\n  %s\n", table(rows), examples)
}
