// Package spawn starts the programs that outlive the daemon: each in a session and a
// cgroup of its own, with nothing of the daemon's environment.
package spawn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/step"
)

// Program is what is started.
type Program struct {
	Binary string
	Args   []string
	Env    []string // beside PATH
	Log    string   // path of the file for what it writes; created, or appended to
	// Place moves the new process out of the daemon's cgroup. It is called before the
	// program does anything, so that what it starts is outside as well. nil: it stays.
	Place func(ctx context.Context, pid int) error
	// Ended is called with the process that was started, once it has been reaped.
	Ended func(pid int, status error)
}

// Start starts the program and returns when it says that it is ready. On an error no
// process is left. This process is the parent and reaps it, if it lives long enough.
func (p Program) Start(ctx context.Context) error {
	logFile, err := os.OpenFile(p.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()

	// The handshake: a byte to the program says that it is in its cgroup, a byte from
	// the program that it is ready. When either process dies, the other one reads an
	// end of file, so a program that was not placed does not live on.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "handshake"), os.NewFile(uintptr(fds[1]), "handshake")
	defer ours.Close()

	cmd := exec.Command(p.Binary, p.Args...)
	cmd.Dir = "/"
	// Nothing of the daemon's environment, such as the service manager's socket, is for
	// others. Where all programs get huge pages, which is Debian's default, those of
	// the heap would cost one to three megabytes. Without profiles, each thread does
	// not need the two kilobytes for the stacks in them.
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "GODEBUG=disablethp=1,profstackdepth=0"}, p.Env...)
	cmd.Env = append(cmd.Env, step.Environ()...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		p.Ended(cmd.Process.Pid, cmd.Wait())
	}()

	if err = p.handshake(ctx, cmd.Process.Pid, ours); err != nil {
		cmd.Process.Kill()
		<-reaped
		return err
	}
	return nil
}

func (p Program) handshake(ctx context.Context, pid int, conn *os.File) error {
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if p.Place != nil {
		if err := p.Place(ctx, pid); err != nil {
			return err
		}
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return fmt.Errorf("it ended before it was told to start: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = context.DeadlineExceeded // the context may be a moment behind
		} else if ctx.Err() != nil {
			err = ctx.Err()
		}
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			return fmt.Errorf("it was not ready in time: %w", err)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("it ended before it was ready; see %s", p.Log)
		}
		return err
	}
	if answer[0] != 0 {
		text, _ := io.ReadAll(io.LimitReader(conn, 4096))
		return errors.New(string(text))
	}
	return nil
}
