package rootfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Names in a container's own directory.
const (
	upperName = "upper" // what the container has written
	workName  = "work"  // overlayfs's own
)

// ErrBusy says that something is mounted at the target already.
var ErrBusy = errors.New("something is mounted there already")

// Mount mounts the layers (the lowest first; none is an empty root) at target,
// with a writable layer in rw/upper and rw/work, which are made unless they are
// there.
//
// With an IDMap, nil being none, who owns a file in a layer owns it in the user
// namespace. The layers stay as they are; the writable one holds the ids of the
// host.
func (s *Store) Mount(ctx context.Context, diffIDs []digest.Digest, rw, target string, m *IDMap) error {
	return s.MountLabelled(ctx, diffIDs, rw, target, m, "")
}

// MountLabelled is Mount. All files have an SELinux label, whatever they have on the disk;
// empty: the one they have there.
func (s *Store) MountLabelled(ctx context.Context, diffIDs []digest.Digest, rw, target string, m *IDMap,
	label string) error {
	err := ctx.Err()
	if err == nil {
		err = s.mount(diffIDs, rw, target, m, label)
	}
	if err != nil {
		return fmt.Errorf("cannot mount a root file system on %s: %w", target, err)
	}
	return nil
}

func (s *Store) mount(diffIDs []digest.Digest, rw, target string, m *IDMap, label string) (err error) {
	if mounted, err := mountinfo.Mounted(target); mounted || err != nil {
		return cmp.Or(err, ErrBusy)
	}
	diffIDs = distinct(diffIDs)
	upper, work := filepath.Join(rw, upperName), filepath.Join(rw, workName)
	// What overlayfs leaves in work has no meaning without a mount, but a mark
	// of an earlier volatile mount would make it refuse this one.
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(work, 0o700), s.makeUpperDir(upper, diffIDs, m)); err != nil {
		return err
	}
	layers := s.dir
	if m != nil {
		layers = target + mappedSuffix
		if err := attachMapped(s.dir, layers, m.Userns); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, detach(layers)) }()
	}
	o, err := newOverlay(layers, rw, target)
	if err != nil {
		return err
	}
	defer o.close()
	o.label = label
	if o.lower, err = s.lower(diffIDs); err != nil {
		return err
	}
	return o.mount()
}

// lower gives the lower directories for overlayfs, the highest first, as paths
// below the directory of all layers.
func (s *Store) lower(diffIDs []digest.Digest) (dirs []string, err error) {
	if len(diffIDs) == 0 {
		return []string{emptyName}, s.makeDirs()
	}
	for _, d := range slices.Backward(diffIDs) {
		if s.get(d) == nil {
			return nil, fmt.Errorf("%w: %s", ErrNoLayer, d)
		}
		dirs = append(dirs, filepath.Join(d.Algorithm().String(), d.Encoded(), diffName))
		if opaque(filepath.Join(s.layerDir(d), diffName)) {
			break // overlayfs does not look for this at a root
		}
	}
	return dirs, nil
}

// distinct leaves each layer only where it is highest: further down it adds
// nothing, overlayfs refuses it, and an image may have one thousands of times.
func distinct(diffIDs []digest.Digest) (l []digest.Digest) {
	seen := map[digest.Digest]bool{}
	for _, d := range slices.Backward(diffIDs) {
		if !seen[d] {
			seen[d] = true
			l = append(l, d)
		}
	}
	slices.Reverse(l)
	return l
}

// makeUpperDir makes the writable layer if there is none. It appears complete.
func (s *Store) makeUpperDir(upper string, diffIDs []digest.Digest, m *IDMap) error {
	if _, err := os.Lstat(upper); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fresh := upper + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	if err := s.prepareUpper(fresh, diffIDs, m); err != nil {
		return err
	}
	return os.Rename(fresh, upper)
}

// overlay is one overlayfs mount to be. Its options are:
//
//	volatile      no sync of the writable layer, neither by fsync(2) inside nor at
//	              unmount, where it would wait for the disk. A container does not
//	              outlive a reboot, so a power cut costs nothing that anybody could
//	              look for later.
//	index=off     the layers are shared by many mounts, which an index forbids
//	metacopy=off  no attribute of a layer is to redirect to another file
//
// The kernel is given each directory as /proc/self/fd/N/..., because it bounds
// the length of a path, and takes some characters for separators. The rest of the
// path is what mountinfo tells: which layers and which container it is.
type overlay struct {
	layers string   // the directory of all layers, by its fd
	lower  []string // below layers, the highest first
	upper  string   // by an fd as well
	work   string
	target string
	label  string // of all files, if not empty
	fds    []int  // closed by close
}

const fdPrefix = "/proc/self/fd/"

var overlayFlags = [][2]string{{"index", "off"}, {"metacopy", "off"}}

// newOverlay opens the directories. The caller sets lower, and calls close when
// it is mounted, or has failed.
func newOverlay(layers, rw, target string) (*overlay, error) {
	o := &overlay{target: target}
	var err error
	if o.layers, err = o.open(layers); err == nil {
		var parent string
		parent, err = o.open(filepath.Dir(rw))
		rw = path.Join(parent, filepath.Base(rw))
	}
	if err != nil {
		o.close()
		return nil, err
	}
	o.upper, o.work = path.Join(rw, upperName), path.Join(rw, workName)
	return o, nil
}

// open gives a name of a directory that is good until close.
func (o *overlay) open(dir string) (string, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot open %s: %w", dir, err)
	}
	o.fds = append(o.fds, fd)
	return fmt.Sprint(fdPrefix, fd), nil
}

func (o *overlay) close() {
	for _, fd := range o.fds {
		unix.Close(fd)
	}
}

func (o *overlay) mount() error {
	err := o.mountNew()
	if errors.Is(err, errNoAppend) {
		err = o.mountClassic()
	}
	return err
}

// errNoAppend says that the kernel cannot take lower directories one by one
// (Linux 6.8).
var errNoAppend = errors.New("overlayfs has no lowerdir+")

func (o *overlay) mountNew() error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot open overlayfs (fsopen): %w", err)
	}
	defer unix.Close(fsfd)
	var options [][2]string
	for _, dir := range o.lower {
		options = append(options, [2]string{"lowerdir+", path.Join(o.layers, dir)})
	}
	options = append(options, [][2]string{{"upperdir", o.upper}, {"workdir", o.work}, {"source", "overlay"}}...)
	options = append(options, overlayFlags...)
	if o.label != "" {
		options = append(options, [2]string{"context", o.label})
	}
	for i, f := range options {
		err := unix.FsconfigSetString(fsfd, f[0], f[1])
		if i == 0 && errors.Is(err, unix.EINVAL) {
			return errNoAppend
		}
		if err != nil {
			return fmt.Errorf("cannot set %s of overlayfs to %s: %w%s", f[0], f[1], err, fsLog(fsfd))
		}
	}
	if err := unix.FsconfigSetFlag(fsfd, "volatile"); err != nil {
		return fmt.Errorf("cannot set volatile of overlayfs: %w%s", err, fsLog(fsfd))
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("cannot make an overlayfs of %d layers: %w%s", len(o.lower), err, fsLog(fsfd))
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot make a mount of the overlayfs: %w%s", err, fsLog(fsfd))
	}
	defer unix.Close(mfd)
	return attach(mfd, o.target)
}

// attach puts a mount that has no place yet on a path.
func attach(mount int, at string) error {
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot attach the mount to %s: %w", at, err)
	}
	return nil
}

// fsLog is what the kernel has to say about the last failure; fsopen(2).
func fsLog(fsfd int) string {
	b := make([]byte, 1024)
	n, err := unix.Read(fsfd, b)
	if err != nil || n <= 0 {
		return ""
	}
	return fmt.Sprintf(" (%s)", bytes.TrimSpace(b[:n]))
}

// mountClassic is for kernels before 6.8. All options together have to fit a
// page. For many layers only names do that from which nobody can tell the layer.
func (o *overlay) mountClassic() error {
	lower := make([]string, len(o.lower))
	for i, dir := range o.lower {
		lower[i] = path.Join(o.layers, dir)
	}
	data := o.data(lower)
	if len(data) >= os.Getpagesize() {
		for i := range lower {
			var err error
			if lower[i], err = o.open(lower[i]); err != nil {
				return err
			}
		}
		data = o.data(lower)
	}
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are too many for this kernel, Linux 6.8 takes more", len(o.lower))
	}
	if err := unix.Mount("overlay", o.target, "overlay", 0, data); err != nil {
		return fmt.Errorf("cannot mount an overlayfs of %d layers: %w", len(o.lower), err)
	}
	return nil
}

func (o *overlay) data(lower []string) string {
	data := fmt.Sprintf("volatile,lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(lower, ":"), o.upper, o.work)
	for _, f := range overlayFlags {
		data += "," + f[0] + "=" + f[1]
	}
	if o.label != "" {
		data += fmt.Sprintf(",context=%q", o.label) // a level has commas
	}
	return data
}

// Unmount unmounts all that is mounted at target, lazily if it is busy, and what
// a Mount that was cut short has left beside it. What is not mounted, or does
// not exist, is no error.
func Unmount(target string) error {
	return errors.Join(detach(target+mappedSuffix), unmountAll(target))
}

func unmountAll(target string) error {
	for {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
			continue // there may be another mount beneath
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return nil
		default:
			return fmt.Errorf("cannot unmount %s: %w", target, err)
		}
	}
}
