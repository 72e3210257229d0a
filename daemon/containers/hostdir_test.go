package containers

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// Whoever can write to the directory above may put something else in the place of a directory
// that was just made. What a link leads to keeps its mode, and so does a file.
func TestModeFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	parent, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must.Succeed(t, err)
	defer unix.Close(parent)
	file, link, made := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "made")
	must.Succeed(t, errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(file, link), os.Mkdir(made, 0o700)))
	for name, ok := range map[string]bool{"file": false, "link": false, "made": true} {
		if err := openForAll(parent, name); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	for path, want := range map[string]fs.FileMode{file: 0o600, made: 0o755} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: want mode %o, got %v, %v", path, want, st.Mode(), err)
		}
	}
}

// What a pod mounts and is not there is made, but never where the runtime has its
// own files, whichever way leads there.
func TestMakeHostDir(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must.Succeed(t, err)
	state, address := filepath.Join(dir, "run", "state"), filepath.Join(dir, "run", "cri.sock")
	m := &Manager{Options: Options{OwnPaths: []string{state, address}}}
	must.Succeed(t, os.MkdirAll(state, 0o700))
	for name, to := range map[string]string{
		"to-run": "run", "to-socket": address, "to-state": state, "dangling": "made/by/link",
	} {
		must.Succeed(t, os.Symlink(to, filepath.Join(dir, name)))
	}
	for path, made := range map[string]string{
		"a/b/c":                  "a/b/c",
		"a/../d/./e/":            "d/e",
		"run/state2":             "run/state2",
		"run/cri.sock2/x":        "run/cri.sock2/x",
		"to-run/other":           "run/other",
		"dangling/x":             "made/by/link/x",
		"run/cri.sock":           "",
		"run/cri.sock/x":         "",
		"run/state/x":            "",
		"to-run/cri.sock":        "",
		"to-run/../run/cri.sock": "",
		"to-socket":              "",
		"to-socket/x":            "",
		"to-state/x/y":           "",
	} {
		err := m.makeHostDir(dir + "/" + path)
		if made == "" {
			if err == nil || !strings.Contains(err.Error(), "is the runtime's own") {
				t.Errorf("%s: %v", path, err)
			}
			continue
		}
		st, serr := os.Lstat(filepath.Join(dir, made))
		if err != nil || serr != nil || st.Mode() != fs.ModeDir|0o755 {
			t.Errorf("%s: %v, %v", path, err, st)
		}
	}
	if err := m.makeHostDir(state); err != nil {
		t.Errorf("one that is there: %v", err)
	}
	if _, err := os.Lstat(address); !os.IsNotExist(err) {
		t.Errorf("something is in the place of the socket: %v", err)
	}
	if entries, err := os.ReadDir(state); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
}
