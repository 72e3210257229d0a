package session

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// pair is two ends of a connection.
func pair(t *testing.T) (all [2]*net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must.Succeed(t, err)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "session")
		c, err := net.FileConn(f)
		f.Close()
		must.Succeed(t, err)
		t.Cleanup(func() { c.Close() })
		all[i] = c.(*net.UnixConn)
	}
	return all
}

// Any text of an error reaches the peer, as much of it as there is room for.
func TestLongErrors(t *testing.T) {
	for _, piece := range []string{"x", "\x01", "\xff", "<", "é", "\U0001f600"} {
		ends := pair(t)
		exit := &Exit{Code: 7, Reason: TimedOut, Error: strings.Repeat(piece, 5000)}
		must.Succeed(t, Send(ends[0], Message{Exit: exit}))
		m, _, err := Receive(ends[1])
		if err != nil || m.Exit == nil || m.Exit.Code != 7 || m.Exit.Reason != TimedOut || len(m.Exit.Error) < 1000 {
			t.Errorf("of %q: received %+v, %v", piece, m.Exit, err)
		}
	}
}

// The last word of a peer arrives, although it has left ours unread.
func TestLastWord(t *testing.T) {
	ends := pair(t)
	must.Succeed(t, Send(ends[0], Message{Exit: &Exit{Code: 7}}))
	must.Succeed(t, Send(ends[1], Message{Hangup: true}))
	ends[1].Close()
	if m, _, err := Receive(ends[0]); err != nil || !m.Hangup {
		t.Errorf("received %+v, %v", m, err)
	}
	if _, _, err := Receive(ends[0]); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}
