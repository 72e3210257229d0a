package rootfs

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// byContent are the errors of the kernel that a layer brings about on any
// machine: a name too long, a loop of links, an attribute that is none.
var byContent = []error{unix.ENAMETOOLONG, unix.ELOOP, unix.EINVAL, unix.ENOENT, unix.ENOTDIR, unix.E2BIG, unix.ERANGE, unix.EFBIG, unix.EMLINK}

// attributeError says that an extended attribute could not be set.
type attributeError struct {
	name string
	size int
	err  error
}

func (e *attributeError) Error() string {
	return fmt.Sprintf("cannot set %.200s of %d bytes: %v", e.name, e.size, e.err)
}

func (e *attributeError) Unwrap() error { return e.err }

// blame makes an error of extracting one of the layer where it is: unless the
// stream could not be read, or the machine could not do what it was asked for.
func (x *extractor) blame(err, stream error) error {
	if stream != nil || x.ctx.Err() != nil || errors.Is(err, ErrBadLayer) {
		return err
	}
	// What a file system has no room for in one inode is not a full disk.
	a, ok := errors.AsType[*attributeError](err)
	if ok && errors.Is(a, unix.ENOSPC) && x.hasRoom() {
		return fmt.Errorf("%w: %v, and the disk is not full: the attributes of one file are too large for this file system", ErrBadLayer, err)
	}
	if errno, ok := errors.AsType[unix.Errno](err); ok && !slices.Contains(byContent, error(errno)) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrBadLayer, err)
}

func (x *extractor) hasRoom() bool {
	var st unix.Statfs_t
	return unix.Fstatfs(x.root, &st) == nil && st.Bavail*uint64(st.Bsize) > 1<<20
}

// maxMemory bounds what is kept about the directories of a layer until its end,
// in bytes. It is enough for more than a million of them with names of 100 bytes.
const maxMemory = 256 << 20

// maxImplied bounds the names in the record of a layer, in bytes. In JSON a byte
// may take six, and a reader takes no more than 64 MiB.
const maxImplied = 8 << 20

// maxKept is what stays in memory of those of each layer.
const maxKept = 64 << 10

func (l names) size() (n int) {
	for _, name := range l {
		n += len(name) + 16 // quotes, a comma, and the string's header
	}
	return n
}

// abridge makes the record what stays in memory.
func (r *layerRecord) abridge() {
	if r.Implied.size() > maxKept {
		r.Implied, r.abridged = nil, true
	}
}

// full is the record with all of its names.
func (s *Store) full(r *layerRecord) (*layerRecord, error) {
	if !r.abridged {
		return r, nil
	}
	var all layerRecord
	err := record.Read(filepath.Join(s.layerDir(r.DiffID), recordName), &all)
	return &all, err
}

func (x *extractor) remember(bytes int) error {
	if x.memory += bytes + 128; x.memory > maxMemory {
		return fmt.Errorf("%w: too many directories, or with names too long", ErrBadLayer)
	}
	return nil
}
