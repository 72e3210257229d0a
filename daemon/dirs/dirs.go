// Package dirs makes the directories of the stores below the daemon's root.
package dirs

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// MakeAll makes directories below root as Make does, and says what it had to move.
func MakeAll(log *slog.Logger, root string, names ...string) error {
	for _, name := range names {
		moved, err := Make(root, name)
		if moved != "" {
			log.Error("a file was in the place of a directory", "path", filepath.Join(root, name), "moved", moved)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Make makes the directory root/name, 0700, with its parents. A file in the
// place of root, or of one below it, is renamed and never removed; moved is then
// what it is called. A symbolic link to a directory is followed; another one is
// such a file. But where root itself leads nowhere, the disk with it may be yet to
// come: that is an error.
func Make(root, name string) (moved string, err error) {
	path := filepath.Join(root, name)
	if err = os.MkdirAll(path, 0o700); err == nil {
		return "", nil
	}
	for at := path; len(at) >= len(root); at = filepath.Dir(at) {
		st, err := os.Stat(at)
		missing := errors.Is(err, fs.ErrNotExist)
		if missing || errors.Is(err, unix.ELOOP) {
			st, err = os.Lstat(at) // a link that leads nowhere
		}
		if err != nil || st.IsDir() {
			continue
		}
		if missing && at == root {
			to, _ := os.Readlink(at)
			return "", fmt.Errorf("%s is a link to %s, which does not exist: mount its disk, or remove the link", at,
				to)
		}
		moved = fmt.Sprintf("%s.damaged-%d", at, time.Now().UnixNano())
		if err := os.Rename(at, moved); err != nil {
			return "", err
		}
		return moved, os.MkdirAll(path, 0o700)
	}
	return "", err
}
