package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// An archive may hold a/b/c without entries for a and a/b. Extracted alone, such
// a layer has made-up directories a and a/b, and overlayfs would show those
// instead of what the layers below say about them: a /tmp of mode 0755. As the
// layers below differ between images, it cannot be put right in the layer. So
// the writable layer gets directories with the attributes that count.
//
// What it is cannot be put right: where the base has a symbolic link named a, as
// /lib is in many, the made-up directory hides it and all that it led to. An
// archive that means the directory behind the link has to name that one.

// attributes of a directory.
type attributes struct {
	mode     uint32
	uid, gid uint32
	mtime    unix.Timespec     // {}: none that anybody gave it
	xattrs   map[string]string // those that a layer may set
}

var madeUp = attributes{mode: 0o755}

// shows says whether a directory with these attributes differs from a made-up
// one. The time does not count, as what is made in a directory changes it.
func (a attributes) shows() bool {
	return a.mode != madeUp.mode || a.uid != 0 || a.gid != 0 || len(a.xattrs) > 0
}

func attributesOf(fd int) (attributes, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return attributes{}, err
	}
	a := attributes{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid, mtime: st.Mtim}
	path := fmt.Sprintf("/proc/self/fd/%d", fd) // the fd is good for no more than a path
	b := make([]byte, 1<<16)                    // what the kernel has at most
	n, err := unix.Listxattr(path, b)
	if errors.Is(err, unix.ENOTSUP) {
		return a, nil
	}
	if err != nil {
		return a, err
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(b[:n]), "\x00"), "\x00") {
		if !maySet(name) || name == capability { // which means nothing at a directory
			continue
		}
		n, err := unix.Getxattr(path, name, b)
		if err != nil {
			return a, err
		}
		if a.xattrs == nil {
			a.xattrs = map[string]string{}
		}
		a.xattrs[name] = string(b[:n])
	}
	return a, nil
}

// layered is one layer of a mount, the fd being its diff directory.
type layered struct {
	fd      int
	implied []name // sorted
}

func (l layered) implies(dir string) bool {
	_, found := slices.BinarySearch(l.implied, name(dir))
	return found
}

// lookUp finds the attributes of a directory in a stack of layers, the highest
// first: those of the highest layer with an entry for it. Overlayfs shows others
// if a layer above that one has the directory without an entry: covered.
func lookUp(layers []layered, name string) (a attributes, covered bool, err error) {
	for _, l := range layers {
		fd, err := beneath.DirAt(l.fd, name)
		switch {
		case errors.Is(err, unix.ENOENT):
			if hidden(l.fd, name) {
				return madeUp, covered, nil
			}
			continue
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return madeUp, covered, nil // something else, with nothing of it below
		case err != nil:
			return madeUp, covered, fmt.Errorf("cannot look up %q in a layer: %w", name, err)
		}
		implied := l.implies(name)
		if !implied {
			a, err = attributesOf(fd)
		}
		unix.Close(fd)
		if !implied {
			return a, covered, err
		}
		covered = true
		// It may be opaque itself: that hides what is in it.
		if name != "." && hidden(l.fd, path.Dir(name)) {
			break
		}
	}
	return madeUp, covered, nil
}

// hidden says whether a layer hides a name of the layers below: it, or a
// directory above it, is opaque. (A whiteout shows up as not a directory.)
func hidden(root int, name string) bool {
	for ; ; name = path.Dir(name) {
		if opaque(fmt.Sprintf("/proc/self/fd/%d/%s", root, name)) {
			return true
		}
		if name == "." {
			return false
		}
	}
}

func opaque(dir string) bool {
	b := make([]byte, 1)
	n, err := unix.Lgetxattr(dir, opaqueXattr, b)
	return err == nil && n == 1 && b[0] == 'y'
}

// prepareUpper gives the root of the writable layer, and the directories that
// layers made up, the attributes they have in the layers below.
func (s *Store) prepareUpper(upper string, diffIDs []digest.Digest, m *IDMap) error {
	var layers []layered // the highest first
	defer func() {
		for _, l := range layers {
			unix.Close(l.fd)
		}
	}()
	names := []name{"."}
	for _, d := range slices.Backward(diffIDs) {
		r := s.get(d)
		if r == nil {
			return fmt.Errorf("%w: %s", ErrNoLayer, d)
		}
		all := *r
		if r.long {
			if err := record.Read(filepath.Join(s.layerDir(d), recordName), &all); err != nil {
				return err
			}
		}
		fd, err := unix.Open(filepath.Join(s.layerDir(d), diffName), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot open layer %s: %w", d, err)
		}
		layers = append(layers, layered{fd, all.Implied})
		names = append(names, all.Implied...)
	}
	slices.Sort(names)
	made := map[string]bool{".": true}
	for _, n := range slices.Compact(names) {
		name := string(n)
		a, covered, err := lookUp(layers, name)
		if err == nil && covered && a.shows() {
			err = makeUpper(upper, name, made)
		}
		if err != nil {
			return err
		}
	}
	// What is made in a directory changes its time, and inherits from its ACL. The
	// attributes of all of them together may be gigabytes.
	for name := range made {
		a, _, err := lookUp(layers, name)
		if err != nil {
			return err
		}
		if err := setAttributes(filepath.Join(upper, name), a, m); err != nil {
			return err
		}
	}
	return nil
}

// makeUpper makes a directory in the writable layer, and those above it. made is
// what has yet to get its attributes.
func makeUpper(upper, name string, made map[string]bool) error {
	if made[name] {
		return nil
	}
	if err := makeUpper(upper, path.Dir(name), made); err != nil {
		return err
	}
	made[name] = true
	return os.Mkdir(filepath.Join(upper, name), 0o700)
}

// setAttributes is for directories of the writable layer before it is mounted:
// nobody else can reach them.
func setAttributes(dir string, a attributes, m *IDMap) error {
	uid, gid := m.host(a)
	if err := os.Lchown(dir, uid, gid); err != nil {
		return err
	}
	if err := unix.Chmod(dir, a.mode); err != nil {
		return err
	}
	for name, value := range a.xattrs {
		if strings.HasPrefix(name, aclPrefix) {
			value = m.hostACL(value)
		}
		if err := setXattr(dir, name, value); err != nil {
			return fmt.Errorf("directory %s: %w", dir, err)
		}
	}
	if a.mtime == (unix.Timespec{}) {
		return nil
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{a.mtime, a.mtime}, unix.AT_SYMLINK_NOFOLLOW)
}
