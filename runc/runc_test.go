package runc

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// script makes an OCI runtime that is a shell script.
func script(t *testing.T, body string) *Runtime {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "runtime")
	must.Succeed(t, os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700))
	return &Runtime{Path: path, Root: filepath.Join(dir, "root"), Log: filepath.Join(dir, "log")}
}

func TestErrorIsTheRuntimes(t *testing.T) {
	r := script(t, `echo '{"level":"error","msg":"it is broken"}' >> "$4"; echo no JSON >> "$4"; exit 3`)
	must.Succeed(t, os.WriteFile(r.Log, []byte(`{"level":"error","msg":"an older error"}`+"\n"), 0o600))
	err := r.Start(t.Context(), "box")
	var e *Error
	if !errors.As(err, &e) || e.Message != "it is broken" || e.Verb != "start" || e.ID != "box" {
		t.Errorf("got %#v", err)
	}
}

// A runtime that was killed, or could not be run, has said nothing about what it was asked for.
func TestUnfinished(t *testing.T) {
	for body, want := range map[string]bool{"exit 1": false, "kill -9 $$": true, "rm $0; exec $0": false} {
		r := script(t, body)
		e, ok := errors.AsType[*Error](r.Start(t.Context(), "box"))
		if !ok || e.Unfinished() != want {
			t.Errorf("%s: %v, unfinished is not %v", body, e, want)
		}
	}
	r := &Runtime{Path: "/nowhere/runtime"}
	if e, ok := errors.AsType[*Error](r.Start(t.Context(), "box")); !ok || !e.Unfinished() {
		t.Errorf("a runtime that is not there: %v", e)
	}
}

// The log of a runtime that fails again and again has a bound, and the words of each
// failure are found.
func TestLogIsBounded(t *testing.T) {
	const fail = `{ printf '{"level":"error","msg":"%s' "$7"
head -c 300000 /dev/zero | tr '\0' x; echo '"}'; } >> "$4"; exit 3`
	r := script(t, fail)
	for i := range 20 {
		verb := []string{"start", "delete"}[i%2]
		var e *Error
		err := r.run(t.Context(), "box", IO{}, verb, "box")
		if !errors.As(err, &e) || !strings.HasPrefix(e.Message, verb+"xxx") {
			t.Fatalf("failure %d: %.100q", i, err)
		}
		if st, err := os.Stat(r.Log); err != nil || st.Size() > maxLog+400_000 {
			t.Fatalf("after failure %d the log has %d bytes, %v", i, st.Size(), err)
		}
	}
}

// Only what an image or a command is makes a container that cannot run, and nothing
// that a user named makes another error look like that.
func TestUnrunnable(t *testing.T) {
	const runc = "runc create failed: unable to start container process: "
	for text, want := range map[string]bool{
		runc + `error during container init: exec: "nope": executable file not found in $PATH`:                 true,
		runc + `error during container init: exec: "/nope": stat /nope: no such file or directory`:             true,
		runc + `error during container init: exec: "/etc": is a directory`:                                     true,
		runc + `error during container init: exec: "/etc/passwd": permission denied`:                           true,
		runc + `error during container init: mkdir /etc/passwd: not a directory`:                               true,
		runc + `error during container init: chdir to cwd ("/x") set in config.json failed: permission denied`: true,
		runc + `exec: "nope": executable file not found in $PATH`:                                              true,
		"executable file `nope` not found in $PATH: No such file or directory":                                 true,
		"open executable: Permission denied":                                                                   true,
		runc + `error during container init: error mounting "/x" to rootfs at "/exec: \"y": no such file`:      false,
		runc + `error during container init: error mounting "exec: \"nope\": not found" to rootfs`:             false,
		runc + `unable to apply cgroup configuration: mkdir /sys/fs/cgroup/x: no space left on device`:         false,
		runc + `error during container init: unable to init seccomp: error loading seccomp filter`:             false,
		runc + `error during container init: unable to apply apparmor profile: apparmor failed to apply`:       false,
		`runc create failed: invalid rootfs: stat /x: no such file or directory`:                               false,
		`runc create failed: unable to get cgroup PIDs: exec: "x": no such file or directory`:                  false,
		"": false,
	} {
		if got := (&Error{Verb: "create", Message: text}).Unrunnable(); got != want {
			t.Errorf("%v for %s", got, text)
		}
	}
	if (&Error{Verb: "delete", Message: "executable file `nope` not found"}).Unrunnable() {
		t.Error("a container that cannot be deleted is taken for one that cannot run")
	}
}

func TestErrorWithoutWords(t *testing.T) {
	err := script(t, "exit 3").Start(t.Context(), "box")
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
}

func TestArguments(t *testing.T) {
	r := script(t, `echo "$@" > "$2.args"; env > "$2.env"`)
	r.SystemdCgroup = true
	t.Setenv("NOTIFY_SOCKET", "/run/x")
	t.Setenv("GOMAXPROCS", "1")
	err := r.Create(t.Context(), "box", CreateOptions{Bundle: "/b", PidFile: "/p", ConsoleSocket: "/c"})
	must.Succeed(t, err)
	want := "--root " + r.Root + " --log " + r.Log +
		" --log-format json --systemd-cgroup create --bundle /b --pid-file /p --console-socket /c box\n"
	if got, err := os.ReadFile(r.Root + ".args"); err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	env, err := os.ReadFile(r.Root + ".env")
	if err != nil || strings.Contains(string(env), "NOTIFY_SOCKET") || strings.Contains(string(env), "GOMAXPROCS") {
		t.Errorf("environment %s, %v", env, err)
	}
}

// The deadline kills what the runtime has started, too.
func TestDeadlineKillsTheGroup(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "alive")
	r := script(t, `sh -c 'echo started > "`+fifo+`"; exec sleep 1000' & wait`)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	pr, pw, err := os.Pipe()
	must.Succeed(t, err)
	defer pr.Close()
	err = r.Create(ctx, "box", CreateOptions{IO: IO{Stdout: pw}})
	pw.Close()
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// Both held the pipe open; its end says that both are gone.
	pr.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if n, err := pr.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("something still runs: %v", err)
	}
}

func TestFeatures(t *testing.T) {
	if out, err := script(t, `echo '{"ociVersionMin":"1.0.0"}'`).Features(t.Context()); err != nil ||
		!strings.Contains(string(out), "1.0.0") {
		t.Errorf("%s, %v", out, err)
	}
	if _, err := script(t, `echo nonsense`).Features(t.Context()); err == nil {
		t.Error("no error for nonsense")
	}
}

// What a runtime leaves behind with its output, and an answer without end, keep nobody.
func TestFeaturesHaveAnEnd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if f, err := script(t, "echo '{}'; sleep 20 &").Features(ctx); err != nil || string(f) != "{}\n" || ctx.Err() != nil {
		t.Errorf("beside a process that was left: %q, %v, %v", f, err, ctx.Err())
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if f, err := script(t, "exec yes").Features(ctx); err == nil || len(f) > maxOutput {
		t.Errorf("%d bytes, %v", len(f), err)
	}
}

// A start of a container whose init is dead fails instead of waiting.
func TestReleaseOfTheDead(t *testing.T) {
	r := &Runtime{Root: t.TempDir()}
	if err := r.Release(t.Context(), "box", 0); err == nil {
		t.Error("no error without a FIFO")
	}
}
