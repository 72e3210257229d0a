package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/session"
	"github.com/holdfast-cri/holdfast/pty"
)

// SessionOptions say what a session is with: a new exec (Process), an exec that lives
// (ExecID), or, with neither, the container itself.
type SessionOptions struct {
	// Process as in Exec, but for Terminal and ConsoleSize, which count here.
	Process *specs.Process
	SetUser bool
	ExecID  string

	Stdin, Stdout, Stderr bool          // what is wanted; an exec that lives has what it was started with
	Timeout               time.Duration // of a new exec; 0: none
	// Lease is how long a new exec lives without a client; 0: as the shim has it.
	Lease time.Duration
}

// Session is one client's end of the standard files of a process. Its files may be
// used directly, or by Copy. Close it.
type Session struct {
	ID       string // of the exec; empty: the container
	Terminal bool
	// What was not asked for is nil. Of the terminal of an exec Stdin is the master, as
	// is Stdout.
	Stdin, Stdout, Stderr *os.File

	conn *net.UnixConn
	end  chan struct{} // closed when exit or err is set
	exit SessionExit
	err  error

	once sync.Once
}

// SessionExit is how the process of a session has ended, or the session with it.
type SessionExit = session.Exit

// Size is that of a terminal, in characters.
type Size = session.Size

// OpenSession starts an exec, or opens one that lives, or the container's own standard
// files. Until Close the process lives as the client says; a client that is killed
// leaves an exec to its lease. It is never repeated.
func (c *Client) OpenSession(ctx context.Context, o SessionOptions) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	s := &Session{ID: o.ExecID, end: make(chan struct{})}
	socket, err := c.openSocket(ctx, o, &s.ID)
	if err != nil {
		return nil, err
	}
	if s.conn, err = c.dir.DialSession(ctx, socket); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	defer stop()
	m, files, err := session.Receive(s.conn)
	if err == nil && m.Files == nil {
		err = errors.New("the shim has sent no files")
	}
	if err == nil {
		err = s.take(m.Files, files)
	}
	if err != nil {
		s.conn.Close()
		return nil, fmt.Errorf("cannot open a session with %s: %w", c.dir.ID(), err)
	}
	go s.watch()
	return s, nil
}

// openSocket has the shim open a socket. It sets id to that of a new exec.
func (c *Client) openSocket(ctx context.Context, o SessionOptions, id *string) (socket string, err error) {
	if o.Process == nil {
		req := &proto.OpenRequest{
			Id:     c.dir.ID(),
			ExecId: o.ExecID,
			Stdin:  o.Stdin,
			Stdout: o.Stdout,
			Stderr: o.Stderr,
		}
		var r *proto.OpenResponse
		r, _, err = once(ctx, c, proto.ShimService.Open, req)
		return r.GetSocket(), err
	}
	wire, err := proto.MarshalAny(o.Process)
	if err != nil {
		return "", err
	}
	req := &proto.ExecRequest{
		Id:        c.dir.ID(),
		Process:   wire,
		SetUser:   o.SetUser,
		Stdin:     o.Stdin,
		Stdout:    o.Stdout,
		Stderr:    o.Stderr,
		TimeoutMs: uint64(o.Timeout.Milliseconds()),
		LeaseMs:   uint64(o.Lease.Milliseconds()),
	}
	payload, err := proto.Pack(req)
	if err != nil {
		return "", err
	}
	if payload != nil {
		defer payload.Close()
		req = &proto.ExecRequest{Id: req.Id, PayloadPath: procPath(payload)}
	}
	err = c.alone(ctx, func(shim proto.ShimService) error { // the shim ends it with the connection until it runs
		r, err := shim.Exec(ctx, req)
		*id, socket = r.GetExecId(), r.GetSocket()
		return err
	})
	return socket, err
}

// take gives the files their places.
func (s *Session) take(f *session.Files, files []*os.File) (err error) {
	s.Terminal = f.Terminal
	if f.Terminal && len(files) == 1 && f.Stdin && f.Stdout { // the master
		s.Stdout = files[0]
		s.Stdin, err = descriptor.Dup(files[0])
		return err
	}
	for _, at := range []struct {
		is bool
		to **os.File
	}{{f.Stdin, &s.Stdin}, {f.Stdout, &s.Stdout}, {f.Stderr, &s.Stderr}} {
		if at.is && len(files) > 0 {
			*at.to, files = files[0], files[1:]
		}
	}
	return nil
}

// watch waits for the exit.
func (s *Session) watch() {
	defer close(s.end)
	for {
		m, files, err := session.Receive(s.conn)
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			s.err = fmt.Errorf("%w: the session has no end: %w", ErrUnreachable, err)
			return
		}
		if m.Exit != nil {
			s.exit = *m.Exit
			return
		}
	}
}

// Wait waits for the end of the process. Of the container itself it is the end of its
// output. There may still be output to read.
func (s *Session) Wait(ctx context.Context) (SessionExit, error) {
	select {
	case <-s.end:
		return s.exit, s.err
	case <-ctx.Done():
		return SessionExit{}, ctx.Err()
	}
}

// Resize sets the size of the terminal.
func (s *Session) Resize(size Size) error { return s.send(session.Message{Resize: &size}) }

// CloseStdin ends the input of the process: it reads an end of file behind what was
// written.
func (s *Session) CloseStdin() error {
	if s.Stdin == nil {
		return nil
	}
	return errors.Join(s.send(session.Message{CloseStdin: true}), s.Stdin.Close())
}

// Hangup ends the exec with all that it has started, and closes the session. The
// container itself does not notice.
func (s *Session) Hangup() error {
	return errors.Join(s.send(session.Message{Hangup: true}), s.Close())
}

// Detach leaves the exec to itself, for good, and closes the session.
func (s *Session) Detach() error {
	return errors.Join(s.send(session.Message{Detach: true}), s.Close())
}

func (s *Session) send(m session.Message) error { return session.Send(s.conn, m) }

// Close closes the session. An exec whose end has not come lives on for its lease.
func (s *Session) Close() error {
	s.once.Do(func() {
		select {
		case <-s.end:
			if s.err == nil {
				s.send(session.Message{Detach: true}) // or the shim would keep the exit
			}
		default:
		}
		s.conn.Close()
		for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
			if f != nil {
				f.Close()
			}
		}
	})
	return nil
}

// Streams are what Copy joins with a session. A nil one is not wanted.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Resize         <-chan Size
}

const (
	// quietTimeout is how long an output may be silent that something keeps open
	// after the process has ended.
	quietTimeout = 2 * time.Second
	copySize     = 64 << 10 // what a pipe holds
)

// Copy passes on bytes and sizes until the process has ended and its output with it, or
// is kept open and silent. It ends the session: when ctx ends first, or an output
// cannot be written, by Hangup. The reader of Stdin may have to be closed by the
// caller afterwards; a read under way is not waited for.
func (s *Session) Copy(ctx context.Context, st Streams) (SessionExit, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if s.Stdin != nil && st.Stdin != nil {
		go s.copyIn(st.Stdin)
	} else {
		s.CloseStdin()
	}
	if st.Resize != nil {
		go s.copySizes(ctx, st.Resize)
	}
	var outputs sync.WaitGroup
	for _, o := range []struct {
		from *os.File
		to   io.Writer
	}{{s.Stdout, st.Stdout}, {s.Stderr, st.Stderr}} {
		if o.from == nil {
			continue
		}
		to := o.to
		if to == nil {
			to = io.Discard
		}
		outputs.Go(func() {
			if err := copyOut(to, o.from, s.end); err != nil {
				cancel(fmt.Errorf("cannot write the output of a command: %w", err))
			}
		})
	}
	drained := make(chan struct{})
	go func() { // ends with the outputs, which Close ends at the latest
		outputs.Wait()
		close(drained)
	}()
	for _, done := range []<-chan struct{}{s.end, drained} {
		select {
		case <-done:
		case <-ctx.Done():
			s.Hangup()
			return SessionExit{}, context.Cause(ctx)
		}
	}
	if err := context.Cause(ctx); err != nil && ctx.Err() != nil {
		s.Hangup()
		return SessionExit{}, err
	}
	s.Close()
	return s.exit, s.err
}

// copyIn gives the process its input, and its end. What the process does not take is
// read all the same: in from, sizes may come behind it.
func (s *Session) copyIn(from io.Reader) {
	_, err := io.Copy(&input{file: s.Stdin, terminal: s.Terminal}, from)
	switch {
	case errors.Is(err, os.ErrClosed): // the session is over
	case err != nil:
		io.Copy(io.Discard, from)
	case !s.Terminal || s.ID == "":
		s.CloseStdin()
	}
}

// input writes to a process. After some bytes it has the pipe hold more, so that the two
// sides wake each other less often.
type input struct {
	file     *os.File
	terminal bool
	written  int
}

// Direct says that whoever reads a connection may write here itself. Behind the input of
// a terminal there may be its size, which must not wait.
func (i *input) Direct() bool { return !i.terminal }

func (i *input) Write(p []byte) (int, error) {
	if i.written < copySize {
		if i.written += len(p); i.written >= copySize {
			enlarge(i.file)
		}
	}
	return i.file.Write(p)
}

// enlarge has a pipe hold more. It fails for a terminal, and where the user has too many
// such pipes.
func enlarge(f *os.File) {
	descriptor.Lend(f, func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, busyPipe)
		return err
	})
}

func (s *Session) copySizes(ctx context.Context, sizes <-chan Size) {
	for {
		select {
		case size, more := <-sizes:
			if !more || s.Resize(size) != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// copyOut copies an output until its end, or, once ended is closed, until it is silent or
// no process has the terminal open.
func copyOut(to io.Writer, from *os.File, ended <-chan struct{}) error {
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-ended:
			from.SetReadDeadline(time.Unix(1, 0)) // wakes the copy, which sets all deadlines after this one
		case <-over:
		}
	}()
	last := false // ended is closed
	r := pty.NewReader(from, func() bool { return last })
	p := pace{file: from, buf: make([]byte, copySize)}
	for {
		n, err := r.Read(p.buf)
		if last && errors.Is(err, os.ErrDeadlineExceeded) {
			if n = descriptor.ReadNow(from, p.buf); n > 0 {
				err = nil
			}
		}
		if n > 0 {
			if _, werr := to.Write(p.buf[:n]); werr != nil {
				return werr
			}
			if !last {
				p.after(n)
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !last:
			last = true
		case err != nil: // the end, the time, or Close
			return nil
		}
		if last {
			from.SetReadDeadline(time.Now().Add(quietTimeout))
		}
	}
}

// pace has a busy output read in large pieces: of one that comes in many small ones,
// most of the time goes into waking up for each. An output is busy when some pieces came
// within some milliseconds; of anything slower no byte waits.
type pace struct {
	file   *os.File
	buf    []byte
	pieces int
	since  time.Time // of the first of busyPieces
	busy   bool
}

const (
	busyPieces = 16
	busyTime   = busyPieces * time.Millisecond
	collect    = 200 * time.Microsecond // for the next piece to grow
	busySize   = 256 << 10
	busyPipe   = 1 << 20
)

// after is called with the size of each piece.
func (p *pace) after(n int) {
	if p.pieces%busyPieces == 0 {
		now := time.Now()
		p.busy = p.pieces > 0 && now.Sub(p.since) < busyTime
		p.since = now
	}
	p.pieces++
	if !p.busy {
		return
	}
	if len(p.buf) < busySize {
		p.buf = make([]byte, busySize)
		enlarge(p.file)
	}
	if n < copySize/2 {
		time.Sleep(collect)
	}
}
