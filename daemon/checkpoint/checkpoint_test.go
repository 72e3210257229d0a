package checkpoint

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// A file has no name before Commit, takes nobody's place, and is removed only as itself.
func TestOutput(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.tar")
	old := unix.Umask(0o777)
	o, err := Create(path)
	unix.Umask(old)
	must.Succeed(t, err)
	defer o.Close()
	holds := func(when string, names ...string) {
		t.Helper()
		var got []string
		list, err := os.ReadDir(dir)
		for _, e := range list {
			got = append(got, e.Name())
		}
		if err != nil || !slices.Equal(got, names) {
			t.Errorf("%s there is %v, %v, want %v", when, got, err, names)
		}
	}
	holds("before Commit")
	must.Succeed(t, o.Commit())
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("after Commit: %v, %v", st, err)
	}
	if err := o.Commit(); !errors.Is(err, kind.Exists) {
		t.Errorf("a second Commit: %v", err)
	}
	holds("after Commit", o.At.Own, "a.tar")
	if err := errors.Join(Remove(o.At), Remove(o.At)); err != nil {
		t.Error(err)
	}
	holds("after Remove")
	testRemove(t, dir, holds)
	os.Symlink("/etc/passwd", path)
	for path, want := range map[string]error{
		path: kind.Exists, "a.tar": kind.Invalid, dir + "/x/../a": kind.Invalid, "/": kind.Invalid,
		dir + "/":         kind.Invalid,
		dir + "/absent/a": kind.Invalid, dir + "/" + strings.Repeat("x", 256): kind.Invalid, "/proc/a": kind.State,
	} {
		if o, err := Create(path); !errors.Is(err, want) {
			t.Errorf("%.100s: %v, %v, want %v", path, o, err, want)
		}
	}
	if _, err := Directory("relative"); !errors.Is(err, kind.Invalid) {
		t.Errorf("a relative directory: %v", err)
	}
	if _, err := OpenArchive(path); !errors.Is(err, kind.Invalid) {
		t.Errorf("an archive that is a link: %v", err)
	}
}

// testRemove removes files to whose paths something else has come.
func testRemove(t *testing.T, dir string, holds func(string, ...string)) {
	path := filepath.Join(dir, "a.tar")
	made := func() *Output {
		o, err := Create(path)
		if err == nil {
			t.Cleanup(func() { o.Close() })
			err = o.Commit()
		}
		must.Succeed(t, err)
		return o
	}
	kept := made().At
	kept.Kept = true
	if err := errors.Join(Remove(kept), Remove(kept)); err != nil {
		t.Error(err)
	}
	holds("of one that is kept", "a.tar")
	// Once it is kept it is no longer ours, whatever a record says.
	kept.Kept = false
	if err := Remove(kept); err != nil {
		t.Error(err)
	}
	holds("of one that was kept", "a.tar")
	os.Remove(path)
	moved := made().At
	if err := errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600), Remove(moved)); err != nil {
		t.Error(err)
	}
	holds("of one whose path has another file", "a.tar")
	os.Remove(path)
	// The directory has gone, or is something else now: there is nothing to remove.
	gone := filepath.Join(dir, "gone")
	lost := records.File{Path: filepath.Join(gone, "below/a.tar"), Own: "own"}
	if err := Remove(lost); err != nil {
		t.Errorf("without the directory: %v", err)
	}
	if err := errors.Join(os.WriteFile(gone, nil, 0o600), Remove(lost), os.Remove(gone)); err != nil {
		t.Errorf("with a file in place of the directory: %v", err)
	}
}

// entry is one of an archive.
type entry struct {
	name, body string
	typ        byte
}

func archive(t *testing.T, entries ...entry) *Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.typ, Size: int64(len(e.body)), Linkname: "/etc/passwd"}
		if e.typ == 0 {
			h.Typeflag, h.Linkname = tar.TypeReg, ""
		}
		must.Succeed(t, errors.Join(w.WriteHeader(h), second(w.Write([]byte(e.body)))))
	}
	must.Succeed(t, errors.Join(w.Close(), os.WriteFile(path, b.Bytes(), 0o600)))
	s, err := OpenArchive(path)
	must.Succeed(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func second(_ int, err error) error { return err }

var (
	fds    = entry{name: "checkpoint/descriptors.json", body: `["/dev/null","pipe:[1]","pipe:[2]"]`}
	config = entry{name: "config.dump", body: `{"id":"a","name":"b"}`}
	host   = entry{name: "checkpoint/utsns-1.img", body: "12345678\x00\x00\x00\x00"}
	spec   = entry{name: "spec.dump", body: `{"process":{"args":["sh"]},"linux":{}}`}
)

// Archives that are in order, and hostile ones: nothing is written but what belongs there.
func TestUnpack(t *testing.T) {
	for name, c := range map[string]struct {
		entries []entry
		want    string // what is unpacked; empty: it is refused
	}{
		"in order": {[]entry{{name: "checkpoint/", typ: tar.TypeDir}, {name: "./checkpoint/core-1.img"}, fds,
			{name: "rootfs-diff.tar"}}, "checkpoint checkpoint/core-1.img checkpoint/descriptors.json rootfs-diff.tar"},
		"others": {[]entry{{name: "../../x"}, {name: "ctr.log"}, {name: "checkpoint/a/b"}, fds},
			"checkpoint checkpoint/descriptors.json"},
		"a way out":      {[]entry{{name: "checkpoint/../../../x"}, fds}, "checkpoint checkpoint/descriptors.json"},
		"a link":         {[]entry{fds, {name: "checkpoint/core-1.img", typ: tar.TypeSymlink}}, ""},
		"a linked place": {[]entry{{name: "checkpoint", typ: tar.TypeSymlink}, fds}, ""},
		"a device":       {[]entry{fds, {name: "checkpoint/null", typ: tar.TypeChar}}, ""},
		"twice":          {[]entry{fds, fds}, ""},
		"no descriptors": {[]entry{{name: "checkpoint/core-1.img"}}, ""},
		"descriptors":    {[]entry{{name: fds.name, body: `["a","b","c","pipe:[9]"]`}}, ""},
		"a long name":    {[]entry{fds, {name: "checkpoint/" + strings.Repeat("x", 256)}}, ""},
		"a host twice":   {[]entry{fds, host, host}, ""},
		"a short host":   {[]entry{fds, {name: "checkpoint/utsns-1.img", body: "x"}}, ""},
	} {
		dir := t.TempDir()
		_, err := archive(t, c.entries...).Unpack(t.Context(), dir, "host")
		if c.want == "" {
			if !errors.Is(err, kind.Invalid) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var got []string
		filepath.WalkDir(dir, func(path string, _ os.DirEntry, _ error) error {
			if rel, _ := filepath.Rel(dir, path); rel != "." {
				got = append(got, rel)
			}
			return nil
		})
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestInfo(t *testing.T) {
	info, err := archive(t, config, spec).Info()
	if err != nil || info.Config.ID != "a" || info.Spec.Process.Args[0] != "sh" {
		t.Errorf("%v, %v", info, err)
	}
	for name, entries := range map[string][]entry{
		"no config": {spec}, "no spec": {config}, "no process": {config, {name: spec.name, body: "{}"}},
		"no JSON": {config, {name: spec.name, body: "{"}}, "nothing": nil,
		"too much": {spec, {name: config.name, body: strings.Repeat(" ", maxDecoded)}},
	} {
		if _, err := archive(t, entries...).Info(); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	fifo, link := filepath.Join(dir, configName), filepath.Join(dir, "link")
	must.Succeed(t, errors.Join(unix.Mkfifo(fifo, 0o600), os.Symlink(fifo, link)))
	for _, path := range []string{dir, fifo, link, "/dev/null", "/dev/tty"} {
		if _, err := OpenArchive(path); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := OpenArchive(filepath.Join(dir, "absent")); !errors.Is(err, kind.NotFound) {
		t.Errorf("one that is not there: %v", err)
	}
}

// A directory with a FIFO, a link or a device in it is no checkpoint, and nobody waits for it.
func TestDirectory(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"":       func(path string) error { return os.WriteFile(path, []byte(config.body), 0o600) },
		"FIFO":   func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link":   func(path string) error { return os.Symlink("/etc/passwd", path) },
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(5, 0))) },
	} {
		path := t.TempDir()
		err := errors.Join(os.Mkdir(ImagesDir(path), 0o700), put(filepath.Join(path, configName)),
			os.WriteFile(filepath.Join(path, specName), []byte(spec.body), 0o600))
		must.Succeed(t, err)
		dir, err := Directory(path)
		must.Succeed(t, err)
		if In(dir) != (name == "") {
			t.Errorf("%s: it is taken for the other", name)
		}
		s := OfDirectory(dir)
		if _, err := s.Info(); name == "" && err != nil || name != "" && !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
		s.Close()
	}
}

// Holes stay holes, and the room of others is left to them.
func TestSpare(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must.Succeed(t, err)
	defer f.Close()
	w := &Spare{File: f}
	body := append(make([]byte, 1<<20), append([]byte("x"), make([]byte, 1<<20)...)...)
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := errors.Join(w.Finish(), unix.Fstat(int(f.Fd()), &st)); err != nil || st.Blocks*512 > 256<<10 {
		t.Errorf("%v, %d blocks", err, st.Blocks)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, body) {
		t.Errorf("it is another file, %v", err)
	}
	if err := Room(f, 1<<60); !errors.Is(err, kind.Exhausted) {
		t.Errorf("more than there is: %v", err)
	}
}

// The name of the host in an image of CRIU is replaced, and nothing else.
func TestHostname(t *testing.T) {
	image := []byte("\x19CVT\x032GT\x0d\x00\x00\x00\x0a\x03zzz\x12\x06(none)")
	got, err := withHostname(image, "longer")
	if want := "\x19CVT\x032GT\x10\x00\x00\x00\x0a\x06longer\x12\x06(none)"; err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// What other runtimes list as removed becomes whiteouts inside the root.
func TestDeletedFiles(t *testing.T) {
	layer, err := archive(t, fds, entry{name: deletedName, body: `["/etc/group","../../a"]`}).
		Unpack(t.Context(), t.TempDir(), "")
	must.Succeed(t, err)
	var names []string
	r := tar.NewReader(bytes.NewReader(layer))
	for h, err := r.Next(); err == nil; h, err = r.Next() {
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != "etc/.wh.group .wh.a" {
		t.Errorf("the layer has %q", got)
	}
}
