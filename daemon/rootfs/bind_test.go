package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// places makes a directory for mounts, with the umask of a careful administrator.
func places(t *testing.T) string {
	t.Helper()
	umask := unix.Umask(0o077)
	t.Cleanup(func() { unix.Umask(umask) })
	at := filepath.Join(t.TempDir(), "volumes")
	check(t, os.Mkdir(at, 0o711))
	t.Cleanup(func() {
		if err := UnmountBelow(at); err != nil {
			t.Error(err)
		}
	})
	return at
}

func all(string) (wanted, mounted bool) { return true, true }

func volumesOf(t *testing.T, root, at string, names ...string) map[string]string {
	t.Helper()
	m, err := Volumes(t.Context(), root, names, 0, 0, at, all)
	check(t, err)
	return m
}

func TestVolumes(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s, apply(t, s,
		e{name: "data", typ: tar.TypeDir, mode: 0o1777, uid: 7},
		e{name: "data/seed", body: "seed"},
		e{name: "run", typ: tar.TypeDir},
		e{name: "var/run", typ: tar.TypeSymlink, link: "/run"},
		e{name: "up", typ: tar.TypeSymlink, link: "../../../.."},
		e{name: "absent", typ: tar.TypeSymlink, link: "made/by/link"},
		e{name: "conf", body: "conf"},
	))
	at := places(t)
	volumes := volumesOf(t, root, at, "data", "/data/", "/var/run/new", "up/new/../new2", "/absent", "conf")
	want := []string{"/conf", "/data", "/made/by/link", "/new2", "/run/new"}
	if got := slices.Sorted(maps.Keys(volumes)); !slices.Equal(got, want) {
		t.Fatalf("volumes %v, want %v", got, want)
	}
	for inside, source := range volumes {
		if filepath.Dir(source) != at {
			t.Errorf("%s is at %s", inside, source)
		}
		if st := lstat(t, source); inside == "/data" && (st.Mode&0o7777 != 0o1777 || st.Uid != 7) ||
			inside == "/run/new" && (st.Mode&0o7777 != 0o755 || st.Uid != 0) {
			t.Errorf("%s has the mode %o and belongs to %d", inside, st.Mode, st.Uid)
		}
	}
	if read(t, volumes["/data"], "seed") != "seed" || read(t, volumes["/conf"]) != "conf" {
		t.Error("a volume has not what the image has there")
	}
	// It is the directory of the root itself, also when nobody finds it there any more.
	check(t, os.Rename(filepath.Join(root, "new2"), filepath.Join(root, "elsewhere")))
	check(t, os.Symlink("/etc", filepath.Join(root, "new2")))
	check(t, os.WriteFile(filepath.Join(volumes["/new2"], "written"), []byte("x"), 0o600))
	read(t, root, "elsewhere/written")
}

// On a writable root a volume is a directory like any other.
func TestVolumesWithoutMounts(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s)
	places(t)
	use := func(dst string) (wanted, mounted bool) { return dst != "/covered", false }
	at := filepath.Join(t.TempDir(), "volumes")
	volumes, err := Volumes(t.Context(), root, []string{"/a/b", "/covered"}, 5, 6, at, use)
	if err != nil || len(volumes) != 0 {
		t.Fatalf("%v, %v", volumes, err)
	}
	gone(t, at)
	for _, dir := range []string{"a", "a/b"} {
		if st := lstat(t, root, dir); st.Uid != 5 || st.Gid != 6 || st.Mode&0o7777 != 0o755 {
			t.Errorf("%s belongs to %d:%d, mode %o", dir, st.Uid, st.Gid, st.Mode)
		}
	}
	gone(t, root, "covered")
}

// It counts where the image's links lead, too.
func TestVolumesByLink(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s, apply(t, s,
		e{name: "proc", typ: tar.TypeDir},
		e{name: "link", typ: tar.TypeSymlink, link: "/proc"},
		e{name: "all", typ: tar.TypeSymlink, link: "/"},
	))
	use := func(dst string) (wanted, mounted bool) {
		ok := dst != "/proc" && dst != "/"
		return ok, ok
	}
	volumes, err := Volumes(t.Context(), root, []string{"/link", "/all", "/proc"}, 0, 0, places(t), use)
	if err != nil || len(volumes) != 0 {
		t.Errorf("%v, %v", volumes, err)
	}
}

func TestImpossibleVolumes(t *testing.T) {
	s := open(t, t.TempDir())
	entries := []e{
		{name: "fifo", typ: tar.TypeFifo},
		{name: "disk", typ: tar.TypeBlock, dev: [2]int64{7, 0}},
		{name: "file", body: "x"},
		{name: "loop", typ: tar.TypeSymlink, link: "loop"},
	}
	var deep []string // none of these, by its name or a link, has too many directories of its own
	for i := range maxVolumeDirs/1000 + 1 {
		name := fmt.Sprint(i, strings.Repeat("/d", 999))
		if i%2 == 0 {
			entries = append(entries, e{name: fmt.Sprint("link", i), typ: tar.TypeSymlink, link: name})
			name = fmt.Sprint("link", i)
		}
		deep = append(deep, name)
	}
	root := mount(t, s, apply(t, s, entries...))
	at := places(t)
	var many []string
	for i := range maxVolumes + 1 {
		many = append(many, fmt.Sprint(i))
	}
	for _, names := range [][]string{{"fifo"}, {"disk"}, {"file/below"}, {"loop"}, {"loop/below"}, many, deep} {
		if v, err := Volumes(t.Context(), root, names, 0, 0, at, all); !errors.Is(err, kind.Invalid) {
			t.Errorf("%v: %v, %v", names[0], v, err)
		}
	}
}

// Nobody makes directories for a creation that is over.
func TestVolumesAreCalledOff(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s)
	ctx := &endsAfter{t.Context(), 2}
	if _, err := Volumes(ctx, root, []string{"a/b/c"}, 0, 0, places(t), all); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	lstat(t, root, "a")
	gone(t, root, "a/b")
}

func TestVolumesOfMappedRoot(t *testing.T) {
	s := open(t, t.TempDir())
	m := newUserns(t)
	_, root := mountMapped(t, s, m, apply(t, s, e{name: "data", typ: tar.TypeDir, uid: 3}))
	at := filepath.Join(filepath.Dir(root), "volumes")
	check(t, os.Mkdir(at, 0o711))
	t.Cleanup(func() { UnmountBelow(at) })
	volumes, err := Volumes(t.Context(), root, []string{"data", "new/one"}, hostUID, hostUID, at, all)
	check(t, err)
	for inside, owner := range map[string]string{"/data": "3", "/new/one": "0"} {
		got, err := as(t, m, 0, volumes[inside], "stat -c %u . && touch x && stat -c %u x")
		if got != owner+"\n0" || err != nil {
			t.Errorf("%s: %q, %v", inside, got, err)
		}
	}
}

func TestBind(t *testing.T) {
	s := open(t, t.TempDir())
	root := mount(t, s, apply(t, s, e{name: "dir/f", body: "x"}, e{name: "link", typ: tar.TypeSymlink, link: "/dir"}))
	at := places(t)
	for name, file := range map[string]string{"dir": "f", "link": "f", "dir/f": "."} {
		place := filepath.Join(at, filepath.Base(name)+"-"+file)
		check(t, Bind(root, name, place))
		if read(t, filepath.Clean(filepath.Join(place, file))) != "x" {
			t.Errorf("%s is not what was mounted", name)
		}
		if err := Unmount(place); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"none", "dir/f/x", "../../etc/passwd"} {
		if err := Bind(root, name, filepath.Join(at, "x")); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
