package rootfs

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// byContent are the errors of the kernel that a layer brings about on any
// machine: a name too long, a loop of links, an attribute that is none.
var byContent = []error{
	unix.ENAMETOOLONG, unix.ELOOP, unix.EINVAL, unix.ENOENT, unix.ENOTDIR,
	unix.E2BIG, unix.ERANGE, unix.EFBIG, unix.EMLINK,
}

// blame makes an error of extracting one of the layer where it is: unless the
// stream could not be read, or the machine could not do what it was asked for.
func (x *extractor) blame(err, stream error) error {
	if stream != nil || x.ctx.Err() != nil || errors.Is(err, ErrBadLayer) {
		return err
	}
	if errno, ok := errors.AsType[unix.Errno](err); ok && !slices.Contains(byContent, error(errno)) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrBadLayer, err)
}

// maxMemory bounds what is kept about the directories of a layer until its end,
// in bytes. It is enough for more than a million of them with names of 100 bytes.
const maxMemory = 256 << 20

func (x *extractor) remember(bytes int) error {
	if x.memory += bytes + 128; x.memory > maxMemory {
		return fmt.Errorf("%w: too many directories, or with names too long", ErrBadLayer)
	}
	return nil
}
