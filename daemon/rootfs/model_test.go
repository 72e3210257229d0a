package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What an archive means, on paper: a tree of nodes, changed entry by entry, as
// tar(1) and OCI image-spec, layer.md, have it. It shares no code with the
// extractor, and the two have to agree about every tree and every refusal.

// node is an inode; hard links are one node with several names.
type node struct {
	kind     byte // tar's: TypeReg, TypeSymlink, TypeChar, TypeBlock, TypeDir, TypeFifo
	mode     uint32
	uid, gid uint32
	dev      uint64
	body     string
	link     string
	mtime    int64 // anyTime: not compared
	xattrs   map[string]string

	// Of directories.
	kids    map[string]*node
	opaque  bool
	implied bool // no entry for it

	// Of a union.
	lower   bool // of a layer below the one that is being applied
	touched bool // a directory of a layer below with something of this one
}

const anyTime = -1 << 62

func dirNode() *node {
	return &node{
		kind:    tar.TypeDir,
		mode:    0o755,
		mtime:   anyTime,
		xattrs:  map[string]string{},
		kids:    map[string]*node{},
		implied: true,
	}
}

func (n *node) isDir() bool { return n.kind == tar.TypeDir }

// isWhiteout as overlayfs has it, which cannot show such a device.
func (n *node) isWhiteout() bool { return n.kind == tar.TypeChar && n.dev == 0 }

var (
	errRefused = errors.New("refused")
	errMissing = errors.New("not there")
	// errOther: on top of other layers the archive means something else than
	// alone. What it means alone counts; see docs/images.md, "Limits".
	errOther = errors.New("depends on the layers below")
)

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errRefused, fmt.Sprintf(format, args...))
}

// model is one layer, or with union set the layers so far and the next one.
type model struct {
	root   *node
	limits Limits
	size   int64
	union  bool
	// linked: a directory was named by a link. Its time is not compared: the
	// same name may mean another one at the end.
	linked bool
}

func newModel(limits Limits) *model { return &model{root: dirNode(), limits: limits} }

// apply changes the tree by a whole archive.
func (m *model) apply(entries []entry) error {
	for i, h := range entries {
		if int64(i) >= m.limits.Entries {
			return refuse("too many entries")
		}
		if err := m.entry(h); err != nil {
			return fmt.Errorf("entry %d, %q: %w", i, h.name, err)
		}
	}
	return nil
}

// lexical gives the components of a cleaned name; none is the root.
func lexical(name string) ([]string, error) {
	var l []string
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
		case c == ".." && len(l) == 0:
			return nil, refuse("it leaves the root")
		case c == "..":
			l = l[:len(l)-1]
		default:
			l = append(l, c)
		}
	}
	return l, nil
}

// walk follows directories and links inside the root, as if that were "/".
// With mk, what is missing is made.
func (m *model) walk(components []string, mk bool) (*node, error) {
	if len(strings.Join(components, "/")) >= unix.PathMax {
		return nil, refuse("too long")
	}
	todo, stack, links := slices.Clone(components), []*node{m.root}, 0
	var names []string // of all but the root
	for len(todo) > 0 {
		at, c := stack[len(stack)-1], todo[0]
		todo = todo[1:]
		if c == "" || c == "." {
			continue
		}
		if c == ".." {
			stack, names = stack[:max(1, len(stack)-1)], names[:max(0, len(names)-1)]
			continue
		}
		if len(c) > 255 {
			return nil, refuse("a name of %d bytes", len(c))
		}
		kid := at.kids[c]
		if kid != nil && kid.lower && !kid.isDir() {
			return nil, errOther
		}
		switch {
		case kid == nil || mk && kid.isWhiteout():
			if !mk {
				return nil, errMissing
			}
			fresh := dirNode()
			fresh.opaque, fresh.implied = kid != nil, kid == nil
			at.kids[c] = fresh
			kid = fresh
		case kid.kind == tar.TypeSymlink:
			m.linked = true
			if links++; links > 40 {
				return nil, refuse("a loop of links")
			}
			if strings.HasPrefix(kid.link, "/") {
				stack, names = stack[:1], nil
			}
			todo = append(strings.Split(kid.link, "/"), todo...)
			continue
		case !kid.isDir() && mk:
			return nil, refuse("%q is no directory", c)
		case !kid.isDir():
			return nil, errMissing
		}
		if kid.lower {
			kid.touch()
		}
		stack, names = append(stack, kid), append(names, c)
		if len(strings.Join(names, "/")) >= unix.PathMax {
			return nil, refuse("too long")
		}
	}
	if mk && links > 0 && len(strings.Join(names, "/"))+1 > maxLinked {
		return nil, refuse("too deep")
	}
	return stack[len(stack)-1], nil
}

// touch notes that a directory of the layers below has something of this one.
// Without an entry it looks as below, unless that gets hidden.
func (n *node) touch() {
	if !n.touched {
		n.touched, n.implied = true, true
	}
}

func (m *model) entry(h entry) error {
	if h.kind == tar.TypeXGlobalHeader {
		return nil
	}
	l, err := lexical(h.name)
	if err != nil {
		return err
	}
	const maxID = 1<<32 - 2
	if h.uid < 0 || h.gid < 0 || h.uid > maxID || h.gid > maxID {
		return refuse("owner %d:%d", h.uid, h.gid)
	}
	if len(l) == 0 {
		if h.kind != tar.TypeDir {
			return refuse("the root is no directory")
		}
		return m.dir(m.root, h)
	}
	dir, base := l[:len(l)-1], l[len(l)-1]
	for i, c := range l {
		if strings.HasPrefix(c, ".wh..wh.") && (i < len(l)-1 || c != ".wh..wh..opq") {
			return nil // of aufs
		}
	}
	parent, err := m.walk(dir, true)
	if err != nil {
		return err
	}
	if base == ".wh..wh..opq" {
		m.hide(parent)
		return nil
	}
	if name, ok := strings.CutPrefix(base, ".wh."); ok {
		return m.whiteout(parent, name)
	}
	if len(base) > 255 {
		return refuse("a name of %d bytes", len(base))
	}
	return m.put(parent, base, h)
}

// put makes the name of an entry mean what the entry says, whatever it meant.
func (m *model) put(parent *node, base string, h entry) error {
	old := parent.kids[base]
	n := &node{kind: h.kind, mode: uint32(h.mode & 0o7777), uid: uint32(h.uid), gid: uint32(h.gid), mtime: h.mtime}
	switch h.kind {
	case tar.TypeDir:
		if old == nil || !old.isDir() {
			fresh := dirNode()
			fresh.opaque = old != nil
			parent.kids[base], old = fresh, fresh
		}
		return m.dir(old, h)
	case tar.TypeReg, tar.TypeCont:
		n.kind, n.body = tar.TypeReg, h.content()
		if m.size += int64(len(n.body)); m.size > m.limits.Bytes {
			return refuse("too large")
		}
	case tar.TypeLink:
		to, err := m.linkTarget(h.link)
		if err != nil {
			return err
		}
		parent.kids[base] = to
		if n.uid != to.uid || n.gid != to.gid {
			delete(to.xattrs, "security.capability") // the kernel does it
		}
		if to.kind != tar.TypeSymlink {
			to.mode = n.mode
		}
		to.uid, to.gid, to.mtime = n.uid, n.gid, n.mtime
		return to.setXattrs(h)
	case tar.TypeSymlink:
		if h.link == "" || len(h.link) >= unix.PathMax {
			return refuse("a link of %d bytes", len(h.link))
		}
		n.link, n.mode = h.link, 0o777
	case tar.TypeChar, tar.TypeBlock:
		if h.major >= 1<<12 || h.minor >= 1<<20 {
			return refuse("device %d:%d", h.major, h.minor)
		}
		n.dev = unix.Mkdev(uint32(h.major), uint32(h.minor))
	case tar.TypeFifo:
	default:
		return refuse("type %q", h.kind)
	}
	if m.union && n.isWhiteout() {
		delete(parent.kids, base)
		return nil
	}
	parent.kids[base] = n
	return n.setXattrs(h)
}

func (m *model) linkTarget(link string) (*node, error) {
	l, err := lexical(link)
	if err != nil {
		return nil, err
	}
	if len(l) == 0 {
		return nil, refuse("a hard link to the root")
	}
	dir, err := m.walk(l[:len(l)-1], false)
	if errors.Is(err, errMissing) {
		err = refuse("a hard link to nothing")
	}
	if err != nil {
		return nil, err
	}
	to := dir.kids[l[len(l)-1]]
	if to == nil || to.lower || to.isDir() || to.isWhiteout() {
		return nil, refuse("a hard link to no file of this layer")
	}
	return to, nil
}

func (m *model) dir(n *node, h entry) error {
	n.mode, n.uid, n.gid, n.mtime = uint32(h.mode&0o7777), uint32(h.uid), uint32(h.gid), h.mtime
	n.implied, n.touched = false, n.lower
	return n.setXattrs(h)
}

func (n *node) setXattrs(h entry) error {
	for k, v := range h.xattrs {
		mayHave := n.kind == tar.TypeReg || n.kind == tar.TypeDir // attributes of users; xattr(7)
		switch {
		case k == "security.capability" && len(v) != 20, k == "user." && mayHave:
			return refuse("attribute %s", k)
		case strings.HasPrefix(k, "user.overlay."), strings.HasPrefix(k, "trusted."), k == "security.selinux":
			continue
		case strings.HasPrefix(k, "user.") && !mayHave:
			continue
		}
		if n.xattrs == nil {
			n.xattrs = map[string]string{}
		}
		n.xattrs[k] = v
	}
	return nil
}

// hide takes what the layers below have out of a directory.
func (m *model) hide(n *node) {
	n.opaque = true
	for name, kid := range n.kids {
		switch {
		case !kid.lower:
		case kid.isDir() && kid.touched:
			if kid.implied {
				*kid = node{
					kind:    tar.TypeDir,
					mode:    0o755,
					mtime:   anyTime,
					kids:    kid.kids,
					implied: true,
					lower:   true,
					touched: true,
				}
			}
			m.hide(kid)
		default:
			delete(n.kids, name)
		}
	}
}

func (m *model) whiteout(parent *node, name string) error {
	if name == "" || name == "." || name == ".." {
		return refuse("a whiteout of nothing")
	}
	old := parent.kids[name]
	switch {
	case m.union && old != nil && old.lower && !old.touched:
		delete(parent.kids, name)
	case m.union && old == nil:
	case old == nil:
		parent.kids[name] = &node{kind: tar.TypeChar, mode: 0o600, mtime: anyTime}
	case old.isDir():
		m.hide(old)
		if old.lower && old.implied {
			old.mode, old.uid, old.gid = 0o755, 0, 0
		}
		old.implied = false // it is made up, whatever is below
	}
	return nil
}

// settle makes all nodes those of layers below the next one.
func (m *model) settle() {
	var visit func(n *node)
	visit = func(n *node) {
		n.lower, n.touched = true, false
		if n.isDir() {
			n.mtime = anyTime // it is that of the layer, or of what was made up
		}
		for _, kid := range n.kids {
			visit(kid)
		}
	}
	visit(m.root)
	m.root.touched = true
	m.size = 0
}

// implied are the paths of directories without an entry.
func (m *model) implied() []string {
	var l []string
	var visit func(name string, n *node)
	visit = func(name string, n *node) {
		if n.isDir() && n.implied {
			l = append(l, name)
		}
		for c, kid := range n.kids {
			visit(path.Join(name, c), kid)
		}
	}
	visit(".", m.root)
	slices.Sort(l)
	return l
}

// usage counts as the record of a layer does.
func (m *model) inodes() uint64 {
	seen := map[*node]bool{}
	var visit func(n *node)
	visit = func(n *node) {
		seen[n] = true
		for _, kid := range n.kids {
			visit(kid)
		}
	}
	visit(m.root)
	return uint64(len(seen))
}

// compare says how a tree on the disk differs from the model.
func (m *model) compare(dir string) error {
	c := comparison{model: m, nodes: map[uint64]*node{}, inodes: map[*node]uint64{}}
	c.compare(".", dir, m.root)
	return errors.Join(c.errs...)
}

type comparison struct {
	model  *model
	nodes  map[uint64]*node
	inodes map[*node]uint64
	errs   []error
}

func (c *comparison) differ(name, format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf("%q: %s", name, fmt.Sprintf(format, args...)))
}

func (c *comparison) compare(name, file string, n *node) {
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		c.differ(name, "%v", err)
		return
	}
	format := map[byte]uint32{
		tar.TypeReg: unix.S_IFREG, tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK,
		tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO,
	}
	if got, want := st.Mode, format[n.kind]|n.mode; got != want {
		c.differ(name, "mode %o, want %o", got, want)
	}
	if (st.Uid != n.uid || st.Gid != n.gid) && !n.isWhiteout() {
		c.differ(name, "owner %d:%d, want %d:%d", st.Uid, st.Gid, n.uid, n.gid)
	}
	if st.Mode&unix.S_IFMT != format[n.kind] {
		return
	}
	// A union may have the directory in its writable layer (see implied.go).
	any := n.mtime == anyTime || n.isDir() && (c.model.linked || c.model.union)
	if !any && st.Mtim.Sec != n.mtime {
		c.differ(name, "time %d, want %d", st.Mtim.Sec, n.mtime)
	}
	switch n.kind {
	case tar.TypeReg:
		if b, err := os.ReadFile(file); err != nil || string(b) != n.body {
			c.differ(name, "%d bytes (%v), want %d", len(b), err, len(n.body))
		}
	case tar.TypeSymlink:
		if link, _ := os.Readlink(file); link != n.link {
			c.differ(name, "a link to %q, want %q", link, n.link)
		}
	case tar.TypeChar, tar.TypeBlock:
		if st.Rdev != n.dev {
			c.differ(name, "device %x, want %x", st.Rdev, n.dev)
		}
	}
	if !c.model.union {
		c.inode(name, file, &st, n)
	}
	if n.isDir() {
		c.kids(name, file, n)
	}
}

// inode compares what an overlay does not show as it is.
func (c *comparison) inode(name, file string, st *unix.Stat_t, n *node) {
	ino, seen := c.inodes[n]
	if other := c.nodes[st.Ino]; seen && ino != st.Ino || other != nil && other != n {
		c.differ(name, "hard links differ")
	}
	c.inodes[n], c.nodes[st.Ino] = st.Ino, n
	want := maps.Clone(n.xattrs)
	if n.opaque {
		want[opaqueXattr] = "y"
	}
	if got := xattrs(file); !maps.Equal(got, want) {
		c.differ(name, "attributes %q, want %q", got, want)
	}
}

func (c *comparison) kids(name, file string, n *node) {
	l, err := os.ReadDir(file)
	if err != nil {
		c.differ(name, "%v", err)
	}
	for _, e := range l {
		if c.model.union && phantom(filepath.Join(file, e.Name())) {
			continue
		}
		if n.kids[e.Name()] == nil {
			c.differ(path.Join(name, e.Name()), "it should not be there")
		}
	}
	for base, kid := range n.kids {
		if c.model.union && kid.isWhiteout() {
			continue
		}
		c.compare(path.Join(name, base), filepath.Join(file, base), kid)
	}
}

// phantom says whether a directory lists something that is not there: overlayfs
// shows whiteouts in a directory that only one layer has.
func phantom(file string) bool {
	_, err := os.Lstat(file)
	return errors.Is(err, os.ErrNotExist)
}

func xattrs(file string) map[string]string {
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(file, b)
	if err != nil || n == 0 {
		return nil
	}
	m := map[string]string{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(b[:n], []byte{0}), []byte{0}) {
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(file, string(name), v)
		if err != nil {
			n = 0
		}
		m[string(name)] = string(v[:n])
	}
	return m
}

// The model itself, against a case that layer.md shows.
func TestModel(t *testing.T) {
	m := newModel(DefaultLimits)
	f := func(name string) entry { return entry{kind: tar.TypeReg, name: name, body: "x"} }
	check(t, m.apply([]entry{f("a/b/c/bar"), f("a/b/c/foo")}))
	m.settle()
	m.union = true
	check(t, m.apply([]entry{f("a/.wh..wh..opq"), f("a/b/c/foo")}))
	c, err := m.walk([]string{"a", "b", "c"}, false)
	if err != nil || len(c.kids) != 1 || c.kids["foo"] == nil {
		t.Errorf("%v %v", c, err)
	}
}
