package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
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
			if err = change(p, dir, env, *user); err == nil {
				r, err = c.Exec(ctx, e)
			}
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

// change sets environment and user of a process to those of the container, with
// the changes that were asked for. Without any, the shim does.
func change(p *specs.Process, dir rundir.Dir, env []string, user string) error {
	if len(env) == 0 && user == "" {
		return nil
	}
	own, err := client.Process(dir)
	if err != nil {
		return err
	}
	p.Env, p.User = own.Env, own.User
	for _, e := range env {
		key, _, _ := strings.Cut(e, "=")
		p.Env = slices.DeleteFunc(p.Env, func(old string) bool { return strings.HasPrefix(old, key+"=") })
		p.Env = append(p.Env, e)
	}
	if user == "" {
		return nil
	}
	// Names are those of the container's files, which only the container should read.
	uid, gid, both := strings.Cut(user, ":")
	if !both {
		gid = fmt.Sprint(p.User.GID)
	}
	u, errU := strconv.ParseUint(uid, 10, 32)
	g, errG := strconv.ParseUint(gid, 10, 32)
	if errU != nil || errG != nil {
		return usagef("exec: -u %q: want numbers, UID or UID:GID", user)
	}
	p.User.UID, p.User.GID, p.User.AdditionalGids = uint32(u), uint32(g), []uint32{uint32(g)}
	return nil
}
