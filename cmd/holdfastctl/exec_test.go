package main

import (
	"encoding/json"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// writeSpec gives a container a spec with a process.
func writeSpec(t *testing.T, dir rundir.Dir) {
	t.Helper()
	b, err := json.Marshal(specs.Spec{Process: &specs.Process{
		Terminal: true, Args: []string{"app"}, Cwd: "/srv", Env: []string{"PATH=/bin", "LANG=de"},
		User: specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{7}},
	}})
	check(t, err)
	check(t, os.WriteFile(dir.Path(rundir.SpecName), b, 0o600))
}

// writeTo writes to a file that the caller named, as the shim does.
func writeTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

func TestExec(t *testing.T) {
	state := newState(t)
	f := startFake(t, &fakeShim{dir: newDir(t, state, "live")})
	writeSpec(t, f.dir)
	var got *proto.ExecSyncRequest
	var process *specs.Process
	big := strings.Repeat("x", 1<<20)
	f.execs = func(req *proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
		got = req
		var err error
		if process, err = proto.UnmarshalAny[specs.Process](req.GetProcess()); err != nil {
			return nil, err
		}
		if req.GetStdinPath() != "" {
			in, err := os.ReadFile(req.GetStdinPath())
			if err != nil {
				return nil, err
			}
			big = string(in)
		}
		if err := writeTo(req.GetStdoutPath(), big); err != nil {
			return nil, err
		}
		return &proto.ExecSyncResponse{ExitCode: 42}, writeTo(req.GetStderrPath(), "oh\n")
	}

	r := ctl(t, "--state", state, "exec", "-e", "LANG=C", "-e", "X=1=2", "-w", "/tmp", "-u", "1000:100", "--timeout",
		"90s", "live", "sh", "-c", "-x")
	if r.code != 42 || r.stdout != big || r.stderr != "oh\n" {
		t.Errorf("exec: code %d, %d bytes, %q", r.code, len(r.stdout), r.stderr)
	}
	if !slices.Equal(process.Args, []string{"sh", "-c", "-x"}) || process.Cwd != "/tmp" || process.Terminal ||
		!slices.Equal(process.Env, []string{"PATH=/bin", "LANG=C", "X=1=2"}) ||
		process.User.UID != 1000 || process.User.GID != 100 ||
		!slices.Equal(process.User.AdditionalGids, []uint32{100}) {
		t.Errorf("process: %+v", process)
	}
	if got.GetTimeoutMs() != 90000 || got.GetStdinPath() != "" || !got.GetSetUser() {
		t.Errorf("request: %v", got)
	}

	in, w, err := os.Pipe()
	check(t, err)
	go func() {
		io.WriteString(w, "typed")
		w.Close()
	}()
	out, _, wait := ctlStart(t.Context(), in, "--state", state, "exec", "-i", "live", "cat")
	if code := wait(); code != 42 || out.String() != "typed" {
		t.Errorf("exec -i: code %d, %q", code, out)
	}
	// The shim fills in what is the container's.
	if process.Cwd != "" || process.User.UID != 0 || process.Env != nil || got.GetSetUser() {
		t.Errorf("process without flags: %+v", process)
	}
	if r := ctl(t, "--state", state, "exec", "-e", "A=b", "live", "env"); r.code != 42 || process.User.UID != 5 ||
		!slices.Equal(process.User.AdditionalGids, []uint32{7}) ||
		!slices.Equal(process.Env, []string{"PATH=/bin", "LANG=de", "A=b"}) {
		t.Errorf("process with an environment: %+v", process)
	}

	var j execJSON
	r = ctl(t, "--state", state, "exec", "--json", "live", "cat")
	check(t, json.Unmarshal([]byte(r.stdout), &j))
	if r.code != 42 || j.ExitCode != 42 || j.Stdout != "typed" || j.Stderr != "oh\n" {
		t.Errorf("exec --json: %+v, %+v", r, j)
	}

	f.execs = func(*proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
		return &proto.ExecSyncResponse{TimedOut: true, ExitCode: 137}, nil
	}
	if r := ctl(t, "--state", state, "exec", "--timeout", "1s", "live", "x"); r.code != codeTimeout ||
		!strings.Contains(r.stderr, "within 1s") {
		t.Errorf("exec that timed out: %+v", r)
	}
	f.execs = func(*proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
		return nil, status.Error(codes.InvalidArgument, "cannot find x")
	}
	if r := ctl(t, "--state", state, "exec", "live", "x"); r.code != 1 || !strings.Contains(r.stderr, "cannot find x") {
		t.Errorf("exec that failed: %+v", r)
	}
	if r := ctl(t, "--state", state, "exec", "-u", "root", "live", "x"); r.code != 2 ||
		!strings.Contains(r.stderr, "want numbers") {
		t.Errorf("exec -u root: %+v", r)
	}
}
