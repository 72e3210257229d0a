package rootfs

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// stack finds directories in layers, the highest first. For each name it looks into those
// layers alone that have the directory above, so names are asked for in sorted order: what
// was found of the directories above is kept for the last name only.
type stack struct {
	ctx    context.Context
	layers []layered
	way    []*place // from the root to the last name
}

// place is what the layers have of one directory.
type place struct {
	name  string
	above *place    // nil: it is the root
	in    []showing // the highest first; as many as were asked for
	next  int       // the next one of above.in to look into
	end   bool      // there are no more
}

// showing is a layer that shows something of a directory.
type showing struct {
	layer  int
	opaque bool // what the layers below have in the directory is hidden
}

func (s *stack) close() {
	for _, l := range s.layers {
		unix.Close(l.fd)
	}
}

// names are the directories that any of the layers implies, and the root, sorted.
func (s *stack) names() []name {
	names := []name{"."}
	for _, l := range s.layers {
		names = append(names, l.implied...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// place gives the place of a directory, and makes it the last one.
func (s *stack) place(name string) *place {
	for n := len(s.way) - 1; n >= 0; n-- {
		last := s.way[n].name
		if last == name {
			return s.way[n]
		}
		if below, ok := strings.CutPrefix(name, last); last == "." || ok && below[0] == '/' {
			break
		}
		s.way = s.way[:n]
	}
	p := &place{name: name}
	if name != "." {
		p.above = s.place(path.Dir(name))
	}
	s.way = append(s.way, p)
	return p
}

// nth gives the n-th layer, from the highest, that shows something of a directory; false:
// there are fewer.
func (s *stack) nth(p *place, n int) (showing, bool, error) {
	for len(p.in) <= n {
		if p.end {
			return showing{}, false, nil
		}
		if err := s.lookFurther(p); err != nil {
			return showing{}, false, err
		}
	}
	return p.in[n], true, nil
}

// lookFurther looks for a directory in one layer more.
func (s *stack) lookFurther(p *place) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	from, more := showing{layer: p.next}, p.next < len(s.layers)
	if p.above != nil {
		if p.next > 0 && p.above.in[p.next-1].opaque {
			p.end = true
			return nil
		}
		var err error
		if from, more, err = s.nth(p.above, p.next); err != nil {
			return err
		}
	}
	if p.end = !more; p.end {
		return nil
	}
	p.next++
	fd, err := beneath.DirAt(s.layers[from.layer].fd, p.name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		p.end = true // something else, such as a whiteout, with nothing of it below
		return nil
	case err != nil:
		return fmt.Errorf("cannot look up %.200q in a layer: %w", p.name, err)
	}
	p.in = append(p.in, showing{from.layer, opaque(fmt.Sprintf("/proc/self/fd/%d/.", fd))})
	unix.Close(fd)
	return nil
}

// lookUp finds the attributes of a directory: those of the highest layer with an entry for
// it. Overlayfs shows others if a layer above that one has the directory without an entry:
// covered. That layer may be opaque there, which hides what is in the directory, not itself.
func (s *stack) lookUp(name string) (a attributes, covered bool, err error) {
	p := s.place(name)
	for n := 0; ; n++ {
		l, more, err := s.nth(p, n)
		if err != nil || !more {
			return madeUp, covered, err
		}
		if s.layers[l.layer].implies(name) {
			covered = true
			continue
		}
		fd, err := beneath.DirAt(s.layers[l.layer].fd, name)
		if err == nil {
			a, err = attributesOf(fd)
			unix.Close(fd)
		}
		if err != nil {
			err = fmt.Errorf("cannot look up %.200q in a layer: %w", name, err)
		}
		return a, covered, err
	}
}

func opaque(dir string) bool {
	b := make([]byte, 1)
	n, err := unix.Lgetxattr(dir, opaqueXattr, b)
	return err == nil && n == 1 && b[0] == 'y'
}

// openStack opens layers, the lowest of which comes first. The caller closes the result.
func (s *Store) openStack(ctx context.Context, diffIDs []digest.Digest) (_ *stack, err error) {
	st := &stack{ctx: ctx}
	defer func() {
		if err != nil {
			st.close()
		}
	}()
	size := 0
	for _, d := range slices.Backward(diffIDs) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		r := s.get(d)
		if r == nil {
			return nil, fmt.Errorf("%w: %s", ErrNoLayer, d)
		}
		all := *r
		if r.long {
			if err := record.Read(filepath.Join(s.layerDir(d), recordName), &all); err != nil {
				return nil, err
			}
		}
		if size += sizeOf(all.Implied); size > maxImpliedOfAll {
			return nil, fmt.Errorf("%w: all layers of the image have too many directories without entries, or with "+
				"names too long", ErrBadLayer)
		}
		fd, err := unix.Open(filepath.Join(s.layerDir(d), diffName), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("cannot open layer %s: %w", d, err)
		}
		st.layers = append(st.layers, layered{fd, all.Implied})
	}
	return st, nil
}

// prepareUpper gives the root of the writable layer, and the directories that
// layers made up, the attributes they have in the layers below.
func (s *Store) prepareUpper(ctx context.Context, upper string, diffIDs []digest.Digest, m *IDMap) error {
	layers, err := s.openStack(ctx, diffIDs)
	if err != nil {
		return err
	}
	defer layers.close()
	made := map[string]bool{".": true}
	for _, n := range layers.names() {
		name := string(n)
		a, covered, err := layers.lookUp(name)
		if err == nil && covered && a.shows() {
			err = makeUpper(upper, name, made)
		}
		if err != nil {
			return err
		}
	}
	// What is made in a directory changes its time, and inherits from its ACL. The
	// attributes of all of them together may be gigabytes.
	for _, name := range slices.Sorted(maps.Keys(made)) {
		a, _, err := layers.lookUp(name)
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
