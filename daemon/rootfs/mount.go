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

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
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
//
// label is the SELinux label of all files; empty: the one they have on the disk.
func (s *Store) Mount(ctx context.Context, diffIDs []digest.Digest, rw, target string, m *IDMap, label string) error {
	err := ctx.Err()
	if err == nil {
		err = s.mount(ctx, diffIDs, rw, target, m, label)
	}
	if err != nil {
		return fmt.Errorf("cannot mount a root file system on %s: %w", target, err)
	}
	return nil
}

func (s *Store) mount(ctx context.Context, diffIDs []digest.Digest, rw, target string, m *IDMap,
	label string) (err error) {
	if mounted, err := mounts.Mounted(target); mounted || err != nil {
		return cmp.Or(err, ErrBusy)
	}
	diffIDs = distinct(diffIDs)
	upper, work := filepath.Join(rw, upperName), filepath.Join(rw, workName)
	// What overlayfs leaves in work has no meaning without a mount, but a mark
	// of an earlier volatile mount would make it refuse this one.
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(work, 0o700), s.makeUpperDir(ctx, upper, diffIDs, m)); err != nil {
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
	lower, err := s.lower(diffIDs)
	if err != nil {
		return err
	}
	o := newOverlay(layers, lower, rw, target)
	defer o.close()
	o.label = label
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
func (s *Store) makeUpperDir(ctx context.Context, upper string, diffIDs []digest.Digest, m *IDMap) error {
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
	if err := s.prepareUpper(ctx, fresh, diffIDs, m); err != nil {
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
// The names of the directories stand in the mount table of the container and of the
// host, where other programs read them: they are real paths wherever the kernel allows.
// All of these directories are ours, in trees that nobody else can enter.
type overlay struct {
	layers string   // the directory of all layers
	lower  []string // below layers, the highest first
	rw     string   // the directory of the container
	target string
	label  string // of all files, if not empty
	short  bool   // directories are named by descriptors; see name
	fds    []int  // closed by close
	bases  map[string]string
}

const (
	fdPrefix = "/proc/self/fd/"
	lowerKey = "lowerdir+" // one directory; in mount(2) lowerdir has all
)

const (
	maxOption = 255 // bytes of a string for fsconfig(2)
	// maxLine bounds what the names of directories take in a line of mountinfo. Many programs,
	// runc among them, read lines of up to 64 KiB, and fail for all mounts at a longer one.
	maxLine = 60 << 10
)

var overlayFlags = [][2]string{{"index", "off"}, {"metacopy", "off"}}

// newOverlay prepares a mount on target of lower, which are directories below layers with
// the highest first. The caller calls close when it is mounted, or has failed.
func newOverlay(layers string, lower []string, rw, target string) *overlay {
	o := &overlay{layers: layers, lower: lower, rw: rw, target: target, bases: map[string]string{}}
	size := 0
	for _, d := range o.dirs() {
		size += len(d[0]) + len(d[1]) + len("=,")
	}
	o.short = size > maxLine
	return o
}

// dirs are the options that name directories.
func (o *overlay) dirs() (dirs [][2]string) {
	for _, dir := range o.lower {
		dirs = append(dirs, [2]string{lowerKey, filepath.Join(o.layers, dir)})
	}
	return append(dirs, [][2]string{
		{"upperdir", filepath.Join(o.rw, upperName)},
		{"workdir", filepath.Join(o.rw, workName)},
	}...)
}

// name gives a name of a directory as the text of an option.
func (o *overlay) name(dir string) (string, error) {
	if !o.short && len(dir) <= maxOption && !strings.ContainsAny(dir, `\:,`) {
		return dir, nil
	}
	return o.shortName(dir)
}

// shortName is for paths that are too long for the kernel, or have what it takes for a
// separator. It begins with a descriptor. The rest is what tells the layer, or the container.
func (o *overlay) shortName(dir string) (string, error) {
	base := o.layers
	rest, ok := strings.CutPrefix(dir, base+"/")
	if !ok {
		base = filepath.Dir(o.rw)
		rest = filepath.Join(filepath.Base(o.rw), filepath.Base(dir))
	}
	if o.bases[base] == "" {
		var err error
		if o.bases[base], err = o.open(base); err != nil {
			return "", err
		}
	}
	return path.Join(o.bases[base], rest), nil
}

// open gives a name of a directory that is good until close.
func (o *overlay) open(dir string) (string, error) {
	fd, err := openDir(dir, unix.O_PATH)
	if err != nil {
		return "", err
	}
	o.fds = append(o.fds, fd)
	return fmt.Sprint(fdPrefix, fd), nil
}

func openDir(dir string, flags int) (int, error) {
	fd, err := unix.Open(dir, flags|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("cannot open %s: %w", dir, err)
	}
	return fd, nil
}

func (o *overlay) close() {
	for _, fd := range o.fds {
		unix.Close(fd)
	}
}

// mount mounts it in the first way that the kernel knows.
func (o *overlay) mount() error {
	ways := []func() error{o.mountFiles, o.mountNames, o.mountClassic}
	if o.short {
		ways = ways[1:] // the first one shows whole paths
	}
	var err error
	for _, way := range ways {
		if err = way(); !errors.Is(err, errOtherWay) {
			break
		}
	}
	return err
}

// errOtherWay says that the kernel does not know this way to give it directories.
var errOtherWay = errors.New("overlayfs has no such option")

// mountFiles gives the kernel descriptors, of which it shows the paths (Linux 6.13).
func (o *overlay) mountFiles() error {
	return o.mountNew(func(fsfd int, key, dir string) error {
		fd, err := openDir(dir, unix.O_RDONLY) // O_PATH would need Linux 6.15
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.FsconfigSetFd(fsfd, key, fd)
	})
}

// mountNames gives the kernel names, one by one (Linux 6.8).
func (o *overlay) mountNames() error {
	return o.mountNew(func(fsfd int, key, dir string) error {
		name, err := o.name(dir)
		if err != nil {
			return err
		}
		return unix.FsconfigSetString(fsfd, key, name)
	})
}

func (o *overlay) mountNew(setDir func(fsfd int, key, dir string) error) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot open overlayfs (fsopen): %w", err)
	}
	defer unix.Close(fsfd)
	for i, d := range o.dirs() {
		err := setDir(fsfd, d[0], d[1])
		if i == 0 && errors.Is(err, unix.EINVAL) {
			return errOtherWay
		}
		if err != nil {
			return fmt.Errorf("cannot set %s of overlayfs to %s: %w%s", d[0], d[1], err, fsLog(fsfd))
		}
	}
	options := append([][2]string{{"source", "overlay"}}, overlayFlags...)
	if o.label != "" {
		options = append(options, [2]string{"context", o.label})
	}
	for _, f := range options {
		if err := unix.FsconfigSetString(fsfd, f[0], f[1]); err != nil {
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
	data, err := o.data(o.name, o.name)
	for _, name := range []func(string) (string, error){o.shortName, o.open} {
		if err == nil && len(data) >= os.Getpagesize() {
			data, err = o.data(name, o.shortName)
		}
	}
	if err != nil {
		return err
	}
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are too many for this kernel, Linux 6.8 takes more", len(o.lower))
	}
	if err := unix.Mount("overlay", o.target, "overlay", 0, data); err != nil {
		return fmt.Errorf("cannot mount an overlayfs of %d layers: %w", len(o.lower), err)
	}
	return nil
}

// data are all options as mount(2) takes them, with the names of layers and of the other
// directories.
func (o *overlay) data(layer, other func(dir string) (string, error)) (string, error) {
	lower, data := "", "volatile"
	for _, d := range o.dirs() {
		if d[0] == lowerKey {
			name, err := layer(d[1])
			if err != nil {
				return "", err
			}
			lower += ":" + name
			continue
		}
		name, err := other(d[1])
		if err != nil {
			return "", err
		}
		data += "," + d[0] + "=" + name
	}
	data += ",lowerdir=" + strings.TrimPrefix(lower, ":")
	for _, f := range overlayFlags {
		data += "," + f[0] + "=" + f[1]
	}
	if o.label != "" {
		data += fmt.Sprintf(",context=%q", o.label) // a level has commas
	}
	return data, nil
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
