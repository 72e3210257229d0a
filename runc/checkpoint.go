package runc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CheckpointOptions are those of Checkpoint and Restore. Both directories are absolute.
type CheckpointOptions struct {
	Images string // what CRIU saves, or has saved
	Work   string // its logs
}

func (o CheckpointOptions) args() []string {
	return []string{"--file-locks", "--image-path", o.Images, "--work-path", o.Work}
}

// Checkpoint saves the processes of a container that runs, or is frozen, and leaves it as
// it is.
func (r *Runtime) Checkpoint(ctx context.Context, id string, o CheckpointOptions) error {
	args := append([]string{"checkpoint", "--leave-running"}, o.args()...)
	return withCause(r.run(ctx, id, IO{}, append(args, id)...), filepath.Join(o.Work, "dump.log"))
}

// Restore makes a container from what Checkpoint has saved. Its processes run when it
// returns, unless the configuration of CRIU says otherwise.
func (r *Runtime) Restore(ctx context.Context, id string, c CreateOptions, o CheckpointOptions) error {
	args := append([]string{"restore", "--detach"}, c.args()...)
	args = append(append(args, o.args()...), id)
	return withCause(r.run(ctx, id, c.IO, args...), filepath.Join(o.Work, "restore.log"))
}

// maxCRIULog bounds what is read of a log of CRIU, in bytes from its end.
const maxCRIULog = 1 << 20

// withCause adds to the error of a verb the first error that CRIU has logged: the runtime
// itself says only that CRIU has failed.
func withCause(err error, log string) error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err
	}
	fd, oerr := unix.Open(log, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if oerr != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), log)
	defer f.Close()
	if st, serr := f.Stat(); serr == nil && st.Size() > maxCRIULog {
		f.Seek(-maxCRIULog, 2)
	}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if _, text, ok := strings.Cut(sc.Text(), "Error ("); ok {
			e.Message = fmt.Sprintf("%s: CRIU says: (%.*s", e.Message, maxMessage, text)
			break
		}
	}
	return err
}
