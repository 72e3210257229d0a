package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var then = time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)

// e is one entry of a test archive.
type e struct {
	name string
	typ  byte // TypeReg if zero
	body string
	link string
	mode int64 // 0644, directories 0755, if zero
	uid  int
	dev  [2]int64
	pax  map[string]string
	raw  func(h *tar.Header)
}

func archive(t testing.TB, entries ...e) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, x := range entries {
		h := &tar.Header{
			Name: x.name, Typeflag: x.typ, Size: int64(len(x.body)), Linkname: x.link, Mode: x.mode,
			Uid: x.uid, Gid: x.uid, Devmajor: x.dev[0], Devminor: x.dev[1], ModTime: then,
			PAXRecords: x.pax, Format: tar.FormatPAX,
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if x.raw != nil {
			x.raw(h)
		}
		check(t, w.WriteHeader(h))
		if _, err := io.WriteString(w, x.body); err != nil {
			t.Fatal(err)
		}
	}
	check(t, w.Close())
	return b.Bytes()
}

var needRoot = must.BeRoot

func open(t testing.TB, dir string) *Store {
	t.Helper()
	needRoot(t)
	s, err := Open(dir, slog.New(slog.DiscardHandler))
	check(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func apply(t testing.TB, s *Store, entries ...e) digest.Digest {
	t.Helper()
	b := archive(t, entries...)
	d := digest.FromBytes(b)
	check(t, s.Apply(t.Context(), d, bytes.NewReader(b)))
	return d
}

// mount mounts the layers and gives the target; it is unmounted at the end.
func mount(t testing.TB, s *Store, layers ...digest.Digest) string {
	t.Helper()
	dir := t.TempDir()
	target := filepath.Join(dir, "rootfs")
	check(t, os.Mkdir(target, 0o755))
	t.Cleanup(func() {
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
	})
	check(t, s.Mount(t.Context(), layers, dir, target, nil, ""))
	return target
}

func read(t testing.TB, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	check(t, err)
	return string(b)
}

func lstat(t testing.TB, path ...string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(path...), &st); err != nil {
		t.Fatalf("%s: %v", filepath.Join(path...), err)
	}
	return st
}

func gone(t testing.TB, path ...string) {
	t.Helper()
	if _, err := os.Lstat(filepath.Join(path...)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v, want it gone", filepath.Join(path...), err)
	}
}

func TestEveryKindOfEntry(t *testing.T) {
	s := open(t, t.TempDir())
	long := strings.Repeat("d/", 120) + strings.Repeat("n", 200)
	capability := "\x01\x00\x00\x02\x00\x04" + strings.Repeat("\x00", 14) // net_bind_service, effective
	root := mount(t, s, apply(t, s,
		e{name: "./", typ: tar.TypeDir, mode: 0o751},
		e{name: "bin/", typ: tar.TypeDir, mode: 0o555, uid: 7},
		e{name: "bin/su", body: "x", mode: 0o4755, uid: 3},
		e{name: "bin/ping", body: "y", mode: 0o755, pax: map[string]string{
			"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.note": "hi",
			"SCHILY.xattr.trusted.overlay.redirect": "/etc"}},
		e{name: "bin/hard", typ: tar.TypeLink, link: "bin/su", mode: 0o4755, uid: 3},
		e{name: "bin/soft", typ: tar.TypeSymlink, link: "/etc/../bin/su"},
		e{name: "bin/hardsoft", typ: tar.TypeLink, link: "/bin/soft"},
		e{name: "dev/null", typ: tar.TypeChar, mode: 0o666, dev: [2]int64{1, 3}},
		e{name: "dev/loop", typ: tar.TypeBlock, mode: 0o660, dev: [2]int64{7, 300}},
		e{name: "dev/fifo", typ: tar.TypeFifo, mode: 0o600, uid: 9},
		e{name: long, body: "long"},
		e{name: "big", body: strings.Repeat("0123456789", 100_000)},
		e{name: "tmp", typ: tar.TypeDir, mode: 0o1777},
	))
	if st := lstat(t, root, "bin/su"); st.Mode != unix.S_IFREG|0o4755 || st.Uid != 3 || st.Nlink != 2 ||
		st.Mtim.Sec != then.Unix() {
		t.Errorf("setuid file: mode %o uid %d links %d time %d", st.Mode, st.Uid, st.Nlink, st.Mtim.Sec)
	}
	if st := lstat(t, root, "bin"); st.Mode != unix.S_IFDIR|0o555 || st.Uid != 7 || st.Mtim.Sec != then.Unix() {
		t.Errorf("directory: mode %o uid %d time %d", st.Mode, st.Uid, st.Mtim.Sec)
	}
	if st := lstat(t, root, "."); st.Mode&0o7777 != 0o751 {
		t.Errorf("root: mode %o", st.Mode)
	}
	if st := lstat(t, root, "tmp"); st.Mode&0o7777 != 0o1777 {
		t.Errorf("tmp: mode %o", st.Mode)
	}
	if st := lstat(t, root, "dev/loop"); st.Mode != unix.S_IFBLK|0o660 || st.Rdev != unix.Mkdev(7, 300) {
		t.Errorf("device: mode %o rdev %x", st.Mode, st.Rdev)
	}
	if st := lstat(t, root, "dev/fifo"); st.Mode != unix.S_IFIFO|0o600 || st.Uid != 9 {
		t.Errorf("fifo: mode %o uid %d", st.Mode, st.Uid)
	}
	if st := lstat(t, root, "bin/hardsoft"); st.Mode&unix.S_IFMT != unix.S_IFLNK || st.Nlink != 2 ||
		st.Mtim.Sec != then.Unix() {
		t.Errorf("hard link to a symbolic one: mode %o links %d", st.Mode, st.Nlink)
	}
	for name, want := range map[string]string{
		"security.capability":      capability,
		"user.note":                "hi",
		"trusted.overlay.redirect": "",
	} {
		b := make([]byte, 64)
		n, _ := unix.Lgetxattr(filepath.Join(root, "bin/ping"), name, b)
		if got := string(b[:max(n, 0)]); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if read(t, root, long) != "long" || len(read(t, root, "big")) != 1_000_000 {
		t.Error("content differs")
	}
	if u := s.Usage(); u.Bytes < 1_000_000 || u.Inodes < 130 || u.Inodes > 140 {
		t.Errorf("usage %+v", u)
	}
}

// A hard link's entry has attributes as any other, and the last one counts.
func TestHardLinksHaveAttributes(t *testing.T) {
	s := open(t, t.TempDir())
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	later := func(h *tar.Header) { h.ModTime = then.Add(time.Hour) }
	root := mount(t, s, apply(t, s,
		e{name: "a", body: "a", mode: 0o4755},
		e{
			name: "b",
			typ:  tar.TypeLink,
			link: "a",
			mode: 0o640,
			uid:  5,
			raw:  later,
			pax:  map[string]string{"SCHILY.xattr.user.note": "hi"},
		},
		e{name: "s", typ: tar.TypeSymlink, link: "/etc/passwd"},
		e{name: "t", typ: tar.TypeLink, link: "s", mode: 0o600, uid: 6, raw: later},
		e{name: "p", body: "p", mode: 0o755, pax: map[string]string{"SCHILY.xattr.security.capability": capability}},
		e{name: "q", typ: tar.TypeLink, link: "p", mode: 0o755},
	))
	for name, want := range map[string]unix.Stat_t{
		"a": {Mode: unix.S_IFREG | 0o640, Uid: 5, Gid: 5, Nlink: 2, Mtim: unix.Timespec{Sec: then.Unix() + 3600}},
		"s": {Mode: unix.S_IFLNK | 0o777, Uid: 6, Gid: 6, Nlink: 2, Mtim: unix.Timespec{Sec: then.Unix() + 3600}},
		"p": {Mode: unix.S_IFREG | 0o755, Nlink: 2, Mtim: unix.Timespec{Sec: then.Unix()}},
	} {
		st := lstat(t, root, name)
		if got := (unix.Stat_t{Mode: st.Mode, Uid: st.Uid, Gid: st.Gid, Nlink: st.Nlink, Mtim: st.Mtim}); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	for file, want := range map[string][2]string{"a": {"user.note", "hi"}, "q": {"security.capability", capability}} {
		b := make([]byte, 64)
		n, _ := unix.Lgetxattr(filepath.Join(root, file), want[0], b)
		if got := string(b[:max(n, 0)]); got != want[1] {
			t.Errorf("%s of %s is %q, want %q", want[0], file, got, want[1])
		}
	}
}

// What a directory passes on to files to come is not for those in the archive.
func TestDefaultACL(t *testing.T) {
	s := open(t, t.TempDir())
	const acl, def = "system.posix_acl_access", "system.posix_acl_default"
	// user::rwx user:7:rwx group::--- mask::rwx other::---
	value := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\x07\x00\x00\x00" +
		"\x04\x00\x00\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	diff := filepath.Join(s.layerDir(apply(t, s,
		e{name: "d", typ: tar.TypeDir, pax: map[string]string{"SCHILY.xattr." + def: value}},
		e{name: "d/file", body: "x", mode: 0o640}, e{name: "d/fifo", typ: tar.TypeFifo}, e{name: "d/sub",
			typ: tar.TypeDir},
		e{name: "d/made/up", body: "x"},
		e{name: "d/own", body: "x", pax: map[string]string{"SCHILY.xattr." + acl: value}},
	)), diffName)
	if got := xattrs(filepath.Join(diff, "d")); got[def] != value || got[acl] != "" {
		t.Errorf("the directory has %q", got)
	}
	for _, name := range []string{"d/file", "d/fifo", "d/sub", "d/made", "d/made/up"} {
		if got := xattrs(filepath.Join(diff, name)); len(got) != 0 {
			t.Errorf("%s has %q", name, got)
		}
	}
	if got := xattrs(filepath.Join(diff, "d/own")); got[acl] != value {
		t.Errorf("a file with its own has %q", got)
	}
	b := archive(t, e{name: "d", typ: tar.TypeDir, pax: map[string]string{"SCHILY.xattr." + def: value[:20]}})
	if err := s.Apply(t.Context(), digest.FromBytes(b), bytes.NewReader(b)); !errors.Is(err, ErrBadLayer) {
		t.Errorf("one that is none: %v", err)
	}
}

func TestWhiteouts(t *testing.T) {
	s := open(t, t.TempDir())
	base := apply(t, s,
		e{name: "a", body: "1"}, e{name: "dir/x", body: "1"}, e{name: "dir/y", body: "1"},
		e{name: "opaque/x", body: "1"}, e{name: "over/x", body: "1"}, e{name: "file/x", body: "1"},
		e{name: "late/x", body: "1"}, e{name: "deep/er/x", body: "1"})
	top := apply(t, s,
		e{name: ".wh.a"}, e{name: "dir/.wh.x"},
		e{name: "opaque/.wh..wh..opq"}, e{name: "opaque/z", body: "2"},
		// A whiteout and a directory of the same name, in both orders: what
		// the layer itself has stays, what is below is hidden.
		e{name: ".wh.over"}, e{name: "over/", typ: tar.TypeDir}, e{name: "over/z", body: "2"},
		e{name: "late/", typ: tar.TypeDir}, e{name: "late/z", body: "2"}, e{name: ".wh.late"},
		e{name: ".wh.deep"}, e{name: "deep/er/z", body: "2"},
		e{name: "file", body: "2"},
		e{name: ".wh..wh.plnk/1", body: "x"})
	root := mount(t, s, base, top)
	for _, name := range []string{"a", "dir/x", "opaque/x", "over/x", "late/x", "deep/er/x", ".wh.a",
		".wh..wh.plnk/1"} {
		gone(t, root, name)
	}
	for name, want := range map[string]string{
		"dir/y":     "1",
		"opaque/z":  "2",
		"over/z":    "2",
		"late/z":    "2",
		"deep/er/z": "2",
		"file":      "2",
	} {
		if got := read(t, root, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

func TestMadeUpDirectoriesLookAsBelow(t *testing.T) {
	s := open(t, t.TempDir())
	base := apply(t, s,
		e{name: "./", typ: tar.TypeDir, mode: 0o711},
		e{name: "tmp", typ: tar.TypeDir, mode: 0o1777},
		e{name: "home", typ: tar.TypeDir, mode: 0o755},
		e{name: "home/me", typ: tar.TypeDir, mode: 0o700, uid: 1000},
		e{name: "gone", typ: tar.TypeDir, mode: 0o700})
	middle := apply(t, s, e{name: ".wh.gone"}, e{name: "tmp/a", body: "a"})
	top := apply(t, s, e{name: "tmp/b", body: "b"}, e{name: "home/me/c", body: "c"}, e{name: "gone/d", body: "d"})
	root := mount(t, s, base, middle, top)
	for name, want := range map[string]struct{ mode, uid uint32 }{
		".": {0o711, 0}, "tmp": {0o1777, 0}, "home": {0o755, 0}, "home/me": {0o700, 1000}, "gone": {0o755, 0},
	} {
		if st := lstat(t, root, name); st.Mode&0o7777 != want.mode || st.Uid != want.uid {
			t.Errorf("%s: mode %o uid %d, want %o %d", name, st.Mode&0o7777, st.Uid, want.mode, want.uid)
		}
	}
	if read(t, root, "tmp/a")+read(t, root, "tmp/b")+read(t, root, "home/me/c")+read(t, root, "gone/d") != "abcd" {
		t.Error("content differs")
	}
	// The same top layer on another base.
	alone := mount(t, s, top)
	if st := lstat(t, alone, "home/me"); st.Mode&0o7777 != 0o755 || st.Uid != 0 {
		t.Errorf("alone: mode %o uid %d", st.Mode&0o7777, st.Uid)
	}
}

// Not the mode alone is that of below: attributes, ACLs and the time are, also of
// a directory that has one in it whose attributes have to be put right.
func TestMadeUpDirectoriesHaveAttributes(t *testing.T) {
	s := open(t, t.TempDir())
	const def = "system.posix_acl_default"
	// user::rwx user:7:rwx group::--- mask::rwx other::---
	acl := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\x07\x00\x00\x00" +
		"\x04\x00\x00\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	base := apply(t, s,
		e{name: "./", typ: tar.TypeDir, pax: map[string]string{"SCHILY.xattr.user.a": "root"}},
		e{name: "d", typ: tar.TypeDir, pax: map[string]string{"SCHILY.xattr." + def: acl}},
		e{name: "d/sub", typ: tar.TypeDir, pax: map[string]string{"SCHILY.xattr.user.a": "sub"}},
		e{name: "d/plain", typ: tar.TypeDir})
	top := apply(
		t,
		s,
		e{name: "d", typ: tar.TypeDir, mode: 0o750, pax: map[string]string{"SCHILY.xattr." + def: acl}},
		e{name: "d/sub/x", body: "x"},
		e{name: "d/plain/x", body: "x"},
	)
	root := mount(t, s, base, top)
	for name, want := range map[string]map[string]string{
		".":       {"user.a": "root"},
		"d":       {def: acl},
		"d/sub":   {"user.a": "sub"},
		"d/plain": {},
	} {
		got := xattrs(filepath.Join(root, name))
		maps.DeleteFunc(got, func(k, _ string) bool { return strings.HasPrefix(k, "trusted.") })
		if !maps.Equal(got, want) {
			t.Errorf("%s has %q, want %q", name, got, want)
		}
		if st := lstat(t, root,
			name); st.Mtim.Sec != then.Unix() && name != "d/plain" { // that is as the layer made it up
			t.Errorf("%s is of %d", name, st.Mtim.Sec)
		}
	}
	m := &IDMap{HostUID: 1000, UIDs: 8, HostGID: 2000, GIDs: 8}
	if got := m.hostACL(acl); got != strings.Replace(
		acl,
		"\x02\x00\x07\x00\x07\x00\x00\x00",
		"\x02\x00\x07\x00\xef\x03\x00\x00",
		1,
	) {
		t.Errorf("with ids of the host: %q", got)
	}
}

// The writable layer may be on another file system than the layers, as on one
// without attributes.
func TestMadeUpDirectoriesWithoutAttributes(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	check(t, unix.Mount("none", dir, "ramfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	a := attributes{mode: 0o1777, mtime: unix.Timespec{Sec: 1}, xattrs: map[string]string{"user.a": "x"}}
	check(t, setAttributes(dir, a, nil))
	if st := lstat(t, dir, "."); st.Mode&0o7777 != a.mode || st.Mtim != a.mtime {
		t.Errorf("mode %o, time %v", st.Mode, st.Mtim)
	}
}

// A directory without an entry is a directory, also over a base where the name
// is a symbolic link: what a layer is does not depend on what is below it.
// containerd's overlayfs snapshots look the same.
func TestMadeUpDirectoryOverALink(t *testing.T) {
	s := open(t, t.TempDir())
	base := apply(t, s,
		e{name: "usr/lib", typ: tar.TypeDir}, e{name: "usr/lib/a", body: "a"},
		e{name: "lib", typ: tar.TypeSymlink, link: "usr/lib"})
	implied := apply(t, s, e{name: "lib/x", body: "x"})
	resolved := apply(t, s, e{name: "usr/lib/x", body: "x"})
	root := mount(t, s, base, implied)
	if st := lstat(t, root, "lib"); st.Mode != unix.S_IFDIR|0o755 {
		t.Errorf("lib has mode %o", st.Mode)
	}
	if read(t, root, "lib/x")+read(t, root, "usr/lib/a") != "xa" {
		t.Error("content differs")
	}
	gone(t, root, "usr/lib/x")
	// As builders write it that resolve links.
	root = mount(t, s, base, resolved)
	if read(t, root, "lib/x")+read(t, root, "lib/a") != "xa" {
		t.Error("content differs")
	}
}

func TestHostileLayers(t *testing.T) {
	needRoot(t)
	for name, entries := range map[string][]e{
		"dotdot":             {{name: "../evil", body: "x"}},
		"dotdot inside":      {{name: "a/../../evil", body: "x"}},
		"hard link out":      {{name: "h", typ: tar.TypeLink, link: "../../../outside"}},
		"hard link absolute": {{name: "h", typ: tar.TypeLink, link: "/etc/passwd"}},
		"hard link by symlink": {{name: "s", typ: tar.TypeSymlink, link: "/etc"},
			{name: "h", typ: tar.TypeLink, link: "s/passwd"}},
		"hard link to directory": {{name: "d", typ: tar.TypeDir}, {name: "h", typ: tar.TypeLink, link: "d"}},
		"hard link to later":     {{name: "h", typ: tar.TypeLink, link: "f"}, {name: "f", body: "x"}},
		"root is a file":         {{name: ".", body: "x"}},
		"root is a link":         {{name: "./", typ: tar.TypeSymlink, link: "/etc"}},
		"below a file":           {{name: "f", body: "x"}, {name: "f/g", body: "x"}},
		"whiteout of dotdot":     {{name: ".wh..."}},
		"symlink loop":           {{name: "l", typ: tar.TypeSymlink, link: "l"}, {name: "l/f", body: "x"}},
		"owner too large":        {{name: "f", raw: func(h *tar.Header) { h.Uid = 1 << 33 }}},
		"unknown type":           {{name: "f", typ: 'Z'}},
		"device number too large": {{name: "c", typ: tar.TypeChar, dev: [2]int64{1 << 13, 0},
			raw: func(h *tar.Header) { h.Format = tar.FormatGNU }}},
	} {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			s := open(t, filepath.Join(outer, "layers"))
			b := archive(t, entries...)
			err := s.Apply(t.Context(), digest.FromBytes(b), bytes.NewReader(b))
			if err == nil {
				t.Fatal("it was taken")
			}
			if !errors.Is(err, ErrBadLayer) {
				t.Errorf("not ErrBadLayer: %v", err)
			}
			if len(s.List()) != 0 {
				t.Error("the layer is there")
			}
			empty(t, filepath.Join(outer, "layers", "tmp"))
			if l, _ := os.ReadDir(outer); len(l) != 1 {
				t.Errorf("beside the store: %v", l)
			}
		})
	}
}

// Links that point out of the root lead to somewhere inside it.
func TestLinksStayInside(t *testing.T) {
	outer := t.TempDir()
	victim := filepath.Join(outer, "victim")
	check(t, os.Mkdir(victim, 0o755))
	s := open(t, filepath.Join(outer, "layers"))
	d := apply(t, s,
		e{name: "abs", typ: tar.TypeSymlink, link: victim},
		e{name: "abs/f", body: "1"},
		e{name: "up", typ: tar.TypeSymlink, link: "../../../../../.." + victim},
		e{name: "up/g", body: "2"},
		e{name: "p", typ: tar.TypeSymlink, link: "/proc/self/root"},
		e{name: "p/h", body: "3"},
		e{name: "/absolute/i", body: "4"},
		// Replacing a directory that was just written to by a link.
		e{name: "d/f", body: "5"},
		e{name: "d", typ: tar.TypeSymlink, link: victim},
		e{name: "d/j", body: "6"},
		// Through the link itself: it is replaced, not followed.
		e{name: "file", typ: tar.TypeSymlink, link: filepath.Join(victim, "k")},
		e{name: "file", body: "7"},
	)
	if l, _ := os.ReadDir(victim); len(l) != 0 {
		t.Errorf("written outside: %v", l)
	}
	diff := filepath.Join(s.layerDir(d), "diff")
	for name, want := range map[string]string{
		victim + "/f": "1", victim + "/g": "2", "proc/self/root/h": "3", "absolute/i": "4",
		victim + "/j": "6", "file": "7",
	} {
		if got := read(t, diff, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

func TestReplacedEntries(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s, apply(t, s,
		e{name: "f", body: "old", mode: 0o600}, e{name: "f", body: "new"},
		e{name: "d/x", body: "x"}, e{name: "d", body: "file"},
		e{name: "g", body: "g"}, e{name: "g/", typ: tar.TypeDir}, e{name: "g/x", body: "x"},
		e{name: "self", body: "s"}, e{name: "self", typ: tar.TypeLink, link: "self"},
		e{name: "implied/x", body: "x"}, e{name: "implied", typ: tar.TypeDir, mode: 0o700},
	))
	for name, want := range map[string]string{"f": "new", "d": "file", "g/x": "x", "self": "s"} {
		if got := read(t, root, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if st := lstat(t, root, "implied"); st.Mode&0o777 != 0o700 {
		t.Errorf("mode %o", st.Mode)
	}
}

func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		limits  Limits
		entries []e
	}{
		"entries": {Limits{Bytes: 1 << 30, Entries: 2}, []e{{name: "a"}, {name: "b"}, {name: "c"}}},
		"bytes":   {Limits{Bytes: 1 << 20, Entries: 100}, []e{{name: "a", body: strings.Repeat("x", 2<<20)}}},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			s.Limits = c.limits
			b := archive(t, c.entries...)
			if err := s.Apply(t.Context(), digest.FromBytes(b), bytes.NewReader(b)); !errors.Is(err, ErrBadLayer) {
				t.Errorf("got %v", err)
			}
			empty(t, filepath.Join(s.dir, "tmp"))
		})
	}
}

// A file of 1 TiB that is nothing but a hole, as GNU tar writes it: beyond the
// limit it is refused, below it takes no room.
func TestSparse(t *testing.T) {
	tail := strings.Repeat("data", 1024) + strings.Repeat("\x00", 8192) // its end becomes a hole as well
	hole := func(size int64) []byte {
		return archiveOf([]entry{{kind: tar.TypeReg, name: "hole", hole: size, body: tail}})
	}
	s := open(t, t.TempDir())
	s.Limits.Bytes = 2 << 20
	b := hole(1 << 20)
	d := digest.FromBytes(b)
	check(t, s.Apply(t.Context(), d, bytes.NewReader(b)))
	st := lstat(t, s.layerDir(d), "diff", "hole")
	if st.Size != int64(1<<20+len(tail)) || st.Blocks*512 > 64<<10 {
		t.Errorf("size %d, %d bytes on disk", st.Size, st.Blocks*512)
	}
	if got := read(t, s.layerDir(d), "diff", "hole"); got[1<<20:] != tail || strings.Trim(got[:1<<20], "\x00") != "" {
		t.Error("content differs")
	}
	b = hole(1 << 40)
	if err := s.Apply(t.Context(), digest.FromBytes(b), bytes.NewReader(b)); !errors.Is(err, ErrBadLayer) {
		t.Errorf("1 TiB: %v", err)
	}
}

func TestWrongDigestAndBrokenStreamLeaveNothing(t *testing.T) {
	s := open(t, t.TempDir())
	b := archive(t, e{name: "a", body: strings.Repeat("x", 1<<20)})
	wrong := digest.FromString("something else")
	if err := s.Apply(t.Context(), wrong, bytes.NewReader(b)); !errors.Is(err, ErrBadLayer) {
		t.Errorf("wrong digest: %v", err)
	}
	cut := errors.New("the line went dead")
	if err := s.Apply(
		t.Context(),
		digest.FromBytes(b),
		io.MultiReader(bytes.NewReader(b[:300_000]), &failing{cut}),
	); !errors.Is(err, cut) {
		t.Errorf("cut: %v", err)
	}
	if err := s.Apply(
		t.Context(),
		digest.FromBytes(b[:300_000]),
		bytes.NewReader(b[:300_000]),
	); !errors.Is(err, ErrBadLayer) {
		t.Errorf("truncated archive: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Apply(ctx, digest.FromBytes(b), bytes.NewReader(b)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := s.Apply(t.Context(), "sha256:../../x", bytes.NewReader(b)); !errors.Is(err, ErrBadLayer) {
		t.Errorf("not a digest: %v", err)
	}
	if len(s.List()) != 0 || s.Usage() != (Usage{}) {
		t.Errorf("left %v, %+v", s.List(), s.Usage())
	}
	empty(t, filepath.Join(s.dir, "tmp"))
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func empty(t *testing.T, dir string) {
	t.Helper()
	l, err := os.ReadDir(dir)
	if err != nil || len(l) != 0 {
		t.Errorf("%s is not empty: %v %v", dir, l, err)
	}
}

func TestConcurrentApplyIsShared(t *testing.T) {
	s := open(t, t.TempDir())
	b := archive(t, e{name: "a", body: "x"})
	d := digest.FromBytes(b)
	// The first one stands still after its first byte, until all others wait.
	gate := make(chan struct{})
	reads := make(chan struct{}, 1)
	slow := readerFunc(func(p []byte) (int, error) {
		select {
		case reads <- struct{}{}:
		default:
		}
		<-gate
		return 0, errors.New("the first stream fails")
	})
	first := make(chan error)
	go func() { first <- s.Apply(t.Context(), d, slow) }()
	<-reads
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { errs[i] = s.Apply(t.Context(), d, bytes.NewReader(b)) })
	}
	close(gate)
	if err := <-first; err == nil {
		t.Error("the first one did not fail")
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Errorf("one who waited failed: %v", err)
	}
	// A layer that is there is not read again.
	if err := s.Apply(t.Context(), d, &failing{errors.New("read")}); err != nil {
		t.Error(err)
	}
	if len(s.List()) != 1 || s.Usage().Inodes != 2 {
		t.Errorf("%v %+v", s.List(), s.Usage())
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestOpenAfterACrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	good := apply(t, s, e{name: "good", body: "x"})
	torn := apply(t, s, e{name: "torn", body: "x"})
	norecord := apply(t, s, e{name: "norecord", body: "x"})
	samboot := apply(t, s, e{name: "samboot", body: "x"})
	s.Close() // all are synced and marked now
	for _, d := range []digest.Digest{good, torn, norecord, samboot} {
		if _, err := os.Stat(filepath.Join(s.layerDir(d), syncedName)); err != nil {
			t.Fatal(err)
		}
	}
	// As a power cut leaves it: of another boot and not marked.
	var r layerRecord
	path := filepath.Join(s.layerDir(torn), recordName)
	check(t, record.Read(path, &r))
	r.BootID = "another boot"
	check(t, record.Write(path, r, false))
	for _, p := range []string{
		filepath.Join(s.layerDir(torn), syncedName),
		filepath.Join(s.layerDir(samboot), syncedName),
		filepath.Join(s.layerDir(norecord), recordName),
	} {
		check(t, os.Remove(p))
	}
	// As a SIGKILL leaves it.
	check(t, os.MkdirAll(filepath.Join(dir, tmpName, "unpack-1", "diff", "x"), 0o755))

	s = open(t, dir)
	if !s.Has(good) || !s.Has(samboot) || s.Count() != 2 {
		t.Errorf("has %v", s.List())
	}
	if u := s.Usage(); u.Inodes != 4 {
		t.Errorf("usage %+v", u)
	}
	if again := apply(t, s, e{name: "torn", body: "x"}); again != torn || !s.Has(torn) {
		t.Error("not unpacked again")
	}
	s.Close()
	empty(t, filepath.Join(dir, tmpName))
	if _, err := os.Stat(filepath.Join(s.layerDir(samboot), syncedName)); err != nil {
		t.Errorf("not marked: %v", err)
	}
}

// Whoever runs on a damaged layer keeps it, however often that happens, and it
// goes after them.
func TestDamagedInUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	var roots []string
	for range 3 {
		d := apply(t, s, e{name: "a", body: "x"})
		roots = append(roots, mount(t, s, d))
		check(t, os.Remove(filepath.Join(s.layerDir(d), recordName)))
		s.Close()
		s = open(t, dir)
		s.Close() // nothing is deleted in the background any more
		s = open(t, dir)
	}
	for i, root := range roots {
		if b, err := os.ReadFile(filepath.Join(root, "a")); string(b) != "x" {
			t.Errorf("root %d: %q, %v", i, b, err)
		}
		check(t, Unmount(root))
	}
	s.Close()
	s = open(t, dir)
	s.Close()
	empty(t, filepath.Join(dir, tmpName))
}

// A layer that was removed and unpacked again during a sync is not marked by it.
func TestMarkOfAnother(t *testing.T) {
	s := open(t, t.TempDir())
	unpack := func() *layerRecord {
		t.Helper()
		d := apply(t, s, e{name: "a", body: "x"})
		mark := filepath.Join(s.layerDir(d), syncedName)
		eventually(t, "the mark", func() bool { _, err := os.Stat(mark); return err == nil })
		check(t, os.Remove(mark))
		return s.layers[d]
	}
	first := unpack()
	check(t, s.Remove(first.DiffID))
	second := unpack()
	check(t, s.mark([]*layerRecord{first}))
	gone(t, s.layerDir(first.DiffID), syncedName)
	check(t, s.mark([]*layerRecord{second}))
	read(t, s.layerDir(first.DiffID), syncedName)
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	d := apply(t, s, e{name: "a/b/c", body: "x"})
	for range 2 {
		check(t, s.Remove(d))
	}
	if s.Has(d) || s.Usage() != (Usage{}) {
		t.Errorf("still there: %+v", s.Usage())
	}
	if err := s.Mount(t.Context(), []digest.Digest{d}, t.TempDir(), t.TempDir(), nil, ""); !errors.Is(err, ErrNoLayer) {
		t.Errorf("mount: %v", err)
	}
	s.Close()
	gone(t, s.layerDir(d))
	empty(t, filepath.Join(dir, tmpName))
}

// Without a free descriptor nobody can say whether a layer is whole. It is not
// removed for that: containers may run on it.
func TestNoDescriptorsLeft(t *testing.T) {
	s := open(t, t.TempDir())
	d := apply(t, s, e{name: "a", body: "x"})
	s.Close()
	var was unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: was.Max}))
	has := s.Has(d)
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	if !has {
		t.Error("the layer counts as gone")
	}
	read(t, s.layerDir(d), diffName, "a")
}

func TestManyLayers(t *testing.T) {
	for name, long := range map[string]string{"short": "", "long": strings.Repeat("x", 200)} {
		for _, n := range []int{1, 2, 130, 200} {
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				s := open(t, filepath.Join(t.TempDir(), long))
				var layers []digest.Digest
				for i := range n {
					layers = append(layers, apply(t, s, e{name: fmt.Sprint("only", i)}, e{name: "same",
						body: fmt.Sprint(i)}))
				}
				root := mount(t, s, layers...)
				if got := read(t, root, "same"); got != fmt.Sprint(n-1) {
					t.Errorf("the wrong layer is on top: %s", got)
				}
				read(t, root, "only0")
			})
		}
	}
}

// An image may have the same layer thousands of times.
func TestRepeatedLayer(t *testing.T) {
	s := open(t, t.TempDir())
	d := apply(t, s, e{name: "a", body: "x"})
	var was unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 500, Max: was.Max}))
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
	read(t, mount(t, s, slices.Repeat([]digest.Digest{d}, 1000)...), "a")
}

func TestClassicMount(t *testing.T) {
	for name, long := range map[string]string{"short": "a:b,c", "long": strings.Repeat("x", 200)} {
		for _, n := range []int{1, 130} {
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				needRoot(t)
				dir := t.TempDir()
				layers, rw := filepath.Join(dir, long, "layers"), filepath.Join(dir, long, "rw")
				target := filepath.Join(dir, "target")
				var lower []string
				for i := range n {
					lower = append(lower, filepath.Join(strings.Repeat("y", 64), fmt.Sprint(i)))
					check(t, os.MkdirAll(filepath.Join(layers, lower[i]), 0o755))
				}
				for _, d := range []string{filepath.Join(rw, upperName), filepath.Join(rw, workName), target} {
					check(t, os.MkdirAll(d, 0o755))
				}
				check(t, os.WriteFile(filepath.Join(layers, lower[n-1], "f"), nil, 0o644))
				o := newOverlay(layers, lower, rw, target)
				defer o.close()
				defer Unmount(target)
				check(t, o.mountClassic())
				read(t, target, "f")
			})
		}
	}
}

// The mount table shows real paths of the directories, in every way to mount them. Where
// they would make a line that other programs cannot read, it is shorter names, which tell the
// layers.
func TestMountTable(t *testing.T) {
	needRoot(t)
	ways := map[string]func(*overlay) error{
		"files":   (*overlay).mountFiles,
		"names":   (*overlay).mountNames,
		"classic": (*overlay).mountClassic,
		"any":     (*overlay).mount,
	}
	for way, mount := range ways {
		for _, n := range []int{1, 15, 499} {
			if way == "files" && n == 499 {
				continue // mount does not, and runc could not run meanwhile
			}
			t.Run(fmt.Sprint(way, n), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), strings.Repeat("x", 60))
				layers, rw := filepath.Join(dir, "layers"), filepath.Join(dir, "rw")
				var lower []string
				for i := range n {
					lower = append(lower, filepath.Join("sha256", fmt.Sprintf("%064x", i), diffName))
					check(t, os.MkdirAll(filepath.Join(layers, lower[i]), 0o755))
				}
				target := filepath.Join(dir, "target")
				for _, d := range []string{filepath.Join(rw, upperName), filepath.Join(rw, workName), target} {
					check(t, os.MkdirAll(d, 0o755))
				}
				o := newOverlay(layers, lower, rw, target)
				defer o.close()
				defer Unmount(target)
				err := mount(o)
				switch {
				case way == "files" && errors.Is(err, errOtherWay):
					t.Skip("this kernel takes no descriptors")
				case way == "classic" && n == 499:
					if err == nil {
						t.Error("a page has room for all layers")
					}
					return
				}
				check(t, err)
				checkTable(t, o, n == 499)
			})
		}
	}
}

// checkTable checks the line of an overlay in mountinfo.
func checkTable(t *testing.T, o *overlay, short bool) {
	t.Helper()
	if n := len(LayersAt(o.target)); n != len(o.lower) {
		t.Errorf("of %d layers, %d are found again", len(o.lower), n)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(table)) {
		if !strings.Contains(line, " "+o.target+" ") {
			continue
		}
		if short {
			if len(line) > 64<<10 {
				t.Errorf("a line of %d bytes", len(line))
			}
		} else if strings.Contains(line, "/proc/self/fd") || !strings.Contains(line, "="+o.rw+"/upper") {
			t.Errorf("no real paths: %.1000s", line)
		}
		for _, l := range o.lower {
			if !strings.Contains(line, l) || !short && !strings.Contains(line, filepath.Join(o.layers, l)) {
				t.Fatalf("it does not tell of layer %s: %.1000s", l, line)
			}
		}
		return
	}
	t.Error("it is not in the mount table")
}

// Directories that overlayfs does not take, or that mountinfo does not show, as
// they are: a start finds the layers in use.
func TestOddDirectories(t *testing.T) {
	long := strings.Repeat("x", 200)
	for name, odd := range map[string]string{
		"space":         "a b",
		"comma":         "a,b",
		"backslash":     `a\b`,
		"equals":        "a=b",
		"newline":       "a\nb",
		"long":          long,
		"long with all": long + `/ ,:=\` + long,
	} {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			dir := filepath.Join(t.TempDir(), odd)
			id := strings.Repeat("0f", 32)
			rw, target := filepath.Join(dir, id), filepath.Join(dir, "target")
			check(t, errors.Join(os.MkdirAll(rw, 0o700), os.Mkdir(target, 0o700)))
			s := open(t, filepath.Join(dir, "layers"))
			d := apply(t, s, e{name: "a", body: "x"})
			t.Cleanup(func() { Unmount(target) })
			check(t, s.Mount(t.Context(), []digest.Digest{d}, rw, target, nil, ""))
			if l := LayersAt(target); !slices.Equal(l, []digest.Digest{d}) {
				t.Errorf("the mount tells of layers %v, not of %s", l, d)
			}
			check(t, errors.Join(s.Close(), os.Remove(filepath.Join(s.layerDir(d), recordName))))
			if err := open(t, s.dir).Close(); err != nil { // and what it removes is gone
				t.Fatal(err)
			}
			read(t, target, "a")
		})
	}
}

func TestMountTwiceUnmountTwice(t *testing.T) {
	s := open(t, t.TempDir())
	d := apply(t, s, e{name: "a", body: "x"})
	dir := t.TempDir()
	target := filepath.Join(dir, "rootfs")
	check(t, os.Mkdir(target, 0o755))
	t.Cleanup(func() { Unmount(target) })
	check(t, s.Mount(t.Context(), []digest.Digest{d}, dir, target, nil, ""))
	if m, err := mounts.Mounted(target); !m || err != nil {
		t.Errorf("mounted: %v %v", m, err)
	}
	for _, rw := range []string{dir, t.TempDir()} {
		if err := s.Mount(t.Context(), []digest.Digest{d}, rw, target, nil, ""); !errors.Is(err, ErrBusy) {
			t.Errorf("another one on it: %v", err)
		}
	}
	check(t, os.WriteFile(filepath.Join(target, "written"), []byte("w"), 0o644))
	// Busy: an open file.
	f, err := os.Open(filepath.Join(target, "a"))
	check(t, err)
	defer f.Close()
	for range 2 {
		check(t, Unmount(target))
	}
	if m, err := mounts.Mounted(target); m || err != nil {
		t.Errorf("unmounted: %v %v", m, err)
	}
	f.Close()
	// What was written is there again, though the first mount was volatile.
	check(t, s.Mount(t.Context(), []digest.Digest{d}, dir, target, nil, ""))
	if read(t, target, "written") != "w" {
		t.Error("lost")
	}
}

func TestScratch(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s)
	check(t, os.WriteFile(filepath.Join(root, "f"), nil, 0o644))
	if st := lstat(t, root, "."); st.Mode&0o777 != 0o755 {
		t.Errorf("mode %o", st.Mode)
	}
	b := make([]byte, 1024) // the empty archive that some builders add
	d := digest.NewDigestFromEncoded(digest.SHA256, fmt.Sprintf("%x", sha256.Sum256(b)))
	check(t, s.Apply(t.Context(), d, bytes.NewReader(b)))
	mount(t, s, d)
}

var check = must.Succeed

// An overlay of another daemon may have a layer of the same digest. Whose directory it is
// counts, and one that nobody can tell is taken for this store's.
func TestIsOther(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "layers"))
	link := filepath.Join(dir, "link")
	check(t, os.Symlink(s.dir, link))
	for name, want := range map[string]bool{
		s.dir:                      false,
		link:                       false,
		dir:                        true,
		filepath.Join(dir, "gone"): false,
		fdPrefix + "7":             false,
		"":                         false,
	} {
		if got := s.isOther(name); got != want {
			t.Errorf("%q: %t, want %t", name, got, want)
		}
	}
}
