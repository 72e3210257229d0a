package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/sbin:/usr/bin:/bin")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

var eventually = must.Come

func needLoop(t testing.TB) {
	t.Helper()
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: ", err)
	}
}

// A layer is whole after a power cut or it is gone, and then it can be unpacked
// again. One that was marked is whole.
func TestPowerCut(t *testing.T) {
	needRoot(t)
	needLoop(t)
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	run(t, "truncate", "-s", "64M", file)
	run(t, "mkfs.ext4", "-q", file)
	mount := func() { run(t, "mount", "-o", "loop,commit=3600", file, dir) }
	umount := func() {
		eventually(t, "nobody uses the disk", func() bool { return unix.Unmount(dir, 0) == nil })
	}
	mount()
	t.Cleanup(umount)
	root := filepath.Join(dir, "layers")
	body := strings.Repeat("content ", 100_000)
	dropped := 0
	for round := range 6 {
		s := open(t, root)
		marked := apply(t, s, e{name: fmt.Sprint("marked", round), body: body})
		mark := filepath.Join(s.layerDir(marked), syncedName)
		eventually(t, "the mark", func() bool { _, err := os.Stat(mark); return err == nil })
		if round%2 == 1 { // the mark and all before it
			run(t, "sync", "-f", dir)
		}
		b := archive(t, e{name: fmt.Sprint("fresh", round), body: body})
		fresh := digest.FromBytes(b)
		check(t, s.Apply(t.Context(), fresh, bytes.NewReader(b)))
		if round >= 4 { // names and sizes get to the disk by themselves; content follows later, or not
			f, err := os.Open(filepath.Join(s.layerDir(fresh), recordName))
			check(t, err)
			check(t, f.Sync())
			f.Close()
		}
		d, err := os.Open(dir)
		if err == nil {
			err = unix.IoctlSetPointerInt(int(d.Fd()), 0x8004587d, 2) // EXT4_IOC_SHUTDOWN, without the journal
			d.Close()
		}
		if err != nil {
			t.Fatalf("cannot cut the power: %v", err)
		}
		s.Close()
		// As long as another process has a copy of the mounts, because a
		// container is started beside this test, this is the one that was cut.
		eventually(t, "the disk is back", func() bool {
			umount()
			mount()
			probe := filepath.Join(dir, "probe")
			return os.WriteFile(probe, nil, 0o600) == nil && os.Remove(probe) == nil
		})
		// Another boot.
		records, _ := filepath.Glob(filepath.Join(root, "*", "*", recordName))
		for _, path := range records {
			var r layerRecord
			if record.Read(path, &r) == nil {
				r.BootID = "another"
				check(t, record.Write(path, r, false))
			}
		}
		s = open(t, root)
		if round%2 == 1 && !s.Has(marked) {
			t.Errorf("round %d: a layer with its mark on the disk is gone", round)
		}
		for l, name := range map[digest.Digest]string{marked: "marked", fresh: "fresh"} {
			name += fmt.Sprint(round)
			if !s.Has(l) {
				dropped++
				again := archive(t, e{name: name, body: body})
				check(t, s.Apply(t.Context(), l, bytes.NewReader(again)))
			}
			if got := read(t, s.layerDir(l), diffName, name); got != body {
				t.Errorf("round %d: %s has %d bytes that are not its own", round, name, len(got))
			}
			check(t, s.Remove(l))
		}
		s.Close()
		run(t, "sync", "-f", dir)
	}
	t.Logf("%d of 12 layers had to be unpacked again", dropped)
}

// smallDisk mounts an ext4 of its own until the end of the test.
func smallDisk(t *testing.T, size string, mkfs ...string) (dir string) {
	t.Helper()
	needRoot(t)
	needLoop(t)
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	run(t, "truncate", "-s", size, file)
	run(t, "mkfs.ext4", append(mkfs, "-q", file)...)
	run(t, "mount", "-o", "loop", file, dir)
	t.Cleanup(func() {
		eventually(t, "nobody uses the disk", func() bool { return unix.Unmount(dir, 0) == nil })
	})
	return dir
}

// A full disk fails a layer, not the store.
func TestFullDisk(t *testing.T) {
	dir := smallDisk(t, "3M", "-m", "0", "-O", "^has_journal")
	s := open(t, filepath.Join(dir, "layers"))
	kept := apply(t, s, e{name: "kept", body: strings.Repeat("x", 500_000)})
	big := archive(
		t,
		e{name: "a", body: strings.Repeat("a", 1_000_000)},
		e{name: "b", body: strings.Repeat("b", 1_500_000)},
	)
	for range 2 {
		if err := s.Apply(
			t.Context(),
			digest.FromBytes(big),
			bytes.NewReader(big),
		); !errors.Is(err, unix.ENOSPC) || errors.Is(err, ErrBadLayer) {
			t.Fatalf("got %v", err)
		}
		if s.Has(digest.FromBytes(big)) {
			t.Error("half a layer is there")
		}
		empty(t, filepath.Join(dir, "layers", tmpName))
	}
	next := apply(t, s, e{name: "next", body: strings.Repeat("y", 1_000_000)})
	if u := s.Usage(); u.Inodes != 4 {
		t.Errorf("usage %+v", u)
	}
	// To the last byte: what is there can be read, and removed.
	fill := filepath.Join(dir, "fill")
	if err := os.WriteFile(fill, make([]byte, 4<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	s.Close()
	s = open(t, filepath.Join(dir, "layers"))
	if !s.Has(kept) || !s.Has(next) {
		t.Errorf("has %v", s.List())
	}
	if err := s.Remove(next); err != nil {
		t.Errorf("remove on a full disk: %v", err)
	}
	s.Close()
	gone(t, s.layerDir(next))
	if read(t, s.layerDir(kept), diffName, "kept")[:3] != "xxx" {
		t.Error("damaged")
	}
}
