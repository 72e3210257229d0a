package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/client"
)

// ErrTimeout says that a command ran longer than it may and was killed.
var ErrTimeout = errors.New("timed out")

// Output of one ExecSync. The CRI asks for a cap at 16 MiB of each stream, but
// the kubelet takes in no answer above 16 MiB: both have to fit together, with
// room for the rest of the message.
const (
	maxExecStream = 16 << 20
	maxExecOutput = 16<<20 - 64<<10
)

// ExecSync runs a command in a container and gives its output and exit code.
// timeout 0 is none.
func (d *Daemon) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*runtimeapi.ExecSyncResponse, error) {
	c, err := d.container(id)
	if err != nil {
		return nil, err
	}
	if s := c.seen.Load(); s.state() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, errorf(ErrState, "container_id: container %s does not run", shortID(id))
	}
	stdout, err := newMemory("stdout")
	if err != nil {
		return nil, as(ErrUnavailable, err)
	}
	defer stdout.Close()
	stderr, err := newMemory("stderr")
	if err != nil {
		return nil, as(ErrUnavailable, err)
	}
	defer stderr.Close()
	resp, err := c.client.Exec(ctx, client.Exec{
		Process: &specs.Process{Args: cmd},
		Timeout: timeout,
		Stdout:  stdout,
		Stderr:  stderr,
		Limit:   maxExecStream,
	})
	if err != nil {
		if exit := c.seen.Load().exit; exit != nil && ctx.Err() == nil {
			return nil, errorf(ErrState, "container_id: container %s has ended (%s), and the command with it: %w", shortID(id), exit.Reason, err)
		}
		return nil, shimError(err)
	}
	if resp.TimedOut {
		return nil, errorf(ErrTimeout, "command %q in container %s ran longer than %s and was killed", cmd[0], shortID(id), timeout)
	}
	outSize, errSize := share(resp.StdoutBytes, resp.StderrBytes)
	answer := &runtimeapi.ExecSyncResponse{ExitCode: int32(resp.Code)}
	if answer.Stdout, err = readMemory(stdout, outSize); err != nil {
		return nil, err
	}
	if answer.Stderr, err = readMemory(stderr, errSize); err != nil {
		return nil, err
	}
	return answer, nil
}

// share divides the room of an answer: who needs less than half leaves the rest
// to the other.
func share(out, err int64) (int64, int64) {
	const half = maxExecOutput / 2
	switch {
	case out+err <= maxExecOutput:
		return out, err
	case err <= half:
		return maxExecOutput - err, err
	case out <= half:
		return out, maxExecOutput - out
	}
	return half, half
}

// newMemory makes a file without a name, which the shim opens through /proc.
func newMemory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate("exec-"+name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a buffer for %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func readMemory(f *os.File, size int64) ([]byte, error) {
	if size == 0 {
		return nil, nil
	}
	b := make([]byte, size)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cannot read the output of the command: %w", err)
	}
	return b[:n], nil
}
