package main

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
)

// command is one entry of the table.
type command struct {
	name     string
	args     string // as in the usage line
	minArgs  int
	maxArgs  int // -1: any number
	summary  string
	text     string // more than the summary, for its own help
	examples []string
	// setup declares the flags and gives what runs the command with their values.
	setup func(*app, *flag.FlagSet) runFunc
}

type runFunc func(context.Context, []string) error

// commands is a function because help refers to it.
func commands() []*command {
	return []*command{
		{name: "shims", summary: "list the containers",
			text:     "A state in parentheses comes from files: the shim is gone or does not answer (NOTE says which).",
			examples: []string{"holdfastctl shims", "holdfastctl --state /run/other shims --json"},
			setup:    setupShims},
		{name: "state", args: "ID", minArgs: 1, maxArgs: 1, summary: "print all that is known about a container",
			examples: []string{"holdfastctl state 4f1c", "holdfastctl state --json 4f1c"},
			setup:    setupState},
		{name: "wait", args: "ID", minArgs: 1, maxArgs: 1, summary: "wait until a container has ended, print its exit code",
			text:     "The output of the container is in its log by then. The exit code printed is the container's; that of holdfastctl is 0.",
			examples: []string{"holdfastctl wait 4f1c"},
			setup:    setupWait},
		{name: "kill", args: "ID", minArgs: 1, maxArgs: 1, summary: "send a signal to a container",
			examples: []string{"holdfastctl kill 4f1c", "holdfastctl kill -s HUP 4f1c", "holdfastctl kill -s 9 --all 4f1c"},
			setup:    setupKill},
		{name: "stop", args: "ID", minArgs: 1, maxArgs: 1, summary: "stop a container: a signal now, SIGKILL at a deadline",
			text:     "The shim keeps the deadline, so interrupting holdfastctl does not call it off. A deadline that was set before can only come forward.",
			examples: []string{"holdfastctl stop 4f1c", "holdfastctl stop -t 60 -s INT 4f1c"},
			setup:    setupStop},
		{name: "exec", args: "ID COMMAND [ARG...]", minArgs: 2, maxArgs: -1, summary: "run a command in a container",
			text: "Environment, user and working directory are the container's unless flags say otherwise. There is no terminal. " +
				"The exit code is the command's, 124 at the timeout. With --json the output comes at the end, at most 16 MiB of each stream. Interrupting holdfastctl kills the command and all that it started.",
			examples: []string{
				"holdfastctl exec 4f1c ps -ef",
				"holdfastctl exec -e LANG=C -w /tmp -u 1000:1000 4f1c sh -c 'echo $LANG; pwd; id'",
				"holdfastctl exec -i 4f1c tar -xf - <files.tar",
				"holdfastctl exec --timeout 5s 4f1c sync",
			},
			setup: setupExec},
		{name: "resize", args: "ID [WIDTHxHEIGHT]", minArgs: 1, maxArgs: 2, summary: "set the size of a container's terminal, to that of this one if none is given",
			examples: []string{"holdfastctl resize 4f1c 120x40"},
			setup:    setupResize},
		{name: "logs", args: "ID", minArgs: 1, maxArgs: 1, summary: "print a container's log",
			text:     "Only the current file is read, not those that were rotated away before; -f goes on across rotations, until the container ends.",
			examples: []string{"holdfastctl logs 4f1c", "holdfastctl logs -f -t 4f1c", "holdfastctl logs --stream stderr 4f1c", "holdfastctl logs --raw 4f1c"},
			setup:    setupLogs},
		{name: "events", args: "[ID...]", maxArgs: -1, summary: "print what happened to containers",
			text:     "A shim that has ended takes its events with it; its exit record is printed instead, without a number.",
			examples: []string{"holdfastctl events", "holdfastctl events -f", "holdfastctl events -f --json 4f1c"},
			setup:    setupEvents},
		{name: "pids", args: "ID", minArgs: 1, maxArgs: 1, summary: "list the processes of a container, as the host numbers them",
			examples: []string{"holdfastctl pids 4f1c"},
			setup:    setupPids},
		{name: "delete", args: "ID", minArgs: 1, maxArgs: 1, summary: "end a container that has not started, or with -f any",
			text:     "The files stay until the kubelet removes the container: they say how it ended.",
			examples: []string{"holdfastctl delete 4f1c", "holdfastctl delete -f 4f1c"},
			setup:    setupDelete},
		{name: "pull", args: "IMAGE", minArgs: 1, maxArgs: 1, summary: "pull an image, and show how far it is",
			text: "This is the one command that needs the daemon. The image's id is printed in the end, and how far it is on the standard error. " +
				"With --creds USER the password is read from the standard input, so that it stands in no list of processes. " +
				"Interrupting holdfastctl calls the pull off, unless somebody else waits for the same image; what has come so far is kept for the next one.",
			examples: []string{"holdfastctl pull docker.io/library/busybox:1.37", "holdfastctl pull --creds me registry.example/team/app:1 <password"},
			setup:    setupPull},
		{name: "pulls", summary: "list the pulls that run, those of the kubelet too, and how far they are",
			text:     "A phase in parentheses is what a daemon was at that has died. NOTE says what a registry did that is being tried again.",
			examples: []string{"holdfastctl pulls", "holdfastctl pulls --json"},
			setup:    setupPulls},
		{name: "version", summary: "print the version of holdfastctl and of the shims' protocol that it speaks",
			examples: []string{"holdfastctl version"},
			setup:    setupVersion},
	}
}

func find(name string) *command {
	for _, c := range commands() {
		if c.name == name {
			return c
		}
	}
	return nil
}

// flags gives the command's flags and what to run once they are parsed.
func (c *command) flags(a *app) (*flag.FlagSet, runFunc) {
	fs := newFlags(c.name)
	fs.BoolVar(&a.json, "json", a.json, "print JSON")
	return fs, c.setup(a, fs)
}

func (c *command) usage() string {
	return strings.TrimSpace("holdfastctl " + c.name + " [FLAGS] " + c.args)
}

func (c *command) checkArgs(args []string) error {
	if len(args) < c.minArgs || c.maxArgs >= 0 && len(args) > c.maxArgs {
		hint := ""
		if slices.ContainsFunc(args, func(s string) bool { return strings.HasPrefix(s, "-") }) {
			hint = " (flags go before it)"
		}
		return usagef("%s: want %s%s; see: holdfastctl help %s", c.name, orNothing(c.args), hint, c.name)
	}
	return nil
}

func orNothing(s string) string {
	if s == "" {
		return "no arguments"
	}
	return s
}

func (a *app) help(args []string) error {
	if len(args) == 0 {
		a.printHelp()
		return nil
	}
	c := find(args[0])
	if c == nil {
		return usagef("there is no command %q; see: holdfastctl help", args[0])
	}
	a.printCommand(c)
	return nil
}

func (a *app) printHelp() {
	fmt.Fprint(a.stdout, `holdfastctl looks at containers and acts on them through their shims. It works
with the daemon dead.

Usage: holdfastctl [--config FILE | --state DIR] [--json] COMMAND [FLAGS] [ARGS]

Commands:
`)
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, c := range commands() {
		fmt.Fprintf(w, "  %s\t%s\n", c.name, c.summary)
	}
	w.Flush()
	fmt.Fprintf(a.stdout, `
ID is the beginning of a container's id, as long as no other begins so.
The state directory is that of --state, of the config file (%s
if there is one), or %s.
Exit codes: 0 done, 1 error, 2 wrong usage; exec passes on its command's.

More about a command, with examples: holdfastctl help COMMAND
`, defaultConfig, defaultState)
}

func (a *app) printCommand(c *command) {
	fmt.Fprintf(a.stdout, "%s: %s\n\nUsage: %s\n", c.name, c.summary, c.usage())
	if c.text != "" {
		fmt.Fprintf(a.stdout, "\n%s\n", wrap(c.text, 78))
	}
	fs, _ := c.flags(a)
	fmt.Fprint(a.stdout, "\nFlags:\n")
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fs.VisitAll(func(f *flag.Flag) {
		arg, text := flag.UnquoteUsage(f)
		dash := "--"
		if len(f.Name) == 1 {
			dash = "-"
		}
		fmt.Fprintf(w, "  %s\t%s\n", strings.TrimSpace(dash+f.Name+" "+arg), text)
	})
	w.Flush()
	fmt.Fprint(a.stdout, "\nExamples:\n")
	for _, e := range c.examples {
		fmt.Fprintf(a.stdout, "  %s\n", e)
	}
}

// wrap breaks text into lines of at most width columns.
func wrap(text string, width int) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column == 0:
		case column+1+len(word) > width:
			b.WriteByte('\n')
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
