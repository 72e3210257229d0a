// Package handshake is what a program does that was started by one that waits for it
// to be ready, as shims are. Descriptor 3, if it is a Unix socket, is the launcher's:
//
//	launcher: one byte      you are in your session and cgroup now; go
//	program:  0x00          ready: the lock is held, the socket listens
//	program:  0x01, text    why it could not become ready
//
// End of file before the first byte ends the program, with nothing left behind.
package handshake

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Launcher is the launcher of this program. Of one that was started by hand it is nil,
// and everything succeeds.
type Launcher struct{ socket *os.File }

// Take takes the launcher's descriptor, so that no child gets it. It is for the
// beginning of the program, when nothing else can have that number.
func Take() *Launcher {
	const fd = 3
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return nil
	}
	unix.CloseOnExec(fd)
	return &Launcher{os.NewFile(fd, "launcher")}
}

// Await waits for the launcher's byte. false: the launcher has gone.
func (l *Launcher) Await() (bool, error) {
	if l == nil {
		return true, nil
	}
	var b [1]byte
	n, err := l.socket.Read(b[:])
	if n == 1 {
		return true, nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return false, nil
	}
	return false, fmt.Errorf("cannot hear the launcher: %w", err)
}

// Ready says that the program is ready. The launcher may have died meanwhile.
func (l *Launcher) Ready() { l.answer([]byte{0}) }

// Fail says why the program cannot become ready. After Ready it says nothing.
func (l *Launcher) Fail(err error) { l.answer(append([]byte{1}, err.Error()...)) }

func (l *Launcher) answer(b []byte) {
	if l == nil || l.socket == nil {
		return
	}
	l.socket.Write(b)
	l.socket.Close()
	l.socket = nil
}
