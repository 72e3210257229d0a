package streaming

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	utilexec "k8s.io/utils/exec"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/session"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// sizeWait is how long a process with a terminal waits for the client's size of it, so
// that its first byte is for a terminal of that size.
const sizeWait = 250 * time.Millisecond

// Session is a process whose streams can be joined with a client's: client.Session.
type Session interface {
	Copy(ctx context.Context, st client.Streams) (client.SessionExit, error)
}

// Opener opens the session that a request wants. size is that of a terminal, or zero.
type Opener func(ctx context.Context, r stream.Request, size client.Size) (Session, error)

// Open opens a session with the shim of a request's container.
func Open(ctx context.Context, r stream.Request, size client.Size) (Session, error) {
	c := client.New(rundir.Dir(r.RunDir))
	defer c.Close() // a session has a connection of its own
	o := client.SessionOptions{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr}
	if r.Kind == stream.Exec {
		o.Process = &specs.Process{Args: r.Cmd, Terminal: r.TTY}
		if size != (client.Size{}) {
			o.Process.ConsoleSize = &specs.Box{Width: uint(size.Width), Height: uint(size.Height)}
		}
	}
	opened, err := c.OpenSession(ctx, o)
	if err != nil {
		return nil, err
	}
	if r.Kind == stream.Attach && size != (client.Size{}) {
		opened.Resize(size) // a client that is cut off sees it by its output
	}
	return opened, nil
}

// run serves a session until its end. resize are the sizes of the client's terminal; nil: it
// says none. The error is the client's: a CodeExitError, if the command has ended with an exit
// code that is not 0.
func (s *Server) run(ctx context.Context, r stream.Request, st client.Streams, resize <-chan client.Size) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var size client.Size
	if r.TTY && resize != nil {
		select {
		case size = <-resize:
		case <-time.After(s.sizeWait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		st.Resize = resize
	}
	opened, err := s.Open(ctx, r, size)
	if err != nil {
		return err
	}
	if err := step.Reach(step.StreamOpened); err != nil {
		cancel() // Copy has the session end then
		opened.Copy(ctx, st)
		return err
	}
	exit, err := opened.Copy(ctx, st)
	switch {
	case err != nil:
		return err
	case exit.Reason != "" && (exit.Reason != session.Killed || exit.Code == 0):
		return errors.New(cmp.Or(exit.Error, string(exit.Reason)))
	case r.Kind == stream.Exec && exit.Code != 0:
		return utilexec.CodeExitError{
			Err:  fmt.Errorf("command terminated with exit code %d", exit.Code),
			Code: exit.Code,
		}
	}
	return nil
}
