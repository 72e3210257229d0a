package containers

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
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Output of one ExecSync. The CRI asks for a cap at 16 MiB of each stream, but
// the kubelet takes in no answer above 16 MiB: both have to fit together, with
// room for the rest of the message.
const (
	maxExecStream = 16 << 20
	maxExecOutput = 16<<20 - 64<<10
)

// ExecSync runs a command in a container and gives its output and exit code.
// timeout 0 is none; a command that runs longer is killed with all that it
// started, and the error is kind.Timeout.
func (m *Manager) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration,
) (*runtimeapi.ExecSyncResponse, error) {
	c, err := m.Find(id)
	if err != nil {
		return nil, err
	}
	if err := c.running(); err != nil {
		return nil, err
	}
	stdout, err := newMemory("stdout")
	if err != nil {
		return nil, kind.As(kind.Unavailable, err)
	}
	defer stdout.Close()
	stderr, err := newMemory("stderr")
	if err != nil {
		return nil, kind.As(kind.Unavailable, err)
	}
	defer stderr.Close()
	command := client.Exec{
		Process: &specs.Process{Args: cmd},
		Timeout: timeout,
		Stdout:  stdout,
		Stderr:  stderr,
		Limit:   maxExecStream,
	}
	var result client.ExecResult
	err = c.call(ctx, func() (err error) {
		result, err = c.client.Exec(ctx, command)
		return err
	})
	if err != nil {
		if exit := c.Seen().Exit; exit != nil && ctx.Err() == nil {
			return nil, kind.Errorf(kind.State, "container_id: %s has ended (%s), and the command with it: %w",
				c, exit.Reason, err)
		}
		return nil, err
	}
	if result.TimedOut {
		return nil, kind.Errorf(kind.Timeout, "command %.100q in %s ran longer than %s and was killed", cmd[0], c, timeout)
	}
	outSize, errSize := share(result.StdoutBytes, result.StderrBytes)
	answer := &runtimeapi.ExecSyncResponse{ExitCode: int32(result.Code)}
	if answer.Stdout, err = readMemory(stdout, outSize); err != nil {
		return nil, err
	}
	if answer.Stderr, err = readMemory(stderr, errSize); err != nil {
		return nil, err
	}
	return answer, nil
}

// share divides the room of an answer: a stream that needs less than half of it
// leaves the rest to the other one.
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
