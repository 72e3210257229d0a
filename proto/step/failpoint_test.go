//go:build failpoint

package step

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// reacher makes this test binary a process that reaches the steps that it names.
const reacher = "STEPS_TO_REACH"

func TestMain(m *testing.M) {
	steps := os.Getenv(reacher)
	if steps == "" {
		os.Exit(m.Run())
	}
	for s := range strings.FieldsSeq(steps) {
		if err := Reach(Step(s)); err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("went on")
		}
	}
	os.Exit(0)
}

// failpoints writes a file of failpoints and gives its path.
func failpoints(t *testing.T, lines string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "failpoints")
	must.Succeed(t, os.WriteFile(file, []byte(lines), 0o600))
	return file
}

// reach is a command that reaches steps in a process of its own.
func reach(t *testing.T, file string, steps ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), Variable+"="+file, reacher+"="+strings.Join(steps, " "))
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	return cmd, out
}

func TestActions(t *testing.T) {
	const went = "went on\n"
	const full = "failpoint one: no space left on device\n"
	for name, c := range map[string]struct {
		lines  string
		want   string         // what the process says
		signal syscall.Signal // that ends it
	}{
		"nothing":        {lines: "", want: went + went + went},
		"another step":   {lines: "other fail", want: went + went + went},
		"a prefix":       {lines: "on fail\none-more fail", want: went + went + went},
		"fail":           {lines: "one fail", want: "failpoint one\n" + went + "failpoint one\n"},
		"fail each time": {lines: "one fail 0", want: "failpoint one\n" + went + "failpoint one\n"},
		"fail once":      {lines: "one fail 2", want: went + went + "failpoint one\n"},
		"fail too late":  {lines: "one fail 3", want: went + went + went},
		"full":           {lines: "one fail ENOSPC", want: full + went + full},
		"full once":      {lines: "one fail ENOSPC 2", want: went + went + full},
		"broken once": {lines: "two fail EIO 1",
			want: went + "failpoint two: input/output error\n" + went},
		"kill":           {lines: "two kill", want: went, signal: syscall.SIGKILL},
		"kill once":      {lines: "one kill 2", want: went + went, signal: syscall.SIGKILL},
		"delay":          {lines: "one 1ns", want: went + went + went},
		"delay and fail": {lines: "two 1ms\ntwo fail", want: went + "failpoint two\n" + went},
		"no such action": {lines: "two explode",
			want: went + "failpoint two: there is no action \"explode\"\n" + went},
		"only the step":   {lines: "two", want: went + went + went},
		"blank lines too": {lines: "\n\ntwo fail\n\n", want: went + "failpoint two\n" + went},
	} {
		t.Run(name, func(t *testing.T) {
			file := failpoints(t, c.lines)
			cmd, out := reach(t, file, "one", "two", "one")
			err := cmd.Run()
			var end *exec.ExitError
			switch {
			case c.signal == 0 && err != nil:
				t.Errorf("it ended with %v", err)
			case c.signal != 0 && (!errors.As(err, &end) || end.Sys().(syscall.WaitStatus).Signal() != c.signal):
				t.Errorf("it ended with %v, want %v", err, c.signal)
			}
			if out.String() != c.want {
				t.Errorf("it said\n%s, want\n%s", out, c.want)
			}
			// What it does not go on from has been reached all the same.
			steps := []string{"one", "two", "one"}[:strings.Count(c.want, "\n")]
			if c.signal != 0 {
				steps = []string{"one", "two", "one"}[:len(steps)+1]
			}
			want := ""
			for _, s := range steps {
				want += fmt.Sprintf("%d %s\n", cmd.Process.Pid, s)
			}
			if got, err := os.ReadFile(file + ".reached"); err != nil || string(got) != want {
				t.Errorf("%q was reached, %v, want %q", got, err, want)
			}
		})
	}
}

func TestDelay(t *testing.T) {
	t.Setenv(Variable, failpoints(t, "one 30ms 1"))
	began := time.Now()
	must.Succeed(t, Reach("one"))
	if took := time.Since(began); took < 30*time.Millisecond {
		t.Errorf("a delay of 30 ms took %s", took)
	}
}

// A step that stops a process goes on when it is told to.
func TestStop(t *testing.T) {
	cmd, out := reach(t, failpoints(t, "one stop"), "one")
	must.Succeed(t, cmd.Start())
	var status unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		cmd.Process.Kill()
		t.Fatalf("it is in state %#x, %v, and should be stopped", status, err)
	}
	must.Succeed(t, cmd.Process.Signal(syscall.SIGCONT))
	if err := cmd.Wait(); err != nil || out.String() != "went on\n" {
		t.Errorf("it said %q and ended with %v", out, err)
	}
}

// The Nth time is counted over all processes, and it happens once.
func TestCountsOverProcesses(t *testing.T) {
	const processes, each = 8, 5
	file := failpoints(t, "one fail 13")
	var cmds []*exec.Cmd
	var outs []*bytes.Buffer
	for range processes {
		cmd, out := reach(t, file, strings.Fields(strings.Repeat("one ", each))...)
		must.Succeed(t, cmd.Start())
		cmds, outs = append(cmds, cmd), append(outs, out)
	}
	failed := 0
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		failed += strings.Count(outs[i].String(), "failpoint")
	}
	if failed != 1 {
		t.Errorf("it failed %d times, want once", failed)
	}
	if b, err := os.ReadFile(file + ".reached"); err != nil || bytes.Count(b, []byte(" one\n")) != processes*each {
		t.Errorf("%d lines, %v, want %d", bytes.Count(b, []byte(" one\n")), err, processes*each)
	}
}

// The file may be replaced while a process runs.
func TestReplaced(t *testing.T) {
	file := failpoints(t, "one fail")
	t.Setenv(Variable, file)
	if err := Reach("one"); err == nil {
		t.Error("it did not fail")
	}
	must.Succeed(t, os.WriteFile(file, nil, 0o600))
	if err := Reach("one"); err != nil {
		t.Error(err)
	}
}

func TestWithoutFile(t *testing.T) {
	t.Setenv(Variable, "")
	if err := Reach("one"); err != nil {
		t.Error(err)
	}
	if env := Environ(); env != nil {
		t.Errorf("a child gets %v", env)
	}
	t.Setenv(Variable, filepath.Join(t.TempDir(), "none"))
	if err := Reach("one"); err == nil {
		t.Error("a file that is named and is not there is no error")
	}
	if env := Environ(); len(env) != 1 || env[0] != Variable+"="+os.Getenv(Variable) {
		t.Errorf("a child gets %v", env)
	}
}
