package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// entry is one entry of a generated archive. It can say more than archive/tar
// would write.
type entry struct {
	kind         byte
	name, link   string
	body         string
	hole         int64 // bytes that are not in the archive, before the body
	mode         int64
	uid, gid     int64
	major, minor int64
	mtime        int64
	xattrs       map[string]string
}

// content is what a file has once it is unpacked.
func (h entry) content() string { return strings.Repeat("\x00", int(h.hole)) + h.body }

// choices reads decisions off the fuzzer's bytes. At their end it always takes
// the first.
type choices struct{ b []byte }

func (c *choices) more() bool { return len(c.b) > 0 }

func (c *choices) n(n int) int {
	if len(c.b) == 0 {
		return 0
	}
	v := int(c.b[0]) % n
	c.b = c.b[1:]
	return v
}

func pick[T any](c *choices, l ...T) T { return l[c.n(len(l))] }

// few names, so that entries meet.
func (c *choices) component() string {
	return pick(c, "a", "b", "c", "a", "b", "d", "l", "..", ".", "", ".wh.a", ".wh.b", ".wh.l",
		".wh..wh..opq", ".wh..wh.plnk", ".wh..", ".wh...", ".wh.", "a", "l", "b", "c",
		strings.Repeat("n", 255), strings.Repeat("N", 256), "\xff\n\"")
}

func (c *choices) path() string {
	var l []string
	for range 1 + c.n(4) {
		l = append(l, c.component())
	}
	return pick(c, "", "", "", "/", "./", "../") + strings.Join(l, "/") + pick(c, "", "", "", "/", "/.")
}

func (c *choices) target() string {
	if c.n(3) > 0 {
		return c.path()
	}
	return pick(c, "/", "..", ".", "", "../../../../../../..",
		"/victim", "../../../../victim", "../../../../../../../victim/a",
		"/proc/self/root", "/proc/self/cwd/a", "l", "l/l", "a/l",
		strings.Repeat("a/", 2000), strings.Repeat("x", 4096), "/dev/shm", "/etc/passwd")
}

func (c *choices) entry() entry {
	h := entry{
		kind: pick(c, byte(tar.TypeReg), tar.TypeDir, tar.TypeSymlink, tar.TypeLink,
			tar.TypeReg, tar.TypeDir, tar.TypeSymlink,
			tar.TypeChar, tar.TypeBlock, tar.TypeFifo, tar.TypeCont, 'Z', tar.TypeXGlobalHeader),
		name: c.path(),
		mode: pick[int64](c, 0o644, 0o755, 0, 0o4755, 0o1777, 0o100644, 0o7777777),
		uid:  pick[int64](c, 0, 0, 1000, 65534, 1<<31, 1<<32-2),
		gid:  pick[int64](c, 0, 0, 7, 1<<31),
	}
	h.mtime = pick[int64](c, 1e9, 0, 1<<31, -1)
	switch h.kind {
	case tar.TypeSymlink, tar.TypeLink:
		h.link = c.target()
	case tar.TypeChar, tar.TypeBlock:
		h.major, h.minor = pick[int64](c, 0, 1, 8, 1<<12-1, 1<<12), pick[int64](c, 0, 3, 300, 1<<20-1, 1<<20)
	case tar.TypeReg, tar.TypeCont:
		h.body = pick(c, "", "x", "yy", strings.Repeat("z", 5000), strings.Repeat("\x00", 4096)+"end")
		h.hole = pick[int64](c, 0, 0, 0, 4096, 10000, 1<<17)
	}
	switch c.n(12) {
	case 11:
		h.xattrs = map[string]string{"user.a": "1"}
	case 10:
		h.xattrs = map[string]string{
			"trusted.overlay.opaque": "y",
			"user.overlay.opaque":    "y",
			"security.selinux":       "x",
			"user.b":                 "",
		}
	case 9:
		h.xattrs = map[string]string{"security.capability": "\x01\x00\x00\x02" + strings.Repeat("\x00", 16),
			"user.a": "2"}
	case 8:
		h.xattrs = pick(c, map[string]string{"security.capability": "bad"}, map[string]string{"user.": "x"})
	case 7:
		h.uid = pick[int64](c, -1, 1<<32-1, 1<<32, 1<<62)
	}
	return h
}

// layers decodes one or more archives.
func (c *choices) layers() [][]entry {
	l := [][]entry{nil}
	for n := 0; c.more() && n < 40; n++ {
		if c.n(9) == 8 && len(l) < 4 {
			l = append(l, nil)
			continue
		}
		l[len(l)-1] = append(l[len(l)-1], c.entry())
	}
	return l
}

// archiveOf writes the archive: ustar headers, and PAX records for what these
// cannot hold.
func archiveOf(entries []entry) []byte {
	var b bytes.Buffer
	for _, h := range entries {
		pax := map[string]string{}
		for k, v := range h.xattrs {
			pax["SCHILY.xattr."+k] = v
		}
		body := h.body
		if h.hole > 0 {
			pax["GNU.sparse.major"], pax["GNU.sparse.minor"] = "1", "0"
			pax["GNU.sparse.name"], pax["GNU.sparse.realsize"] = h.name, fmt.Sprint(h.hole+int64(len(h.body)))
			sparse := fmt.Sprintf("1\n%d\n%d\n", h.hole, len(h.body))
			body = sparse + strings.Repeat("\x00", 512-len(sparse)) + body
		}
		set := func(key, v string, max int) string {
			if len(v) <= max {
				return v
			}
			pax[key] = v
			return v[:max]
		}
		number := func(key string, v int64) int64 {
			if v >= 0 && v < 1<<21 {
				return v
			}
			pax[key] = fmt.Sprint(v)
			return 0
		}
		header := rawHeader{kind: h.kind, name: set("path", h.name, 100), link: set("linkpath", h.link, 100),
			mode: h.mode,
			uid:  number("uid", h.uid), gid: number("gid", h.gid), mtime: max(h.mtime, 0),
			size: int64(len(body)), major: h.major, minor: h.minor}
		if h.mtime < 0 {
			pax["mtime"] = fmt.Sprint(h.mtime)
		}
		if h.kind == tar.TypeXGlobalHeader {
			body = paxRecord("comment", "x")
			header.size = int64(len(body))
			clear(pax)
		}
		if len(pax) > 0 {
			var records strings.Builder
			for _, k := range slices.Sorted(maps.Keys(pax)) {
				records.WriteString(paxRecord(k, pax[k]))
			}
			rawHeader{kind: tar.TypeXHeader, name: "pax", size: int64(records.Len())}.write(&b, records.String())
		}
		header.write(&b, body)
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

type rawHeader struct {
	kind                                      byte
	name, link                                string
	mode, uid, gid, size, mtime, major, minor int64
}

func (h rawHeader) write(b *bytes.Buffer, body string) {
	block := make([]byte, 512)
	copy(block[0:100], h.name)
	octal := func(field []byte, v int64) { copy(field, fmt.Sprintf("%0*o", len(field)-1, v)) }
	octal(block[100:108], h.mode)
	octal(block[108:116], h.uid)
	octal(block[116:124], h.gid)
	octal(block[124:136], h.size)
	octal(block[136:148], h.mtime)
	block[156] = h.kind
	copy(block[157:257], h.link)
	copy(block[257:], "ustar\x0000")
	octal(block[329:337], h.major)
	octal(block[337:345], h.minor)
	repair(block)
	b.Write(block)
	b.WriteString(body)
	b.Write(make([]byte, -len(body)&511))
}

// repair makes the checksums of headers right, which mutations break.
func repair(b []byte) {
	for ; len(b) >= 512; b = b[512:] {
		h := b[:512]
		if string(h[257:262]) != "ustar" {
			continue
		}
		copy(h[148:156], "        ")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	}
}

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for n != len(k)+len(v)+3+len(fmt.Sprint(n)) {
		n = len(k) + len(v) + 3 + len(fmt.Sprint(n))
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

// guarded is a store deep inside a tree that nobody may change.
type guarded struct {
	*Store
	outer  string
	before string
}

// newGuarded works in memory where it can: a fuzzer has no use for a disk.
func newGuarded(t testing.TB) *guarded {
	needRoot(t)
	outer, err := os.MkdirTemp("/dev/shm", "holdfast-fuzz-")
	if err == nil {
		t.Cleanup(func() { os.RemoveAll(outer) })
		// Before Linux 6.6 a tmpfs has no attributes of users.
		err = unix.Setxattr(outer, "user.a", []byte("x"), 0)
		unix.Removexattr(outer, "user.a")
	}
	if err != nil {
		outer = t.TempDir()
	}
	dir := outer
	for _, level := range []string{".", "1", "2", "layers"} {
		dir = filepath.Join(dir, level)
		check(t, os.MkdirAll(filepath.Join(dir, "victim", "a"), 0o755))
		for _, name := range []string{"a", "b", "c", "victim/a/a", "victim/b"} {
			check(t, os.WriteFile(filepath.Join(dir, name), []byte(level), 0o640))
		}
	}
	s, err := Open(dir, slog.New(slog.DiscardHandler))
	check(t, err)
	t.Cleanup(func() { s.Close() })
	s.Limits = Limits{Bytes: 1 << 20, Entries: 1000}
	g := &guarded{Store: s, outer: outer}
	g.before = g.state(t)
	return g
}

// state is all about the tree around the layers, the time of the last change of
// each inode included.
func (g *guarded) state(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(g.outer, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st := lstat(t, path)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR && strings.HasPrefix(path, g.dir+"/") &&
			!strings.HasPrefix(path, g.dir+"/victim") {
			return fs.SkipDir // the layers themselves
		}
		fmt.Fprintln(&b, path, st.Mode, st.Uid, st.Gid, st.Ino, st.Nlink, st.Size, st.Mtim, st.Ctim)
		return nil
	})
	check(t, err)
	return b.String()
}

// apply unpacks an archive and looks for what it left where it should not.
func (g *guarded) apply(t testing.TB, b []byte) (digest.Digest, error) {
	t.Helper()
	d := digest.FromBytes(b)
	err := g.Apply(context.Background(), d, bytes.NewReader(b))
	if after := g.state(t); after != g.before {
		t.Fatalf("changed outside of the layer:\n%s\nwas\n%s", after, g.before)
	}
	if err != nil {
		if !errors.Is(err, ErrBadLayer) {
			t.Fatalf("it is the layer's fault, and not said so: %v", err)
		}
		if l, _ := filepath.Glob(filepath.Join(g.dir, tmpName, "unpack-*")); len(l) != 0 {
			t.Fatalf("left behind: %v", l)
		}
	}
	return d, err
}

// checkLayer unpacks an archive, and the tree has to be what the model says.
func checkLayer(t testing.TB, g *guarded, entries []entry) {
	t.Helper()
	b := archiveOf(entries)
	m := newModel(g.Limits)
	want := m.apply(entries)
	if int64(len(b)) > g.Limits.Bytes {
		want = refuse("%d bytes", len(b))
	}
	d, err := g.apply(t, b)
	if (err == nil) != (want == nil) {
		t.Fatalf("%s\ngot %v, want %v", show(entries), err, want)
	}
	if err != nil {
		return
	}
	defer g.Remove(d)
	if err := m.compare(filepath.Join(g.layerDir(d), diffName)); err != nil {
		t.Fatalf("%s\n%v", show(entries), err)
	}
	var r layerRecord
	check(t, record.Read(filepath.Join(g.layerDir(d), recordName), &r))
	if implied := m.implied(); fmt.Sprintf("%q", r.Implied) != fmt.Sprintf("%q", implied) {
		t.Fatalf("%s\nimplied %q, want %q", show(entries), r.Implied, implied)
	}
	if r.Inodes != m.inodes() {
		t.Fatalf("%s\n%d inodes, want %d", show(entries), r.Inodes, m.inodes())
	}
}

// checkUnion mounts layers, and the tree has to be what comes of unpacking one
// archive over the other.
func checkUnion(t testing.TB, g *guarded, layers [][]entry) {
	t.Helper()
	m := newModel(g.Limits)
	m.union = true
	var diffIDs []digest.Digest
	for _, entries := range layers {
		m.settle()
		if m.apply(entries) != nil {
			return
		}
		d, err := g.apply(t, archiveOf(entries))
		if err != nil {
			return
		}
		defer g.Remove(d)
		diffIDs = append(diffIDs, d)
	}
	rw, err := os.MkdirTemp(filepath.Dir(g.outer), "holdfast-fuzz-rw-")
	check(t, err)
	defer os.RemoveAll(rw)
	target := filepath.Join(rw, "rootfs")
	check(t, os.Mkdir(target, 0o755))
	defer Unmount(target)
	if err := g.Mount(context.Background(), diffIDs, rw, target, nil, ""); err != nil {
		t.Fatalf("%s\n%v", show(layers...), err)
	}
	if err := m.compare(target); err != nil {
		t.Fatalf("%s\n%v", show(layers...), err)
	}
}

// show is the archives for people.
func show(layers ...[]entry) string {
	var b strings.Builder
	for i, l := range layers {
		for _, h := range l {
			fmt.Fprintf(&b, "%d %c %.80q", i, h.kind, h.name)
			if h.link != "" {
				fmt.Fprintf(&b, " -> %.80q", h.link)
			}
			fmt.Fprintf(
				&b,
				" mode %o owner %d:%d time %d size %d+%d device %d:%d %q\n",
				h.mode,
				h.uid,
				h.gid,
				h.mtime,
				h.hole,
				len(h.body),
				h.major,
				h.minor,
				h.xattrs,
			)
		}
	}
	return b.String()
}

// seeds of decisions; the fuzzer finds the rest.
var decisions = [][]byte{
	[]byte("0123456789abcdefghijklmnopqrstuvwxyz"),
	bytes.Repeat([]byte{1, 2, 3, 5, 8, 13, 21, 34, 55, 89}, 12),
	bytes.Repeat([]byte{0, 1, 1, 0, 2, 0, 0, 3, 0, 1, 0}, 20),
}

func FuzzLayer(f *testing.F) {
	for _, b := range decisions {
		f.Add(b)
	}
	g := newGuarded(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &choices{b}
		checkLayer(t, g, slices.Concat(c.layers()...))
	})
}

func FuzzUnion(f *testing.F) {
	for _, b := range decisions {
		f.Add(b)
	}
	g := newGuarded(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &choices{b}
		checkUnion(t, g, c.layers())
	})
}

// What the fuzzers have found.
func TestFoundByFuzzing(t *testing.T) {
	g := newGuarded(t)
	dir := func(name string, mode int64) entry {
		return entry{kind: tar.TypeDir, name: name, mode: mode, mtime: 1e9}
	}
	file := func(name string) entry {
		return entry{kind: tar.TypeReg, name: name, body: "x", mode: 0o644, mtime: 1e9}
	}
	link := func(name, to string) entry { return entry{kind: tar.TypeLink, name: name, link: to} }
	soft := func(name, to string) entry { return entry{kind: tar.TypeSymlink, name: name, link: to, mtime: 1e9} }
	manyLinks := []entry{file("a"), file("b")}
	for _, to := range []string{"a", "b"} {
		for i := range 10 {
			manyLinks = append(manyLinks, link(fmt.Sprint(i), to))
		}
	}
	for name, entries := range map[string][]entry{
		"inodes below zero":               manyLinks,
		"a tree is replaced by a file":    {file("a/b/c"), file("a/b/d"), file("a")},
		"a made-up name that is no UTF-8": {file("\xff/a")},
		"opaque, in a directory of aufs":  {file("a/.wh..wh.plnk/.wh..wh..opq")},
		"made up, in a setgid directory": {{kind: tar.TypeDir, name: ".", mode: 0o2755, gid: 7, mtime: 1e9},
			file("a/b")},
		"another directory has the name": {dir("a/c", 0o700), {
			kind:  tar.TypeDir,
			name:  "c",
			mode:  0o755,
			mtime: 2e9,
		}, soft("a", "/")},
		"made up, then hidden":               {file("a/b"), file(".wh.a")},
		"hidden, then made up":               {file(".wh.a"), file("a/b")},
		"a hard link to itself by a link":    {file("d/a"), soft("l", "d"), link("d/a", "l/a")},
		"a hard link in place of its parent": {file("d/a"), link("d", "d/a")},
	} {
		t.Run(name, func(t *testing.T) { checkLayer(t, g, entries) })
	}
	for name, layers := range map[string][][]entry{
		"the same layer twice":            {{file("a")}, {file(".wh.a"), file("b")}, {file("a")}},
		"the same empty layer many times": {nil, nil, {file("a")}, nil},
		"an opaque root": {{dir(".", 0o700), file("a"), file("d/b")}, {
			file(".wh..wh..opq"),
			file("d/c"),
		}},
		"opaque, not itself hidden": {{dir("tmp", 0o1777), file("tmp/a")}, {
			file("tmp/.wh..wh..opq"),
			file("tmp/b"),
		}},
		"hidden, and made up again": {{dir("tmp", 0o1777), file("tmp/a")}, {file(".wh.tmp"), file("tmp/b")}},
		"opaque, with directories in it": {{dir("a", 0o700), dir("a/b", 0o700), file("a/b/c")}, {
			file("a/.wh..wh..opq"),
			file("a/b/d"),
		}},
		"a file in between hides a directory": {{dir("a", 0o700), file("a/b")}, {file("a")}, {dir("a", 0o711),
			file("a/c")}},
	} {
		t.Run(name, func(t *testing.T) { checkUnion(t, g, layers) })
	}
}

// Random archives, without the fuzzer's sense of what is new, and much faster.
func TestRandomLayers(t *testing.T) {
	layers, unions := 3000, 300
	if os.Getenv("HOLDFAST_DRILL") != "" {
		layers, unions = 300_000, 30_000
	}
	g := newGuarded(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func() *choices {
		b := make([]byte, 20+rnd.IntN(200))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return &choices{b}
	}
	for range unions {
		checkUnion(t, g, random().layers())
	}
	for range layers {
		checkLayer(t, g, slices.Concat(random().layers()...))
	}
}

// rawSeeds are archives to mutate.
func rawSeeds(t testing.TB) [][]byte {
	return [][]byte{
		archive(
			t,
			e{name: "a/b", body: "x"},
			e{name: ".wh.c"},
			e{name: "l", typ: tar.TypeSymlink, link: "/"},
			e{name: "l/x", body: "y"},
		),
		archive(
			t,
			e{name: "d", typ: tar.TypeDir},
			e{name: "d/a", body: "x"},
			e{name: "h", typ: tar.TypeLink, link: "d/a"},
			e{name: "d/.wh..wh..opq"},
		),
		archive(
			t,
			e{name: "l", typ: tar.TypeSymlink, link: "../../.."},
			e{name: "l/l", typ: tar.TypeSymlink, link: ".."},
			e{name: "l/l/l", typ: tar.TypeFifo},
		),
		archiveOf([]entry{{kind: tar.TypeReg, name: "hole", body: "x", hole: 4096, uid: 1 << 31}}),
	}
}

func TestMutatedArchives(t *testing.T) {
	g := newGuarded(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 1000 {
		seeds := rawSeeds(t)
		b := seeds[i%len(seeds)]
		for range 1 + rnd.IntN(3) {
			b[rnd.IntN(len(b))] = "/.\x00lh0137wd"[rnd.IntN(11)]
		}
		repair(b)
		if d, err := g.apply(t, b); err == nil {
			g.Remove(d)
		}
	}
	g.Close()
	empty(t, filepath.Join(g.dir, tmpName))
}

// The bytes of the archive themselves.
func FuzzArchive(f *testing.F) {
	for _, b := range rawSeeds(f) {
		f.Add(b)
	}
	g := newGuarded(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		repair(b)
		if d, err := g.apply(t, b); err == nil {
			g.Remove(d)
		}
	})
}
