package image

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// jury is the verifiers of an image, and what the first one was called with.
type jury struct {
	t   *testing.T
	f   *faulty
	dir string
	out string
}

func newJury(t *testing.T) *jury {
	return &jury{t, newFaulty(t, 10_000, 10_000), t.TempDir(), filepath.Join(t.TempDir(), "called")}
}

// script makes a verifier.
func (j *jury) script(name, text string) {
	j.t.Helper()
	// No child of a test beside this one may come into being that has it
	// open: nobody can run it then.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(j.t, os.WriteFile(filepath.Join(j.dir, name), []byte("#!/bin/sh\n"+text), 0o755))
}

// pull pulls into a store of its own and checks that a rejected image leaves nothing.
func (j *jury) pull(ctx context.Context, timeout time.Duration) error {
	j.t.Helper()
	s := openAt(j.t, j.t.TempDir(), func(o *Options) { o.VerifierDir, o.VerifierTimeout = j.dir, timeout })
	var k sink
	j.f.reset()
	_, err := s.Pull(ctx, k.request(j.f.ref))
	hits, _ := j.f.reset()
	if n := count(hits, "GET blobs"); err != nil && n != 0 {
		j.t.Errorf("%d blobs were fetched before the verdict", n)
	}
	if err != nil {
		half(j.t, s)
		eventually(j.t, "nothing is left", func() bool { return s.Usage() == Usage{} })
	}
	return err
}

func TestVerifiersLetIn(t *testing.T) {
	t.Parallel()
	j := newJury(t)
	if err := j.pull(t.Context(), 0); err != nil {
		t.Errorf("there are no verifiers: %v", err)
	}
	j.script("10-first", `echo "$@" >`+j.out+`; cat >>`+j.out+`; echo fine; echo noise >&2`)
	if err := j.pull(t.Context(), 0); err != nil {
		t.Error(err)
	}
	hash, _ := j.f.img.Digest()
	args, stdin, _ := strings.Cut(string(read(t, j.out)), "\n")
	want := "-name " + j.f.ref + " -digest " + hash.String() +
		" -stdin-media-type application/vnd.oci.descriptor.v1+json"
	if args != want {
		t.Errorf("called with %s, want %s", args, want)
	}
	var d ocispec.Descriptor
	if err := json.Unmarshal([]byte(stdin), &d); err != nil || d.Digest.String() != hash.String() || d.Size == 0 {
		t.Errorf("stdin %q: %v", stdin, err)
	}
	// A verdict does not wait for what the verifier left behind, and its output
	// is bounded; one that reads nothing is no problem.
	j.script("10-first", `sleep 1000 & echo $! >`+j.out+`.left; yes | head -c 200000`)
	if err := j.pull(t.Context(), 0); err != nil {
		t.Error(err)
	}
	left, err := strconv.Atoi(strings.TrimSpace(string(read(t, j.out+".left"))))
	check(t, err)
	eventually(t, "what a verifier left behind is killed", func() bool { return !alive(left) })
}

func TestVerifiersReject(t *testing.T) {
	t.Parallel()
	j := newJury(t)
	j.script("10-first", "")
	for _, c := range []struct {
		name, script string
		timeout      time.Duration
		want         string
	}{
		{"stdout", "echo no signature by a friend; exit 3", 0, "no signature by a friend"},
		{"its name", "echo no signature by a friend; exit 3", 0, "20-second (exit code 3)"},
		{"stderr", "echo no key >&2; exit 1", 0, "(exit code 1): no key"},
		{"killed", "kill -9 $$", 0, ""},
		{"timeout", "sleep 1000", 100 * time.Millisecond, "no answer"},
	} {
		j.script("20-second", c.script)
		err := j.pull(t.Context(), c.timeout)
		if !errors.Is(err, ErrRejected) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	j.script("20-second", "touch "+j.out+".began; sleep 1000")
	go func() {
		eventually(t, "it runs", func() bool { _, err := os.Stat(j.out + ".began"); return err == nil })
		cancel()
	}()
	if err := j.pull(ctx, time.Hour); !errors.Is(err, context.Canceled) || errors.Is(err, ErrRejected) {
		t.Errorf("cancelled: %v", err)
	}
	second := filepath.Join(j.dir, "20-second")
	check(t, errors.Join(os.WriteFile(second, nil, 0o644), os.Chmod(second, 0o644)))
	if err := j.pull(t.Context(), 0); !errors.Is(err, ErrRejected) {
		t.Errorf("not a program: %v", err)
	}
}

// Verifiers decide about what is here already as well.
func TestVerifiersAreAskedAgain(t *testing.T) {
	t.Parallel()
	j := newJury(t)
	j.script("10-first", "")
	s := openAt(t, t.TempDir(), func(o *Options) { o.VerifierDir = j.dir })
	var k sink
	mustPull(t, s, k.request(j.f.ref))
	j.script("10-first", "exit 1")
	if _, err := s.Pull(t.Context(), k.request(j.f.ref)); !errors.Is(err, ErrRejected) {
		t.Errorf("again: %v", err)
	}
	// A directory that has gone is not an empty one.
	check(t, os.RemoveAll(j.dir))
	if _, err := s.Pull(t.Context(), k.request(j.f.ref)); !errors.Is(err, ErrRejected) {
		t.Errorf("without the directory: %v", err)
	}
}

// alive says whether a process runs; a zombie does not.
func alive(pid int) bool {
	_, err := rundir.FindProcess(pid)
	return err == nil
}
