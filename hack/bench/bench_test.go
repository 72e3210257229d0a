package main

import (
	"bytes"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == serveCommand { // the registry's process
		log.Fatal(serve(os.Args[2]))
	}
	os.Exit(m.Run())
}

// programs is the folder of the programs to measure.
func programs(t *testing.T) string {
	t.Helper()
	must.BeRoot(t)
	bin := os.Getenv("HOLDFAST_BIN")
	if bin == "" {
		bin = "../../bin"
	}
	bin, err := filepath.Abs(bin)
	must.Succeed(t, err)
	if _, err := os.Stat(filepath.Join(bin, "holdfastd")); err != nil {
		t.Fatalf("cannot measure: run make build first: %v", err)
	}
	return bin
}

// TestBench is a short run of all of it, without containerd and without a file
// system of its own. What it measures is of no interest, only that it measures.
func TestBench(t *testing.T) {
	bin := programs(t)
	dir := t.TempDir()
	o := options{dir: dir, bin: bin, images: 2, layers: 3, bytes: 8 << 20, compress: "gzip", rounds: 1, plain: true}
	r, err := bench(o, t.Logf)
	if err != nil {
		b, _ := os.ReadFile(filepath.Join(dir, "holdfast.log"))
		t.Fatalf("%v\n%s", err, b)
	}
	s := r.samples["holdfast"]
	if len(s) != 1 || s[0].wall <= 0 || s[0].cpu <= 0 || s[0].rss < s[0].anon || s[0].anon < 1<<20 {
		t.Errorf("measured %+v", s)
	}
	if r.Unpacked < 7<<20 || r.Files < 100 || float64(r.Unpacked)/float64(r.Packed) < 2.4 {
		t.Errorf("the images are %+v", r.made)
	}
	var b bytes.Buffer
	r.print(&b)
	for _, f := range figures {
		if !strings.Contains(b.String(), f.name) {
			t.Errorf("no %q in\n%s", f.name, &b)
		}
	}
	// The next run with the folder takes what is there.
	again, err := makeImages(filepath.Join(dir, "image-2-3-8388608-gzip"), o)
	if err != nil || again != r.made {
		t.Errorf("made %+v again: %v", again, err)
	}
}

// TestBenchExecs runs a few, without containerd.
func TestBenchExecs(t *testing.T) {
	dir := t.TempDir()
	r, err := benchExecs(options{dir: dir, bin: programs(t), execs: 4})
	if err != nil {
		b, _ := os.ReadFile(filepath.Join(dir, "holdfast.log"))
		t.Fatalf("%v\n%s", err, b)
	}
	for _, row := range r.rows {
		if v := row.values["holdfast"]; len(v) != 4 || slices.Min(v) <= 0 {
			t.Errorf("%s took %v ms", row.name, v)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "holdfast-*")); len(r.rows) != 2 || len(left) != 0 {
		t.Errorf("%d rows; %v is left", len(r.rows), left)
	}
}

// TestBenchSessions runs a few, without containerd.
func TestBenchSessions(t *testing.T) {
	dir := t.TempDir()
	o := options{dir: dir, bin: programs(t), sessions: 1, rounds: 1, bytes: 16 << 20}
	r, err := benchSessions(o, t.Logf)
	if err != nil {
		b, _ := os.ReadFile(filepath.Join(dir, "holdfast.log"))
		t.Fatalf("%v\n%s", err, b)
	}
	for _, row := range r.rows {
		v := row.values["holdfast"]
		if len(v) == 0 || slices.Min(v) < 0 || row.goal == 0 && slices.Min(v) == 0 {
			t.Errorf("%s took %v ms", row.name, v)
		}
	}
	if len(r.rows) != 2*(2+8) {
		t.Errorf("%d rows", len(r.rows))
	}
}

func TestImagesAreDeterministic(t *testing.T) {
	for _, c := range []string{"gzip", "zstd", "none"} {
		var manifests []string
		for range 2 {
			dir := t.TempDir()
			if _, err := makeImages(dir, options{images: 1, layers: 2, bytes: 256 << 10, compress: c}); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, "manifest-0"))
			must.Succeed(t, err)
			manifests = append(manifests, string(b))
		}
		if len(slices.Compact(manifests)) != 1 {
			t.Errorf("%s: two runs made\n%s", c, strings.Join(manifests, "\n"))
		}
	}
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]int64{
		"1":           1,
		"4K":          4 << 10,
		"40M":         40 << 20,
		"2G":          2 << 30,
		"":            0,
		"G":           0,
		"-1M":         0,
		"1T":          0,
		"9999999999G": 0,
	} {
		if n, err := parseBytes(s); n != want || (err == nil) != (want > 0) {
			t.Errorf("%q is %d, %v", s, n, err)
		}
	}
}
