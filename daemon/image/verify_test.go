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

func TestVerifiers(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 10_000, 10_000)
	dir := t.TempDir()
	out := filepath.Join(t.TempDir(), "called")
	script := func(name, text string) {
		t.Helper()
		// No child of a test beside this one may come into being that has it
		// open: nobody can run it then.
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	pull := func(ctx context.Context, timeout time.Duration) error {
		s := openAt(t, t.TempDir(), func(o *Options) { o.VerifierDir, o.VerifierTimeout = dir, timeout })
		var k sink
		f.reset()
		_, err := s.Pull(ctx, k.request(f.ref))
		hits, _ := f.reset()
		if n := count(hits, "GET blobs"); err != nil && n != 0 {
			t.Errorf("%d blobs were fetched before the verdict", n)
		}
		if err != nil {
			half(t, s)
			eventually(t, "nothing is left", func() bool { return s.Usage() == Usage{} })
		}
		return err
	}
	if err := pull(t.Context(), 0); err != nil {
		t.Errorf("nobody was asked: %v", err)
	}
	script("10-first", `echo "$@" >`+out+`; cat >>`+out+`; echo fine; echo noise >&2`)
	if err := pull(t.Context(), 0); err != nil {
		t.Error(err)
	}
	hash, _ := f.img.Digest()
	args, stdin, _ := strings.Cut(string(read(t, out)), "\n")
	want := "-name " + f.ref + " -digest " + hash.String() +
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
	script("10-first", `sleep 1000 & echo $! >`+out+`.left; yes | head -c 200000`)
	if err := pull(t.Context(), 0); err != nil {
		t.Error(err)
	}
	left, err := strconv.Atoi(strings.TrimSpace(string(read(t, out+".left"))))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "what a verifier left behind is killed", func() bool { return !alive(left) })
	script("20-second", "echo no signature by a friend; exit 3")
	err = pull(t.Context(), 0)
	if !errors.Is(err, ErrRejected) || !strings.Contains(err.Error(), "no signature by a friend") ||
		!strings.Contains(err.Error(), "20-second (exit code 3)") {
		t.Errorf("got %v", err)
	}
	script("20-second", "echo no key >&2; exit 1")
	err = pull(t.Context(), 0)
	if !errors.Is(err, ErrRejected) ||
		!strings.Contains(err.Error(), "(exit code 1): no key") {
		t.Errorf("the reason on stderr: %v", err)
	}
	script("20-second", "kill -9 $$")
	if err := pull(t.Context(), 0); !errors.Is(err, ErrRejected) {
		t.Errorf("killed: %v", err)
	}
	script("20-second", "sleep 1000")
	err = pull(t.Context(), 100*time.Millisecond)
	if !errors.Is(err, ErrRejected) ||
		!strings.Contains(err.Error(), "no answer") {
		t.Errorf("timeout: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	script("20-second", "touch "+out+".began; sleep 1000")
	go func() {
		eventually(t, "it runs", func() bool { _, err := os.Stat(out + ".began"); return err == nil })
		cancel()
	}()
	if err := pull(ctx, time.Hour); !errors.Is(err, context.Canceled) || errors.Is(err, ErrRejected) {
		t.Errorf("cancelled: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "20-second"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "20-second"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := pull(t.Context(), 0); !errors.Is(err, ErrRejected) {
		t.Errorf("not a program: %v", err)
	}
	// What is here already is asked about as well.
	if err := os.Remove(filepath.Join(dir, "20-second")); err != nil {
		t.Fatal(err)
	}
	script("10-first", "")
	s := openAt(t, t.TempDir(), func(o *Options) { o.VerifierDir = dir })
	var k sink
	mustPull(t, s, k.request(f.ref))
	script("10-first", "exit 1")
	if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrRejected) {
		t.Errorf("again: %v", err)
	}
	// A directory that has gone is not an empty one.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), k.request(f.ref)); !errors.Is(err, ErrRejected) {
		t.Errorf("without the directory: %v", err)
	}
}

// alive says whether a process runs; a zombie does not.
func alive(pid int) bool {
	_, err := rundir.FindProcess(pid)
	return err == nil
}
