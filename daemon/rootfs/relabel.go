package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// labelAttr holds the SELinux label of a file.
const labelAttr = "security.selinux"

// maxLabelDepth bounds how deep a tree may be that is relabelled: each level takes a
// descriptor.
const maxLabelDepth = 1000

// systemDirs are directories whose content belongs to the host: with the label of a
// container its own programs could not read it any more.
var systemDirs = []string{
	"/", "/bin", "/boot", "/dev", "/etc", "/etc/passwd", "/etc/pki", "/etc/shadow", "/home", "/lib", "/lib64", "/media",
	"/mnt", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/lib",
	"/usr/lib64", "/usr/local", "/usr/sbin", "/var", "/var/lib", "/var/log", "/var/run", "/var/tmp",
}

// CheckRelabel refuses, as kind.Invalid, a path whose files nobody may relabel for a
// container. Links to it are followed, as the mount of it does.
func CheckRelabel(path string) error {
	fd, err := openToRelabel(path)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// Relabel gives the file or directory at a path, and all below it, an SELinux label. What
// is labelled so already stays untouched, and so does what is on a file system that has no
// labels. Somebody may be changing the tree meanwhile: each file is labelled through a
// descriptor that was opened in the directory before it, and no link below path is
// followed, so nothing outside is ever touched. An error may leave a part relabelled.
func Relabel(ctx context.Context, path, label string) error {
	fd, err := openToRelabel(path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := relabelling{ctx: ctx, label: []byte(label), system: systemFiles()}
	if err := r.tree(fd, 0); err != nil {
		return fmt.Errorf("cannot relabel %s: %w", path, err)
	}
	return nil
}

func openToRelabel(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, kind.Errorf(kind.Invalid, "cannot relabel %s: %w", path, err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = systemFiles().check(&st)
	}
	if err != nil {
		unix.Close(fd)
		return -1, kind.Errorf(kind.Invalid, "cannot relabel %s: %w", path, err)
	}
	return fd, nil
}

// files are paths by device and inode.
type files map[[2]uint64]string

func systemFiles() files {
	all := files{}
	for _, path := range systemDirs {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			all[[2]uint64{st.Dev, st.Ino}] = path
		}
	}
	return all
}

func (f files) check(st *unix.Stat_t) error {
	if path := f[[2]uint64{st.Dev, st.Ino}]; path != "" {
		return fmt.Errorf("this is %s, whose files the host itself needs", path)
	}
	return nil
}

type relabelling struct {
	ctx    context.Context
	label  []byte
	system files
}

// tree labels what an O_PATH descriptor stands for, and before that what is below it. A directory of the system may be
// mounted there.
func (r *relabelling) tree(fd, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if err := r.system.check(&st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := r.below(fd, depth); err != nil {
			return err
		}
	}
	return r.one(fd)
}

// below labels all in a directory.
func (r *relabelling) below(fd, depth int) error {
	if depth == maxLabelDepth {
		return fmt.Errorf("it is more than %d directories deep", maxLabelDepth)
	}
	list, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(list), "")
	defer f.Close()
	for {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		const some = 256
		names, err := f.Readdirnames(some)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := r.entry(fd, name, depth); err != nil {
				return err
			}
		}
	}
}

func (r *relabelling) entry(dir int, name string, depth int) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // it has gone
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return r.tree(fd, depth+1)
}

// one labels what a descriptor stands for, a link itself. The magic link of a descriptor
// leads to that, whatever has its name now.
func (r *relabelling) one(fd int) error {
	path := fmt.Sprint(fdPrefix, fd)
	was := make([]byte, 4096)
	n, err := unix.Getxattr(path, labelAttr, was)
	if err == nil && bytes.Equal(bytes.TrimRight(was[:n], "\x00"), r.label) {
		return nil
	}
	err = unix.Setxattr(path, labelAttr, r.label, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}
