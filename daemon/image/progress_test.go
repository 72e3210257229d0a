package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// What was here before counts as done and is told apart, whichever way it came.
func TestProgressOfLayers(t *testing.T) {
	t.Parallel()
	layer := func(name string) ocispec.Descriptor {
		return ocispec.Descriptor{Digest: digest.FromString(name), Size: 100}
	}
	kept, resumed, joined, fresh := layer("kept"), layer("resumed"), layer("joined"), layer("fresh")
	g := &progress{news: make(chan struct{}, 1), p: records.Pull{Phase: records.PullResolving}}
	is := func(what string, phase records.PullPhase, bytes, present int64, layers int, trouble string) {
		t.Helper()
		p := g.snapshot()
		if p.Phase != phase || p.Bytes != bytes || p.PresentBytes != present || p.Layers != layers ||
			p.Trouble != trouble {
			t.Errorf("%s: %+v", what, p)
		}
	}
	is("nothing is known", records.PullResolving, 0, 0, 0, "")
	g.setPhase(records.PullVerifying)
	is("it is verified", records.PullVerifying, 0, 0, 0, "")
	g.setLayers([]ocispec.Descriptor{kept, resumed, joined, fresh, kept})
	if p := g.snapshot(); p.TotalBytes != 400 || p.TotalLayers != 4 {
		t.Errorf("%+v", p)
	}
	is("the layers are known", records.PullDownloading, 0, 0, 0, "")
	r, j, f := &download{desc: resumed}, &download{desc: joined, n: 30, started: true}, &download{desc: fresh}
	g.downloading(r)
	is("a download begins", records.PullDownloading, 0, 0, 0, "")
	r.queued, f.queued = true, true
	is("no download has its turn", records.PullWaiting, 0, 0, 0, "")
	g.present(kept.Digest)
	g.downloading(j)
	g.downloading(f)
	is("one is here, one flows", records.PullDownloading, 130, 130, 0, "")
	r.n, r.had, r.started = 50, 40, true
	j.n, f.trouble = 60, "503"
	is("all flow", records.PullDownloading, 210, 170, 0, "503")
	g.finished(kept.Digest, true)
	r.n = 100
	g.finished(resumed.Digest, true)
	is("two are unpacked", records.PullDownloading, 260, 170, 2, "503")
	// What the other pull had brought was no good: it comes anew.
	g.stopped(joined.Digest)
	is("one is gone", records.PullWaiting, 200, 140, 2, "503")
	g.downloading(&download{desc: joined, started: true})
	f.n, f.started, f.trouble = 100, true, ""
	is("it comes anew", records.PullDownloading, 300, 140, 2, "")
	g.present(joined.Digest)
	g.stopped(joined.Digest)
	is("all bytes are here", records.PullUnpacking, 400, 140, 2, "")
	g.finished(joined.Digest, true)
	g.finished(fresh.Digest, true)
	is("all are unpacked", records.PullUnpacking, 400, 140, 4, "")

	// Nobody looks.
	var none *progress
	none.setPhase(records.PullVerifying)
	none.downloading(f)
	none.finished(fresh.Digest, true)
}

func TestResultOf(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, "success"},
		{errors.New("x"), "error"},
		{fmt.Errorf("%w: %w", context.Canceled, ErrUnavailable), "canceled"},
		{fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded), "timeout"},
		{fmt.Errorf("cannot store a blob: %w", &os.PathError{Err: syscall.ENOSPC}), "no_space"},
		{fmt.Errorf("x: %w", ErrUnauthorized), "unauthorized"},
		{errClosed, "canceled"},
	} {
		if got := resultOf(c.err); got != c.want {
			t.Errorf("%v is %s, want %s", c.err, got, c.want)
		}
	}
	s := openAt(t, t.TempDir())
	if _, err := s.Pull(t.Context(), PullRequest{Ref: "NO:SUCH:NAME"}); err == nil {
		t.Error("a bad name was pulled")
	}
	if st := s.Stats(); st.Pulls["invalid"] != 1 || len(st.Pulls) < 10 {
		t.Errorf("%v", st.Pulls)
	}
}

// A pull that waits for its registry can be seen, with whose it is and why it
// waits.
func TestProgressBeforeLayers(t *testing.T) {
	t.Parallel()
	f := newFaulty(t, 100_000)
	asked, gate := make(chan struct{}, 100), make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			asked <- struct{}{}
			<-gate
		}
		return true
	})
	dir := filepath.Join(t.TempDir(), "pulls")
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressDir = dir })
	var k sink
	ended := make(chan error, 1)
	go func() {
		r := k.request(f.ref)
		r.Pod = "team/web"
		_, err := s.Pull(t.Context(), r)
		ended <- err
	}()
	<-asked
	var p records.Pull
	eventually(t, "there is a record", func() bool {
		files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
		return len(files) == 1 && record.Read(files[0], &p) == nil
	})
	if p.Phase != records.PullResolving || p.Pod != "team/web" || p.Ref != f.ref || p.TotalBytes != 0 ||
		!p.Daemon.Alive() {
		t.Errorf("%+v", p)
	}
	close(gate)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A record that cannot be removed with the end of its pull is removed later, and those of pulls that run
// are not.
func TestRecordRemovedLater(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pulls")
	s := openAt(t, t.TempDir(), func(o *Options) { o.ProgressDir, o.ProgressEvery = dir, time.Hour })
	written := func(g *progress) func() bool {
		return func() bool { return record.Read(g.record, new(records.Pull)) == nil }
	}
	one, stop := s.follow("one", "one", "")
	two, stopTwo := s.follow("two", "two", "")
	defer stopTwo()
	eventually(t, "one is written", written(one))
	eventually(t, "two is written", written(two))
	// A file cannot be refused to root, but a directory is none.
	if err := errors.Join(os.Remove(one.record), os.MkdirAll(filepath.Join(one.record, "x"), 0o700),
		os.WriteFile(filepath.Join(dir, "."+filepath.Base(one.record)+".123"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	stop()
	eventually(t, "the first is gone", func() bool {
		files, err := os.ReadDir(dir)
		return err == nil && len(files) == 1
	})
	if !written(two)() {
		t.Error("the record of a pull that runs is gone")
	}
}
