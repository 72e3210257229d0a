package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
)

const hostUID, hostGID, mappedIDs = 200000, 300000, 1000

// newUserns is a user namespace for as long as the test runs.
func newUserns(t testing.TB) *IDMap {
	t.Helper()
	needRoot(t)
	var u unix.Utsname
	check(t, unix.Uname(&u))
	var major, minor int
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	if major < 6 || major == 6 && minor < 3 {
		t.Skipf("needs Linux 6.3, this is %d.%d", major, minor)
	}
	c := exec.Command("sleep", "3600")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 syscall.CLONE_NEWUSER,
		UidMappings:                []syscall.SysProcIDMap{{HostID: hostUID, Size: mappedIDs}},
		GidMappings:                []syscall.SysProcIDMap{{HostID: hostGID, Size: mappedIDs}},
		GidMappingsEnableSetgroups: true,
	}
	check(t, c.Start())
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	return &IDMap{
		Userns:  fmt.Sprintf("/proc/%d/ns/user", c.Process.Pid),
		HostUID: hostUID,
		UIDs:    mappedIDs,
		HostGID: hostGID,
		GIDs:    mappedIDs,
	}
}

// mountMapped is mount for a user namespace. The way to the target is open to
// everybody.
func mountMapped(t testing.TB, s *Store, m *IDMap, layers ...digest.Digest) (rw, target string) {
	t.Helper()
	rw, err := os.MkdirTemp("", "rootfs-idmap-")
	check(t, err)
	target = filepath.Join(rw, "rootfs")
	t.Cleanup(func() {
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
		os.RemoveAll(rw)
	})
	check(t, errors.Join(os.Chmod(rw, 0o711), os.Mkdir(target, 0o711)))
	check(t, s.Mount(t.Context(), layers, rw, target, m, ""))
	return rw, target
}

// as runs a shell command in a directory as a user of the user namespace.
func as(t testing.TB, m *IDMap, uid int, dir, command string) (string, error) {
	t.Helper()
	c := exec.Command("nsenter", "--user="+m.Userns, "--mount=/proc/self/ns/mnt",
		fmt.Sprintf("--setuid=%d", uid), fmt.Sprintf("--setgid=%d", uid), "sh", "-c", "cd "+dir+" && "+command)
	out, err := c.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func TestMappedOwners(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	m := newUserns(t)
	caps := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service=ep
	base := apply(t, s,
		e{name: "./", typ: tar.TypeDir, mode: 0o755},
		e{name: "root", body: "r", mode: 0o600},
		e{name: "user", body: "u", mode: 0o600, uid: 7},
		e{name: "stranger", body: "s", mode: 0o644, uid: mappedIDs + 5},
		e{name: "setuid", body: "#!", mode: 0o6755, uid: 7},
		e{name: "caps", body: "c", mode: 0o755, pax: map[string]string{"SCHILY.xattr.security.capability": caps}},
		e{name: "xattr", body: "x", pax: map[string]string{"SCHILY.xattr.user.name": "value"}},
		e{name: "one", body: "1", uid: 7}, e{name: "two", typ: tar.TypeLink, link: "one", uid: 7},
		e{name: "null", typ: tar.TypeChar, mode: 0o666, dev: [2]int64{1, 3}},
		e{name: "fifo", typ: tar.TypeFifo, uid: 7},
		e{name: "link", typ: tar.TypeSymlink, link: "one", uid: 7},
		e{name: "gone", body: "g"}, e{name: "dir/", typ: tar.TypeDir, uid: 7, mode: 0o1777}, e{name: "dir/gone",
			body: "g"},
		e{name: "opaque/", typ: tar.TypeDir}, e{name: "opaque/gone", body: "g"},
	)
	// dir is made up here, and has to look as below.
	top := apply(t, s, e{name: ".wh.gone"}, e{name: "dir/.wh.gone"}, e{name: "dir/new", body: "n", uid: 8},
		e{name: "opaque/", typ: tar.TypeDir, uid: 9}, e{name: "opaque/.wh..wh..opq"}, e{name: "alone/x", body: "x"})
	rw, root := mountMapped(t, s, m, base, top)

	for name, want := range map[string]string{
		".": "0:0 755", "root": "0:0 600", "user": "7:7 600", "stranger": "65534:65534 644",
		"setuid": "7:7 6755", "null": "0:0 666", "fifo": "7:7 644", "link": "7:7 777",
		"dir": "7:7 1777", "dir/new": "8:8 644", "opaque": "9:9 755", "alone": "0:0 755", "alone/x": "0:0 644",
	} {
		if got, err := as(t, m, 0, root, "stat -c '%u:%g %a' "+name); got != want || err != nil {
			t.Errorf("%s looks like %q from inside (%v), want %q", name, got, err, want)
		}
	}
	if st := lstat(t, root, "user"); st.Uid != hostUID+7 || st.Gid != hostGID+7 {
		t.Errorf("a file of 7 is of %d:%d for the host", st.Uid, st.Gid)
	}
	for _, name := range []string{"gone", "dir/gone", "opaque/gone"} {
		gone(t, root, name)
	}

	for _, c := range []struct {
		uid     int
		command string
		works   bool
	}{
		{0, "cat root user", true},
		{7, "cat user && ! cat root", true},
		{0, "echo >stranger", false},
		{0, "rm stranger || chown 0 stranger", false}, // what has no owner inside cannot be copied up
		{7, "test $(stat -c %h one) = 2 && cmp one two && echo more >>one", true},
		{0, "chown 5:6 root && stat -c %u:%g root | grep -qx 5:6", true},
		{0, fmt.Sprintf("chown %d root", mappedIDs), false},
		{
			0,
			"echo >new && mkdir -m 700 newdir && chown 7 newdir && mv dir/new newdir && rm xattr && ln one newdir/three",
			true,
		},
		{7, "cat newdir/new", true},
		{0, "mknod n c 1 3", false},
		{0, "getfattr -n user.name xattr 2>/dev/null || true", true},
		{0, "rm -r opaque && mkdir opaque && touch opaque/a", true},
		{0, "chmod u+x caps", true}, // copied up, with its attribute
	} {
		if out, err := as(t, m, c.uid, root, c.command); (err == nil) != c.works {
			t.Errorf("%d: %s: %v: %s", c.uid, c.command, err, out)
		}
	}
	upper := filepath.Join(rw, upperName)
	for name, want := range map[string][2]uint32{
		".":          {0, 0},
		"root":       {5, 6},
		"new":        {0, 0},
		"newdir":     {7, 0},
		"newdir/new": {8, 8},
		"one":        {7, 7},
		"dir":        {7, 7},
	} {
		if st := lstat(t, upper, name); st.Uid != hostUID+want[0] || st.Gid != hostGID+want[1] {
			t.Errorf("%s is of %d:%d on the disk, want %v mapped", name, st.Uid, st.Gid, want)
		}
	}
	// Capabilities count in the user namespace alone: its root is in the attribute.
	b := make([]byte, 64)
	n, err := unix.Lgetxattr(filepath.Join(upper, "caps"), "security.capability", b)
	if err != nil || n != 24 || b[3] != 3 || b[4] != 0 || b[5] != 4 ||
		uint32(b[20])|uint32(b[21])<<8|uint32(b[22])<<16 != hostUID {
		t.Errorf("the capability of a file that was copied up is %x, %v", b[:n], err)
	}
	// The layers are as they were.
	diff := filepath.Join(s.layerDir(base), diffName)
	for name, uid := range map[string]uint32{"root": 0, "user": 7, "stranger": mappedIDs + 5, "one": 7, "xattr": 0} {
		if st := lstat(t, diff, name); st.Uid != uid {
			t.Errorf("%s of the layer is of %d now, want %d", name, st.Uid, uid)
		}
	}
	if got := read(t, diff, "one"); got != "1" {
		t.Errorf("the layer has changed: %q", got)
	}
}

// A program with capabilities has them in the user namespace.
func TestMappedCapabilities(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	m := newUserns(t)
	program, err := os.ReadFile("/bin/cat")
	check(t, err)
	caps := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	// With their own name, for a program that is many of them.
	layer := apply(t, s, e{
		name: "caps/cat",
		body: string(program),
		mode: 0o755,
		pax:  map[string]string{"SCHILY.xattr.security.capability": caps},
	},
		e{name: "setuid/cat", body: string(program), mode: 0o4755, uid: 9})
	_, root := mountMapped(t, s, m, layer)
	if got, err := as(
		t,
		m,
		7,
		root,
		"caps/cat /proc/self/status | grep CapEff",
	); !strings.HasSuffix(got, "0000000000000400") {
		t.Errorf("a program with cap_net_bind_service has %s, %v", got, err)
	}
	if got, err := as(
		t,
		m,
		7,
		root,
		"setuid/cat /proc/self/status | grep Uid",
	); strings.Join(strings.Fields(got), " ") != "Uid: 7 9 9 9" {
		t.Errorf("a program of 9 with the setuid bit, run by 7, is %s, %v", got, err)
	}
}

// Many mounts, with many mappings, use one copy of a layer, and nothing but the
// roots is mounted afterwards.
func TestMappedMounts(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	m := newUserns(t)
	var layers []digest.Digest
	for i := range 150 {
		layers = append(layers, apply(t, s, e{name: fmt.Sprintf("file%d", i), body: "x", uid: i}))
	}
	before := s.Usage()
	for range 3 {
		rw, root := mountMapped(t, s, m, layers...)
		if got, err := as(t, m, 0, root, "ls | wc -l; stat -c %u file149"); got != "150\n149" || err != nil {
			t.Errorf("inside: %q, %v", got, err)
		}
		gone(t, root+mappedSuffix)
		b, err := os.ReadFile("/proc/self/mountinfo")
		check(t, err)
		if !strings.Contains(string(b), "="+root+mappedSuffix+"/") {
			t.Error("the mount table has no real paths of the layers")
		}
		if n := strings.Count(string(b), " "+rw+"/"); n != 1 {
			t.Errorf("%d mounts below %s, want 1", n, rw)
		}
		if err := s.Mount(t.Context(), layers, rw, root, m, ""); !errors.Is(err, ErrBusy) {
			t.Errorf("once more: %v", err)
		}
	}
	_, root := mountMapped(t, s, m) // no layers
	if got, err := as(t, m, 0, root, "touch x && stat -c %u . x"); got != "0\n0" || err != nil {
		t.Errorf("an empty root: %q, %v", got, err)
	}
	if after := s.Usage(); after != before {
		t.Errorf("the layers take %v, and took %v", after, before)
	}
}

// A process that is killed in the middle leaves the layers attached: Mount goes
// on from there, and Unmount removes them.
func TestMappedLeftovers(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	m := newUserns(t)
	layer := apply(t, s, e{name: "file", body: "x"})
	rw := t.TempDir()
	target := filepath.Join(rw, "rootfs")
	check(t, os.Mkdir(target, 0o711))
	t.Cleanup(func() { Unmount(target) })
	left := func() {
		t.Helper()
		check(t, attachMapped(s.dir, target+mappedSuffix, m.Userns))
	}
	left()
	if err := os.WriteFile(filepath.Join(target+mappedSuffix, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing through the attached layers: %v, want read-only", err)
	}
	left()
	check(t, s.Mount(t.Context(), []digest.Digest{layer}, rw, target, m, ""))
	gone(t, target+mappedSuffix)
	read(t, target, "file")
	left()
	check(t, Unmount(target))
	gone(t, target+mappedSuffix)
	if on, err := mounts.Mounted(target); on || err != nil {
		t.Errorf("still mounted: %v, %v", on, err)
	}
	read(t, s.layerDir(layer), diffName, "file")
	absent := []digest.Digest{"sha256:" + digest.Digest(strings.Repeat("0", 64))}
	if err := s.Mount(t.Context(), absent, rw, target, m, ""); !errors.Is(err, ErrNoLayer) {
		t.Errorf("a layer that is not there: %v", err)
	}
	gone(t, target+mappedSuffix)
	net := &IDMap{Userns: "/proc/self/ns/net"}
	if err := s.Mount(t.Context(), []digest.Digest{layer}, rw, target, net, ""); err == nil {
		t.Error("no user namespace, and mounted")
	}
	gone(t, target+mappedSuffix)
}

func TestMappedClassicMount(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	m := newUserns(t)
	layer := apply(t, s, e{name: "file", body: "x", uid: 7})
	rw := t.TempDir()
	target, layers := filepath.Join(rw, "rootfs"), filepath.Join(rw, "rootfs"+mappedSuffix)
	upper, work := filepath.Join(rw, upperName), filepath.Join(rw, workName)
	for _, dir := range []string{target, upper, work} {
		check(t, os.Mkdir(dir, 0o755))
	}
	t.Cleanup(func() { Unmount(target) })
	check(t, attachMapped(s.dir, layers, m.Userns))
	lower := []string{filepath.Join(layer.Algorithm().String(), layer.Encoded(), diffName)}
	o := newOverlay(layers, lower, rw, target)
	defer o.close()
	check(t, o.mountClassic())
	check(t, detach(layers))
	if st := lstat(t, target, "file"); st.Uid != hostUID+7 {
		t.Errorf("the file is of %d, want %d", st.Uid, hostUID+7)
	}
}

func TestCheckMapped(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "layers"))
	ns, err := os.Open(newUserns(t).Userns)
	check(t, err)
	defer ns.Close()
	if err := s.CheckMapped(ns); err != nil {
		t.Error(err)
	}
	self, err := os.Open("/proc/self/ns/user")
	check(t, err)
	defer self.Close()
	if err := s.CheckMapped(self); err == nil { // the kernel takes any but the first one
		t.Error("no error for the host's own user namespace")
	}
}
