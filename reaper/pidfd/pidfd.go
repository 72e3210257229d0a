// Package pidfd waits for processes that are held by descriptor (pidfd_open(2)).
package pidfd

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Poll waits until one of fds is ready: a pidfd is when its process has ended.
// It waits for at most as long as ctx has, and says context.DeadlineExceeded
// then. The cancellation of ctx does not end it early.
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
