package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
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

// execFlags are what an exec changes in the container's process.
type execFlags struct {
	env     []string
	cwd     string
	user    string
	stdin   bool
	timeout time.Duration
}

func setupExec(a *app, fs *flag.FlagSet) runFunc {
	var f execFlags
	fs.Func("e", "set the environment variable `KEY=VALUE`; may be repeated", func(s string) error {
		if !strings.Contains(s, "=") {
			return errors.New("want KEY=VALUE")
		}
		f.env = append(f.env, s)
		return nil
	})
	fs.StringVar(&f.cwd, "w", "", "run in `DIR` of the container")
	fs.StringVar(&f.user, "u", "", "run as `UID[:GID]`, numbers")
	fs.BoolVar(&f.stdin, "i", false, "pass on standard input")
	fs.DurationVar(&f.timeout, "timeout", 0, "kill it after `DURATION`, such as 5s (default never)")
	return func(ctx context.Context, dir rundir.Dir, command []string) error {
		if f.timeout < 0 || f.timeout > 0 && f.timeout < time.Millisecond {
			return usagef("exec: --timeout must be 1ms or more")
		}
		if len(command) > 1 && command[0] == "--" {
			command = command[1:] // as kubectl wants it
		}
		var result client.ExecResult
		err := withShim(ctx, dir, func(c *client.Client) (err error) {
			result, err = a.exec(ctx, c, command, f)
			return err
		})
		switch {
		case err != nil:
			return err
		case result.TimedOut:
			const text = "holdfastctl: the command did not end within %s; it and all that it started was killed\n"
			fmt.Fprintf(a.stderr, text, f.timeout)
			return exitCode(codeTimeout)
		case result.Code != 0:
			return exitCode(result.Code)
		}
		return nil
	}
}

// exec runs a command in the process of the container, but for what flags say.
// With --json the output is kept and printed in the end.
func (a *app) exec(ctx context.Context, c *client.Client, command []string, f execFlags) (client.ExecResult, error) {
	e := client.Exec{
		Process: &specs.Process{Args: command, Cwd: f.cwd},
		SetUser: f.user != "",
		Timeout: f.timeout,
		// Hidden in a struct, so that the shim gets pipes and not our own files.
		Stdout: struct{ io.Writer }{a.stdout},
		Stderr: struct{ io.Writer }{a.stderr},
	}
	if f.user != "" || len(f.env) > 0 {
		if err := f.change(e.Process, c.Dir()); err != nil {
			return client.ExecResult{}, err
		}
	}
	if f.stdin {
		e.Stdin = struct{ io.Reader }{a.stdin}
	}
	var out, errs bytes.Buffer
	if a.json {
		const limit = 16 << 20
		e.Stdout, e.Stderr, e.Limit = &out, &errs, limit
	}
	r, err := c.Exec(ctx, e)
	if err != nil || !a.json {
		return r, err
	}
	return r, a.print(execJSON{r.Code, r.TimedOut, out.String(), errs.String(), r.DroppedBytes}, "")
}

// change sets environment and user of a process to those of the container, with
// the changes that flags ask for.
func (f execFlags) change(p *specs.Process, dir rundir.Dir) error {
	var spec specs.Spec
	b, err := os.ReadFile(dir.Path(rundir.SpecName))
	if err == nil {
		err = json.Unmarshal(b, &spec)
	}
	if err == nil && spec.Process == nil {
		err = errors.New("it names no process")
	}
	if err != nil {
		return fmt.Errorf("cannot read the container's environment from %s: %w", dir.Path(rundir.SpecName), err)
	}
	p.Env, p.User = spec.Process.Env, spec.Process.User
	for _, e := range f.env {
		key, _, _ := strings.Cut(e, "=")
		p.Env = slices.DeleteFunc(p.Env, func(old string) bool { return strings.HasPrefix(old, key+"=") })
		p.Env = append(p.Env, e)
	}
	if f.user != "" {
		p.User, err = parseUser(f.user, p.User)
	}
	return err
}

// parseUser reads UID[:GID]. Names are those of the container's files, which
// only the container should read.
func parseUser(s string, old specs.User) (specs.User, error) {
	uid, gid, both := strings.Cut(s, ":")
	if !both {
		gid = fmt.Sprint(old.GID)
	}
	u, errU := strconv.ParseUint(uid, 10, 32)
	g, errG := strconv.ParseUint(gid, 10, 32)
	if errU != nil || errG != nil {
		return old, usagef("exec: -u %q: want numbers, UID or UID:GID", s)
	}
	return specs.User{UID: uint32(u), GID: uint32(g), AdditionalGids: []uint32{uint32(g)}, Umask: old.Umask}, nil
}

// execJSON is what `exec --json` prints.
type execJSON struct {
	ExitCode     int    `json:"exitCode"`
	TimedOut     bool   `json:"timedOut,omitempty"`
	Stdout       string `json:"stdout"`
	Stderr       string `json:"stderr"`
	DroppedBytes uint64 `json:"droppedBytes,omitempty"`
}
