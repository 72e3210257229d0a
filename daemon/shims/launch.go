// Package shims starts shims, finds them again and speaks to them.
package shims

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Launcher starts shims.
type Launcher struct {
	Binary   string
	LogLevel string // debug, info, warn or error
	// Place moves the new shim out of the daemon's cgroup. It is called before
	// the shim does anything, so that what the shim starts is outside as well.
	Place func(ctx context.Context, id string, pid int) error
	Log   *slog.Logger
}

// Launch starts the shim of a run directory and returns when it listens, holds
// its lock and is in its cgroup. On an error no process is left. This process is
// the parent of the shim and reaps it, if it lives long enough.
func (l *Launcher) Launch(ctx context.Context, dir rundir.Dir) error {
	if err := l.launch(ctx, dir); err != nil {
		return fmt.Errorf("cannot start the shim of %s: %w", dir.ID(), err)
	}
	return nil
}

func (l *Launcher) launch(ctx context.Context, dir rundir.Dir) error {
	logFile, err := os.OpenFile(dir.Path(rundir.ShimLogName), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()

	// The handshake: a byte to the shim says that it is in its cgroup, a byte
	// from the shim that it is ready. When either process dies, the other one
	// reads an end of file, so a shim that was not placed does not live on.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "handshake"), os.NewFile(uintptr(fds[1]), "handshake")
	defer ours.Close()

	cmd := exec.Command(l.Binary, "--dir", string(dir), "--log-level", l.LogLevel)
	cmd.Dir = "/"
	// Nothing of the daemon's environment, such as the service manager's socket,
	// is for the OCI runtime or a container. A shim needs one processor only;
	// setting that here costs half a megabyte less than a call in the shim does.
	// Where all programs get huge pages, which is Debian's default, those of the
	// heap would cost one to three megabytes. Without profiles, each thread does not need
	// the two kilobytes for the stacks in them.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1", "GODEBUG=disablethp=1,profstackdepth=0"}
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
		err := cmd.Wait()
		l.Log.Debug("shim ended", "container", dir.ID(), "pid", cmd.Process.Pid, "status", err)
	}()

	if err = l.handshake(ctx, dir.ID(), cmd.Process.Pid, ours); err != nil {
		cmd.Process.Kill()
		<-reaped
		return err
	}
	return nil
}

func (l *Launcher) handshake(ctx context.Context, id string, pid int, conn *os.File) error {
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if l.Place != nil {
		if err := l.Place(ctx, id, pid); err != nil {
			return err
		}
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return fmt.Errorf("it ended before it was told to start: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("it was not ready in time: %w", ctx.Err())
		}
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("it ended before it was ready; see %s in its run directory", rundir.ShimLogName)
		}
		return err
	}
	if answer[0] != 0 {
		text, _ := io.ReadAll(io.LimitReader(conn, 4096))
		return errors.New(string(text))
	}
	return nil
}

// Alive is the method of this name.
func (*Launcher) Alive(dir rundir.Dir) (bool, error) { return dir.Alive() }

// Find is dir.FindShim.
func (*Launcher) Find(dir rundir.Dir) (rundir.Process, error) { return dir.FindShim() }

// Reach is the function of this name.
func (*Launcher) Reach(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	return Reach(ctx, dir, c)
}

// End is the function of this name.
func (*Launcher) End(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	return End(ctx, dir, c)
}
