package shims

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// ErrUnreachable says that the shim did not take the connection or did not
// answer in time. Whether it lives is for its lock to say.
var ErrUnreachable = errors.New("the shim does not answer")

// Deadlines of calls. A shim answers from memory but for Create, Start and
// Delete, which run the OCI runtime.
const (
	quick   = 10 * time.Second
	runtime = 4*time.Minute + 30*time.Second // the shim gives the OCI runtime four
)

// Client speaks to one shim. It connects when first used and again after the
// connection was lost. Its methods may be called at the same time.
type Client struct {
	dir rundir.Dir

	mu   sync.Mutex
	conn *ttrpc.Client // nil: not connected
}

// New makes a client; it does not connect yet. Close it.
func New(dir rundir.Dir) *Client { return &Client{dir: dir} }

// Close drops the connection. Calls under way fail.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// dial opens a connection that the caller closes.
func (c *Client) dial(ctx context.Context) (*ttrpc.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	conn, err := c.dir.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return ttrpc.NewClient(conn), nil
}

func (c *Client) connection(ctx context.Context) (*ttrpc.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		return c.conn, nil
	}
	conn, err := c.dial(ctx)
	c.conn = conn
	return conn, err
}

func (c *Client) drop(conn *ttrpc.Client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == conn {
		c.conn = nil
	}
	conn.Close()
}

// call runs one call on the shared connection. A connection that turns out to
// be dead is replaced once: every call of the contract is idempotent.
func call[Req, Resp any](ctx context.Context, c *Client, limit time.Duration,
	f func(proto.ShimService, context.Context, Req) (Resp, error), req Req) (Resp, error) {
	var zero Resp
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for try := 0; ; try++ {
		conn, err := c.connection(ctx)
		if err != nil {
			return zero, err
		}
		resp, err := f(proto.NewShimClient(conn), ctx, req)
		if err == nil {
			return resp, nil
		}
		if errors.Is(err, ttrpc.ErrClosed) {
			c.drop(conn)
			if try == 0 {
				continue
			}
		}
		return zero, c.explain(err)
	}
}

// explain sorts what a call failed with: an answer of the shim is passed on,
// silence becomes ErrUnreachable.
func (c *Client) explain(err error) error {
	if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
		return fmt.Errorf("shim of %s: %w", c.dir.ID(), context.Canceled)
	}
	if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded {
		return fmt.Errorf("shim of %s: %w: %w", c.dir.ID(), ErrUnreachable, err)
	}
	return &answer{status.Convert(err)}
}

// answer is an error that a shim answered with. Its text is the shim's own.
type answer struct{ s *status.Status }

func (a *answer) Error() string              { return a.s.Message() }
func (a *answer) GRPCStatus() *status.Status { return a.s }

func (c *Client) id() string { return c.dir.ID() }

// Create has the shim create the container.
func (c *Client) Create(ctx context.Context, req *proto.CreateRequest) (*proto.CreateResponse, error) {
	req.Id = c.id()
	return call(ctx, c, runtime, proto.ShimService.Create, req)
}

// Start has the shim start the container.
func (c *Client) Start(ctx context.Context) (*proto.StartResponse, error) {
	return call(ctx, c, runtime, proto.ShimService.Start, &proto.StartRequest{Id: c.id()})
}

// State asks the shim for all it knows.
func (c *Client) State(ctx context.Context) (*proto.StateResponse, error) {
	return call(ctx, c, quick, proto.ShimService.State, &proto.StateRequest{Id: c.id()})
}

// Stop hands the deadline to the shim and returns; the end comes by Watch.
func (c *Client) Stop(ctx context.Context, signal int, grace time.Duration) error {
	_, err := call(ctx, c, quick, proto.ShimService.Stop,
		&proto.StopRequest{Id: c.id(), Signal: uint32(signal), GraceMs: uint64(grace.Milliseconds())})
	return err
}

// Delete ends the container if it runs, and the shim.
func (c *Client) Delete(ctx context.Context) error {
	_, err := call(ctx, c, runtime, proto.ShimService.Delete, &proto.DeleteRequest{Id: c.id(), Force: true})
	return err
}

// ReopenLog has the shim switch to a new log file.
func (c *Client) ReopenLog(ctx context.Context) error {
	_, err := call(ctx, c, quick, proto.ShimService.ReopenLog, &proto.ReopenLogRequest{Id: c.id()})
	return err
}

// ExecSync runs a command in the container. It has a connection of its own: the
// shim kills the command when that closes, so cancelling ctx, or the death of
// this process, ends it.
func (c *Client) ExecSync(ctx context.Context, req *proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
	req.Id = c.id()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := proto.NewShimClient(conn).ExecSync(ctx, req)
	if err != nil {
		return nil, c.explain(err)
	}
	return resp, nil
}

// Watch calls f with each event, from the first one on and in order. It returns nil
// after the last event of a container, EXITED, so as not to keep a shim that is
// about to end; otherwise the error says why it ended. It has a connection of its own,
// so that a long poll never delays a call.
func (c *Client) Watch(ctx context.Context, f func(*proto.Event)) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	const poll = time.Minute
	for after := uint64(0); ; {
		ctx, cancel := context.WithTimeout(ctx, poll+quick)
		resp, err := proto.NewShimClient(conn).Events(ctx, &proto.EventsRequest{
			Id: c.id(), After: after, WaitMs: uint32(poll.Milliseconds())})
		cancel()
		if err != nil {
			return c.explain(err)
		}
		for _, e := range resp.GetEvents() {
			after = e.GetSeq()
			f(e)
			if e.GetType() == proto.EventType_EVENT_TYPE_EXITED {
				return nil
			}
		}
	}
}
