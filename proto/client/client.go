// Package client is the one client of the shim: for the daemon, for holdfastctl
// and for what comes. It finds the shim by its run directory, negotiates with it,
// gives every call a deadline, and turns messages into what package rundir has.
//
// An answer of the shim that is an error has its kind (package kind) and the
// shim's own text. Silence is ErrUnreachable.
package client

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
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// ErrUnreachable says that the shim did not take the connection or did not
// answer in time. Whether it lives is for the kernel to say. Its kind is
// kind.Unavailable.
var ErrUnreachable = kind.Errorf(kind.Unavailable, "the shim does not answer")

// Deadlines of calls. A shim answers from memory but for those that run the OCI
// runtime; it gives the OCI runtime four minutes.
const (
	quick = 10 * time.Second
	slow  = 4*time.Minute + 30*time.Second
)

// Client speaks to one shim. It connects at the first call and again after the
// connection was lost. Its methods may be called at the same time.
type Client struct {
	dir rundir.Dir

	mu   sync.Mutex // never held over anything slow
	link *link      // the connection that calls share; nil: none
	shim *Shim      // what Hello said; nil: not asked, or the connection died since
}

// link is the shared connection, from the beginning of the dialling on.
type link struct {
	done   chan struct{}      // closed when conn or err is set
	cancel context.CancelFunc // ends the dialling
	conn   *ttrpc.Client      // guarded by Client.mu until done is closed, as are the rest
	shim   *Shim
	err    error
}

// New makes a client; it does not connect yet. Close it.
func New(dir rundir.Dir) *Client { return &Client{dir: dir} }

// Dir is the run directory of the shim.
func (c *Client) Dir() rundir.Dir { return c.dir }

// Close drops the connection. Calls under way fail; a later call connects again.
func (c *Client) Close() {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if l != nil {
		c.drop(l)
	}
}

// drop forgets a shared connection and closes it.
func (c *Client) drop(l *link) {
	c.mu.Lock()
	if c.link == l {
		c.link, c.shim = nil, nil
	}
	conn := l.conn
	c.mu.Unlock()
	l.cancel()
	if conn != nil {
		conn.Close()
	}
}

// connect gives the shared connection. Whoever needs it first starts the
// dialling, which has a deadline of its own: those who wait give up on theirs.
func (c *Client) connect(ctx context.Context) (*link, error) {
	c.mu.Lock()
	l := c.link
	if l == nil {
		dialCtx, cancel := context.WithTimeout(context.Background(), quick)
		l = &link{done: make(chan struct{}), cancel: cancel}
		c.link = l
		go c.fill(dialCtx, l)
	}
	c.mu.Unlock()
	select {
	case <-l.done:
		return l, l.err
	case <-ctx.Done():
		return nil, c.explain(ctx.Err())
	}
}

// fill dials for a link. A link that was dropped meanwhile gets no connection.
func (c *Client) fill(ctx context.Context, l *link) {
	defer l.cancel()
	conn, shim, err := c.dial(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.link != l && err == nil:
		conn.Close()
		conn, err = nil, c.explain(ttrpc.ErrClosed)
	case c.link == l && err != nil:
		c.link = nil
	}
	l.conn, l.shim, l.err = conn, shim, err
	close(l.done)
}

// dial opens a connection, which the caller closes. It says Hello on it unless
// another connection to the same shim has done so.
func (c *Client) dial(ctx context.Context) (*ttrpc.Client, *Shim, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	socket, err := c.dir.Dial(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	conn := ttrpc.NewClient(socket)
	c.mu.Lock()
	shim := c.shim
	c.mu.Unlock()
	if shim != nil {
		return conn, shim, nil
	}
	if shim, err = c.negotiate(ctx, conn); err != nil {
		conn.Close()
		return nil, nil, err
	}
	c.mu.Lock()
	c.shim = shim
	c.mu.Unlock()
	return conn, shim, nil
}

// alone runs f with a connection of its own.
func (c *Client) alone(ctx context.Context, f func(proto.ShimService) error) error {
	conn, shim, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err = f(proto.NewShimClient(conn)); err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) { // the next one may be another shim
		c.mu.Lock()
		if c.shim == shim {
			c.shim = nil
		}
		c.mu.Unlock()
	}
	return c.explain(err)
}

// Shim is what a shim says of itself.
type Shim struct {
	rundir.Identity
	ProtocolMin  uint32
	ProtocolMax  uint32
	Capabilities []string // what its build can do beyond the version of the protocol
}

// negotiate makes sure that it is the right shim and speaks our language.
func (c *Client) negotiate(ctx context.Context, conn *ttrpc.Client) (*Shim, error) {
	r, err := proto.NewShimClient(conn).Hello(ctx, &proto.HelloRequest{Id: c.dir.ID()})
	if err != nil {
		return nil, c.explain(err)
	}
	if r.GetProtocolMin() > proto.ProtocolMax || r.GetProtocolMax() < proto.ProtocolMin {
		return nil, kind.Errorf(kind.Unsupported, "cannot talk to the shim of %s: "+
			"it is of version %s and speaks protocol %d to %d, this program speaks %d to %d; "+
			"use the programs of its version",
			c.dir.ID(), r.GetVersion(), r.GetProtocolMin(), r.GetProtocolMax(), proto.ProtocolMin, proto.ProtocolMax)
	}
	return &Shim{
		Identity: rundir.Identity{
			Shim:    r.GetShim().File(),
			BootID:  r.GetBootId(),
			Nonce:   r.GetNonce(),
			Version: r.GetVersion(),
		},
		ProtocolMin:  r.GetProtocolMin(),
		ProtocolMax:  r.GetProtocolMax(),
		Capabilities: r.GetCapabilities(),
	}, nil
}

// once runs one call on the shared connection. closed says that the connection
// turned out to be dead, so that nobody knows whether the call arrived.
func once[Req, Resp any](ctx context.Context, c *Client,
	f func(proto.ShimService, context.Context, Req) (Resp, error), req Req) (resp Resp, closed bool, err error) {
	l, err := c.connect(ctx)
	if err != nil {
		return resp, false, err
	}
	resp, err = f(proto.NewShimClient(l.conn), ctx, req)
	if err == nil {
		return resp, false, nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		c.drop(l)
		closed = true
	}
	return resp, closed, c.explain(err)
}

// call runs one call with a limit. On a connection that turned out to be dead it
// is repeated once: the contract says that repeating a call is safe.
func call[Req, Resp any](ctx context.Context, c *Client, limit time.Duration,
	f func(proto.ShimService, context.Context, Req) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	resp, closed, err := once(ctx, c, f, req)
	if closed {
		resp, _, err = once(ctx, c, f, req)
	}
	return resp, err
}

// explain sorts what a call failed with: an answer of the shim gets its kind,
// silence becomes ErrUnreachable, with the reason if it shows.
func (c *Client) explain(err error) error {
	code := status.Code(err)
	switch {
	case errors.Is(err, context.Canceled) || code == codes.Canceled:
		return fmt.Errorf("a call to the shim was given up: %w", context.Canceled)
	case errors.Is(err, ttrpc.ErrClosed):
		return fmt.Errorf("%w: it closed the connection: %w", ErrUnreachable, err)
	case errors.Is(err, context.DeadlineExceeded) || code == codes.DeadlineExceeded:
		if id, rerr := c.dir.ReadIdentity(); rerr == nil && id.Shim.Stopped() {
			return fmt.Errorf("%w: it is stopped by a signal; wake it with: kill -CONT %d: %w",
				ErrUnreachable, id.Shim.PID, context.DeadlineExceeded)
		}
		return fmt.Errorf("%w in time; %s may say why: %w",
			ErrUnreachable, c.dir.Path(rundir.ShimLogName), context.DeadlineExceeded)
	}
	return kind.FromStatus(err)
}
