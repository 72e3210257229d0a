package dirs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// What is no directory makes way for one, a link to one does not.
func TestMake(t *testing.T) {
	other := t.TempDir()
	for name, put := range map[string]func(path string) error{
		"file":           func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"link to a file": func(path string) error { return os.Symlink("/proc/version", path) },
		"dangling link":  func(path string) error { return os.Symlink("nowhere", path) },
		"link to itself": func(path string) error { return os.Symlink(path, path) },
		"link":           func(path string) error { return os.Symlink(other, path) },
		"nothing":        func(path string) error { return nil },
	} {
		for _, at := range []string{"", "a", "a/b"} {
			t.Run(name+" at "+at, func(t *testing.T) {
				root := filepath.Join(t.TempDir(), "root")
				path := filepath.Join(root, at)
				must.Succeed(t, errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), put(path)))
				moved, err := Make(root, "a/b")
				if name == "dangling link" && at == "" { // its disk may be yet to come
					_, there := os.Lstat(root)
					if there != nil || err == nil || !strings.Contains(err.Error(), "nowhere") {
						t.Errorf("got %v, %v", err, there)
					}
					return
				}
				must.Succeed(t, err)
				if st, err := os.Stat(filepath.Join(root, "a/b")); err != nil || !st.IsDir() {
					t.Errorf("no directory: %v", err)
				}
				if keep := name == "link" || name == "nothing"; keep != (moved == "") {
					t.Errorf("moved to %q", moved)
				} else if !keep {
					if _, err := os.Lstat(moved); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}
