package beneath

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// tree makes a root with files, links and a FIFO in it, and a secret beside it.
func tree(t *testing.T) (root string) {
	t.Helper()
	outer := t.TempDir()
	root = filepath.Join(outer, "root")
	must.Succeed(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	for path, text := range map[string]string{
		"secret":          "secret",
		"root/etc/passwd": "inside",
		"root/secret":     "inside too",
	} {
		must.Succeed(t, os.WriteFile(filepath.Join(outer, path), []byte(text), 0o644))
	}
	for link, to := range map[string]string{
		"abs":   "/etc/passwd",
		"up":    "../../secret",
		"self":  "self",
		"etcs":  "/etc",
		"magic": "/proc/self/exe",
	} {
		must.Succeed(t, os.Symlink(to, filepath.Join(root, link)))
	}
	must.Succeed(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	return root
}

func TestReadFile(t *testing.T) {
	root := tree(t)
	for path, want := range map[string]string{
		"/etc/passwd":   "inside",
		"abs":           "inside",
		"up":            "inside too",
		"/etcs/passwd":  "inside",
		"../../secret":  "inside too",
		"etc/../secret": "inside too",
	} {
		b, err := ReadFile(root, path, 100)
		if err != nil || string(b) != want {
			t.Errorf("%s: %q %v, want %q", path, b, err, want)
		}
	}
	for _, path := range []string{"none", "etc/passwd/x", "magic"} {
		if _, err := ReadFile(root, path, 100); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want not exist", path, err)
		}
	}
	for _, path := range []string{"fifo", "etc", "self", "."} {
		if _, err := ReadFile(root, path, 100); err == nil {
			t.Errorf("%s was read", path)
		}
	}
	if _, err := ReadFile(root, "/etc/passwd", 5); err == nil {
		t.Error("too large, and read")
	}
}

// Paths of the host: nothing blocks, and nothing larger than the bound is read.
func TestHost(t *testing.T) {
	dir := tree(t)
	large := filepath.Join(dir, "large")
	must.Succeed(t, os.WriteFile(large, nil, 0o600))
	must.Succeed(t, os.Truncate(large, 1<<40))
	for _, path := range []string{"/dev/zero", filepath.Join(dir, "fifo"), large, dir, "/proc/self/mountinfo"} {
		if b, err := HostFile(path, 10); err == nil {
			t.Errorf("%s: %d bytes were read", path, len(b))
		}
	}
	t.Chdir(dir)
	for _, path := range []string{filepath.Join(dir, "etc/passwd"), "etc/passwd"} {
		if b, err := HostFile(path, 10); err != nil || string(b) != "inside" {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
}

func TestKinds(t *testing.T) {
	root := tree(t)
	for _, c := range []struct {
		name  string
		kinds []Kind
	}{
		{"etc", []Kind{Directory, FileOrDirectory}},
		{"etcs", []Kind{Directory, FileOrDirectory}},
		{"abs", []Kind{File, FileOrDirectory}},
		{"fifo", nil},
		{"none", nil},
	} {
		for _, kind := range []Kind{File, Directory, FileOrDirectory} {
			f, err := Open(root, c.name, kind, 100)
			if (err == nil) != slices.Contains(c.kinds, kind) {
				t.Errorf("%s as %o: %v", c.name, kind, err)
			}
			if err == nil {
				f.Close()
			}
		}
	}
}

func TestMkdirAll(t *testing.T) {
	root := tree(t)
	dir, err := unix.Open(root, unix.O_PATH, 0)
	must.Succeed(t, err)
	defer unix.Close(dir)
	for link, to := range map[string]string{"dangling": "../../new/place", "loop1": "loop2/x", "loop2": "loop1/x"} {
		must.Succeed(t, os.Symlink(to, filepath.Join(root, link)))
	}
	for name, want := range map[string]string{
		"a/b/c":           "a/b/c",
		"/etcs/x":         "etc/x",
		"dangling/below":  "new/place/below",
		"a/../../../up2":  "up2",
		"etcs/../etc/./y": "etc/y",
	} {
		last := ""
		err := MkdirAll(dir, name, func(parent int, base, path string) error {
			last = path
			if err := unix.Mkdirat(parent, base, 0o755); !errors.Is(err, unix.EEXIST) {
				return err
			}
			return nil
		})
		st, serr := os.Lstat(filepath.Join(root, want))
		if err != nil || last != want || serr != nil || !st.IsDir() {
			t.Errorf("%s: made %q (%v, %v), want %q", name, last, err, serr, want)
		}
	}
	if err := MkdirAll(dir, "loop1", nil); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop of links: %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(root)); len(entries) != 2 {
		t.Errorf("something was made outside: %v", entries)
	}
}
