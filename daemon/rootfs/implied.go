package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
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
}

var madeUp = attributes{mode: 0o755}

// layered is one layer of a mount, the fd being its diff directory.
type layered struct {
	fd      int
	implied []string // sorted
}

func (l layered) implies(name string) bool {
	_, found := slices.BinarySearch(l.implied, name)
	return found
}

// truth finds the attributes of a directory in a stack of layers, the highest
// first: those of the highest layer with an entry for it.
func truth(layers []layered, name string) (attributes, error) {
	for _, l := range layers {
		var st unix.Stat_t
		fd, err := openBeneath(l.fd, name)
		if err == nil {
			err = unix.Fstat(fd, &st)
			unix.Close(fd)
		}
		if errors.Is(err, unix.ENOENT) {
			if hidden(l.fd, name) {
				break
			}
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			break // something else, with nothing of it below
		}
		if err != nil {
			return madeUp, fmt.Errorf("cannot look up %q in a layer: %w", name, err)
		}
		if !l.implies(name) {
			return attributes{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid}, nil
		}
		// It may be opaque itself: that hides what is in it.
		if name != "." && hidden(l.fd, path.Dir(name)) {
			break
		}
	}
	return madeUp, nil
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
	names := []string{"."}
	for _, d := range slices.Backward(diffIDs) {
		s.mu.Lock()
		r, ok := s.layers[d]
		s.mu.Unlock()
		if !ok {
			return fmt.Errorf("%w: %s", ErrNoLayer, d)
		}
		r, err := s.full(r)
		if err != nil {
			return err
		}
		fd, err := unix.Open(filepath.Join(s.layerDir(d), diffName), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot open layer %s: %w", d, err)
		}
		layers = append(layers, layered{fd, r.Implied})
		names = append(names, r.Implied...)
	}
	slices.Sort(names) // parents before children
	for _, name := range slices.Compact(names) {
		a, err := truth(layers, name)
		if err != nil {
			return err
		}
		if name == "." {
			err = setAttributes(upper, a, m)
		} else if a != madeUp && !shownRight(layers, name) {
			err = makeUpper(upper, layers, name, m)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// shownRight says whether the highest layer that has the directory has an entry
// for it, or another kind of file in its place.
func shownRight(layers []layered, name string) bool {
	for _, l := range layers {
		fd, err := openBeneath(l.fd, name)
		if err == nil {
			unix.Close(fd)
			return !l.implies(name)
		}
		if !errors.Is(err, unix.ENOENT) {
			return true
		}
	}
	return true
}

// makeUpper makes a directory in the writable layer, and those above it.
func makeUpper(upper string, layers []layered, name string, m *IDMap) error {
	dir := filepath.Join(upper, name)
	if parent := path.Dir(name); parent != "." {
		if _, err := os.Lstat(filepath.Join(upper, parent)); err != nil {
			if err := makeUpper(upper, layers, parent, m); err != nil {
				return err
			}
		}
	}
	a, err := truth(layers, name)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return setAttributes(dir, a, m)
}

// setAttributes is for directories of the writable layer before it is mounted:
// nobody else can reach them.
func setAttributes(dir string, a attributes, m *IDMap) error {
	uid, gid := m.host(a)
	if err := os.Lchown(dir, uid, gid); err != nil {
		return err
	}
	return unix.Chmod(dir, a.mode)
}
