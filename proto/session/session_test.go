package session

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// pair is two ends of a connection.
func pair(t *testing.T) (all [2]*net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "session")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		all[i] = c.(*net.UnixConn)
	}
	return all
}

// The last word of a peer arrives, although it has left ours unread.
func TestLastWord(t *testing.T) {
	ends := pair(t)
	if err := Send(ends[0], Message{Exit: &Exit{Code: 7}}); err != nil {
		t.Fatal(err)
	}
	if err := Send(ends[1], Message{Hangup: true}); err != nil {
		t.Fatal(err)
	}
	ends[1].Close()
	if m, _, err := Receive(ends[0]); err != nil || !m.Hangup {
		t.Errorf("received %+v, %v", m, err)
	}
	if _, _, err := Receive(ends[0]); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}
