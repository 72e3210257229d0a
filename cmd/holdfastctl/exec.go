package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// codeTimeout is the exit code of a command that ran into --timeout, as
// timeout(1) has it.
const codeTimeout = 124

// execJSON is what `exec --json` prints.
type execJSON struct {
	ExitCode     int    `json:"exitCode"`
	TimedOut     bool   `json:"timedOut,omitempty"`
	Stdout       string `json:"stdout"`
	Stderr       string `json:"stderr"`
	DroppedBytes uint64 `json:"droppedBytes,omitempty"`
}

func setupExec(a *app, fs *flag.FlagSet) runFunc {
	p := &specs.Process{}
	var env []string
	fs.Func("e", "set the environment variable `KEY=VALUE`; may be repeated", func(s string) error {
		if !strings.Contains(s, "=") {
			return errors.New("want KEY=VALUE")
		}
		env = append(env, s)
		return nil
	})
	fs.StringVar(&p.Cwd, "w", "", "run in `DIR` of the container")
	user := fs.String("u", "", "run as `UID[:GID]`, numbers")
	stdin := fs.Bool("i", false, "pass on standard input")
	fs.BoolVar(&p.Terminal, "t", false, "give it a terminal")
	fs.BoolFunc("it", "-i and -t", func(string) error {
		*stdin, p.Terminal = true, true
		return nil
	})
	timeout := fs.Duration("timeout", 0, "kill it after `DURATION`, such as 5s (default never)")
	return func(ctx context.Context, dir rundir.Dir, command []string) error {
		if *timeout < 0 || *timeout > 0 && *timeout < time.Millisecond {
			return usagef("exec: --timeout must be 1ms or more")
		}
		if len(command) > 1 && command[0] == "--" {
			command = command[1:] // as kubectl wants it
		}
		p.Args = command
		change := func() error {
			err := client.Change(p, dir, env, *user)
			if errors.Is(err, client.ErrUser) {
				return usagef("exec: -u %q: %v", *user, err)
			}
			return err
		}
		if p.Terminal {
			return a.execTerminal(ctx, dir, change, client.SessionOptions{
				Process: p,
				SetUser: *user != "",
				Stdin:   *stdin,
				Stdout:  true,
				Timeout: *timeout,
			})
		}
		e := client.Exec{Process: p, SetUser: *user != "", Timeout: *timeout}
		if *stdin {
			e.Stdin = struct{ io.Reader }{a.stdin}
		}
		return a.exec(ctx, dir, change, e)
	}
}

// exec runs a command without a terminal. change completes its process.
func (a *app) exec(ctx context.Context, dir rundir.Dir, change func() error, e client.Exec) error {
	// Hidden in a struct, so that the shim gets pipes and not our own files.
	e.Stdout, e.Stderr = struct{ io.Writer }{a.stdout}, struct{ io.Writer }{a.stderr}
	var out, errs bytes.Buffer
	if a.json {
		const limit = 16 << 20
		e.Stdout, e.Stderr, e.Limit = &out, &errs, limit
	}
	var r client.ExecResult
	err := withShim(ctx, dir, func(c *client.Client) (err error) {
		if err = change(); err != nil {
			return err
		}
		r, err = c.Exec(ctx, e)
		return err
	})
	if err == nil && a.json {
		err = a.print(execJSON{r.Code, r.TimedOut, out.String(), errs.String(), r.DroppedBytes}, "")
	}
	switch {
	case err != nil:
		return err
	case r.TimedOut:
		const text = "holdfastctl: the command did not end within %s; it and all that it started was killed\n"
		fmt.Fprintf(a.stderr, text, e.Timeout)
		return exitCode(codeTimeout)
	case r.Code != 0:
		return exitCode(r.Code)
	}
	return nil
}

// execTerminal runs a command with a terminal, as large as ours if we have one.
func (a *app) execTerminal(ctx context.Context, dir rundir.Dir, change func() error, o client.SessionOptions) error {
	if a.json {
		return usagef("exec: --json and -t exclude each other")
	}
	if err := change(); err != nil {
		return err
	}
	if size, err := sizeOf(a.stdin); err == nil {
		o.Process.ConsoleSize = &specs.Box{Width: uint(size.Width), Height: uint(size.Height)}
	}
	return a.session(ctx, dir, o, o.Stdin)
}
