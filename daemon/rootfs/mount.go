package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

// ErrBusy says that something else is mounted at the target.
var ErrBusy = errors.New("something else is mounted there")

// Mount mounts the layers (the lowest first; none is an empty root) at target,
// with a writable layer in rw/upper and rw/work, which are made. If that is
// mounted there already, nothing happens.
//
// With an IDMap, nil being none, who owns a file in a layer owns it in the user
// namespace. The layers stay as they are; the writable one holds the ids of the
// host.
func (s *Store) Mount(ctx context.Context, diffIDs []digest.Digest, rw, target string, m *IDMap) error {
	err := ctx.Err()
	if err == nil {
		err = s.mount(diffIDs, rw, target, m)
	}
	if err != nil {
		return fmt.Errorf("cannot mount a root file system on %s: %w", target, err)
	}
	return nil
}

func (s *Store) mount(diffIDs []digest.Digest, rw, target string, m *IDMap) (err error) {
	upper, work := filepath.Join(rw, upperName), filepath.Join(rw, workName)
	switch mounted, err := Mounted(target); {
	case err != nil:
		return err
	case mounted:
		return isOverlay(target, upper)
	}
	diffIDs = distinct(diffIDs)
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
	lower := []string{filepath.Join(layers, emptyName)}
	if len(diffIDs) > 0 {
		lower = nil
	} else if err := s.makeDirs(); err != nil {
		return err
	}
	for _, d := range slices.Backward(diffIDs) {
		if !s.Has(d) {
			return fmt.Errorf("%w: %s", ErrNoLayer, d)
		}
		lower = append(lower, filepath.Join(layers, d.Algorithm().String(), d.Encoded(), diffName))
		if opaque(filepath.Join(s.layerDir(d), diffName)) {
			break // overlayfs does not look for this at a root
		}
	}
	o := overlay{lower: lower, upper: upper, work: work, target: target}
	defer o.close()
	err = o.mountNew()
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, errNoAppend) {
		err = o.mountClassic()
	}
	return err
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
type overlay struct {
	lower       []string // the highest first
	upper, work string
	target      string
	fds         map[string]int // by path, see short; closed by close
}

var overlayFlags = [][2]string{{"index", "off"}, {"metacopy", "off"}}

func (o *overlay) close() {
	for _, fd := range o.fds {
		unix.Close(fd)
	}
}

// short gives a name of a directory that is shorter, good until close: an fd in
// the place of its beginning. Of its last components it keeps what fits into that
// many bytes: by them mountinfo tells which layer or container it is. It makes
// mountinfo less readable all the same, so it is used where it has to be only.
func (o *overlay) short(path string, keep int) (string, error) {
	cut := max(len(path)-keep, strings.LastIndexByte(path, '\\')+1, 1)
	dir, rest := path, ""
	if i := strings.IndexByte(path[cut:], '/'); i >= 0 {
		dir, rest = path[:cut+i], path[cut+i:]
	}
	fd, ok := o.fds[dir]
	if !ok {
		var err error
		if fd, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return "", fmt.Errorf("cannot open %s: %w", dir, err)
		}
		if o.fds == nil {
			o.fds = map[string]int{}
		}
		o.fds[dir] = fd
	}
	return fmt.Sprintf("%s%d%s", fdPrefix, fd, rest), nil
}

const (
	fdPrefix = "/proc/self/fd/"
	// kept is what short keeps at least: a layer, ALGORITHM/HEX/diff, or ID/upper
	// of a container. With an fd it is shorter than maxString.
	kept = 160
)

// errNoAppend says that the kernel cannot take lower directories one by one
// (Linux 6.8).
var errNoAppend = errors.New("overlayfs has no lowerdir+")

// maxString is the longest value of fsconfig(2), its final NUL included.
const maxString = 256

func (o *overlay) mountNew() error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot open overlayfs (fsopen): %w", err)
	}
	defer unix.Close(fsfd)
	set := func(key, path string) error {
		// A backslash is taken as it is in some of them, and escapes in others.
		if len(path) >= maxString || strings.Contains(path, `\`) {
			if path, err = o.short(path, kept); err != nil {
				return err
			}
		}
		if err := unix.FsconfigSetString(fsfd, key, path); err != nil {
			return fmt.Errorf("cannot set %s of overlayfs to %s: %w%s", key, path, err, fsLog(fsfd))
		}
		return nil
	}
	for i, dir := range o.lower {
		if err := set("lowerdir+", dir); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return errNoAppend
			}
			return err
		}
	}
	if err := set("upperdir", o.upper); err != nil {
		return err
	}
	if err := set("workdir", o.work); err != nil {
		return err
	}
	for _, f := range overlayFlags {
		if err := set(f[0], f[1]); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetString(fsfd, "source", "overlay"); err != nil {
		return fmt.Errorf("cannot set the source of overlayfs: %w", err)
	}
	if err := unix.FsconfigSetFlag(fsfd, "volatile"); err != nil {
		return fmt.Errorf("cannot set volatile of overlayfs: %w%s", err, fsLog(fsfd))
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("cannot make an overlayfs of %d layers with %s: %w%s", len(o.lower), o.upper, err, fsLog(fsfd))
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot make a mount of the overlayfs: %w%s", err, fsLog(fsfd))
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, o.target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot attach the overlayfs: %w", err)
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

// mountClassic is for kernels before 6.8. All options together have to fit a page.
func (o *overlay) mountClassic() error {
	data, err := o.data(func(p string) (string, error) { return escape.Replace(p), nil })
	if err == nil && len(data) >= os.Getpagesize() {
		data, err = o.data(func(p string) (string, error) {
			if p == o.upper { // isOverlay looks for it
				p, err := o.short(p, kept)
				return escape.Replace(p), err
			}
			return o.short(p, 0)
		})
	}
	if err != nil {
		return err
	}
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are too many for this kernel, Linux 6.8 takes more", len(o.lower))
	}
	err = unix.Mount("overlay", o.target, "overlay", 0, data+",volatile")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("overlay", o.target, "overlay", 0, data) // before Linux 5.10
	}
	if err != nil {
		return fmt.Errorf("cannot mount an overlayfs of %d layers with %s: %w", len(o.lower), o.upper, err)
	}
	return nil
}

// escape is what overlayfs wants in a path of a classic mount.
var escape = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)

func (o *overlay) data(name func(path string) (string, error)) (string, error) {
	names := make([]string, 0, len(o.lower)+2)
	for _, p := range append(slices.Clone(o.lower), o.upper, o.work) {
		n, err := name(p)
		if err != nil {
			return "", err
		}
		names = append(names, n)
	}
	n := len(o.lower)
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(names[:n], ":"), names[n], names[n+1])
	for _, f := range overlayFlags {
		data += "," + f[0] + "=" + f[1]
	}
	return data, nil
}

// isOverlay says nil if the mount at target is an overlay on upper.
func isOverlay(target, upper string) error {
	target, err := filepath.EvalSymlinks(target)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(target))
	if err != nil {
		return fmt.Errorf("cannot read the mounts: %w", err)
	}
	for _, m := range mounts {
		for o := range strings.SplitSeq(m.VFSOptions, ",") {
			if shown, ok := strings.CutPrefix(o, "upperdir="); ok && m.FSType == "overlay" && shownAs(unescape(shown), upper) {
				return nil
			}
		}
	}
	return ErrBusy
}

// shownAs says whether overlayfs shows a directory as it was named: in full or as
// short has made it, and maybe escaped for a classic mount.
func shownAs(shown, path string) bool {
	rest, short := strings.CutPrefix(shown, fdPrefix)
	if !short {
		return shown == path || shown == escape.Replace(path)
	}
	rest = strings.TrimLeft(rest, "0123456789")
	return rest != "" && (strings.HasSuffix(path, rest) || strings.HasSuffix(escape.Replace(path), rest))
}

var octal = regexp.MustCompile(`\\[0-7]{3}`)

// unescape undoes what the kernel does to spaces, commas and others in mountinfo.
func unescape(shown string) string {
	return octal.ReplaceAllStringFunc(shown, func(o string) string {
		c, _ := strconv.ParseUint(o[1:], 8, 8)
		return string([]byte{byte(c)})
	})
}

// Mounted says whether target is a mount point. It does not follow a symbolic
// link at its end; what does not exist is not mounted.
func Mounted(target string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot look at %s: %w", target, err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 { // before Linux 5.8
		return mountinfo.Mounted(target)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
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
