// Command holdfastctl looks at containers and acts on them through their shims.
// It needs no daemon: what it knows comes from the run directories and from the
// shims' own sockets.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// version is set by the linker.
var version = "unknown"

// Exit codes; exec passes on the one of its command.
const (
	codeError = 1
	codeUsage = 2
)

func main() {
	app := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	os.Exit(app.main(context.Background(), os.Args[1:]))
}

// app is one run of the program.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer
	config         string // file, if one was named
	state          string // the directory
	json           bool
}

// usageError is a mistake in the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return usageError{fmt.Sprintf(format, args...)}
}

// exitCode ends the program without a message of its own.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// main runs the command line and gives the exit code.
func (a *app) main(ctx context.Context, args []string) int {
	err := a.run(ctx, args)
	var usage usageError
	var code exitCode
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &usage):
		fmt.Fprintf(a.stderr, "holdfastctl: %v\n", err)
		return codeUsage
	case errors.Is(err, fs.ErrPermission):
		fmt.Fprintf(a.stderr, "holdfastctl: %v; run it as root\n", err)
		return codeError
	}
	fmt.Fprintf(a.stderr, "holdfastctl: %v\n", err)
	return codeError
}

func (a *app) run(ctx context.Context, args []string) error {
	global := newFlags("holdfastctl")
	global.StringVar(&a.config, "config", "", "read the state directory from the daemon's config `FILE`")
	global.StringVar(&a.state, "state", "", "look for containers in `DIR`/containers")
	global.BoolVar(&a.json, "json", false, "print JSON")
	if err := global.Parse(args); errors.Is(err, flag.ErrHelp) {
		a.printHelp()
		return err
	} else if err != nil {
		return usagef("%v; see: holdfastctl help", err)
	}
	if a.config != "" && a.state != "" {
		return usagef("--config and --state exclude each other")
	}
	args = global.Args()
	if len(args) == 0 {
		a.printHelp()
		return usagef("a command is missing")
	}
	if args[0] == "help" {
		return a.help(args[1:])
	}
	cmd := find(args[0])
	if cmd == nil {
		return usagef("there is no command %q; see: holdfastctl help", args[0])
	}
	flags, run := cmd.flags(a)
	if err := flags.Parse(args[1:]); errors.Is(err, flag.ErrHelp) {
		a.printCommand(cmd)
		return err
	} else if err != nil {
		return usagef("%s: %v; see: holdfastctl help %s", cmd.name, err, cmd.name)
	}
	if err := cmd.checkArgs(flags.Args()); err != nil {
		return err
	}
	if a.state == "" {
		var err error
		if a.state, err = stateFrom(a.config); err != nil {
			return err
		}
	}
	return run(ctx, flags.Args())
}

// newFlags makes a set of flags that leaves messages to the caller.
func newFlags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}
