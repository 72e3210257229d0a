// Package descriptor lends the descriptors of open files. (*os.File).Fd would make a file blocking: to close it would
// not end a read of it any more.
package descriptor

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Lend calls f with the descriptor of an open file, and gives what f returns. The file stays open meanwhile; f must
// neither block nor keep it. os.ErrClosed: it has been closed, and f was not called.
func Lend(file syscall.Conn, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if raw.Control(func(fd uintptr) { err = f(int(fd)) }) != nil {
		return os.ErrClosed
	}
	return err
}

// Dup gives a second file of what is open, close-on-exec; the caller closes it. os.ErrClosed: nothing is open.
func Dup(file *os.File) (*os.File, error) {
	var dup int
	err := Lend(file, func(fd int) (err error) {
		dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot duplicate the descriptor of %s: %w", file.Name(), err)
	}
	return os.NewFile(uintptr(dup), file.Name()), nil
}

// ReadNow reads what is in a pipe or terminal now, whatever its deadline: whoever was stopped
// meanwhile sees that before the data. 0: there is nothing.
func ReadNow(file syscall.Conn, b []byte) (n int) {
	Lend(file, func(fd int) error {
		n, _ = unix.Read(fd, b)
		return nil
	})
	return max(n, 0)
}
