package descriptor

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A second file goes on when the first one is closed, and none of it makes them blocking.
func TestDup(t *testing.T) {
	r, w, err := os.Pipe()
	must.Succeed(t, err)
	defer w.Close()
	dup, err := Dup(r)
	must.Succeed(t, err)
	defer dup.Close()
	err = Lend(dup, func(fd int) error {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		closeOnExec, cerr := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if flags&unix.O_NONBLOCK == 0 || closeOnExec&unix.FD_CLOEXEC == 0 {
			t.Errorf("its flags are %#x and %#x", flags, closeOnExec)
		}
		return errors.Join(err, cerr)
	})
	if err != nil {
		t.Error(err)
	}
	r.Close()
	w.WriteString("x")
	b := make([]byte, 2)
	if n, err := dup.Read(b); n != 1 || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestClosed(t *testing.T) {
	f, err := os.Open(os.DevNull)
	must.Succeed(t, err)
	failed := errors.New("failed")
	if err := Lend(f, func(int) error { return failed }); err != failed {
		t.Errorf("the error became %v", err)
	}
	f.Close()
	if err := Lend(f, func(int) error { panic("called") }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
	if dup, err := Dup(f); dup != nil || !errors.Is(err, os.ErrClosed) {
		t.Errorf("a copy of a closed file: %v, %v", dup, err)
	}
}
