package containers

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// Exec gives the address at which a client runs a command in a container.
func (m *Manager) Exec(ctx context.Context, r *runtimeapi.ExecRequest) (string, error) {
	c, err := m.Find(r.GetContainerId())
	if err != nil {
		return "", err
	}
	if err := c.running(); err != nil {
		return "", err
	}
	if err := c.callable(ctx); err != nil {
		return "", err
	}
	return m.Sessions.URL(ctx, stream.Request{
		Kind:   stream.Exec,
		ID:     c.ID(),
		RunDir: string(c.dir),
		Cmd:    r.GetCmd(),
		Stdin:  r.GetStdin(),
		Stdout: r.GetStdout(),
		Stderr: r.GetStderr(),
		TTY:    r.GetTty(),
	})
}

// Attach gives the address at which a client speaks to the container's own process. It
// is told here where it wants what the container was not created with: there would be
// nobody who reads its input, or a terminal's bytes in the place of lines.
func (m *Manager) Attach(ctx context.Context, r *runtimeapi.AttachRequest) (string, error) {
	c, err := m.Find(r.GetContainerId())
	if err != nil {
		return "", err
	}
	cfg := c.Record().Config.M
	if tty := cfg.GetTty(); r.GetTty() != tty {
		return "", kind.Errorf(kind.Invalid, "tty: is %v, and that of %s is %v: attach as it was created",
			r.GetTty(), c, tty)
	}
	if r.GetStdin() && !cfg.GetStdin() {
		return "", kind.Errorf(kind.Invalid, "stdin: is true, and %s was created without an input", c)
	}
	if err := c.running(); err != nil {
		return "", err
	}
	if err := c.callable(ctx); err != nil {
		return "", err
	}
	return m.Sessions.URL(ctx, stream.Request{
		Kind:   stream.Attach,
		ID:     c.ID(),
		RunDir: string(c.dir),
		Stdin:  r.GetStdin(),
		Stdout: r.GetStdout(),
		Stderr: r.GetStderr(),
		TTY:    r.GetTty(),
	})
}

// callable makes sure that the shim can be called by whoever brings the token: that one knows
// nothing but its socket, which somebody may have removed.
func (c *Container) callable(ctx context.Context) error {
	err := c.call(ctx, func() error {
		conn, err := c.dir.Dial(ctx)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return kind.As(kind.Unavailable, err)
}
