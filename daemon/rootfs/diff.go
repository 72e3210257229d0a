package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// ErrNoDiff says that a writable layer cannot be written as a layer of an image.
var ErrNoDiff = errors.New("the writable layer cannot be saved")

const (
	redirectXattr = "trusted.overlay.redirect"
	// maxDepth bounds directories in each other: each holds a descriptor.
	maxDepth = 512
	// maxXattrs bounds the names of all attributes of one file, as the kernel does.
	maxXattrs = 64 << 10
)

// Diff writes what is in the writable layer rw/upper as the tar stream of a layer. Nobody
// changes it meanwhile. Owners are those of the disk. Sockets are left out: a tar archive
// has none.
func Diff(ctx context.Context, rw string, w io.Writer, limits Limits) error {
	return Archive(ctx, filepath.Join(rw, upperName), w, limits)
}

// Archive is Diff for any directory.
func Archive(ctx context.Context, dir string, w io.Writer, limits Limits) error {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", dir, err)
	}
	d := &differ{ctx: ctx, Writer: tar.NewWriter(w), to: w, left: limits, links: map[uint64]string{}}
	err = d.directory(root, ".", 0)
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		return fmt.Errorf("cannot save %s: %w", dir, err)
	}
	return nil
}

// differ writes one stream. It holds the descriptors of the directories on its way.
type differ struct {
	ctx context.Context
	*tar.Writer
	to    io.Writer // what Writer writes to
	left  Limits
	links map[uint64]string // the first name of each file that has several, by inode number
}

// directory writes a directory and what is in it. It closes fd.
func (d *differ) directory(fd int, name string, depth int) error {
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if depth > maxDepth {
		return fmt.Errorf("%w: %.200q lies deeper than %d directories", ErrNoDiff, name, maxDepth)
	}
	self := fmt.Sprintf("/proc/self/fd/%d/.", fd)
	if n, err := unix.Lgetxattr(self, redirectXattr, nil); err == nil && n > 0 {
		return fmt.Errorf("%w: the directory %.200q of the image was renamed", ErrNoDiff, name)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	h, err := d.header(name+"/", &st, self)
	if err != nil {
		return err
	}
	h.Typeflag = tar.TypeDir
	if err := d.entry(h, nil); err != nil {
		return err
	}
	if opaque(self) {
		if err := d.whiteout(path.Join(name, whiteoutOpaque), h.ModTime); err != nil {
			return err
		}
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, base := range names {
		if err := d.node(fd, base, path.Join(name, base), depth); err != nil {
			return err
		}
	}
	return nil
}

// node writes one entry of a directory.
func (d *differ) node(dir int, base, name string, depth int) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%.200q: %w", name, err)
	}
	kindOf := st.Mode & unix.S_IFMT
	switch {
	case isWhiteout(&st):
		return d.whiteout(path.Join(path.Dir(name), whiteoutPrefix+base), time.Unix(st.Mtim.Unix()))
	case strings.HasPrefix(base, whiteoutPrefix):
		return fmt.Errorf("%w: the name %.200q would remove a file", ErrNoDiff, name)
	case kindOf == unix.S_IFSOCK:
		return nil
	case kindOf == unix.S_IFDIR:
		fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%.200q: %w", name, err)
		}
		return d.directory(fd, name, depth+1)
	}
	h, err := d.header(name, &st, fmt.Sprintf("/proc/self/fd/%d/%s", dir, base))
	if err == nil && st.Nlink > 1 {
		if first, ok := d.links[st.Ino]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return d.entry(h, nil)
		}
		d.links[st.Ino] = name
	}
	if err == nil {
		err = d.leaf(dir, base, h, &st)
	}
	if err != nil {
		return fmt.Errorf("%.200q: %w", name, err)
	}
	return nil
}

// leaf writes anything but a directory.
func (d *differ) leaf(dir int, base string, h *tar.Header, st *unix.Stat_t) error {
	h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size, h.Devmajor, h.Devminor = tar.TypeReg, st.Size, 0, 0
		fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), h.Name)
		defer f.Close()
		list, err := extents(f, st, maxExtents)
		if err != nil {
			return err
		}
		if list != nil {
			return d.sparse(h, f, list)
		}
		return d.entry(h, f)
	case unix.S_IFLNK:
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, base, b)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname, h.Devmajor, h.Devminor = tar.TypeSymlink, string(b[:n]), 0, 0
	case unix.S_IFIFO:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeFifo, 0, 0
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	}
	return d.entry(h, nil)
}

// header has the attributes of what is at self.
func (d *differ) header(name string, st *unix.Stat_t, self string) (*tar.Header, error) {
	h := &tar.Header{
		Name:       name,
		Mode:       int64(st.Mode & 0o7777),
		Uid:        int(st.Uid),
		Gid:        int(st.Gid),
		ModTime:    time.Unix(st.Mtim.Unix()),
		Format:     tar.FormatPAX,
		PAXRecords: map[string]string{},
	}
	list := make([]byte, maxXattrs)
	n, err := unix.Llistxattr(self, list)
	if errors.Is(err, unix.ENOTSUP) {
		n, err = 0, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list its attributes: %w", err)
	}
	for attr := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !maySet(attr) {
			continue
		}
		value := make([]byte, maxXattrs)
		n, err := unix.Lgetxattr(self, attr, value)
		if err != nil {
			return nil, fmt.Errorf("cannot read its attribute %.200s: %w", attr, err)
		}
		h.PAXRecords[paxXattr+attr] = string(value[:n])
	}
	return h, nil
}

func (d *differ) whiteout(name string, at time.Time) error {
	return d.entry(&tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: at, Format: tar.FormatPAX}, nil)
}

// count takes an entry of so many bytes off what is left: holes count, as they do for whoever
// reads it.
func (d *differ) count(size int64) error {
	d.left.Entries--
	d.left.Bytes -= size
	if d.left.Entries < 0 || d.left.Bytes < 0 {
		return fmt.Errorf("%w: it is too large", kind.Exhausted)
	}
	return nil
}

func (d *differ) entry(h *tar.Header, content io.Reader) error {
	if err := d.count(h.Size); err != nil {
		return err
	}
	if err := d.WriteHeader(h); err != nil || content == nil {
		return err
	}
	_, err := io.CopyN(d.Writer, &cancelled{d.ctx, content}, h.Size)
	return err
}

// cancelled is a reader that ends with its context.
type cancelled struct {
	ctx context.Context
	io.Reader
}

func (c *cancelled) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}

// Restore makes the writable layer rw/upper of what Diff has written, streams on top of
// each other, before Mount is called for the same layers. Its streams are hostile. After an
// error some of it may be there.
func (s *Store) Restore(ctx context.Context, diffIDs []digest.Digest, rw string, streams ...io.Reader) error {
	upper := filepath.Join(rw, upperName)
	if _, err := os.Lstat(upper); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot restore a writable layer: there is one: %w", err)
	}
	err := s.makeUpperDir(ctx, upper, distinct(diffIDs), nil)
	for _, stream := range streams {
		if err == nil {
			err = Extract(ctx, upper, stream, s.Limits)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot restore a writable layer: %w", err)
	}
	return nil
}

// Extract writes the entries of a hostile stream below a directory, in which nobody else
// works meanwhile. The directory beside it, with the suffix below, is used for what is
// replaced.
func Extract(ctx context.Context, dir string, stream io.Reader, limits Limits) error {
	trash := dir + trashSuffix
	// One may be left by a daemon that was killed.
	if err := errors.Join(os.RemoveAll(trash), os.Mkdir(trash, 0o700)); err != nil {
		return err
	}
	x, err := newExtractor(ctx, dir, trash, limits)
	if err == nil {
		if err = x.run(&cancelled{ctx, io.LimitReader(stream, limits.Bytes)}); err == nil {
			err = x.finish()
		}
		if err != nil {
			err = x.blame(err, nil)
		}
		x.close()
	}
	return errors.Join(err, os.RemoveAll(trash))
}

const trashSuffix = ".trash"

// OpenLayer opens the directory of an unpacked layer. The layer is held meanwhile, and
// the caller closes the result.
func (s *Store) OpenLayer(diffID digest.Digest) (*os.File, error) {
	if s.get(diffID) == nil {
		return nil, fmt.Errorf("%w: %s", ErrNoLayer, diffID)
	}
	return os.Open(filepath.Join(s.layerDir(diffID), diffName))
}
