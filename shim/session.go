package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/session"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/runc"
)

const (
	// defaultLease is how long an exec lives without a client.
	defaultLease = 30 * time.Second
	// admitTimeout is how long a socket waits for a client, for that of an exec besides
	// its lease.
	admitTimeout = 30 * time.Second
	// maxSessions bounds the execs of a shim and the clients that are attached or
	// awaited, each of which holds some descriptors and goroutines.
	maxSessions = 500
	// maxAttached bounds the clients that are attached to the container or awaited, as
	// each of them may let attachQueue of output wait.
	maxAttached = 64
	attachQueue = 512 << 10 // bytes
)

// files are the standard files of a session: first the supervisor's ends, which its
// client gets copies of, then the ends of the other side. A terminal is in master.
type files struct {
	master *os.File
	ours   [3]*os.File // write end of stdin, read ends of stdout and stderr; nil: not wanted
	theirs [3]*os.File
}

// openFiles makes pipes for what is wanted of stdin, stdout and stderr.
func openFiles(wanted [3]bool) (f files, err error) {
	for i, want := range wanted {
		if !want {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			f.close()
			return f, fmt.Errorf("cannot make a pipe for a session: %w", err)
		}
		if i == 0 {
			r, w = w, r
		}
		f.ours[i], f.theirs[i] = r, w
	}
	return f, nil
}

// message is how the files are sent to a client. list is what goes with it.
func (f *files) message() (m session.Message, list []*os.File) {
	if f.master != nil {
		return session.Message{Files: &session.Files{Terminal: true, Stdin: true, Stdout: true}}, []*os.File{f.master}
	}
	for _, file := range f.ours {
		if file != nil {
			list = append(list, file)
		}
	}
	return session.Message{Files: &session.Files{
		Stdin:  f.ours[0] != nil,
		Stdout: f.ours[1] != nil,
		Stderr: f.ours[2] != nil,
	}}, list
}

// closeAll closes those of the files that are not nil.
func closeAll(files ...*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func (f *files) child() runc.IO {
	return runc.IO{Stdin: f.theirs[0], Stdout: f.theirs[1], Stderr: f.theirs[2]}
}

// passed is called when the process has its ends, or never will.
func (f *files) passed(master *os.File) {
	closeAll(f.theirs[:]...)
	f.theirs = [3]*os.File{}
	f.master = master
}

func (f *files) close() {
	closeAll(f.master)
	closeAll(f.ours[:]...)
	closeAll(f.theirs[:]...)
}

// admit makes a socket for one client, and has serve called with its connection, or with
// nil when none has come within limit or ctx has ended. serve closes the connection.
// Until it returns the session counts.
func (t *task) admit(ctx context.Context, limit time.Duration, serve func(*net.UnixConn)) (socket string, err error) {
	t.mu.Lock()
	full := len(t.execs)+t.sessions >= maxSessions
	if !full {
		t.sessions++
		t.sessionSerial++
		t.serving.Add(1)
	}
	id := "session-" + strconv.Itoa(t.sessionSerial)
	t.mu.Unlock()
	if full {
		return "", kind.Errorf(kind.Exhausted, "the shim has %d execs and sessions already", maxSessions)
	}
	leave := func() {
		t.mu.Lock()
		t.sessions--
		t.mu.Unlock()
		t.serving.Done()
	}
	l, socket, err := t.dir.ListenSession(id)
	if err != nil {
		leave()
		return "", err
	}
	go func() {
		defer leave()
		l.SetDeadline(time.Now().Add(limit))
		stop := context.AfterFunc(ctx, func() { l.Close() })
		conn, err := l.AcceptUnix()
		stop()
		l.Close()
		os.Remove(t.dir.Path(socket))
		if err != nil {
			conn = nil
		}
		serve(conn)
	}()
	return socket, nil
}

// Exec starts a command and gives a socket for the client of its session.
func (t *task) Exec(ctx context.Context, p *specs.Process, req *pb.ExecRequest) (*pb.ExecResponse, error) {
	e, err := t.newExec(ctx)
	if err != nil {
		return nil, err
	}
	s := &execSession{
		exec:     e,
		terminal: p.Terminal,
		lease:    defaultLease,
		over:     make(chan struct{}),
	}
	if req.LeaseMs > 0 {
		s.lease = milliseconds(req.LeaseMs)
	}
	if !p.Terminal {
		if s.files, err = openFiles([3]bool{req.Stdin, req.Stdout, req.Stderr}); err != nil {
			e.end()
			return nil, err
		}
	}
	e.stdio = s
	s.timer = time.AfterFunc(s.lease, s.expire)
	// First: what is refused has done nothing.
	socket, err := s.open()
	if err == nil {
		err = step.Reach(step.ShimSession)
	}
	if err != nil {
		e.end()
		return nil, err
	}
	e.limit(req.TimeoutMs)
	go e.run(p, req.SetUser)
	select {
	case <-e.started:
	case <-e.done:
		return nil, e.err // it could not be started
	case <-ctx.Done(): // the caller has gone, and there is nobody else to come
		e.kill(errExecHangup)
		return nil, ctx.Err()
	}
	return &pb.ExecResponse{ExecId: e.id, Socket: socket, Process: pb.ProcessOf(e.process.Process)}, nil
}

// execSession is the standard files of an exec whose client comes to its socket, goes,
// and may come back. The process has the other ends of its files, so no byte passes the
// shim; the shim keeps copies, so that the process does not notice when its client has
// gone. It is the exec's execStdio.
//
// While there is no client the lease runs, before its first one too.
type execSession struct {
	exec     *exec
	terminal bool
	lease    time.Duration
	over     chan struct{} // closed when nobody will ask for the exit any more

	mu      sync.Mutex
	files   files
	awaited bool   // a socket waits for a client
	refuse  func() // takes the socket away
	client  *net.UnixConn
	timer   *time.Timer // of the lease
	keep    bool        // its client wants it to live on without one
	hungUp  bool        // its client wants it to end
	exit    *session.Exit
	isOver  bool
}

func (s *execSession) child() runc.IO { return s.files.child() }

func (s *execSession) begin(master *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files.passed(master)
	s.timer.Reset(s.lease) // its client is told of the socket only now
}

// drain leaves the rest of the output to the client, for whom the lease runs once more.
func (s *execSession) drain(e *exec) {
	exit := session.Exit{Code: e.status.Code}
	if e.err != nil {
		exit.Error = e.err.Error()
		switch {
		case errors.Is(e.err, errExecTimeout):
			exit.Reason = session.TimedOut
		case errors.Is(e.err, errExecHangup), errors.Is(e.err, errExecLease):
			exit.Reason = session.HungUp
		default:
			exit.Reason = session.Killed
		}
	}
	s.conclude(exit)
	select {
	case <-s.over:
	case <-e.task.exited: // what was sent can still be read
	case <-e.c.life.Done():
	}
}

func (s *execSession) conclude(exit session.Exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exit = &exit
	switch {
	case s.client != nil:
		session.Send(s.client, session.Message{Exit: s.exit}) // or it has gone
	case !s.running() || exit.Reason == session.HungUp || s.hungUp: // nobody asks for it
		s.endLocked()
	default:
		s.timer.Reset(s.lease)
	}
}

func (s *execSession) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	if s.refuse != nil {
		s.refuse()
	}
	if s.client != nil {
		s.client.Close()
	}
	s.files.close()
	s.endLocked()
}

func (s *execSession) endLocked() {
	if !s.isOver {
		s.isOver = true
		close(s.over)
	}
}

// expire is the end of the lease.
func (s *execSession) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.client != nil || s.keep && s.exit == nil: // a client came at the last moment
	case s.exit != nil:
		s.endLocked()
	case !s.running(): // whose client is told of the socket later
		s.timer.Reset(s.lease)
	default:
		s.exec.kill(errExecLease)
	}
}

// running says whether the process was started.
func (s *execSession) running() bool {
	select {
	case <-s.exec.started:
		return true
	default:
		return false
	}
}

// open makes a socket for the next client.
func (s *execSession) open() (socket string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.isOver:
		return "", kind.Errorf(kind.NotFound, "exec %s has ended", s.exec.id)
	case s.client != nil || s.awaited:
		return "", kind.Errorf(kind.State, "exec %s has a client already", s.exec.id)
	}
	ctx, refuse := context.WithCancel(s.exec.c.life)
	// The socket goes with the exec, which the lease ends once it runs.
	if socket, err = s.exec.task.admit(ctx, admitTimeout+s.lease, s.serve); err != nil {
		refuse()
		return "", err
	}
	s.awaited, s.refuse = true, refuse
	s.timer.Reset(s.lease)
	return socket, nil
}

// serve gives the files to a client, which they are lent to until it goes. nil: none
// has come.
func (s *execSession) serve(conn *net.UnixConn) {
	if !s.admitted(conn) {
		return
	}
	defer conn.Close()
	var last session.Message
	for {
		m, err := receive(conn)
		if err != nil {
			break
		}
		if m.Resize != nil && s.terminal {
			pty.Resize(s.files.master, m.Resize.Width, m.Resize.Height)
		}
		if m.CloseStdin {
			s.closeStdin()
		}
		if m.Hangup || m.Detach {
			last = m
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.client = nil
	switch {
	case s.exit != nil && (last.Hangup || last.Detach):
		s.endLocked()
	case last.Hangup:
		s.hungUp = true
		s.exec.kill(errExecHangup)
	case last.Detach:
		s.keep = true
	default:
		s.timer.Reset(s.lease)
	}
}

// admitted says whether a client has come and has the files.
func (s *execSession) admitted(conn *net.UnixConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaited = false
	s.refuse()
	if conn == nil {
		return false
	}
	m, list := s.files.message()
	err := kind.Errorf(kind.NotFound, "exec %s has ended", s.exec.id)
	if !s.isOver {
		err = session.Send(conn, m, list...)
	}
	if err != nil {
		conn.Close()
		return false
	}
	if s.exit != nil {
		session.Send(conn, session.Message{Exit: s.exit}) // or it has gone, with a word that serve reads
	}
	s.timer.Stop()
	s.client, s.keep = conn, false
	return true
}

// receive takes a message of a client, which sends no descriptors.
func receive(conn *net.UnixConn) (session.Message, error) {
	m, list, err := session.Receive(conn)
	closeAll(list...)
	return m, err
}

func (s *execSession) closeStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.files.ours[0])
	s.files.ours[0] = nil
}

// Open gives a socket for a client of an exec, or of the container.
func (t *task) Open(req *pb.OpenRequest) (socket string, err error) {
	if req.ExecId == "" {
		return t.attach(req)
	}
	s, err := t.sessionOf(req.ExecId)
	if err != nil {
		return "", err
	}
	return s.open()
}

func (t *task) sessionOf(execID string) (*execSession, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.execs[execID]; e != nil {
		select {
		case <-e.started:
			if s, ok := e.stdio.(*execSession); ok {
				return s, nil
			}
		default:
		}
	}
	return nil, kind.Errorf(kind.NotFound, "there is no exec %.100q with a session", execID)
}
