package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// layerWith makes an archive of empty files, with no entry for their directories.
func layerWith(t *testing.T, headers ...tar.Header) (digest.Digest, *bytes.Buffer) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		check(t, w.WriteHeader(&h))
	}
	check(t, w.Close())
	return digest.FromBytes(b.Bytes()), &b
}

// Names of directories without entries go into the record of the layer: a small
// archive has no large one, and a long one is no memory for as long as it lies there.
func TestImpliedNamesAreBounded(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, slog.Default())
	check(t, err)
	deep := strings.Repeat(strings.Repeat("d", 250)+"/", 15)
	var many []tar.Header
	for i := range maxImplied/len(deep) + 10 {
		many = append(many, tar.Header{Name: fmt.Sprintf("%s%d/f", deep, i)})
	}
	d, b := layerWith(t, many...)
	if err := s.Apply(t.Context(), d, b); !errors.Is(err, ErrBadLayer) || s.Has(d) {
		t.Errorf("%d names: %v", len(many), err)
	}
	base, b := layerWith(t, tar.Header{Name: "a", Typeflag: tar.TypeDir, Mode: 0o1777})
	check(t, s.Apply(t.Context(), base, b))
	top, b := layerWith(t, append(many[:100:100], tar.Header{Name: "a/f"})...)
	check(t, s.Apply(t.Context(), top, b))
	for _, again := range []bool{false, true} {
		if again {
			s.Close()
			if s, err = Open(dir, slog.Default()); err != nil {
				t.Fatal(err)
			}
		}
		if !s.Has(top) || s.layers[top].Implied != nil {
			t.Errorf("%d names in memory", len(s.layers[top].Implied))
		}
		target := t.TempDir()
		check(t, s.Mount(t.Context(), []digest.Digest{base, top}, t.TempDir(), target, nil, ""))
		st, err := os.Stat(filepath.Join(target, "a"))
		if err != nil || st.Mode() != os.ModeDir|os.ModeSticky|0o777 {
			t.Errorf("again %v: %v %v", again, st.Mode(), err)
		}
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
	}
	s.Close()
}

// What all layers of an image imply together is bounded as well, before it is in memory.
func TestImpliedNamesOfAllLayersAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	many := slices.Repeat([]name{name(strings.Repeat("d", 4000))}, 2000)
	var ids []digest.Digest
	for total := 0; total <= maxImpliedOfAll; total += sizeOf(many) {
		d := apply(t, s, e{name: fmt.Sprint(len(ids))})
		r := *s.get(d)
		r.Implied = many
		check(t, record.Write(filepath.Join(s.layerDir(d), recordName), r, false))
		s.noteLocked(&r, true)
		ids = append(ids, d)
	}
	rw := t.TempDir()
	if err := s.Mount(t.Context(), ids, rw, t.TempDir(), nil, ""); !errors.Is(err, ErrBadLayer) {
		t.Errorf("Mount of %d layers: %v", len(ids), err)
	}
	if err := s.Restore(t.Context(), ids, rw); !errors.Is(err, ErrBadLayer) {
		t.Errorf("Restore of %d layers: %v", len(ids), err)
	}
}

// endsAfter is a context that ends when it was asked so many times whether it has.
type endsAfter struct {
	context.Context
	left int
}

func (c *endsAfter) Err() error {
	if c.left--; c.left < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

// Directories of 1000 levels without entries are looked up once in each layer, and no longer than
// somebody waits for the mount.
func TestDeepImpliedNames(t *testing.T) {
	s := open(t, t.TempDir())
	const depth, layers = 1000, 2
	var ids []digest.Digest
	for i := range layers {
		ids = append(ids, apply(t, s, e{name: strings.Repeat("d/", depth) + fmt.Sprint(i)}))
	}
	endless := &endsAfter{t.Context(), 1 << 30}
	was := endless.left
	check(t, s.prepareUpper(endless, t.TempDir(), ids, nil))
	if looks, most := was-endless.left, 2*depth*(layers+1); looks < depth*layers || looks > most {
		t.Errorf("%d looks for %d names in %d layers, at most %d do", looks, depth, layers, most)
	}
	for _, left := range []int{0, 1, 2, 1000} {
		ctx := &endsAfter{t.Context(), left}
		rw, target := t.TempDir(), t.TempDir()
		if err := s.Mount(ctx, ids, rw, target, nil, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Mount that ends after %d looks: %v", left, err)
			Unmount(target)
		}
		if err := s.Restore(ctx, ids, t.TempDir()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Restore that ends after %d looks: %v", left, err)
		}
	}
}

// Deep layers that are deleted at the same time need the descriptors of one.
func TestDeletionsTakeFewDescriptors(t *testing.T) { // not parallel: it counts
	s := open(t, t.TempDir())
	const trees, depth = 8, 700
	for i := range trees {
		tree := filepath.Join(s.dir, tmpName, fmt.Sprint(i))
		check(t, os.MkdirAll(filepath.Join(tree, strings.Repeat("d/", depth)), 0o700))
	}
	used := func() int { // at least: the kernel gives the lowest number that is free
		f, err := os.Open("/")
		check(t, err)
		defer f.Close()
		return int(f.Fd())
	}
	before, most := used(), 0
	for i := range trees {
		s.deleteLater(filepath.Join(s.dir, tmpName, fmt.Sprint(i)))
	}
	done := make(chan struct{})
	go func() {
		s.background.Wait()
		close(done)
	}()
	for over := false; !over; most = max(most, used()) {
		select {
		case <-done:
			over = true
		default:
		}
	}
	if most-before > depth+100 {
		t.Errorf("%d descriptors for trees of %d levels", most-before, depth)
	}
	empty(t, filepath.Join(s.dir, tmpName))
}

// A hole of 400 GiB does not keep a pull from being called off.
func TestHolesAreCalledOff(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	body := make([]byte, 512)
	copy(body, "1\n429496729600\n0\n") // the map: one piece, of no bytes, at the end
	// The writer refuses records of sparse files, so they are patched in.
	records := map[string]string{
		"XNU.sparse.major":    "1",
		"XNU.sparse.minor":    "0",
		"XNU.sparse.name":     "big",
		"XNU.sparse.realsize": "429496729600",
	}
	check(t, w.WriteHeader(&tar.Header{Name: "f", Size: int64(len(body)), Mode: 0o644, PAXRecords: records}))
	w.Write(body)
	w.Close()
	raw := bytes.ReplaceAll(b.Bytes(), []byte("XNU.sparse."), []byte("GNU.sparse."))
	s, err := Open(t.TempDir(), slog.Default())
	check(t, err)
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := s.Apply(
		ctx,
		digest.FromBytes(raw),
		bytes.NewReader(raw),
	); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrBadLayer) {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > time.Minute { // all of it would take longer
		t.Errorf("it went on for %s", took)
	}
}

// The record of a layer may be damaged under a running store: what counts of it is
// in memory.
func TestRecordDamagedMeanwhile(t *testing.T) {
	s := open(t, t.TempDir())
	d := apply(t, s, e{name: "implied/f", body: "x"})
	check(t, os.WriteFile(filepath.Join(s.layerDir(d), recordName), nil, 0o600))
	read(t, mount(t, s, d), "implied/f")
}
