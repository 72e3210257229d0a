package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

const (
	// quick is the limit of a call that a shim answers from memory.
	quick = 3 * time.Second
	// slow is the limit of a call for which the shim runs the OCI runtime.
	slow = 4*time.Minute + 30*time.Second
)

// errSilent says that a shim lives but does not answer in time.
var errSilent = errors.New("the shim does not answer")

// errGone says that nobody listens at a shim's socket.
var errGone = errors.New("the shim is gone")

// shim is a connection to one shim. Close it.
type shim struct {
	dir     rundir.Dir
	conn    *ttrpc.Client
	service proto.ShimService
}

// connect dials the shim of a run directory and makes sure that it is the right
// one and speaks our language.
func connect(ctx context.Context, dir rundir.Dir) (*shim, error) {
	dialCtx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	conn, err := dir.Dial(dialCtx)
	if errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err != nil {
		kind := errGone
		if held, herr := dir.Held(); herr == nil && held {
			kind = errSilent // just starting, or just ending
		}
		return nil, fmt.Errorf("%w: %w", kind, err)
	}
	client := ttrpc.NewClient(conn)
	s := &shim{dir: dir, conn: client, service: proto.NewShimClient(client)}
	if s.stopped() != 0 {
		s.Close()
		return nil, s.silence() // no need to wait for the deadline
	}
	hello, err := call(ctx, s, quick, proto.ShimService.Hello, &proto.HelloRequest{Id: dir.ID()})
	if err == nil && (hello.GetProtocolMin() > proto.ProtocolMax || hello.GetProtocolMax() < proto.ProtocolMin) {
		err = fmt.Errorf("cannot talk to the shim of %s: it speaks protocol %d to %d, this holdfastctl %d to %d; use the holdfastctl of its version, %s",
			dir.ID(), hello.GetProtocolMin(), hello.GetProtocolMax(), proto.ProtocolMin, proto.ProtocolMax, hello.GetVersion())
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close drops the connection. A call under way fails.
func (s *shim) Close() { s.conn.Close() }

// call runs one call with a limit; none if it is 0.
func call[Req, Resp any](ctx context.Context, s *shim, limit time.Duration,
	f func(proto.ShimService, context.Context, Req) (Resp, error), req Req) (Resp, error) {
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	resp, err := f(s.service, ctx, req)
	if err != nil {
		err = s.explain(err)
	}
	return resp, err
}

// explain tells an answer of the shim from its silence and from its end.
func (s *shim) explain(err error) error {
	switch {
	case errors.Is(err, ttrpc.ErrClosed):
		return fmt.Errorf("%w: it closed the connection", errGone)
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
		return s.silence()
	}
	if st, ok := status.FromError(err); ok {
		return errors.New(st.Message())
	}
	return err
}

// silence is errSilent with the reason, if it shows.
func (s *shim) silence() error {
	if pid := s.stopped(); pid != 0 {
		return fmt.Errorf("%w: it is stopped by a signal; wake it with: kill -CONT %d", errSilent, pid)
	}
	return fmt.Errorf("%w in time; %s may say why", errSilent, s.dir.Path(rundir.ShimLogName))
}

// stopped gives the shim's pid if the shim is in state T (proc_pid_stat(5)).
func (s *shim) stopped() int {
	id, err := s.dir.ReadIdentity()
	if err != nil || !id.Shim.Alive() {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id.Shim.PID))
	if err != nil || !bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte(" T")) {
		return 0
	}
	return id.Shim.PID
}
