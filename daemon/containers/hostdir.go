package containers

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

// makeHostDir makes a directory of the host that a request names, with its
// parents: 0755, whatever the umask. It makes none where the runtime itself has its
// files, by whatever links the name leads there: a pod may mount the socket of the
// runtime, and be created at a moment when there is none.
func (m *Manager) makeHostDir(name string) error {
	top, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	err = beneath.MkdirAll(top, name, func(parent int, base, path string) error {
		var st unix.Stat_t
		err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
		if own := m.ownPath("/" + path); own != "" {
			return fmt.Errorf("it does not exist and is not made, as %s is the runtime's own", own)
		}
		return mkdir(parent, base)
	})
	if err != nil {
		return fmt.Errorf("cannot make the directory %.200q: %w", name, err)
	}
	return nil
}

// mkdir makes a directory for all, unless something has its name by now.
func mkdir(parent int, base string) error {
	err := unix.Mkdirat(parent, base, 0o755)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err == nil {
		err = openForAll(parent, base)
	}
	return err
}

// openForAll sets the mode of a directory, whatever the umask has made of it. A pod may be able
// to write to the parent, and have put a link in its place by now: whatever file of the host
// that leads to would get the mode.
func openForAll(parent int, base string) error {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, 0o755)
}

// ownPath gives the path of the runtime that a clean path is, or is below; empty:
// none.
func (m *Manager) ownPath(path string) string {
	for _, own := range m.OwnPaths {
		if rest, ok := strings.CutPrefix(path, own); ok && (rest == "" || rest[0] == '/') {
			return own
		}
	}
	return ""
}
