package image

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// A removal that was cut short is finished by the next Open, but for what was
// pulled since; a record of it that cannot be read harms nothing.
func TestRemovalIsFinished(t *testing.T) {
	h := newHub(t)
	img := imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer))
	one, two := h.push(t, "app:1", img), h.push(t, "app:2", img)
	root := t.TempDir()
	s := openAt(t, root)
	var k sink
	mustPull(t, s, k.request(one))
	i := mustPull(t, s, k.request(two))
	r := removal{ID: i.ID}
	for _, ref := range append(slices.Clone(i.RepoTags), i.RepoDigests...) {
		r.Refs = append(r.Refs, s.refs[ref].refRecord)
	}
	s.Close()
	path := filepath.Join(root, removalName)

	check(t, os.WriteFile(path, []byte("?"), 0o600))
	s = openAt(t, root)
	if l := s.List(); len(l) != 1 || len(l[0].RepoTags) != 2 {
		t.Errorf("after a record that cannot be read: %+v", l)
	}
	s.Close()

	other := slices.Clone(r.Refs)
	other[0].PulledAt = other[0].PulledAt.Add(-time.Hour)
	check(t, record.Write(path, removal{ID: i.ID, Refs: other}, false))
	s = openAt(t, root)
	if l := s.List(); len(l) != 1 || !slices.Equal(l[0].RepoTags, []string{other[0].Ref}) ||
		len(l[0].RepoDigests) != 0 {
		t.Errorf("after a removal with one pulled since: %+v", l)
	}
	s.Close()

	check(t, record.Write(path, r, false))
	s = openAt(t, root)
	noRefs(t, s)
	eventually(t, "all is collected", func() bool { return s.Usage() == Usage{} })
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("its record: %v", err)
	}
}

// What the clock dates to a day that will not come for long is not kept for so
// long.
func TestClockWasWrong(t *testing.T) {
	root := t.TempDir()
	s := openAt(t, root)
	check(t, s.beginPending("registry.test/a:1", nil))
	s.Close()
	p := pendings(s)[0]
	p.Since = time.Now().AddDate(30, 0, 0)
	check(t, record.Write(s.pendingPath(p.Ref), p, false))
	part := filepath.Join(root, ingestName, "sha256-"+someHex)
	check(t, os.WriteFile(part, []byte("part"), 0o600))
	check(t, os.Chtimes(part, p.Since, p.Since))
	s = openAt(t, root)
	for _, path := range []string{s.pendingPath(p.Ref), part} {
		eventually(t, path+" is gone", func() bool { _, err := os.Lstat(path); return os.IsNotExist(err) })
	}
}

const someHex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// The account holds what the store did, whatever a person does to its files.
func TestUsageOfDamagedBlobs(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "app:1", imageOf(t, "x", layerOf(t, "a", 100_000, 1, types.OCILayer)))
	s := openAt(t, t.TempDir())
	var k sink
	mustPull(t, s, k.request(ref))
	want := s.Usage()
	var paths []string
	if err := s.eachBlob(
		func(path string, _ digest.Digest) error { paths = append(paths, path); return nil },
	); err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		for _, damage := range []func(string) error{os.Remove, func(p string) error { return os.Truncate(p, 1<<20) },
			func(p string) error { os.Remove(p); return os.MkdirAll(filepath.Join(p, "x"), 0o700) }} {
			check(t, damage(path))
			var k sink
			mustPull(t, s, k.request(ref))
			verify(t, s)
			if got := s.Usage(); got != want {
				t.Errorf("the usage is %v, want %v", got, want)
			}
		}
	}
}
