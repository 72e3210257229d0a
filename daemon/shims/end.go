package shims

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// End ends the shim of a run directory, and the container with it, and returns
// when the process is gone. No shim is no error. A shim that does not answer is
// killed: whoever calls End wants the container gone. A lock file that was
// removed or damaged says nothing: then the process is looked for, and what
// stands in the lock's place is removed once there is none.
func End(ctx context.Context, dir rundir.Dir, c *client.Client) error {
	held, lerr := dir.Held()
	if lerr == nil && !held {
		if id, err := dir.ReadIdentity(); err != nil || !id.Shim.Alive() {
			return nil
		}
	}
	shim, err := Find(dir)
	if errors.Is(err, rundir.ErrNoProcess) && lerr != nil {
		return os.RemoveAll(dir.Path(rundir.LockName))
	}
	// A killed process is a zombie before its last thread has let go of the lock.
	for wait := time.Millisecond; errors.Is(err, rundir.ErrNoProcess); wait *= 2 {
		if held, herr := dir.Held(); herr == nil && !held {
			return nil
		}
		if wait > time.Second || ctx.Err() != nil {
			break
		}
		time.Sleep(wait)
		shim, err = Find(dir)
	}
	if err != nil {
		return err
	}
	if err := end(ctx, dir, c, shim); err != nil || lerr == nil {
		return err
	}
	return os.RemoveAll(dir.Path(rundir.LockName))
}

func end(ctx context.Context, dir rundir.Dir, c *client.Client, shim rundir.Process) error {
	fd, err := unix.PidfdOpen(shim.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || !shim.Alive() {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot watch the shim of %s (process %d): %w", dir.ID(), shim.PID, err)
	}
	gone := os.NewFile(uintptr(fd), "pidfd")
	defer gone.Close()

	// State first: it answers from memory, so silence means something. Any
	// other failure does not: a shim that is ending by itself has closed its
	// socket and may still be making the exit record durable.
	_, err = c.State(ctx)
	if err == nil {
		_, err = c.Delete(ctx, true)
	}
	silent := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
	if !silent {
		if err = await(ctx, gone, dir, shim); err == nil || ctx.Err() != nil {
			return err
		}
	}
	if kerr := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
		return fmt.Errorf("cannot kill the shim of %s (process %d), which does not answer: %w", dir.ID(), shim.PID, errors.Join(kerr, err))
	}
	return await(ctx, gone, dir, shim)
}

// await returns when the process of a pidfd has ended.
func await(ctx context.Context, pidfd *os.File, dir rundir.Dir, shim rundir.Process) error {
	const limit = 30 * time.Second // a shim that was told to end writes a few files
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	deadline, _ := ctx.Deadline()
	pidfd.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { pidfd.SetReadDeadline(time.Now()) })
	defer stop()
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := conn.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n == 1
	}); err != nil {
		return fmt.Errorf("the shim of %s (process %d) has been told to end and has not: %w", dir.ID(), shim.PID, err)
	}
	return nil
}

// Find tells which process is the shim of a run directory. Where shim.json does
// not say, the command line does: it names the directory.
func Find(dir rundir.Dir) (rundir.Process, error) {
	if id, err := dir.ReadIdentity(); err == nil && id.BootID == rundir.BootID() && id.Shim.Alive() {
		return id.Shim, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return rundir.Process{}, fmt.Errorf("cannot look for the shim of %s: %w", dir.ID(), err)
	}
	want := []byte("\x00" + string(dir) + "\x00")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if !bytes.Contains(cmdline, want) || !bytes.Contains(cmdline, []byte("\x00--dir\x00")) {
			continue
		}
		// Anybody can name the directory; only root can be this program.
		if exe, _ := os.Readlink(filepath.Join("/proc", e.Name(), "exe")); !strings.HasPrefix(filepath.Base(exe), "holdfast-shim") {
			continue
		}
		if p, err := rundir.FindProcess(pid); err == nil {
			return p, nil
		}
	}
	return rundir.Process{}, fmt.Errorf("cannot find the shim of %s: its lock is held, but no process has --dir %s: %w", dir.ID(), dir, rundir.ErrNoProcess)
}
