package taskapi

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	// maxExecs bounds the execs that are known. One that has ended is forgotten for a
	// new one, if its client has not deleted it.
	maxExecs = 500
	// maxExecID bounds an exec's id, in bytes.
	maxExecID = 256
	// maxSpecs bounds what all execs hold that clients have chosen, in bytes: the specs of
	// those that are not started, and paths.
	maxSpecs = 4 << 20
)

// ExecOptions are those of an exec.
type ExecOptions struct {
	Process       *anypb.Any // an OCI process, as a typeurl Any
	Terminal      bool
	Width, Height uint16    // of the terminal, in characters; 0: not said
	FIFOs         [3]string // paths for stdin, stdout and stderr; empty: /dev/null
}

// Exec is an exec that was started. Its methods may be called by any goroutine.
type Exec interface {
	Pid() int
	Kill(signal uint32, all bool) error
	Resize(width, height uint16) error
	CloseStdin()
	Exited() <-chan struct{}
	// Exit is for after Exited.
	Exit() (code int, at time.Time)
	// Close is for after Exited. It returns when the output is in the FIFOs.
	Close()
}

// execs are those that were asked for and not deleted. Clients choose their ids.
type execs struct {
	mu    sync.Mutex
	all   []*exec // the oldest first
	specs int     // what size says of all of them
}

// exec is one exec, from the request for it until it is deleted.
type exec struct {
	id       string
	nameless bool          // as names says: its client will not delete it
	started  chan struct{} // closed when running is set
	deleted  chan struct{} // closed when it is deleted

	// Guarded by execs.mu.
	options ExecOptions // without Process once it is started
	busy    bool        // it is being started
	running Exec        // nil: it is not started
}

// size is how much of it a client has chosen, in bytes.
func (x *exec) size() int {
	p, fifos := x.options.Process, &x.options.FIFOs
	return len(p.GetTypeUrl()) + len(p.GetValue()) + len(fifos[0]) + len(fifos[1]) + len(fifos[2])
}

func (x *exec) ended() bool {
	if x.running == nil {
		return false
	}
	select {
	case <-x.running.Exited():
		return true
	default:
		return false
	}
}

// names gives the id of the exec that a request is about; "": it is about the container.
//
// ctr's shim commands send an exec's id as that of the container, and none of an exec.
// This shim has one container, so an id that is not the container's is one of an exec:
// a nameless request.
func (s *service) names(m message) (execID string, nameless bool, err error) {
	id, execID := m.text(fieldID), m.text(fieldExecID)
	if execID == "" && id != "" && id != s.id {
		return id, true, nil
	}
	return execID, false, s.check(m)
}

// target gives the exec that a request is about; nil: it is about the container.
func (s *service) target(m message) (*exec, error) {
	execID, nameless, err := s.names(m)
	if err != nil || execID == "" {
		return nil, err
	}
	s.execs.mu.Lock()
	defer s.execs.mu.Unlock()
	if i := s.execs.indexLocked(execID); i >= 0 {
		return s.execs.all[i], nil
	}
	if nameless {
		return nil, s.check(m)
	}
	return nil, kind.Errorf(kind.NotFound, "container %s has no exec %.100q", s.id, execID)
}

// targetStarted is target for what can only be done to an exec that was started.
func (s *service) targetStarted(m message) (*exec, Exec, error) {
	x, err := s.target(m)
	if err != nil || x == nil {
		return nil, nil, err
	}
	s.execs.mu.Lock()
	defer s.execs.mu.Unlock()
	if x.running == nil {
		return x, nil, kind.Errorf(kind.State, "exec %s is not started", x.id)
	}
	return x, x.running, nil
}

func (e *execs) indexLocked(id string) int {
	return slices.IndexFunc(e.all, func(x *exec) bool { return x.id == id })
}

// exec is Exec, which only takes down what Start starts.
func (s *service) exec(_ context.Context, m message) (message, error) {
	execID, nameless, err := s.names(m)
	spec := m.bytes(7)
	switch {
	case err != nil:
		return nil, err
	case execID == "":
		return nil, kind.Errorf(kind.Invalid, "exec_id is empty")
	case len(execID) > maxExecID || !utf8.ValidString(execID):
		return nil, kind.Errorf(kind.Invalid, "exec_id %.100q is longer than %d bytes, or no text", execID, maxExecID)
	}
	return nil, s.execs.add(&exec{
		id:       execID,
		nameless: nameless,
		started:  make(chan struct{}),
		deleted:  make(chan struct{}),
		options: ExecOptions{
			Process:  &anypb.Any{TypeUrl: spec.text(1), Value: slices.Clone(spec.bytes(2))},
			Terminal: m.bool(3),
			FIFOs:    [3]string{m.text(4), m.text(5), m.text(6)},
		},
	})
}

func (e *execs) add(x *exec) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.indexLocked(x.id); i >= 0 {
		if old := e.all[i]; !old.nameless || !old.ended() {
			return kind.Errorf(kind.Exists, "exec %s exists", x.id)
		}
		e.forgetLocked(i)
	}
	if len(e.all) >= maxExecs {
		i := slices.IndexFunc(e.all, (*exec).ended)
		if i < 0 {
			return kind.Errorf(kind.Exhausted, "there are %d execs already", maxExecs)
		}
		e.forgetLocked(i)
	}
	if size := e.specs + x.size(); size > maxSpecs {
		return kind.Errorf(kind.Exhausted, "execs that are not started have specs of %d bytes, and %d are too many",
			e.specs, size)
	}
	e.specs += x.size()
	e.all = append(e.all, x)
	return nil
}

// forgetLocked removes one that has ended, whose client has not.
func (e *execs) forgetLocked(i int) {
	go e.all[i].running.Close()
	e.removeLocked(i)
}

func (e *execs) removeLocked(i int) {
	x := e.all[i]
	e.specs -= x.size()
	close(x.deleted)
	e.all = slices.Delete(e.all, i, i+1)
}

// startExec does the work of Start. After an error it can be tried again.
func (s *service) startExec(x *exec) (message, error) {
	e := &s.execs
	e.mu.Lock()
	if x.busy || x.running != nil {
		e.mu.Unlock()
		return nil, kind.Errorf(kind.State, "exec %s is started already", x.id)
	}
	x.busy = true
	options := x.options
	e.mu.Unlock()
	running, err := s.shim.StartExec(options)
	e.mu.Lock()
	defer e.mu.Unlock()
	x.busy = false
	if err != nil {
		return nil, err
	}
	e.specs -= x.size()
	x.options.Process = nil
	e.specs += x.size()
	x.running = running
	close(x.started)
	return message(nil).putUint(1, uint64(running.Pid())), nil
}

// stateOf is the answer of State.
func (s *service) stateOf(x *exec) message {
	s.execs.mu.Lock()
	defer s.execs.mu.Unlock()
	pid, status := 0, uint64(statusCreated)
	if x.running != nil {
		pid, status = x.running.Pid(), statusRunning
	}
	answer := message(nil).
		putText(1, s.id).
		putText(2, s.bundle).
		putUint(3, uint64(pid)).
		putText(5, x.options.FIFOs[0]).
		putText(6, x.options.FIFOs[1]).
		putText(7, x.options.FIFOs[2]).
		putBool(8, x.options.Terminal).
		putText(11, x.id)
	if x.ended() {
		status = statusStopped
		code, at := x.running.Exit()
		answer = answer.putUint(9, uint64(code)).putTime(10, timestamppb.New(at))
	}
	return answer.putUint(4, status)
}

// waitFor does the work of Wait. The exec may be started later.
func (s *service) waitFor(ctx context.Context, x *exec) (message, error) {
	select {
	case <-x.started:
	case <-x.deleted:
		return nil, kind.Errorf(kind.NotFound, "exec %s was deleted before it was started", x.id)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-x.running.Exited():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	code, at := x.running.Exit()
	return message(nil).putUint(1, uint64(code)).putTime(2, timestamppb.New(at)), nil
}

// deleteExec does the work of Delete.
func (s *service) deleteExec(x *exec) (message, error) {
	e := &s.execs
	e.mu.Lock()
	if x.busy || x.running != nil && !x.ended() {
		e.mu.Unlock()
		return nil, kind.Errorf(kind.State, "cannot delete exec %s: it runs", x.id)
	}
	if i := slices.Index(e.all, x); i >= 0 { // or another call has deleted it
		e.removeLocked(i)
	}
	running := x.running
	e.mu.Unlock()
	if running == nil {
		return nil, nil
	}
	running.Close()
	code, at := running.Exit()
	return message(nil).
		putUint(1, uint64(running.Pid())).
		putUint(2, uint64(code)).
		putTime(3, timestamppb.New(at)), nil
}

// resizeExec keeps the size for an exec that is not started.
func (s *service) resizeExec(x *exec, width, height uint64) error {
	if width > math.MaxUint16 || height > math.MaxUint16 {
		return kind.Errorf(kind.Invalid, "width and height are at most %d", math.MaxUint16)
	}
	s.execs.mu.Lock()
	running := x.running
	if running == nil {
		x.options.Width, x.options.Height = uint16(width), uint16(height)
	}
	s.execs.mu.Unlock()
	if running == nil {
		return nil
	}
	return running.Resize(uint16(width), uint16(height))
}

// closeIO is CloseIO. The input of the container itself belongs to those who are
// attached to it.
func (s *service) closeIO(_ context.Context, m message) (message, error) {
	x, running, err := s.targetStarted(m)
	switch {
	case err != nil:
		return nil, err
	case x == nil:
		return nil, kind.Errorf(kind.Unsupported, "the input of the container belongs to the clients that are attached")
	case m.bool(3):
		running.CloseStdin()
	}
	return nil, nil
}
