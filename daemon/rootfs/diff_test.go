package rootfs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// What a container has done to its root is the same after Diff and Restore, below another
// mount of the same layers.
func TestDiffAndRestore(t *testing.T) {
	needRoot(t)
	s := open(t, t.TempDir())
	layer := apply(t, s, e{name: "d/", typ: '5', mode: 0o751}, e{name: "d/gone", body: "x"},
		e{name: "d/kept", body: "x"},
		e{name: "hidden/", typ: '5'}, e{name: "hidden/a", body: "x"})
	rw := t.TempDir()
	root := filepath.Join(t.TempDir(), "root")
	err := errors.Join(os.Mkdir(root, 0o700), s.Mount(t.Context(), []digest.Digest{layer}, rw, root, nil, ""))
	check(t, err)
	const work = `set -e; cd "$1"; umask 0; rm d/gone; echo more >>d/kept; rm -r hidden; mkdir -m 2750 hidden
		echo b >hidden/b; chown 12:34 hidden/b; chmod 4755 hidden/b; ln hidden/b hidden/c; ln -s /nowhere link
		mkfifo -m 640 fifo; mknod null c 1 3; touch -d '2001-02-03 04:05:06.7' d/kept
		truncate -s 100000 hole
		truncate -s 8G large
		printf begin | dd of=large conv=notrunc 2>/dev/null
		printf end | dd of=large bs=1 seek=5000000000 conv=notrunc 2>/dev/null
		truncate -s 3M large-$(printf %0200d 1)`
	if out, err := exec.Command("sh", "-c", work, "sh", root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check(t, unix.Lsetxattr(filepath.Join(root, "d/kept"), "user.a", []byte("\x00b"), 0))
	if fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); err == nil {
		unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(root, "d/s")})
		unix.Close(fd)
	}
	var diff bytes.Buffer
	check(t, Diff(t.Context(), rw, &diff, DefaultLimits))
	if diff.Len() > 1<<20 {
		t.Errorf("the holes take %d bytes", diff.Len())
	}
	os.Remove(filepath.Join(root, "d/s")) // a tar archive has no sockets

	rw2, root2 := t.TempDir(), filepath.Join(t.TempDir(), "root")
	// As a daemon that was killed leaves it.
	err = os.MkdirAll(filepath.Join(rw2, upperName+trashSuffix, "1"), 0o700)
	check(t, err)
	err = errors.Join(os.Mkdir(root2, 0o700), s.Restore(t.Context(), []digest.Digest{layer}, rw2, &diff),
		s.Mount(t.Context(), []digest.Digest{layer}, rw2, root2, nil, ""))
	check(t, err)
	t.Cleanup(func() { Unmount(root); Unmount(root2) })
	const look = `cd "$1" && find . ! -path ./d -printf '%p %y %m %U:%G %s %l %n %T@\n' | sort
		cat d/kept hidden/*; sha256sum large-*
		dd if=large bs=4096 count=1 skip=1220703 2>/dev/null | sha256sum
		head -c 10 large; du -k large | sed 's/\t.*//'
		stat -c '%t %T %a' null d
		ls -i hidden | cut -d' ' -f1 | uniq | wc -l
		getfattr -d -e hex d/kept 2>/dev/null; true`
	want, err1 := exec.Command("sh", "-c", look, "sh", root).CombinedOutput()
	got, err2 := exec.Command("sh", "-c", look, "sh", root2).CombinedOutput()
	if err1 != nil || err2 != nil || !bytes.Equal(want, got) {
		t.Errorf("%v, %v: the root was\n%s\nand is\n%s", err1, err2, want, got)
	}
	var attr [8]byte
	n, err := unix.Lgetxattr(filepath.Join(root2, "d/kept"), "user.a", attr[:])
	if err != nil || string(attr[:n]) != "\x00b" {
		t.Errorf("the attribute is %q, %v", attr[:max(n, 0)], err)
	}
	if err := s.Restore(t.Context(), []digest.Digest{layer}, rw2, &diff); err == nil {
		t.Error("a writable layer was restored on top of another one")
	}
}

func holed(path string, size int64) error {
	return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
}

// A file of too many pieces is refused: whoever reads the archive keeps a list of them.
func TestExtents(t *testing.T) {
	const pieces = 10
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	check(t, err)
	defer f.Close()
	for i := int64(0); err == nil && i < pieces; i++ {
		_, err = f.WriteAt([]byte("x"), i<<20)
	}
	var st unix.Stat_t
	check(t, errors.Join(err, f.Sync(), unix.Fstat(int(f.Fd()), &st)))
	if list, err := extents(f, &st, pieces); err != nil || len(list) != pieces || list[1].at != 1<<20 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := extents(f, &st, pieces-1); !errors.Is(err, ErrNoDiff) {
		t.Errorf("too many: %v", err)
	}
}

// What a layer cannot say, or would say otherwise, is refused, and so is too much.
func TestDiffRefuses(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		make   func(upper string) error
		limits Limits
		want   error
	}{
		"a name that removes": {func(upper string) error { return os.WriteFile(upper+"/.wh.a", nil, 0o600) }, DefaultLimits,
			ErrNoDiff},
		"a renamed directory": {func(upper string) error {
			return errors.Join(os.Mkdir(upper+"/d", 0o700), unix.Setxattr(upper+"/d", redirectXattr, []byte("/old"), 0))
		}, DefaultLimits, ErrNoDiff},
		"too many": {func(upper string) error { return os.Mkdir(upper+"/d", 0o700) }, Limits{Bytes: 1, Entries: 1}, nil},
		"a hole that is too much": {func(upper string) error { return holed(upper+"/f", 1<<20) },
			Limits{Bytes: 1<<20 - 1, Entries: 9}, kind.Exhausted},
		"too much": {func(upper string) error { return os.WriteFile(upper+"/f", []byte("xx"), 0o600) },
			Limits{Bytes: 1, Entries: 9}, nil},
	} {
		rw := t.TempDir()
		upper := filepath.Join(rw, upperName)
		check(t, errors.Join(os.Mkdir(upper, 0o700), c.make(upper)))
		var b bytes.Buffer
		if err := Diff(t.Context(), rw, &b, c.limits); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
