package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Ways is a directory with ways to roots for those who are nobody on the host. The
// OCI runtime goes to the root of a container as root of its user namespace, and
// the directories of the daemon let nobody in. One way is
//
//	WAYS          0711         may be passed, and tells nothing
//	WAYS/ID       0710 GROUP   lets in who has the group of root in that namespace
//	WAYS/ID/root               the root, mounted a second time
//
// The mount is there only while the OCI runtime creates the container.
type Ways string

const wayName = "root"

// Make makes the directory, and says why nobody could come to a root in it.
func (w Ways) Make() error {
	if err := os.Mkdir(string(w), 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Lstat(string(w))
	if err == nil && !st.IsDir() {
		err = &fs.PathError{Op: "open", Path: string(w), Err: unix.ENOTDIR}
	}
	if err == nil {
		err = errors.Join(os.Chown(string(w), os.Geteuid(), os.Getegid()), os.Chmod(string(w), 0o711))
	}
	for dir := filepath.Dir(string(w)); err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if st, err = os.Stat(dir); err == nil && st.Mode()&0o001 == 0 {
			return fmt.Errorf("cannot reach root file systems from a user namespace: "+
				"the mode of %s is %#o (chmod o+x %s)", dir, st.Mode().Perm(), dir)
		}
	}
	return err
}

// Open mounts root on a way for a group, and gives the path. What an earlier Open
// of the same id has left is replaced.
func (w Ways) Open(id, root string, gid int) (string, error) {
	if err := w.Remove(id); err != nil {
		return "", err
	}
	dir := filepath.Join(string(w), id)
	at := filepath.Join(dir, wayName)
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = os.Mkdir(at, 0o700)
	}
	if err == nil {
		err = errors.Join(os.Chown(dir, os.Geteuid(), gid), os.Chmod(dir, 0o710))
	}
	if err == nil {
		err = mountAgain(root, at)
	}
	if err != nil {
		return "", fmt.Errorf("cannot open a way to %s: %w", root, err)
	}
	return at, nil
}

// Close ends the mount. The path stays.
func (w Ways) Close(id string) error { return unmountAll(filepath.Join(string(w), id, wayName)) }

// Remove is Close, and removes the path. There may be none.
func (w Ways) Remove(id string) error {
	dir := filepath.Join(string(w), id)
	if err := detach(filepath.Join(dir, wayName)); err != nil {
		return err
	}
	return detach(dir)
}

// mountAgain mounts a file or directory on another one, without what is mounted below it.
func mountAgain(path, at string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot copy the mount of %s: %w", path, err)
	}
	defer unix.Close(tree)
	return attach(tree, at)
}

// Tmpfs mounts a tmpfs with these options on a directory. No program of it runs,
// no device of it is one, and a setuid bit means nothing.
func Tmpfs(dir, options string) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", dir, "tmpfs", flags, options); err != nil {
		return fmt.Errorf("cannot mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// Disarm takes the meaning from setuid bits and device nodes of a mount, and of no
// copy that anybody has of it. A directory that is no mount is mounted on itself.
func Disarm(target string) error {
	err := disarm(target)
	if errors.Is(err, unix.EINVAL) {
		if err = mountAgain(target, target); err == nil {
			err = disarm(target)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot make %s nosuid and nodev: %w", target, err)
	}
	return nil
}

func disarm(mount string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		return err
	}
	keep := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOEXEC)
	return unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV|keep, "")
}
