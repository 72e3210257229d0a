package mounts

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestParse(t *testing.T) {
	long := strings.Repeat("lowerdir+=/var/lib/layers/sha256/0123,", 10_000)
	table := `22 1 8:1 / / rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw
30 22 0:5 /a\040b\134\043//deleted /mnt/x\011\012y rw - tmpfs  rw,size=4k
no line of a mount
31 22 0:6 / /no/options rw - tmpfs
40 22 0:7 / /merged rw - overlay overlay rw,` + long + "volatile\n"
	want := []Mount{
		{ID: "22", Root: "/", Point: "/", Peers: "shared:1 master:2", Kind: "ext4", FSOptions: "rw"},
		{ID: "30", Root: `/a b\#//deleted`, Point: "/mnt/x\t\ny", Kind: "tmpfs", FSOptions: "rw,size=4k"},
		{ID: "40", Root: "/", Point: "/merged", Kind: "overlay", FSOptions: "rw," + long + "volatile"},
	}
	if got, err := parse(strings.NewReader(table)); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %.2000v, %v", got, err)
	}
}

func TestUnescape(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "plain": "plain", `\`: `\`, `a\04`: `a\04`, `\999x`: `\999x`, `\400`: `\400`, `x\040\134040`: `x \040`,
	} {
		if got := unescape(text); got != want {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

func TestPlaces(t *testing.T) {
	for _, c := range []struct {
		point, path  string
		below, holds bool
	}{
		{"/", "/a", false, true},
		{"/", "/", true, true},
		{"/a", "/a", true, true},
		{"/a/b", "/a", true, false},
		{"/a", "/a/b", false, true},
		{"/ab", "/a", false, false},
		{"/a", "/ab", false, false},
		{"/a", "/", true, false},
	} {
		m := Mount{Point: c.point}
		if m.Below(c.path) != c.below || m.Holds(c.path) != c.holds {
			t.Errorf("%s and %s: below %v, holds %v", c.point, c.path, m.Below(c.path), m.Holds(c.path))
		}
	}
}

func TestMounted(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must.Succeed(t, err)
	at, link := filepath.Join(dir, "a b"), filepath.Join(dir, "link")
	must.Succeed(t, errors.Join(os.Mkdir(at, 0o700), os.Symlink(at, link)))
	for _, mounted := range []bool{false, true} {
		if mounted {
			must.Succeed(t, unix.Mount("none", at, "tmpfs", 0, ""))
			defer unix.Unmount(at, unix.MNT_DETACH)
		}
		for _, path := range []string{at, link} {
			for name, f := range map[string]func(string) (bool, error){"statx": Mounted, "table": listed} {
				if got, err := f(path); got != mounted || err != nil {
					t.Errorf("%s: %s is mounted: %v, %v", name, path, got, err)
				}
			}
		}
	}
	if _, err := Mounted(filepath.Join(dir, "nothing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	all, err := Read(Self)
	i := slices.IndexFunc(all, func(m Mount) bool { return m.Point == at })
	if err != nil || i < 0 || all[i].Kind != "tmpfs" {
		t.Errorf("it is not in the table: %v, %v", all, err)
	}
}
