package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func TestBar(t *testing.T) {
	const mib = 1 << 20
	half := records.Pull{Phase: records.PullDownloading, Bytes: 50 * mib, TotalBytes: 200 * mib, Layers: 1,
		TotalLayers: 3, Rate: 1234567}
	// It is never longer than the line, and says the most important things first.
	for width, want := range map[int]string{
		200: "[#######.......................] 50 MiB of 200 MiB (25%), 1.18 MiB/s, 2m left, 1 of 3 layers",
		80:  "[###...........] 50 MiB of 200 MiB (25%), 1.18 MiB/s, 2m left, 1 of 3 layers",
		70:  "50 MiB of 200 MiB (25%), 1.18 MiB/s, 2m left, 1 of 3 layers",
		20:  "50 MiB of 200 MiB (", 1: "", 0: "",
	} {
		if got := barText(half, width); got != want {
			t.Errorf("in %d columns %q, want %q", width, got, want)
		}
	}
	for _, p := range []records.Pull{{}, {Bytes: 5, TotalBytes: 3, TotalLayers: 1}, {Bytes: 3, TotalBytes: 3,
		TotalLayers: 1}, {TotalLayers: 1}} {
		if got := barText(p, 100); p.TotalBytes > 0 && !strings.HasPrefix(got, "["+strings.Repeat("#", barWidth)+"]") ||
			p.TotalBytes == 0 && strings.Contains(got, "[") {
			t.Errorf("%+v: %s", p, got)
		}
	}
	if got := barText(records.Pull{Trouble: "503 \x1b[31mred"}, 100); !strings.HasSuffix(got,
		"; trying again: 503 ?[31mred") {
		t.Errorf("what a registry said is printed as %q", got)
	}
	// Not on a terminal: no control characters, and not ten lines a second; but
	// as soon as it is known what there is to do, that.
	var out bytes.Buffer
	b := newBar(&out)
	began := time.Now()
	b.show(records.Pull{Phase: records.PullResolving, Since: time.Now()})
	for range 10 {
		b.show(half)
	}
	b.clear()
	most := 2 + int(time.Since(began)/(10*time.Second)) // one more every ten seconds
	if got := out.String(); strings.Count(got, "\n") < 2 || strings.Count(got, "\n") > most ||
		strings.ContainsAny(got, "\r\x1b") {
		t.Errorf("printed %q", got)
	}
}

// On a terminal it follows the width of that.
func TestBarOnTerminal(t *testing.T) {
	master, path, err := console.NewPty()
	check(t, err)
	defer master.Close()
	tty, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	check(t, err)
	defer tty.Close()
	t.Setenv("TERM", "xterm")
	b := newBar(tty)
	p := records.Pull{Phase: records.PullDownloading, Bytes: 1, TotalBytes: 2, TotalLayers: 1}
	// A terminal gives what was written to it in one or more pieces.
	read := func(want string) string {
		var got []byte
		for len(got) < len(want) {
			buf := make([]byte, 4096)
			n, err := master.Read(buf)
			check(t, err)
			got = append(got, buf[:n]...)
		}
		return string(got)
	}
	for _, width := range []uint16{60, 30, 0} {
		check(t, master.Resize(console.WinSize{Width: width, Height: 24}))
		b.show(p)
		want := "\r\x1b[K" + barText(p, cmp.Or(int(width), 80))
		if got := read(want); got != want {
			t.Errorf("in %d columns %q, want %q", width, got, want)
		}
	}
	b.clear()
	if got := read("\r\x1b[K"); got != "\r\x1b[K" {
		t.Errorf("at the end %q", got)
	}
	t.Setenv("TERM", "dumb")
	if newBar(tty).width != nil {
		t.Error("draws on a dumb terminal")
	}
}

// records writes what pulls of a daemon leave: this process is the living one.
func writePulls(t *testing.T, dir string, list map[string]records.Pull) {
	t.Helper()
	self, err := rundir.FindProcess(os.Getpid())
	check(t, err)
	check(t, os.MkdirAll(dir, 0o700))
	for name, p := range list {
		if p.Daemon.PID == 0 {
			p.Daemon = self
		}
		check(t, record.Write(filepath.Join(dir, name), p, false))
	}
}

var dead = rundir.Process{PID: 1, StartTime: 1 << 40}

func TestFindPull(t *testing.T) {
	state := t.TempDir()
	dir := filepath.Join(state, records.PullsName)
	now := time.Now()
	writePulls(t, dir, map[string]records.Pull{
		"1.json": {Asked: "busybox", Since: now.Add(-time.Hour), Bytes: 1}, // somebody else's
		"2.json": {Asked: "busybox", Since: now.Add(time.Second), Bytes: 2},
		"3.json": {Asked: "alpine", Since: now.Add(time.Minute), Bytes: 3},
		"4.json": {Asked: "busybox", Since: now.Add(time.Hour), Daemon: dead},
	})
	check(t, os.WriteFile(filepath.Join(dir, "5.json"), []byte("torn"), 0o600))
	if p, ok := records.FindPull(state, "busybox"); !ok || p.Bytes != 2 {
		t.Errorf("found %+v", p)
	}
	if p, ok := records.FindPull(state, "none"); ok {
		t.Errorf("found %+v", p)
	}
	if p, ok := records.FindPull(filepath.Join(state, "none"), "busybox"); ok {
		t.Errorf("found %+v", p)
	}
}

func TestPulls(t *testing.T) {
	state := t.TempDir()
	if r := ctl(t, "--state", state, "pulls"); r.code != 0 || strings.Count(r.stdout, "\n") != 1 {
		t.Errorf("none: %+v", r)
	}
	if r := ctl(t, "--state", state, "pulls", "--json"); r.code != 0 || r.stdout != "[]\n" {
		t.Errorf("none: %+v", r)
	}
	if r := ctl(t, "--state", state+"/none", "pulls"); r.code != 1 || !strings.Contains(r.stderr, "is --state right?") {
		t.Errorf("no state: %+v", r)
	}
	now := time.Now()
	writePulls(t, filepath.Join(state, records.PullsName), map[string]records.Pull{
		"1.json": {Ref: "a.test/half:1", Pod: "ns/web", Since: now.Add(-10 * time.Minute),
			Phase: records.PullDownloading, Bytes: 1 << 20, TotalBytes: 4 << 20,
			Layers: 2, TotalLayers: 5, Rate: 1 << 10, Trouble: "503 \x1b"},
		"2.json": {Ref: "a.test/asked:1", Since: now.Add(-3 * time.Minute), Phase: records.PullResolving},
		"3.json": {Ref: "a.test/orphan:1", Since: now.Add(-time.Hour), Phase: records.PullUnpacking, Daemon: dead},
	})
	check(t, os.WriteFile(filepath.Join(state, records.PullsName, ".2.json.new"), []byte("torn"), 0o600))
	r := ctl(t, "--state", state, "pulls")
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	if r.code != 0 || len(lines) != 4 {
		t.Fatalf("%+v", r)
	}
	for i, want := range [][]string{
		{"IMAGE", "POD", "PHASE"},
		{"a.test/orphan:1", "(unpacking)", "has died"},
		{"a.test/half:1", "ns/web", "downloading", "25%", "4 MiB", "1 KiB/s", "2/5", "10m", "503 ?"},
		{"a.test/asked:1", "resolving", "3m"},
	} {
		for _, w := range want {
			if !strings.Contains(lines[i], w) {
				t.Errorf("line %d has no %q: %s", i, w, lines[i])
			}
		}
	}
	var list []struct {
		records.Pull
		Alive bool
	}
	if r = ctl(t, "--state", state, "pulls", "--json"); r.code != 0 ||
		json.Unmarshal([]byte(r.stdout), &list) != nil || len(list) != 3 ||
		list[0].Alive || !list[1].Alive || list[1].Bytes != 1<<20 {
		t.Errorf("%+v", r)
	}
}

// What is wrong with the command line is said before anything is done.
func TestPullUsage(t *testing.T) {
	for want, args := range map[string][]string{
		"the name of the image is empty":    {"pull", ""},
		"--creds takes the user alone":      {"pull", "--creds", "me:secret", "busybox"},
		"want IMAGE":                        {"pull"},
		"there is no command \"push\"; see": {"push"},
	} {
		if r := ctl(t, append([]string{"--state", t.TempDir()}, args...)...); r.code != 2 ||
			!strings.Contains(r.stderr, want) {
			t.Errorf("%q: %+v", args, r)
		}
	}
	null, err := os.Open(os.DevNull)
	check(t, err)
	defer null.Close()
	_, stderr, wait := ctlStart(t.Context(), null, "--state", t.TempDir(), "pull", "--creds", "me", "busybox")
	if code := wait(); code != 1 || !strings.Contains(stderr.String(), "empty password") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}

// Whoever waits for a password that does not come can give up.
func TestPullWithoutPassword(t *testing.T) {
	r, w, err := os.Pipe()
	check(t, err)
	defer r.Close()
	defer w.Close()
	// For good, so that one that comes too early or too late harms nobody.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	_, _, wait := ctlStart(t.Context(), r, "--state", t.TempDir(), "pull", "--creds", "me", "busybox")
	code := make(chan int, 1)
	go func() { code <- wait() }()
	eventually(t, "it gives up", func() bool {
		check(t, syscall.Kill(os.Getpid(), syscall.SIGHUP))
		select {
		case got := <-code:
			if got != rundir.CodeSignalOffset+int(syscall.SIGHUP) {
				t.Errorf("exit code %d", got)
			}
			return true
		default:
			return false
		}
	})
}

func TestAddress(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	check(t, os.WriteFile(file, []byte("address = \"/x/y.sock\"\nroot = \"/z\"\n"), 0o600))
	for want, a := range map[string]app{"/s/holdfast.sock": {state: "/s"}, "/x/y.sock": {config: file}} {
		if err := a.load(); err != nil || a.address != want {
			t.Errorf("%s, %v; want %s", a.address, err, want)
		}
	}
	if err := (&app{config: file + ".none"}).load(); err == nil {
		t.Error("a config that is missing was ignored")
	}
}
