package rundir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestExitIsWrittenOnce(t *testing.T) {
	dir := t.TempDir()
	first, err := PrepareExit(dir, true)
	check(t, err)
	second, err := PrepareExit(dir, false)
	check(t, err)
	check(t, first.Commit(Exit{Code: 1, Message: strings.Repeat("\x00", 10000)}))
	if err := second.Commit(Exit{Code: 2}); !errors.Is(err, ErrExists) {
		t.Errorf("second commit: %v", err)
	}
	if e, err := ReadExitIn(dir); err != nil || e.Code != 1 {
		t.Errorf("got %+v, %v", e, err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

// What is no exit record of the container is not taken for one, and gives way to it.
func TestExitInThePlaceOfAnother(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"of another container": func(path string) error { return record.WriteOf(path, "another", Exit{}, false) },
		"damaged":              func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) },
		"a FIFO":               func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"a directory":          func(path string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o700) },
	} {
		dir := t.TempDir()
		check(t, put(filepath.Join(dir, ExitName)))
		if _, err := ReadExitIn(dir); !errors.Is(err, record.ErrDamaged) {
			t.Errorf("%s: read: %v", name, err)
		}
		e, err := PrepareExit(dir, false)
		if err == nil {
			err = e.Commit(Exit{Code: 3})
		}
		if got, rerr := ReadExitIn(dir); err != nil || rerr != nil || got.Code != 3 {
			t.Errorf("%s: %v; %+v, %v", name, err, got, rerr)
		}
	}
}

// The room for the record is taken beforehand, so a file system that fills up
// while the container runs does not lose its end.
func TestExitOnAFullFileSystem(t *testing.T) {
	must.BeRoot(t)
	dir := t.TempDir()
	check(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	defer syscall.Unmount(dir, 0)
	e, err := PrepareExit(dir, true)
	check(t, err)
	err = os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 1<<20), 0o600)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling: %v", err)
	}
	if err := record.Write(filepath.Join(dir, "other.json"), 1, false); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("another record: %v", err)
	}
	// The message is of a container's choosing; each of these takes six characters in JSON.
	check(t, e.Commit(Exit{Code: 42, Message: "it: " + strings.Repeat("<", 5000)}))
	if got, err := ReadExitIn(dir); err != nil || got.Code != 42 || !strings.HasPrefix(got.Message, "it: <<<") {
		t.Errorf("got %+v, %v", got, err)
	}
}

// A name more must not take an inode more.
func TestExitWithoutInodes(t *testing.T) {
	must.BeRoot(t)
	dir := t.TempDir()
	check(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,nr_inodes=64"))
	defer syscall.Unmount(dir, 0)
	e, err := PrepareExit(dir, true)
	check(t, err)
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling: %v", err)
	}
	check(t, e.Commit(Exit{Code: 42}))
	if got, err := ReadExitIn(dir); err != nil || got.Code != 42 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestLock(t *testing.T) {
	d := Dir(t.TempDir())
	held := func(want bool) {
		t.Helper()
		if got, err := d.Held(); err != nil || got != want {
			t.Errorf("held: %v, %v, want %v", got, err, want)
		}
	}
	held(false)
	f, err := d.Lock()
	check(t, err)
	held(true)
	if _, err := d.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("second lock: %v", err)
	}
	// A probe, and a child that got all that children get, change nothing.
	check(t, exec.Command("true").Run())
	held(true)
	child := exec.Command("sleep", "60")
	check(t, child.Start())
	defer func() { child.Process.Kill(); child.Wait() }()
	f.Close()
	held(false)
}

// A socket address holds 107 bytes; a run directory may be much deeper.
func TestDialFromADeepDirectory(t *testing.T) {
	deep := filepath.Join(t.TempDir(), strings.Repeat("d/", 60), strings.Repeat("x", 64))
	check(t, os.MkdirAll(deep, 0o700))
	d := Dir(deep)
	if err := os.WriteFile(d.Path(SocketName), nil, 0o600); err != nil { // of a dead shim
		t.Fatal(err)
	}
	l, err := d.Listen()
	check(t, err)
	defer l.Close()
	c, err := d.Dial(t.Context())
	check(t, err)
	c.Close()
	l.Close()
	if _, err := d.Dial(context.Background()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestProcess(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	check(t, cmd.Start())
	p, err := FindProcess(cmd.Process.Pid)
	if err != nil || !p.Alive() {
		t.Fatalf("%+v, %v", p, err)
	}
	other := p
	other.StartTime++
	if other.Alive() {
		t.Error("a process of the same pid passes for another")
	}
	check(t, cmd.Process.Kill())
	// It is a zombie until it is waited for: dead, though its pid is taken.
	must.Come(t, "the end of a killed process", func() bool { return !p.Alive() })
	cmd.Wait()
	if _, err := FindProcess(cmd.Process.Pid); !errors.Is(err, ErrNoProcess) {
		t.Errorf("after the end: %v", err)
	}
	if (Process{}).Alive() {
		t.Error("nobody is alive")
	}
}

// What stands in the place of a lock is an error, whatever it is: neither held
// nor free.
func TestNotALock(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"dangling link": func(path string) error { return os.Symlink("/nowhere/x", path) },
		"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
		"FIFO":          func(path string) error { return syscall.Mkfifo(path, 0o600) },
	} {
		d := Dir(t.TempDir())
		check(t, put(d.Path(LockName)))
		if held, err := d.Held(); err == nil {
			t.Errorf("%s: held %v", name, held)
		}
		if _, err := d.Lock(); err == nil || errors.Is(err, ErrLocked) {
			t.Errorf("%s: lock: %v", name, err)
		}
	}
}

func TestExitWithoutPreparedFile(t *testing.T) {
	dir := t.TempDir()
	e, err := PrepareExit(dir, true)
	check(t, err)
	check(t, os.Remove(e.f.Name()))
	check(t, e.Commit(Exit{Code: 5}))
	if got, err := ReadExitIn(dir); err != nil || got.Code != 5 {
		t.Errorf("got %+v, %v", got, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	gone, err := PrepareExit(dir, false)
	check(t, err)
	os.RemoveAll(dir)
	if err := gone.Commit(Exit{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
}

var check = must.Succeed
