package rootfs

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Names with a meaning in a layer; OCI image-spec, layer.md, "Whiteouts".
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // of aufs; only the next one means something here
	whiteoutOpaque = ".wh..wh..opq"

	opaqueXattr = "trusted.overlay.opaque"
	defaultACL  = aclPrefix + "default"
	accessACL   = aclPrefix + "access"
	capability  = "security.capability"
)

// extractor writes the entries of one archive below root.
//
// The archive is hostile. Nothing is ever reached by a path: a parent directory
// is opened with openat2 confined to root, and the last component is created
// exclusively in it, replaced, or not followed. Nobody else writes below root
// meanwhile.
type extractor struct {
	ctx    context.Context
	root   int // fd of the layer's root, closed by close
	trash  int // the same of a directory for what later entries replace
	limits Limits
	buf    []byte

	// The parent of the last entry: archives go directory by directory.
	// parent is root, or owned and closed by the extractor.
	parentName string
	parent     int

	dirs    map[uint64]dirEntry // with an entry, by inode number
	implied map[uint64]string   // by inode number; see record.Implied
	memory  int                 // roughly what dirs and implied take, in bytes
	trashed int
	bytes   uint64 // taken on the file system
	inodes  uint64
	logical int64 // sizes as the headers have them
}

// dirEntry is what a directory gets last: making something in it changes its
// time, and what is made would inherit the ACL.
type dirEntry struct {
	name string
	t    time.Time
	acl  string // "": none
}

// extract reads stream to its end, writes its entries below diff, and compares
// its digest.
func extract(ctx context.Context, diff, trash string, diffID digest.Digest, stream io.Reader,
	limits Limits) (r layerRecord, err error) {
	x, err := newExtractor(ctx, diff, trash, limits)
	if err != nil {
		return r, err
	}
	defer x.close()
	return x.all(diffID, stream)
}

// newExtractor writes below diff. The caller closes it.
func newExtractor(ctx context.Context, diff, trash string, limits Limits) (x *extractor, err error) {
	const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fds := []int{-1, -1}
	for i, dir := range []string{diff, trash} {
		if fds[i], err = unix.Open(dir, dirFlags, 0); err != nil {
			unix.Close(fds[0])
			return nil, fmt.Errorf("cannot open %s: %w", dir, err)
		}
	}
	x = &extractor{
		ctx:        ctx,
		root:       fds[0],
		trash:      fds[1],
		limits:     limits,
		buf:        make([]byte, 64<<10),
		parentName: ".",
		parent:     fds[0],
		dirs:       map[uint64]dirEntry{},
		implied:    map[uint64]string{},
		inodes:     1,
	}
	if err := x.imply(x.root, "."); err != nil {
		x.close()
		return nil, err
	}
	return x, nil
}

func (x *extractor) close() {
	x.forgetParent()
	unix.Close(x.root)
	unix.Close(x.trash)
}

// all extracts the archive, and compares its digest.
func (x *extractor) all(diffID digest.Digest, stream io.Reader) (r layerRecord, err error) {
	hash := diffID.Algorithm().Hash()
	ahead := readAhead(x.ctx, stream, hash, x.limits.Bytes)
	defer ahead.stop()
	if err := x.run(ahead); err != nil {
		return r, x.blame(err, ahead.failed)
	}
	// The archive may be padded; the digest covers that too.
	if _, err := io.Copy(io.Discard, ahead); err != nil {
		return r, err
	}
	if got := digest.NewDigest(diffID.Algorithm(), hash); got != diffID {
		return r, fmt.Errorf("%w: its digest is %s", ErrBadLayer, got)
	}
	if err := x.finish(); err != nil {
		return r, x.blame(err, nil)
	}
	implied, err := x.impliedNames()
	if err != nil {
		return r, err
	}
	if x.trashed > 0 {
		if err := x.recount(); err != nil {
			return r, err
		}
	}
	return layerRecord{
		DiffID:  diffID,
		Bytes:   x.bytes,
		Inodes:  x.inodes,
		BootID:  rundir.BootID(),
		Implied: implied,
	}, nil
}

func (x *extractor) run(r io.Reader) error {
	tr := tar.NewReader(r)
	for n := int64(0); ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if n >= x.limits.Entries {
			return fmt.Errorf("%w: more than %d entries", ErrBadLayer, x.limits.Entries)
		}
		if err := x.entry(h, tr); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
}

// clean turns a name of an archive into a path relative to the root, "." being
// the root itself. A leading slash means the root, as tar(1) has it.
func clean(name string) (string, error) {
	p := path.Clean(strings.TrimLeft(name, "/"))
	if p == ".." || strings.HasPrefix(p, "../") {
		return "", fmt.Errorf("%w: %.200q leaves the root", ErrBadLayer, name)
	}
	if strings.IndexByte(p, 0) >= 0 {
		return "", fmt.Errorf("%w: a NUL in the name", ErrBadLayer)
	}
	return p, nil
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return fmt.Errorf("%w: owner %d:%d", ErrBadLayer, h.Uid, h.Gid)
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root is not a directory but type %q", ErrBadLayer, h.Typeflag)
		}
		return x.setDir(x.root, name, h)
	}
	dir, base := path.Split(name)
	if strings.Contains("/"+dir, "/"+whiteoutMeta) || strings.HasPrefix(base, whiteoutMeta) && base != whiteoutOpaque {
		return nil
	}
	parent, err := x.openParent(path.Clean(dir))
	if err != nil {
		return err
	}
	switch {
	case base == whiteoutOpaque:
		return x.setOpaque(parent, ".")
	case strings.HasPrefix(base, whiteoutPrefix):
		return x.whiteout(parent, base[len(whiteoutPrefix):])
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return x.mkdir(parent, base, name, h)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		err = x.file(parent, base, h, r)
	case tar.TypeLink:
		// What the entry says goes for the file, whatever its names, as where a
		// file comes twice.
		err = x.hardLink(parent, base, h.Linkname)
	case tar.TypeSymlink:
		err = x.create(parent, base, func() error { return unix.Symlinkat(h.Linkname, parent, base) })
	case tar.TypeChar:
		err = x.mknod(parent, base, unix.S_IFCHR, h)
	case tar.TypeBlock:
		err = x.mknod(parent, base, unix.S_IFBLK, h)
	case tar.TypeFifo:
		err = x.mknod(parent, base, unix.S_IFIFO, h)
	default:
		err = fmt.Errorf("%w: unknown type %q", ErrBadLayer, h.Typeflag)
	}
	if err != nil {
		return err
	}
	return x.setNode(parent, base, h)
}

// create makes a name in a directory with make, taking away what is there.
func (x *extractor) create(parent int, base string, make func() error) error {
	err := make()
	if errors.Is(err, unix.EEXIST) {
		if err := x.takeAway(parent, base); err != nil {
			return err
		}
		err = make()
	}
	if err != nil {
		return fmt.Errorf("cannot create it: %w", err)
	}
	x.inodes++
	return nil
}

// takeAway moves what an earlier entry made out of the layer.
func (x *extractor) takeAway(parent int, base string) error {
	// The parent that is remembered may be below it. It is used right now,
	// though, so only its name is forgotten if it is a directory above.
	x.trashed++
	if err := unix.Renameat(parent, base, x.trash, fmt.Sprint(x.trashed)); err != nil {
		return fmt.Errorf("cannot replace it: %w", err)
	}
	x.parentName = ""
	x.inodes--
	return nil
}

func (x *extractor) mknod(parent int, base string, kind uint32, h *tar.Header) error {
	var dev uint64
	if kind != unix.S_IFIFO {
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
			return fmt.Errorf("%w: device %d:%d", ErrBadLayer, h.Devmajor, h.Devminor)
		}
		dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	}
	return x.create(parent, base, func() error { return unix.Mknodat(parent, base, kind|0o600, int(dev)) })
}

// setNode sets the attributes of what was just created, or linked to: of anything
// but a directory.
func (x *extractor) setNode(parent int, base string, h *tar.Header) error {
	st, err := setOwner(parent, base, h)
	if err != nil {
		return err
	}
	if err := setXattrs(parent, base, &st, h); err != nil {
		return err
	}
	return setTime(parent, base, h.ModTime)
}

// setOwner sets owner and mode where they are others: each change is one of the
// journal too, which for small files is most of the work.
func setOwner(parent int, base string, h *tar.Header) (st unix.Stat_t, err error) {
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return st, err
	}
	owned := st.Uid == uint32(h.Uid) && st.Gid == uint32(h.Gid)
	if !owned {
		if err := unix.Fchownat(parent, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return st, fmt.Errorf("cannot set its owner: %w", err)
		}
	}
	// After the owner, as changing that drops setuid and capabilities.
	mode := uint32(h.Mode & 0o7777)
	if st.Mode&unix.S_IFMT == unix.S_IFLNK || owned && st.Mode&0o7777 == mode {
		return st, nil
	}
	if err := unix.Fchmodat(parent, base, mode, 0); err != nil {
		return st, fmt.Errorf("cannot set its mode: %w", err)
	}
	return st, nil
}

func (x *extractor) file(parent int, base string, h *tar.Header, r io.Reader) error {
	if h.Size < 0 || h.Size > x.limits.Bytes-x.logical {
		return fmt.Errorf("%w: more than %d bytes of files", ErrBadLayer, x.limits.Bytes)
	}
	x.logical += h.Size
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	var fd int
	err := x.create(parent, base, func() (err error) {
		fd, err = unix.Openat(parent, base, flags, uint32(h.Mode&0o777))
		return err
	})
	if err != nil {
		return err
	}
	err = x.copy(fd, r, h.Size, sparse(h))
	if cerr := unix.Close(fd); err == nil && cerr != nil {
		err = fmt.Errorf("cannot write it: %w", cerr)
	}
	return err
}

func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

const block = 4096

// copy writes size bytes of r; with holes, blocks of zeros become holes.
func (x *extractor) copy(fd int, r io.Reader, size int64, holes bool) error {
	for off := int64(0); off < size; {
		if err := x.ctx.Err(); err != nil {
			return err // a hole is not read from the stream, which would tell
		}
		b := x.buf[:min(int64(len(x.buf)), size-off)]
		if _, err := io.ReadFull(r, b); err != nil {
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				err = fmt.Errorf("%w: the archive ends in the file", ErrBadLayer)
			}
			return err
		}
		var err error
		if holes {
			err = x.writeHoly(fd, b, off)
		} else {
			err = x.write(fd, b, off)
		}
		if err != nil {
			return fmt.Errorf("cannot write it: %w", err)
		}
		off += int64(len(b))
	}
	if holes {
		if err := unix.Ftruncate(fd, size); err != nil {
			return fmt.Errorf("cannot write it: %w", err)
		}
	}
	return nil
}

func (x *extractor) write(fd int, b []byte, off int64) error {
	x.bytes += uint64(len(b)+block-1) / block * block
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

var zeros [block]byte

func (x *extractor) writeHoly(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		p := b[:min(len(b), block)]
		if string(p) != string(zeros[:len(p)]) {
			if err := x.write(fd, p, off); err != nil {
				return err
			}
		}
		b, off = b[len(p):], off+int64(len(p))
	}
	return nil
}

// hardLink links to what an earlier entry made. A layer that means a file of
// the layers below would have to carry it, as hard links do not cross them.
func (x *extractor) hardLink(parent int, base, target string) error {
	name, err := clean(target)
	if err != nil {
		return err
	}
	dir, targetBase := path.Split(name)
	targetDir, err := x.openDir(path.Clean(dir))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: a hard link to %.200q, which is not in the layer", ErrBadLayer, target)
	}
	if err != nil {
		return err
	}
	defer unix.Close(targetDir)
	var to, at unix.Stat_t
	err = unix.Fstatat(targetDir, targetBase, &to, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || to.Mode&unix.S_IFMT == unix.S_IFDIR || isWhiteout(&to) {
		return fmt.Errorf("%w: a hard link to %.200q, which is not a file in the layer", ErrBadLayer, target)
	}
	if unix.Fstatat(parent, base, &at, unix.AT_SYMLINK_NOFOLLOW) == nil && at.Ino == to.Ino {
		return nil // to itself; taking it away first would lose it
	}
	// Flags 0: the link itself is linked if the target is a symbolic one.
	err = x.create(parent, base, func() error { return unix.Linkat(targetDir, targetBase, parent, base, 0) })
	if err == nil {
		x.inodes--
	}
	return err
}

// whiteout hides a name of the layers below: for overlayfs, a character device
// 0/0. What this layer itself has under the name stays, but hides as well.
func (x *extractor) whiteout(parent int, base string) error {
	if base == "" || base == "." || base == ".." {
		return fmt.Errorf("%w: a whiteout of nothing", ErrBadLayer)
	}
	err := unix.Mknodat(parent, base, unix.S_IFCHR|0o600, 0)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			delete(x.implied, st.Ino) // what is below does not count any more
			return x.setOpaque(parent, base)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot make a whiteout: %w", err)
	}
	x.inodes++
	return nil
}

func isWhiteout(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// setOpaque hides what the layers below have in a directory.
func (x *extractor) setOpaque(parent int, base string) error {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0)
	}
	if err != nil {
		return fmt.Errorf("cannot make the directory opaque: %w", err)
	}
	return nil
}

// mkdir makes the directory of an entry, or takes the one that is there.
func (x *extractor) mkdir(parent int, base, name string, h *tar.Header) error {
	fd, err := x.ensureDir(parent, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return x.setDir(fd, name, h)
}

// ensureDir opens a directory, making it if there is none of this layer. The
// caller closes it.
func (x *extractor) ensureDir(parent int, base string) (int, error) {
	var st unix.Stat_t
	hides := false
	switch err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return -1, err
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		// Whatever it is, it hides the directory of the layers below.
		hides = true
		if err := x.takeAway(parent, base); err != nil {
			return -1, err
		}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := unix.Mkdirat(parent, base, 0o755); err != nil {
			return -1, fmt.Errorf("cannot create it: %w", err)
		}
		x.inodes++
		x.bytes += block
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("cannot open it: %w", err)
	}
	if hides {
		if err := x.setOpaque(fd, "."); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

func (x *extractor) setDir(fd int, name string, h *tar.Header) error {
	st, err := setOwner(fd, ".", h)
	if err != nil {
		return err
	}
	d := dirEntry{name, h.ModTime, cmp.Or(h.PAXRecords[paxXattr+defaultACL], x.dirs[st.Ino].acl)}
	if err := setXattrs(fd, ".", &st, h); err != nil {
		return err
	}
	x.dirs[st.Ino] = d
	delete(x.implied, st.Ino)
	return x.remember(len(name) + len(d.acl))
}

// imply notes a directory that the archive has no entry for, so far.
func (x *extractor) imply(fd int, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	x.implied[st.Ino] = name
	return x.remember(len(name))
}

// finish sees to directories and sorts out what was replaced.
func (x *extractor) finish() error {
	for ino, d := range x.dirs {
		fd, err := x.openStill(d.name, ino)
		if replaced(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("entry %.200q: %w", d.name, err)
		}
		if d.acl != "" {
			err = setXattr(fmt.Sprintf("/proc/self/fd/%d/.", fd), defaultACL, d.acl)
		}
		err = cmp.Or(err, setTime(fd, ".", d.t))
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("entry %.200q: %w", d.name, err)
		}
	}
	for ino, name := range x.implied {
		fd, err := x.openStill(name, ino)
		if replaced(err) {
			delete(x.implied, ino)
			continue
		}
		if err != nil {
			return fmt.Errorf("directory %.200q: %w", name, err)
		}
		unix.Close(fd)
	}
	return nil
}

// replaced says that openStill found something else, or nothing.
func replaced(err error) bool {
	errno, _ := errors.AsType[unix.Errno](err)
	return slices.Contains([]unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG}, errno)
}

// openStill opens a directory if the name still means the one with this inode
// number: what was above it may have been replaced, by a link for one.
func (x *extractor) openStill(name string, ino uint64) (int, error) {
	fd, err := x.openDir(name)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Ino != ino {
		err = unix.ENOENT
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// setTime follows no link. The time of access is of no interest.
func setTime(parent int, base string, t time.Time) error {
	ts := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	if err := unix.UtimesNanoAt(parent, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("cannot set its time: %w", err)
	}
	return nil
}

// maySet says whether a layer may set an extended attribute. Those of overlayfs
// would be orders to the kernel, and security labels are the node's.
func maySet(name string) bool {
	user := strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay.")
	return user || name == capability || name == accessACL || name == defaultACL
}

const paxXattr = "SCHILY.xattr."

// setXattrs sets the extended attributes that a layer may set, but for default
// ACLs, which finish sets.
func setXattrs(parent int, base string, st *unix.Stat_t, h *tar.Header) error {
	kind := st.Mode & unix.S_IFMT
	for k, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok || !maySet(name) || name == defaultACL && kind == unix.S_IFDIR {
			continue
		}
		err := setXattr(fmt.Sprintf("/proc/self/fd/%d/%s", parent, base), name, value)
		if errors.Is(err, unix.EPERM) && kind != unix.S_IFREG && kind != unix.S_IFDIR {
			continue // the kernel has user attributes for files and directories only
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func setXattr(path, name, value string) error {
	err := unix.Lsetxattr(path, name, []byte(value), 0)
	if err == nil || errors.Is(err, unix.ENOTSUP) && name != capability {
		return nil // it is set, or the file system has none of them
	}
	var st unix.Statfs_t
	if errors.Is(err, unix.ENOSPC) && unix.Statfs(filepath.Dir(path), &st) == nil &&
		st.Bavail*uint64(st.Bsize) > 1<<20 {
		err = fmt.Errorf("%w: %v, and the disk is not full: it has no more room for attributes of one file",
			ErrBadLayer, err)
	}
	return fmt.Errorf("cannot set %.200s of %d bytes: %w", name, len(value), err)
}
