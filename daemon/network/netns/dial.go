package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects by TCP to addr from inside the namespace at path; "" is the node's.
// The host in addr is an IP address, or "localhost" for 127.0.0.1 and then ::1;
// other names are refused, because a resolver would not run inside. The
// connection belongs to the caller and may be used from any goroutine.
//
// A thread is in the namespace only while it makes the sockets: who listens there may
// let the connection wait as long as it likes.
func Dial(ctx context.Context, path, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("cannot dial in a pod: %w", err)
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	var errs []error
	for _, h := range hosts {
		to, err := netip.ParseAddrPort(net.JoinHostPort(h, port))
		if err != nil {
			return nil, fmt.Errorf("cannot dial %s in a pod: it is not an IP address with a port", addr)
		}
		c, err := dial(ctx, path, to)
		if err == nil {
			return c, nil
		}
		errs = append(errs, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err})
	}
	return nil, fmt.Errorf("cannot dial %s in %s: %w", addr, path, errors.Join(errs...))
}

func dial(ctx context.Context, path string, to netip.AddrPort) (net.Conn, error) {
	family := unix.AF_INET6
	var address unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if ip := to.Addr().Unmap(); ip.Is4() {
		family, address = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: ip.As4()}
	}
	fd := -1
	err := OnThread(func() (err error) {
		if err = Enter(path); err == nil {
			fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		}
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close() // the connection has a descriptor of its own
	if err := connect(ctx, f, address); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// connect connects a socket that does not block.
func connect(ctx context.Context, f *os.File, to unix.Sockaddr) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.Connect(int(fd), to) })
	if cerr != nil || err == nil {
		return cerr
	}
	if !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var status int
	werr := raw.Write(func(fd uintptr) bool { return connected(int(fd), &status, &err) })
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case werr != nil:
		return werr
	case err != nil:
		return os.NewSyscallError("getsockopt", err)
	case status != 0:
		return os.NewSyscallError("connect", syscall.Errno(status))
	}
	return nil
}

// connected says whether the attempt to connect is over, and how it went.
func connected(fd int, status *int, err *error) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, perr := unix.Poll(poll, 0)
	for perr == unix.EINTR {
		n, perr = unix.Poll(poll, 0)
	}
	if n == 0 && perr == nil {
		return false
	}
	*status, *err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	return true
}
