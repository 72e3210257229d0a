// Command holdfastctl looks at containers and acts on them through their shims.
// It needs no daemon: what it knows comes from the run directories and from the
// shims' own sockets.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// version is set by the linker.
var version = "unknown"

const (
	defaultConfig = "/etc/holdfast/config.toml"
	defaultState  = "/run/holdfast"
	maxConfig     = 1 << 20 // bytes, as the daemon has it
)

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
	address        string // of the daemon
	daemon         records.Daemon
	settings       config
	json           bool
}

// usageError is a mistake in the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// exitCode ends the program without a message of its own.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// main runs the command line and gives the exit code.
func (a *app) main(ctx context.Context, args []string) int {
	err := a.run(ctx, args)
	var usage usageError
	var code exitCode
	hint := ""
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, fs.ErrPermission):
		hint = "; run it as root"
	}
	fmt.Fprintf(a.stderr, "holdfastctl: %s%s\n", lines(err.Error()), hint)
	if errors.As(err, &usage) {
		return codeUsage
	}
	return codeError
}

func (a *app) run(ctx context.Context, args []string) (err error) {
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
	help := args[0] == "help"
	if help {
		if args = args[1:]; len(args) == 0 {
			a.printHelp()
			return nil
		}
	}
	cmd, err := find(args[0])
	if err != nil {
		return err
	}
	if help {
		a.printCommand(cmd)
		return nil
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
	if err := a.load(); err != nil {
		return err
	}
	var dir rundir.Dir
	args = flags.Args()
	if strings.HasPrefix(cmd.args, "ID") {
		if dir, err = a.dir(args[0]); err != nil {
			return err
		}
		args = args[1:]
	}
	return run(ctx, dir, args)
}

// newFlags makes a set of flags that leaves messages to the caller.
func newFlags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// config is what matters here of the daemon's config. A mistake in another key
// keeps nobody from looking.
type config struct {
	Root    string `toml:"root"`
	State   string `toml:"state"`
	Address string `toml:"address"` // of the CRI
	CNI     struct {
		ConfDir string `toml:"conf_dir"`
	} `toml:"cni"`
}

// load reads the config, unless the state directory was named. The default file
// may be missing.
func (a *app) load() error {
	var c config
	if a.state == "" {
		path := cmp.Or(a.config, defaultConfig)
		b, err := beneath.HostFile(path, maxConfig)
		if err == nil {
			err = toml.Unmarshal(b, &c)
		} else if errors.Is(err, fs.ErrNotExist) && a.config == "" {
			err = nil
		}
		if err != nil {
			return fmt.Errorf("cannot read the config %s: %w; --state does without", path, err)
		}
	}
	a.settings = c
	a.state = cmp.Or(a.state, c.State, defaultState)
	var err error
	if a.daemon, err = records.ReadDaemon(a.state); err != nil {
		a.daemon = records.Daemon{} // never started, or damaged: the config has to do
	}
	a.address = cmp.Or(a.daemon.Address, c.Address, filepath.Join(a.state, "holdfast.sock"))
	return nil
}
