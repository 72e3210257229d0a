package runc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper/pidfd"
)

// ErrNotStartable says that the init of a container ended before it could run
// the container's process.
var ErrNotStartable = errors.New("the container's init has ended")

// HasFifo says whether the runtime keeps the container as runc does: a
// state.json, and an exec.fifo for as long as the container is created only.
func (r *Runtime) HasFifo(id string) bool {
	dir := r.StateDir(id)
	_, err := os.Stat(filepath.Join(dir, "state.json"))
	st, ferr := os.Stat(filepath.Join(dir, fifoName))
	return err == nil && ferr == nil && st.Mode()&fs.ModeNamedPipe != 0
}

const (
	fifoName = "exec.fifo"
	// releasedName is what Release calls the FIFO before it lets init go on.
	releasedName = "exec.fifo.released"
)

// Release does what "runc start" does, without the price of a process: init
// waits for a reader of its exec.fifo, writes a byte and runs the container's
// process. runc takes a container without exec.fifo for a running one.
//
// The FIFO loses its name before that: whoever finds the name knows for sure that the
// program has not run. A call that fails before init was released gives it back.
//
// init is a pidfd of init: its end is noticed. The deadline is that of ctx.
func (r *Runtime) Release(ctx context.Context, id string, init int) (err error) {
	name := filepath.Join(r.StateDir(id), fifoName)
	path := filepath.Join(r.StateDir(id), releasedName)
	if err := os.Rename(name, path); err != nil {
		return fmt.Errorf("cannot start %s: %w", id, err)
	}
	defer func() {
		if err != nil {
			os.Rename(path, name)
		}
	}()
	// Without O_NONBLOCK, open would wait for an init that may be dead.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot start %s: open %s: %w", id, path, err)
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(init), Events: unix.POLLIN}}
	for {
		if err := pidfd.Poll(ctx, fds); err != nil {
			return fmt.Errorf("cannot start %s: init does not answer on %s: %w", id, path, err)
		}
		var b [1]byte
		n, err := unix.Read(fd, b[:])
		if n == 1 {
			break
		}
		if err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return fmt.Errorf("cannot start %s: read %s: %w", id, path, err)
		}
		if fds[1].Revents != 0 {
			return fmt.Errorf("cannot start %s: %w", id, ErrNotStartable)
		}
	}
	os.Remove(path) // or it goes with the container; by this name it means nothing
	return nil
}
