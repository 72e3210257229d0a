package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

const sampleLog = `2026-01-02T03:04:05.000000001Z stdout F one
2026-01-02T03:04:05.000000002Z stdout P tw
2026-01-02T03:04:05.000000003Z stderr F oops
2026-01-02T03:04:05.000000004Z stdout F o  
2026-01-02T03:04:05.000000005Z stdout F 
2026-01-02T03:04:05.000000006Z stdout P end
`

func TestLogs(t *testing.T) {
	state := newState(t)
	newDir(t, state, "c1")
	check(t, os.WriteFile(filepath.Join(state, "c1.log"), []byte(sampleLog), 0o600))
	for _, c := range []struct {
		args           []string
		stdout, stderr string
	}{
		{nil, "one\ntwo  \n\nend\n", "oops\n"},
		{[]string{"--stream", "stderr"}, "", "oops\n"},
		{[]string{"--raw"}, sampleLog, ""},
		{[]string{"--raw", "--stream", "stderr"}, "2026-01-02T03:04:05.000000003Z stderr F oops\n", ""},
		{[]string{"-t", "--stream", "stdout"},
			"2026-01-02T03:04:05.000000001Z one\n2026-01-02T03:04:05.000000002Z two  \n" +
				"2026-01-02T03:04:05.000000005Z \n2026-01-02T03:04:05.000000006Z end\n", ""},
		{[]string{"--json", "--stream", "stderr"},
			`{"time":"2026-01-02T03:04:05.000000003Z","stream":"stderr","log":"oops"}` + "\n", ""},
	} {
		args := append(append([]string{"--state", state, "logs"}, c.args...), "c1")
		if r := ctl(t, args...); r.code != 0 || r.stdout != c.stdout || r.stderr != c.stderr {
			t.Errorf("%q: %d, %q, %q; want %q, %q", args, r.code, r.stdout, r.stderr, c.stdout, c.stderr)
		}
	}
}

// A line longer than any buffer, in one record and in many.
func TestLongLine(t *testing.T) {
	state := newState(t)
	newDir(t, state, "c1")
	long := strings.Repeat("abcdefgh", 40000)
	const head = "2026-01-02T03:04:05.000000001Z stdout "
	log := head + "F " + long + "\n" + strings.Repeat(head+"P "+long[:16000]+"\n", 20) + head + "F .\n"
	check(t, os.WriteFile(filepath.Join(state, "c1.log"), []byte(log), 0o600))
	want := long + "\n" + strings.Repeat(long[:16000], 20) + ".\n"
	if r := ctl(t, "--state", state, "logs", "c1"); r.stdout != want {
		t.Errorf("%d bytes, want %d", len(r.stdout), len(want))
	}
}

func TestNoLog(t *testing.T) {
	state := newState(t)
	dir := newDir(t, state, "c1")
	if r := ctl(t, "--state", state, "logs", "c1"); r.code != 1 || !strings.Contains(r.stderr, "cannot open the log") {
		t.Errorf("a missing log: %+v", r)
	}
	// Whoever can write to the log directory must not have another file shown.
	secret := filepath.Join(t.TempDir(), "secret")
	check(t, os.WriteFile(secret, []byte("x\n"), 0o600))
	check(t, os.Symlink(secret, filepath.Join(state, "c1.log")))
	if r := ctl(t, "--state", state, "logs", "c1"); r.code != 1 || r.stdout != "" {
		t.Errorf("a link that leads out: %+v", r)
	}
	check(t, dir.WriteLaunch(rundir.Launch{}))
	if r := ctl(t, "--state", state, "logs", "c1"); r.code != 1 || !strings.Contains(r.stderr, "has no log") {
		t.Errorf("without a log: %+v", r)
	}
}

// The log is rotated as the kubelet does it, with the shim still writing to the
// old file; no line may be lost or doubled.
func TestLogsFollow(t *testing.T) {
	state := newState(t)
	dir := newDir(t, state, "c1")
	lock, err := dir.Lock() // somebody who lives
	check(t, err)
	defer lock.Close()
	path := filepath.Join(state, "c1.log")
	write := func(f *os.File, text string) {
		t.Helper()
		_, err := f.WriteString("2026-01-02T03:04:05.000000001Z stdout " + text)
		check(t, err)
	}
	old, err := os.Create(path)
	check(t, err)
	defer old.Close()
	write(old, "F one\n")
	out, _, wait := ctlStart(t.Context(), nil, "--state", state, "logs", "-f", "c1")
	eventually(t, "the first line", func() bool { return out.String() == "one\n" })
	write(old, "F tw")
	_, err = old.WriteString("o\n")
	check(t, err)
	eventually(t, "a line in two writes", func() bool { return out.String() == "one\ntwo\n" })

	check(t, os.Rename(path, path+".1"))
	write(old, "F three\n")
	write(old, "P fo\n")
	next, err := os.Create(path)
	check(t, err)
	defer next.Close()
	write(next, "F ur\n")
	eventually(t, "lines across a rotation", func() bool { return out.String() == "one\ntwo\nthree\nfour\n" })

	// The last words come with the end.
	write(next, "F five\n")
	lock.Close()
	if code := wait(); code != 0 || out.String() != "one\ntwo\nthree\nfour\nfive\n" {
		t.Errorf("code %d, %q", code, out)
	}
}
