// Package runc runs the verbs of an OCI runtime (runc and those with its
// command line) and decodes its errors.
package runc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/group"
)

// Runtime says how the OCI runtime is called. Every method takes its deadline
// from its context; at its end the runtime and its process group are killed.
type Runtime struct {
	Path          string       // of the binary
	Root          string       // --root: where it keeps its state
	SystemdCgroup bool         // --systemd-cgroup
	Log           string       // --log, in JSON: where its error messages come from
	Runner        group.Runner // of the process that reaps its orphans; nil: os/exec
}

// Error is a verb that failed, with the runtime's own words.
type Error struct {
	Verb    string
	ID      string
	Message string // the runtime's error, empty if it said nothing
	Err     error  // how it ended: *exec.ExitError, context.DeadlineExceeded ...
}

func (e *Error) Error() string {
	s := fmt.Sprintf("OCI runtime cannot %s %s: ", e.Verb, e.ID)
	if e.Message == "" {
		return s + e.Err.Error()
	}
	return s + e.Message
}

func (e *Error) Unwrap() error { return e.Err }

// Unrunnable says that a container could not be created because of what its image is
// or what it was told to run. Any other error is the machine's, or the caller's.
func (e *Error) Unrunnable() bool { return e.Verb == "create" && unrunnable(e.Message) }

// Unfinished says that the runtime did not come to its end by itself: it was killed, or could
// not be run. Nothing is wrong with what it was asked for.
func (e *Error) Unfinished() bool {
	exit, ok := errors.AsType[*exec.ExitError](e.Err)
	return !ok || !exit.Exited()
}

// unrunnable knows how runtimes say that a container's program or its working directory
// is not there, is none, or may not be used. There is nothing but their texts to tell
// it by: those of runc (libcontainer's init: LookPath, MkdirAll of cwd, chdir, and its
// check of where that led) and of crun. They are looked for at the beginning alone, as
// names that a user chose may follow. A regular expression would cost every shim 50 kB.
func unrunnable(message string) bool {
	text, ofRunc := strings.CutPrefix(strings.TrimPrefix(message, "runc create failed: "),
		"unable to start container process: ")
	words := []string{"executable file `", "open executable", "cannot find `", "chdir "}
	if ofRunc {
		text = strings.TrimPrefix(text, "error during container init: ")
		words = []string{`exec: "`, "chdir to cwd (", "mkdir ", "current working directory "}
	} else {
		text = strings.TrimPrefix(message, "crun: ")
	}
	return slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(text, w) })
}

// IO is what the container's process gets as its standard files. They stay the
// caller's to close. A nil one is /dev/null.
type IO struct{ Stdin, Stdout, Stderr *os.File }

// CreateOptions are those of Create.
type CreateOptions struct {
	IO
	Bundle        string
	PidFile       string
	ConsoleSocket string // with a terminal
}

func (o CreateOptions) args() []string {
	args := []string{"--bundle", o.Bundle, "--pid-file", o.PidFile}
	if o.ConsoleSocket != "" {
		args = append(args, "--console-socket", o.ConsoleSocket)
	}
	return args
}

// Create makes a container whose init waits for Start.
func (r *Runtime) Create(ctx context.Context, id string, o CreateOptions) error {
	return r.run(ctx, id, o.IO, append(append([]string{"create"}, o.args()...), id)...)
}

// Start lets the init of a created container run the container's process.
func (r *Runtime) Start(ctx context.Context, id string) error {
	return r.run(ctx, id, IO{}, "start", id)
}

// ExecOptions are those of Exec.
type ExecOptions struct {
	IO
	Process       string // file with an OCI process as JSON
	PidFile       string
	Cgroup        string // as Cgroups.Sub gives it; empty: the container's
	ConsoleSocket string // with a terminal
}

// Exec starts a process in a running container and leaves it behind: the
// nearest subreaper above becomes its parent.
func (r *Runtime) Exec(ctx context.Context, id string, o ExecOptions) error {
	args := []string{"exec", "--detach", "--process", o.Process, "--pid-file", o.PidFile}
	if o.Cgroup != "" {
		args = append(args, "--cgroup", o.Cgroup)
	}
	if o.ConsoleSocket != "" {
		args = append(args, "--console-socket", o.ConsoleSocket)
	}
	return r.run(ctx, id, o.IO, append(args, id)...)
}

// Update sets the limits of a container that has not ended to those in a file: the JSON of
// linux.resources of a spec. Where it fails, some of them may be set.
func (r *Runtime) Update(ctx context.Context, id, resources string) error {
	return r.run(ctx, id, IO{}, "update", "--resources", resources, id)
}

// Delete removes what the runtime keeps of a container, its cgroups included.
// With force it kills what lives, and a missing container is no error.
func (r *Runtime) Delete(ctx context.Context, id string, force bool) error {
	args := []string{"delete"}
	if force {
		args = append(args, "--force")
	}
	// It mounts the root there for a restore, and may have been killed.
	unix.Unmount(filepath.Join(r.StateDir(id), "criu-root"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	return r.run(ctx, id, IO{}, append(args, id)...)
}

// Features asks what the runtime can do; the answer is features.Features of
// the OCI runtime spec as JSON.
func (r *Runtime) Features(ctx context.Context) (json.RawMessage, error) {
	out, err := r.output(ctx, "", "features")
	if err == nil && !json.Valid(out) {
		err = fmt.Errorf("cannot read the OCI runtime's features: %.100q is not JSON", out)
	}
	return out, err
}

// StateDir is where runc keeps a container.
func (r *Runtime) StateDir(id string) string { return filepath.Join(r.Root, id) }

// An answer has a bound. Once the runtime has ended a process that it left, which may have
// its output still, is not waited for.
const (
	maxOutput  = 1 << 20
	outputWait = time.Second
)

func (r *Runtime) output(ctx context.Context, id string, args ...string) ([]byte, error) {
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", r.Path, err)
	}
	defer pr.Close()
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(pr, maxOutput))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = nil // there is no more of the runtime's
		}
		done <- result{b, err}
	}()
	err = r.run(ctx, id, IO{Stdout: pw}, args...)
	pw.Close()
	pr.SetReadDeadline(time.Now().Add(outputWait))
	res := <-done
	return res.b, errors.Join(err, res.err)
}

func (r *Runtime) run(ctx context.Context, id string, stdio IO, args ...string) error {
	global := []string{"--root", r.Root}
	var offset int64
	if r.Log != "" {
		global = append(global, "--log", r.Log, "--log-format", "json")
		offset = r.boundLog()
	}
	if r.SystemdCgroup {
		global = append(global, "--systemd-cgroup")
	}
	cmd := exec.Command(r.Path, append(global, args...)...)
	cmd.Env = environ()
	// A nil *os.File in the interface would not be nil.
	if stdio.Stdin != nil {
		cmd.Stdin = stdio.Stdin
	}
	if stdio.Stdout != nil {
		cmd.Stdout = stdio.Stdout
	}
	if stdio.Stderr != nil {
		cmd.Stderr = stdio.Stderr
	}
	// The init of a container has a session of its own, and is not in the group.
	if err := group.Run(ctx, cmd, r.Runner, group.Keep); err != nil {
		return &Error{Verb: args[0], ID: id, Message: lastError(r.Log, offset), Err: err}
	}
	return nil
}

// maxLog bounds the runtime's log, in bytes. A probe whose command is missing adds to it
// for as long as its container lives.
const maxLog = 1 << 20

// boundLog empties a log that has become too large, and gives its size. A verb that runs
// meanwhile loses its words by that, and takes no others for them.
func (r *Runtime) boundLog() int64 {
	st, err := os.Stat(r.Log)
	if err != nil || st.Size() > maxLog && os.Truncate(r.Log, 0) == nil {
		return 0
	}
	return st.Size()
}

var notInherited = []string{
	"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
	"GOMAXPROCS", "GOGC", "GOMEMLIMIT", "GODEBUG", "GOTRACEBACK",
}

// environ is ours without what would make the runtime talk to our own service
// manager or bend its Go runtime.
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool {
		k, _, _ := strings.Cut(kv, "=")
		return slices.Contains(notInherited, k)
	})
}

// maxMessage bounds what is kept of a runtime's words, in characters: they repeat
// arguments, of which one may have 128 KiB.
const maxMessage = 2000

// lastError is the last error that the runtime logged after offset.
func lastError(path string, offset int64) (msg string) {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return ""
	}
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 0, 4096), 1<<20)
	for sc.Scan() {
		var line struct{ Level, Msg string }
		if json.Unmarshal(sc.Bytes(), &line) == nil && line.Msg != "" &&
			(line.Level == "error" || line.Level == "fatal") {
			msg = fmt.Sprintf("%.*s", maxMessage, line.Msg)
		}
	}
	return msg
}
