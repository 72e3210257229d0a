package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// IDMap says how the owners of files look in a user namespace, and from outside
// of it. The ids from 0 on are those after HostUID and HostGID for the host.
type IDMap struct {
	Userns        string // file of the user namespace
	HostUID, UIDs uint32 // UIDs and GIDs: how many are mapped
	HostGID, GIDs uint32
}

// host gives who the host sees as the owner of what is a.uid's and a.gid's in a
// layer. An id that is not mapped is the host's root, who is nobody inside.
func (m *IDMap) host(a attributes) (uid, gid int) {
	if m == nil {
		return int(a.uid), int(a.gid)
	}
	if a.uid < m.UIDs {
		uid = int(m.HostUID + a.uid)
	}
	if a.gid < m.GIDs {
		gid = int(m.HostGID + a.gid)
	}
	return uid, gid
}

// Extended attributes with ACLs: acl(5), and posix_acl_xattr.h of the kernel.
const (
	aclPrefix = "system.posix_acl_"
	aclUser   = 0x02 // the tag of an entry for a user by id
	aclGroup  = 0x08
)

// hostACL gives an ACL the ids of the host: a version of 4 bytes, and entries of a
// tag, permissions and an id.
func (m *IDMap) hostACL(acl string) string {
	if m == nil {
		return acl
	}
	b := []byte(acl)
	for i := 4; i+8 <= len(b); i += 8 {
		id := binary.LittleEndian.Uint32(b[i+4:])
		uid, gid := m.host(attributes{uid: id, gid: id})
		switch binary.LittleEndian.Uint16(b[i:]) {
		case aclUser:
			binary.LittleEndian.PutUint32(b[i+4:], uint32(uid))
		case aclGroup:
			binary.LittleEndian.PutUint32(b[i+4:], uint32(gid))
		}
	}
	return string(b)
}

// Overlayfs makes private copies of the mounts its lower directories are on. So
// one idmapped mount of the directory of all layers does for any number of them,
// and is needed only while the overlay is made. It has to have a place for that
// time, though: overlayfs takes no detached mount before Linux 6.15. That is
// beside the target, where Unmount finds it if this process is killed meanwhile.
const mappedSuffix = ".layers"

// attachMapped mounts dir on at, which it makes, read-only and with the owners
// mapped for a user namespace.
func attachMapped(dir, at, userns string) error {
	ns, err := os.Open(userns)
	if err != nil {
		return fmt.Errorf("cannot open the user namespace: %w", err)
	}
	defer ns.Close()
	tree, err := cloneMapped(dir, ns)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := attach(tree, at); err != nil {
		return errors.Join(err, detach(at))
	}
	return nil
}

// detach removes what attachMapped has made, or has begun to.
func detach(at string) error {
	if err := unmountAll(at); err != nil {
		return err
	}
	// Not more than an empty directory: if this is no mount any more, it is one.
	if err := unix.Rmdir(at); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("cannot remove %s: %w", at, err)
	}
	return nil
}

// cloneMapped gives a detached mount of dir.
func cloneMapped(dir string, userns *os.File) (fd int, err error) {
	fd, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("cannot copy the mount of %s: %w", dir, err)
	}
	if err := mapOwners(fd, userns); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("cannot map the owners of files in %s: %w", dir, err)
	}
	return fd, nil
}

func mapOwners(mount int, userns *os.File) error {
	return unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY,
		Propagation: unix.MS_PRIVATE,
		Userns_fd:   uint64(userns.Fd()),
	})
}

// CheckMapped says why layers cannot be mounted for a user namespace; nil if
// they can. Nothing is mounted anywhere for that.
func (s *Store) CheckMapped(userns *os.File) error {
	fd, err := cloneMapped(s.dir, userns)
	if err != nil {
		return fmt.Errorf("%w: the file system has to know idmapped mounts, as ext4, xfs and btrfs do", err)
	}
	unix.Close(fd)
	return tmpfsIsMapped(userns)
}

// tmpfsIsMapped stands for the version of the kernel: tmpfs was the last that
// pods need, in Linux 6.3. Secrets and service account tokens lie there, and
// overlayfs knows mapped layers since 5.19.
func tmpfsIsMapped(userns *os.File) error {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot open a tmpfs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("cannot make a tmpfs: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot mount a tmpfs: %w", err)
	}
	defer unix.Close(fd)
	if err := mapOwners(fd, userns); err != nil {
		return fmt.Errorf("cannot map the owners of files in a tmpfs: %w: Linux 6.3 or later is needed", err)
	}
	return nil
}
