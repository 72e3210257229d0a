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
	timeout := fs.Duration("timeout", 0, "kill it after `DURATION`, such as 5s (default never)")
	return func(ctx context.Context, dir rundir.Dir, command []string) error {
		if *timeout < 0 || *timeout > 0 && *timeout < time.Millisecond {
			return usagef("exec: --timeout must be 1ms or more")
		}
		if len(command) > 1 && command[0] == "--" {
			command = command[1:] // as kubectl wants it
		}
		p.Args = command
		e := client.Exec{Process: p, SetUser: *user != "", Timeout: *timeout}
		// Hidden in a struct, so that the shim gets pipes and not our own files.
		e.Stdout, e.Stderr = struct{ io.Writer }{a.stdout}, struct{ io.Writer }{a.stderr}
		var out, errs bytes.Buffer
		if a.json {
			const limit = 16 << 20
			e.Stdout, e.Stderr, e.Limit = &out, &errs, limit
		}
		if *stdin {
			e.Stdin = struct{ io.Reader }{a.stdin}
		}
		var r client.ExecResult
		err := withShim(ctx, dir, func(c *client.Client) (err error) {
			if err = client.Change(p, dir, env, *user); errors.Is(err, client.ErrUser) {
				return usagef("exec: -u %q: %v", *user, err)
			} else if err != nil {
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
			fmt.Fprintf(a.stderr, text, *timeout)
			return exitCode(codeTimeout)
		case r.Code != 0:
			return exitCode(r.Code)
		}
		return nil
	}
}
