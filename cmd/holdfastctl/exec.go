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

	"github.com/holdfast-cri/holdfast/proto"
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
	return func(ctx context.Context, args []string) error {
		if f.timeout < 0 || f.timeout > 0 && f.timeout < time.Millisecond {
			return usagef("exec: --timeout must be 1ms or more")
		}
		command := args[1:]
		if len(command) > 1 && command[0] == "--" {
			command = command[1:] // as kubectl wants it
		}
		var resp *proto.ExecSyncResponse
		err := a.withShim(ctx, args[0], func(s *shim) error {
			process, err := f.process(s.dir, command)
			if err != nil {
				return err
			}
			resp, err = a.exec(ctx, s, process, f)
			return err
		})
		if err != nil {
			return err
		}
		return a.execResult(resp, f.timeout)
	}
}

// execResult turns the answer into the exit code.
func (a *app) execResult(resp *proto.ExecSyncResponse, timeout time.Duration) error {
	if resp.GetTimedOut() {
		fmt.Fprintf(a.stderr, "holdfastctl: the command did not end within %s; it and all that it started was killed\n", timeout)
		return exitCode(codeTimeout)
	}
	if code := resp.GetExitCode(); code != 0 {
		return exitCode(code)
	}
	return nil
}

// execJSON is what `exec --json` prints: everything at the end.
type execJSON struct {
	ExitCode     uint32 `json:"exitCode"`
	TimedOut     bool   `json:"timedOut,omitempty"`
	Stdout       string `json:"stdout"`
	Stderr       string `json:"stderr"`
	DroppedBytes uint64 `json:"droppedBytes,omitempty"`
}

// jsonLimit is how much of each stream `exec --json` keeps in memory.
const jsonLimit = 16 << 20

// process is the container's own process with another command line.
func (f execFlags) process(dir rundir.Dir, args []string) (*specs.Process, error) {
	b, err := os.ReadFile(dir.Path(rundir.SpecName))
	if err != nil {
		return nil, fmt.Errorf("cannot read the container's spec: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", dir.Path(rundir.SpecName), err)
	}
	if spec.Process == nil {
		return nil, fmt.Errorf("cannot take the container's environment from %s: it names no process", dir.Path(rundir.SpecName))
	}
	p := *spec.Process
	p.Args, p.CommandLine, p.Terminal, p.ConsoleSize = args, "", false, nil
	if f.cwd != "" {
		p.Cwd = f.cwd
	}
	for _, e := range f.env {
		key, _, _ := strings.Cut(e, "=")
		p.Env = slices.DeleteFunc(p.Env, func(old string) bool { return strings.HasPrefix(old, key+"=") })
		p.Env = append(p.Env, e)
	}
	if f.user != "" {
		if p.User, err = parseUser(f.user, p.User); err != nil {
			return nil, err
		}
	}
	return &p, nil
}

// parseUser reads UID[:GID]. Names are those of the container's files, which
// only the container should read.
func parseUser(s string, old specs.User) (specs.User, error) {
	uid, gid, both := strings.Cut(s, ":")
	u, err := strconv.ParseUint(uid, 10, 32)
	g := uint64(old.GID)
	if err == nil && both {
		g, err = strconv.ParseUint(gid, 10, 32)
	}
	if err != nil {
		return old, usagef("exec: -u %q: want numbers, UID or UID:GID", s)
	}
	// Naming the group once more tells root from "nobody in particular", which
	// the shim takes for the container's own user.
	return specs.User{UID: uint32(u), GID: uint32(g), AdditionalGids: []uint32{uint32(g)}, Umask: old.Umask}, nil
}

// exec runs the process. Its streams are pipes of this process, which the shim
// opens by their names in /proc.
func (a *app) exec(ctx context.Context, s *shim, p *specs.Process, f execFlags) (*proto.ExecSyncResponse, error) {
	wire, err := proto.MarshalAny(p)
	if err != nil {
		return nil, err
	}
	req := &proto.ExecSyncRequest{Id: s.dir.ID(), Process: wire, TimeoutMs: uint64(f.timeout.Milliseconds())}
	if f.stdin {
		r, err := a.feed()
		if err != nil {
			return nil, err
		}
		defer r.Close() // open until the shim has surely opened it
		req.StdinPath = procPath(r)
	}
	var out, errOut bytes.Buffer
	stdout, stderr := a.stdout, a.stderr
	if a.json {
		stdout, stderr, req.OutputLimit = &out, &errOut, jsonLimit
	}
	outPipe, err := drain(stdout)
	if err != nil {
		return nil, err
	}
	errPipe, err := drain(stderr)
	if err != nil {
		outPipe.abandon()
		return nil, err
	}
	req.StdoutPath, req.StderrPath = procPath(outPipe.w), procPath(errPipe.w)

	limit := time.Duration(0) // as long as the command takes
	if f.timeout > 0 {
		limit = f.timeout + slow // the shim starts the OCI runtime and kills a tree
	}
	resp, err := call(ctx, s, limit, proto.ShimService.ExecSync, req)
	if err != nil {
		outPipe.abandon()
		errPipe.abandon()
		return nil, err
	}
	outPipe.finish()
	errPipe.finish()
	if a.json {
		err = a.printJSON(execJSON{resp.GetExitCode(), resp.GetTimedOut(), out.String(), errOut.String(), resp.GetDroppedBytes()})
	}
	return resp, err
}

// procPath is a name under which another process can open our descriptor.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }

// feed gives a pipe that standard input is copied into. The copying ends with
// standard input, with the last reader, or with this process.
func (a *app) feed() (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	go func() {
		io.Copy(w, a.stdin)
		w.Close()
	}()
	return r, nil
}

// drainer is a pipe whose content goes to a writer.
type drainer struct {
	r, w *os.File // w is for the shim to open
	done chan struct{}
}

func drain(to io.Writer) (*drainer, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	d := &drainer{r: r, w: w, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		io.Copy(to, r)
	}()
	return d, nil
}

// finish waits for the rest of the output, once the command has ended and the
// shim has closed its end. It takes as long as whoever reads ours.
func (d *drainer) finish() {
	d.w.Close()
	<-d.done
	d.r.Close()
}

// abandon drops what is still to come: the shim may keep its end open.
func (d *drainer) abandon() {
	d.w.Close()
	d.r.Close()
	<-d.done
}
