package rootfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const aLabel = "system_u:object_r:container_file_t:s0:c1,c2"

// labelOf is that of a file, a link itself.
func labelOf(t *testing.T, path string) string {
	t.Helper()
	b := make([]byte, 256)
	n, err := unix.Lgetxattr(path, labelAttr, b)
	if errors.Is(err, unix.ENODATA) {
		return ""
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return strings.TrimRight(string(b[:n]), "\x00")
}

// labelDir is a directory on a file system with labels, which no policy forbids to set.
func labelDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Setxattr(dir, labelAttr, []byte(aLabel), 0); err != nil {
		t.Skipf("no label can be set: %v", err)
	}
	return dir
}

// All of a tree is labelled, of whatever kind it is, and nothing that a link leads to.
func TestRelabel(t *testing.T) {
	dir := labelDir(t)
	tree, outside := filepath.Join(dir, "tree"), filepath.Join(dir, "outside")
	check(t, os.MkdirAll(filepath.Join(tree, "a/b/c"), 0o755))
	check(t, os.Mkdir(outside, 0o755))
	check(t, os.WriteFile(filepath.Join(outside, "secret"), nil, 0o600))
	for _, name := range []string{"file", "a/file", "a/b/c/file"} {
		check(t, os.WriteFile(filepath.Join(tree, name), nil, 0o600))
	}
	check(t, os.Symlink(outside, filepath.Join(tree, "a/link")))
	check(t, os.Symlink(filepath.Join(outside, "secret"), filepath.Join(tree, "secret")))
	check(t, unix.Mkfifo(filepath.Join(tree, "fifo"), 0o600))
	check(t, unix.Mknod(filepath.Join(tree, "device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	link := filepath.Join(dir, "link") // to the tree: what is asked for may be a link
	check(t, os.Symlink(tree, link))

	check(t, Relabel(t.Context(), link, aLabel))
	check(t, filepath.WalkDir(tree, func(path string, _ os.DirEntry, err error) error {
		if got := labelOf(t, path); got != aLabel {
			t.Errorf("%s has the label %q", path, got)
		}
		return err
	}))
	for _, path := range []string{outside, filepath.Join(outside, "secret"), link} {
		if got := labelOf(t, path); got != "" {
			t.Errorf("%s, which is outside, has the label %q", path, got)
		}
	}

	// A second time changes nothing, not even a time.
	var before, after unix.Stat_t
	check(t, unix.Stat(filepath.Join(tree, "file"), &before))
	check(t, Relabel(t.Context(), tree, aLabel))
	check(t, unix.Stat(filepath.Join(tree, "file"), &after))
	if before.Ctim != after.Ctim {
		t.Error("a file that has the label is labelled again")
	}
	const another = "system_u:object_r:container_file_t:s0"
	check(t, Relabel(t.Context(), filepath.Join(tree, "file"), another))
	if got := labelOf(t, filepath.Join(tree, "file")); got != another {
		t.Errorf("a file alone has the label %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Relabel(ctx, tree, another); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// A directory that is replaced by a link again and again, as a container can do, never has
// what it leads to labelled.
func TestRelabelRaces(t *testing.T) {
	dir := labelDir(t)
	tree, outside := filepath.Join(dir, "tree"), filepath.Join(dir, "outside")
	swapped, aside := filepath.Join(tree, "swapped"), filepath.Join(tree, "aside")
	check(t, os.MkdirAll(filepath.Join(swapped, "secret"), 0o755))
	check(t, os.MkdirAll(filepath.Join(outside, "secret"), 0o755))
	check(t, os.Symlink(outside, aside))
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, swapped, unix.AT_FDCWD, aside, unix.RENAME_EXCHANGE)
			}
		}
	})
	labels := []string{aLabel, "system_u:object_r:container_file_t:s0"}
	for i := range 500 {
		check(t, Relabel(t.Context(), tree, labels[i%2]))
	}
	close(stop)
	swapping.Wait()
	for _, path := range []string{outside, filepath.Join(outside, "secret")} {
		if got := labelOf(t, path); got != "" {
			t.Fatalf("%s, which is outside, has the label %q", path, got)
		}
	}
}

// A directory of the system that is mounted inside, as in a tree for chroot(8), keeps its labels.
func TestRelabelMounts(t *testing.T) {
	dir := labelDir(t)
	inside := filepath.Join(dir, "dev")
	check(t, os.Mkdir(inside, 0o755))
	if err := unix.Mount("/dev", inside, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(inside, unix.MNT_DETACH)
	const other = "system_u:object_r:container_file_t:s0:c3"
	if err := Relabel(t.Context(), dir, other); err == nil || !strings.Contains(err.Error(), "this is /dev") {
		t.Errorf("a directory of the system was relabelled: %v", err)
	}
	if got := labelOf(t, filepath.Join(inside, "null")); got == other {
		t.Error("/dev/null was relabelled")
	}
}

func TestRelabelRefused(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	check(t, os.Symlink("/usr", link))
	for _, path := range []string{"/", "/etc", "/etc/", "/usr/../etc/.", link, "/var/lib", "/bin", dir + "/none"} {
		if err := CheckRelabel(path); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", path, err)
		}
		if err := Relabel(t.Context(), path, aLabel); !errors.Is(err, kind.Invalid) {
			t.Errorf("%s: %v", path, err)
		}
	}
	check(t, CheckRelabel(dir))

	dir = labelDir(t)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	check(t, err)
	for range maxLabelDepth + 1 {
		check(t, unix.Mkdirat(fd, "d", 0o700))
		below, err := unix.Openat(fd, "d", unix.O_PATH|unix.O_DIRECTORY, 0)
		check(t, err)
		unix.Close(fd)
		fd = below
	}
	unix.Close(fd)
	if err := Relabel(t.Context(), dir, aLabel); err == nil || !strings.Contains(err.Error(), "deep") {
		t.Errorf("a tree without end: %v", err)
	}
}
