package pty

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	creack "github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// open makes a terminal.
func open(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, slave, err := creack.Open()
	must.Succeed(t, err)
	t.Cleanup(func() { master.Close(); slave.Close() })
	return master, slave
}

// send does what an OCI runtime does with --console-socket.
func send(t *testing.T, path string, f *os.File) {
	t.Helper()
	c, err := net.Dial("unix", path)
	must.Succeed(t, err)
	defer c.Close()
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix([]byte(f.Name()), unix.UnixRights(int(f.Fd())), nil); err != nil {
		t.Fatal(err)
	}
}

func TestReceive(t *testing.T) {
	// Longer than a Unix address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 120))
	must.Succeed(t, os.Mkdir(dir, 0o700))
	s, err := Listen(dir, "console.sock")
	must.Succeed(t, err)
	defer s.Close()
	m, slave := open(t)
	send(t, s.Path(), m)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	master, err := s.Receive(ctx)
	must.Succeed(t, err)
	defer master.Close()
	m.Close()
	second, err := descriptor.Dup(master)
	must.Succeed(t, err)
	defer second.Close()
	must.Succeed(t, Resize(second, 91, 37))
	size, err := unix.IoctlGetWinsize(int(slave.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col != 91 || size.Row != 37 {
		t.Errorf("size %+v, %v", size, err)
	}
	slave.WriteString("hello")
	b := make([]byte, 16)
	if n, err := master.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("read %q, %v", b[:n], err)
	}
	// The end of the other side ends a read, and so does closing the master.
	slave.Close()
	if _, err := master.Read(b); !errors.Is(err, unix.EIO) {
		t.Errorf("read after the end: %v", err)
	}
}

// A Reader goes on where a terminal is closed and opened again, and comes to its end only
// where it was told that nobody opens it any more.
func TestReader(t *testing.T) {
	master, slave := open(t)
	must.Succeed(t, descriptor.Lend(master, func(fd int) error { return unix.SetNonblock(fd, true) }))
	second, err := descriptor.Dup(master) // known to the poller, as what Receive gives
	must.Succeed(t, err)
	defer second.Close()
	var ended atomic.Bool
	r := NewReader(second, ended.Load)
	type result struct {
		text string
		err  error
	}
	results := make(chan result)
	go func() {
		for b := make([]byte, 16); ; {
			n, err := r.Read(b)
			// Before the result is told: what is set after that stays.
			second.SetReadDeadline(time.Time{})
			results <- result{string(b[:n]), err}
			if err == io.EOF {
				return
			}
		}
	}()
	for range 20 {
		slave.WriteString("hello")
		if got := <-results; got != (result{"hello", nil}) {
			t.Errorf("read %+v", got)
		}
		name := slave.Name()
		slave.Close()
		select {
		case got := <-results:
			t.Fatalf("read %+v of a terminal that nobody has open", got)
		case <-time.After(time.Millisecond):
		}
		slave, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
		must.Succeed(t, err)
	}
	slave.WriteString("last")
	slave.Close()
	if got := <-results; got != (result{"last", nil}) {
		t.Errorf("read %+v", got)
	}
	second.SetReadDeadline(time.Unix(1, 0))
	if got := <-results; !errors.Is(got.err, os.ErrDeadlineExceeded) {
		t.Errorf("read %+v", got)
	}
	ended.Store(true)
	second.SetReadDeadline(time.Unix(1, 0)) // may be cleared before it is seen
	for got := range results {
		if got.err == io.EOF {
			break
		}
		if !errors.Is(got.err, os.ErrDeadlineExceeded) {
			t.Fatalf("read %+v", got)
		}
	}
	second.Close()
	if _, err := r.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read of a closed file: %v", err)
	}
}

func TestReceiveSomethingElse(t *testing.T) {
	s, err := Listen(t.TempDir(), "console.sock")
	must.Succeed(t, err)
	defer s.Close()
	null, err := os.Open(os.DevNull)
	must.Succeed(t, err)
	defer null.Close()
	send(t, s.Path(), null)
	if f, err := s.Receive(t.Context()); err == nil {
		f.Close()
		t.Error("/dev/null was taken for a terminal")
	}
}

func TestReceiveCancelled(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(dir, "console.sock")
	must.Succeed(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Receive(ctx); err == nil {
		t.Error("no error")
	}
	s.Close()
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
