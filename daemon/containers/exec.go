package containers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
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
	stdout, stderr := c.newOutput(), c.newOutput()
	defer stdout.Close()
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
		return nil, kind.Errorf(kind.Timeout, "command %.100q in %s ran longer than %s and was killed", cmd[0], c,
			timeout)
	}
	return c.answer(ctx, result, stdout, stderr)
}

// answer waits for room and takes the output of a command into memory.
func (c *Container) answer(ctx context.Context, r client.ExecResult, stdout, stderr *output,
) (*runtimeapi.ExecSyncResponse, error) {
	outSize, errSize := share(r.StdoutBytes, r.StderrBytes)
	release, err := c.m.reserve(ctx, outSize+errSize)
	if err != nil {
		return nil, err
	}
	out, err := stdout.bytes(outSize)
	errs, err2 := stderr.bytes(errSize)
	if err = errors.Join(err, err2); err != nil {
		release()
		return nil, err
	}
	missing := r.StdoutBytes + r.StderrBytes + int64(r.DroppedBytes) - int64(len(out)+len(errs))
	if missing > 0 {
		c.m.Log.Warn("output of a command is missing in the answer",
			"container", c.ID(),
			"bytes", missing,
			"error", errors.Join(stdout.err, stderr.err))
		errs = tellMissing(errs, missing)
	}
	answer := &runtimeapi.ExecSyncResponse{ExitCode: int32(r.Code), Stdout: out, Stderr: errs}
	c.m.keepRoom(ctx, answer, release)
	return answer, nil
}

// tellMissing ends the error output of a command with what was dropped of its output.
func tellMissing(stderr []byte, n int64) []byte {
	var newline string
	if len(stderr) > 0 && stderr[len(stderr)-1] != '\n' {
		newline = "\n"
	}
	return fmt.Appendf(stderr, "%sholdfast: %d bytes of output are missing here: an answer holds 16 MiB\n", newline, n)
}
