package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy says that processes are left in a cgroup that was to go.
var ErrBusy = errors.New("the cgroup has processes")

// How long a dying process may keep its cgroup: it has been killed or has ended
// by itself already, and only the kernel's part of its end is left.
const (
	busyLimit = 2 * time.Second
	busyFirst = time.Millisecond
	busyMost  = 100 * time.Millisecond
)

// RetryBusy calls f until its error is no longer ErrBusy, with growing pauses,
// for a little while, and no longer than ctx allows. Nothing else tells about
// the end of a process in all of v1, v2 and systemd.
func RetryBusy(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, busyLimit)
	defer cancel()
	for pause := busyFirst; ; pause = min(2*pause, busyMost) {
		err := f()
		if !errors.Is(err, ErrBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// Remove removes the cgroups with those below them, and never a process. It
// waits a little for one that is just dying. Where one is left the error is
// ErrBusy, and what can go has gone. No cgroup is no error.
func (c Set) Remove(ctx context.Context) error {
	return RetryBusy(ctx, func() error {
		var errs []error
		for _, dir := range c.dirs() {
			errs = append(errs, removeTree(dir))
		}
		return errors.Join(errs...)
	})
}

// RemoveIdle is Remove unless a process is left, which is reported as false.
func (c Set) RemoveIdle() (bool, error) {
	if _, populated, err := c.Populated(); err != nil || populated {
		return false, err
	}
	return true, c.Remove(context.Background())
}

// removeTree goes on where a cgroup below is busy, so that the rest goes.
func removeTree(dir string) error {
	// Mostly there is nothing below.
	if err := rmdir(unix.AT_FDCWD, dir); !errors.Is(err, ErrBusy) {
		return err
	}
	err := walk(dir, func(*os.File) error { return nil }, func(above *os.File, name string) error {
		if err := rmdir(int(above.Fd()), name); !errors.Is(err, ErrBusy) {
			return err
		}
		return nil // then dir is busy, too
	})
	if err != nil {
		return fmt.Errorf("cannot remove what is below cgroup %s: %w", dir, err)
	}
	return rmdir(unix.AT_FDCWD, dir)
}

func rmdir(at int, name string) error {
	err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
	switch {
	case ignoreGone(err) == nil:
		return nil
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
		return fmt.Errorf("cannot remove cgroup %s: %w", name, ErrBusy)
	}
	return fmt.Errorf("cannot remove cgroup %s: %w", name, err)
}
