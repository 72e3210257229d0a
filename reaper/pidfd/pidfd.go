// Package pidfd holds processes by descriptor (pidfd_open(2)): a signal reaches
// the very process that was opened or nothing, and waiting for its end costs no
// thread.
package pidfd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// ErrEnded says that the process has ended.
var ErrEnded = errors.New("the process has ended")

// Process is a process that is held by descriptor. Its methods may be called
// from any goroutine, but only one may be in Wait or Kill. Whoever opened it
// closes it.
type Process struct {
	PID  int
	file *os.File // non-blocking, known to the runtime's poller
}

// Open gets hold of the process that has the pid. A pid may be given to another
// process at any time, so is is asked behind the descriptor whether the pid
// still belongs to the one that is meant; nil is for a child of the caller that
// nobody reaps meanwhile. ErrEnded if the process has been reaped, or is not
// the one that is meant.
func Open(pid int, is func() bool) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("cannot get hold of process %d: %w", pid, ErrEnded)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot get hold of process %d: pidfd_open: %w", pid, err)
	}
	if is != nil && !is() {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot get hold of process %d: %w", pid, ErrEnded)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot get hold of process %d: %w", pid, err)
	}
	return &Process{PID: pid, file: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// Close lets go of the process. A Wait that is under way ends with an error.
func (p *Process) Close() { p.file.Close() }

// Wait returns when the process has ended, be it reaped or a zombie still, or
// else when ctx ends, with the cause of that.
func (p *Process) Wait(ctx context.Context) error {
	if p.Ended() { // also where ctx has ended
		return nil
	}
	deadline, _ := ctx.Deadline()
	if err := p.file.SetReadDeadline(deadline); err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", p.PID, err)
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		p.file.SetReadDeadline(time.Unix(1, 0))
		close(ended)
	})
	conn, err := p.file.SyscallConn()
	if err == nil {
		err = conn.Read(func(fd uintptr) bool { return ready(int(fd)) })
	}
	if !stop() {
		<-ended // or it would end the next Wait
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The runtime's timer may be ahead of that of ctx.
		if err = context.Cause(ctx); err == nil {
			err = context.DeadlineExceeded
		}
	}
	if err != nil {
		return fmt.Errorf("process %d has not ended: %w", p.PID, err)
	}
	return nil
}

// Ended says whether the process has ended: it is a zombie, or was reaped.
func (p *Process) Ended() bool {
	ended := false
	err := p.Control(func(fd int) error {
		ended = ready(fd)
		return nil
	})
	return err == nil && ended
}

// Signal sends a signal: ErrEnded if the process was reaped. A zombie takes it
// and does nothing.
func (p *Process) Signal(sig unix.Signal) error {
	err := p.Control(func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		err = ErrEnded
	}
	if err != nil {
		return fmt.Errorf("cannot send signal %d to process %d: %w", sig, p.PID, err)
	}
	return nil
}

// Kill kills the process and returns when it has ended, as Wait does.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, ErrEnded) {
		return err
	}
	return p.Wait(ctx)
}

// Control lends the descriptor to f, which must not block and must not keep it.
// It becomes readable when the process ends.
func (p *Process) Control(f func(fd int) error) error {
	return descriptor.Lend(p.file, f)
}

func ready(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// Poll waits until one of several descriptors is ready, a pidfd among them,
// which is when its process has ended. It waits for at most as long as ctx has,
// and says context.DeadlineExceeded then. The cancellation of ctx does not end
// it early. It occupies a thread: whoever may wait for long uses Wait.
func Poll(ctx context.Context, fds []unix.PollFd) error {
	for {
		timeout := -1
		if d, ok := ctx.Deadline(); ok {
			timeout = int(max(0, time.Until(d).Milliseconds()+1))
		}
		n, err := unix.Poll(fds, timeout)
		switch {
		case n > 0:
			return nil
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		default:
			return context.DeadlineExceeded
		}
	}
}
