package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// What is mounted into a container from a place that it can write, or that its
// image has made, is never named by a path there: a link on the way would lead
// the OCI runtime to a directory of the host, or what is mounted first would
// cover the way. It is opened inside its root, and the descriptor is mounted on
// a path of ours, before anything of the container is mounted.

// maxVolumes is how many volumes an image may declare.
const maxVolumes = 1000

// maxVolumeDirs bounds the directories on the ways to all volumes that are missing in the
// image, made or found. A name, or a link that it leads to, has up to 2000.
const maxVolumeDirs = 10_000

// Bind mounts the file or directory name of the directory root, in which all
// links are resolved, on the path at, which is made. Unmount(at) ends it. If name
// is not there, or is something else, the error is of the kind kind.Invalid.
func Bind(root, name, at string) error {
	f, err := beneath.Open(root, name, beneath.FileOrDirectory, 0)
	if err != nil {
		return kind.As(kind.Invalid, err)
	}
	defer f.Close()
	return bind(f, at)
}

func bind(f *os.File, at string) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.Mkdir(at, 0o711)
	} else {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make a place for a mount: %w", err)
	}
	return mountAgain(fmt.Sprint(fdPrefix, f.Fd()), at)
}

// Volumes makes the directories that an image declares as volumes, where they are
// missing, in its mounted root; these belong to uid and gid, as the host sees
// them. What is there stays as it is, a file too.
//
// Those that need it are also mounted, below the directory at, which is made:
// UnmountBelow(at) ends it. The result has these paths of the host, by the path in
// the container, in which no link of the image is left.
//
// use says of a path in the container whether its directory is wanted and whether
// it has to be mounted. It is asked for what the image says, and for the result.
// A volume that is impossible is an error of the kind kind.Invalid.
func Volumes(ctx context.Context, root string, names []string, uid, gid int, at string,
	use func(dst string) (wanted, mounted bool)) (map[string]string, error) {
	if len(names) > maxVolumes {
		return nil, kind.Errorf(kind.Invalid, "the image declares %d volumes, and %d are possible", len(names),
			maxVolumes)
	}
	sources := map[string]string{}
	dirs := volumeDirs{ctx: ctx, uid: uid, gid: gid, left: maxVolumeDirs}
	for i, name := range slices.Sorted(slices.Values(names)) {
		if wanted, _ := use(path.Join("/", name)); !wanted {
			continue
		}
		f, err := dirs.open(root, name)
		if err != nil {
			return nil, fmt.Errorf("cannot make volume %.200q of the image: %w", name, err)
		}
		err = mountVolume(root, f, filepath.Join(at, strconv.Itoa(i)), sources, use)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("cannot mount volume %.200q of the image: %w", name, err)
		}
	}
	return sources, nil
}

// mountVolume mounts a volume on source if that is due.
func mountVolume(root string, volume *os.File, source string, sources map[string]string,
	use func(dst string) (wanted, mounted bool)) error {
	dst, err := pathIn(root, volume)
	if err != nil {
		return err
	}
	if _, mounted := use(dst); !mounted || sources[dst] != "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(source), 0o711); err != nil {
		return err
	}
	sources[dst] = source
	return bind(volume, source)
}

// volumeDirs makes the directories of volumes.
type volumeDirs struct {
	ctx      context.Context
	uid, gid int
	left     int // so many more may be on the ways
}

// open opens a volume, after making its directory if it is missing.
func (d *volumeDirs) open(root, name string) (*os.File, error) {
	if err := d.ctx.Err(); err != nil {
		return nil, err
	}
	f, err := beneath.Open(root, name, beneath.FileOrDirectory, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, kind.As(kind.Invalid, err)
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	err = beneath.MkdirAll(dir, name, func(parent int, base, _ string) error {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if d.left--; d.left < 0 {
			return fmt.Errorf("the volumes that are missing have more than %d directories", maxVolumeDirs)
		}
		return mkdirOwned(parent, base, d.uid, d.gid)
	})
	if err == nil {
		f, err = beneath.Open(root, name, beneath.FileOrDirectory, 0)
	}
	return f, kind.As(kind.Invalid, err)
}

// mkdirOwned makes a directory unless something has its name.
func mkdirOwned(parent int, base string, uid, gid int) error {
	if err := unix.Mkdirat(parent, base, 0o755); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return errors.Join(unix.Fchown(fd, uid, gid), unix.Fchmod(fd, 0o755)) // whatever the umask
}

// pathIn gives the absolute path in root of what is open there.
func pathIn(root string, f *os.File) (string, error) {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return "", err
	}
	at, err := os.Readlink(fmt.Sprint(fdPrefix, f.Fd()))
	if err != nil {
		return "", err
	}
	inside, ok := strings.CutPrefix(at, root)
	if !ok || inside != "" && inside[0] != '/' {
		return "", fmt.Errorf("%s is not in %s", at, root)
	}
	return path.Join("/", inside), nil
}

// UnmountBelow is Unmount for each entry of a directory. One that does not exist
// has none.
func UnmountBelow(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		err = errors.Join(err, Unmount(filepath.Join(dir, e.Name())))
	}
	return err
}
