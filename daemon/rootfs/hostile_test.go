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
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
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
