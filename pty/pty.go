// Package pty receives the terminal that an OCI runtime opened for a container, and
// reads it.
package pty

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// Socket is where the OCI runtime sends the master of a terminal
// (--console-socket).
type Socket struct {
	dir  *os.File // open, because Path leads through it; Close closes it
	name string
	l    *net.UnixListener
	path string
}

// Listen makes a console socket of a name in a directory. Close it.
func Listen(directory, name string) (*Socket, error) {
	dir, err := os.Open(directory)
	if err != nil {
		return nil, fmt.Errorf("cannot make a console socket: %w", err)
	}
	// A Unix address holds 107 bytes and the directory's path may be longer.
	// The runtime is another process, so /proc/self would not do.
	s := &Socket{dir: dir, name: name}
	err = descriptor.Lend(dir, func(fd int) error {
		s.path = fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), fd, name)
		return nil
	})
	if err == nil {
		os.Remove(s.path)
		s.l, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.path, Net: "unix"})
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("cannot make a console socket in %s: %w", directory, err)
	}
	return s, nil
}

// Path is what the OCI runtime is given.
func (s *Socket) Path() string { return s.path }

// Close removes the socket. A Receive under way returns.
func (s *Socket) Close() {
	s.l.Close()
	os.Remove(filepath.Join(s.dir.Name(), s.name))
	s.dir.Close()
}

// Receive waits for the runtime to send the master. The file is the caller's;
// its reads fail with EIO while no process has the terminal open: see Reader.
func (s *Socket) Receive(ctx context.Context) (*os.File, error) {
	if d, ok := ctx.Deadline(); ok {
		s.l.SetDeadline(d)
	}
	defer context.AfterFunc(ctx, s.Close)()
	c, err := s.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	fd, err := parseRights(oob[:n])
	if err != nil {
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot receive the terminal: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pty")
	err = descriptor.Lend(f, func(fd int) error {
		_, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		return err
	})
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot receive the terminal: what came is none: %w", err)
	}
	return f, nil
}

func parseRights(oob []byte) (int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, err
	}
	if len(msgs) != 1 {
		return -1, errors.New("the message carries no descriptor")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return -1, err
	}
	if len(fds) != 1 {
		return -1, fmt.Errorf("the message carries %d descriptors", len(fds))
	}
	return fds[0], nil
}

// Collect gives the terminal that run has the OCI runtime make: run is called with
// the path of a console socket. After an error there is none.
func Collect(ctx context.Context, directory, name string, run func(socket string) error) (*os.File, error) {
	s, err := Listen(directory, name)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		master *os.File
		err    error
	}
	received := make(chan result, 1)
	go func() { // ends at the latest when cancel ends Receive
		master, err := s.Receive(ctx)
		received <- result{master, err}
	}()
	if err = run(s.Path()); err != nil {
		cancel()
	}
	r := <-received
	if err == nil {
		return r.master, r.err
	}
	if r.master != nil {
		r.master.Close()
	}
	return nil, err
}

// Reader reads a terminal by its master. EIO says only that no process has the terminal
// open now: one may open it again, as login does, or whoever goes on at /dev/tty. So a
// Read waits for that, until ended says that nobody will. A pipe is read as it is.
type Reader struct {
	master *os.File
	ended  func() bool
}

// NewReader gives a Reader of master, which stays the caller's. ended is called by Read,
// and must not block. Whoever changes its answer ends the Read that waits, by the read
// deadline of master.
func NewReader(master *os.File, ended func() bool) *Reader {
	return &Reader{master: master, ended: ended}
}

// Read is a read of the master, with its deadline. io.EOF: ended says so, and no process
// has the terminal open.
func (r *Reader) Read(b []byte) (n int, err error) {
	raw, err := r.master.SyscallConn()
	if err != nil {
		return 0, err
	}
	failed := raw.Read(func(fd uintptr) bool {
		for err = unix.EINTR; err == unix.EINTR; {
			n, err = unix.Read(int(fd), b)
		}
		return err != unix.EAGAIN && (err != unix.EIO || r.ended())
	})
	switch {
	case failed != nil:
		return 0, failed
	case err == unix.EIO, err == nil && n == 0:
		return 0, io.EOF
	}
	return max(n, 0), err
}

// Resize sets the size of a terminal by its master, in characters. The Setsize of creack/pty and the
// Resize of containerd/console would make the master blocking.
func Resize(master *os.File, width, height uint16) error {
	size := unix.Winsize{Col: width, Row: height}
	err := descriptor.Lend(master, func(fd int) error { return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &size) })
	if err != nil {
		return fmt.Errorf("cannot resize the terminal to %dx%d: %w", width, height, err)
	}
	return nil
}
