// Package taskapi lets a shim be looked at and driven through containerd's task API,
// versions 2 and 3, beside its own one: by ctr's shim commands, and by any other ttrpc
// client of that API. The two versions have the same messages under two names.
//
// It knows the numbers of the fields that it needs and nothing else of the API's types.
package taskapi

import (
	"context"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Services are the names under which a shim offers the API.
var Services = [...]string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// Shim is what is asked of the shim: calls of its own service, and what that has no
// call for.
type Shim interface {
	Hello(context.Context, *pb.HelloRequest) (*pb.HelloResponse, error)
	State(context.Context, *pb.StateRequest) (*pb.StateResponse, error)
	Start(context.Context, *pb.StartRequest) (*pb.StartResponse, error)
	Wait(context.Context, *pb.WaitRequest) (*pb.WaitResponse, error)
	Kill(context.Context, *pb.KillRequest) (*pb.KillResponse, error)
	Pids(context.Context, *pb.PidsRequest) (*pb.PidsResponse, error)
	Delete(context.Context, *pb.DeleteRequest) (*pb.DeleteResponse, error)
	ResizePty(context.Context, *pb.ResizePtyRequest) (*pb.ResizePtyResponse, error)
	// Shutdown ends the shim if it has no container.
	Shutdown() error
	// StartExec starts a command, whose caller need not wait for it.
	StartExec(ExecOptions) (Exec, error)
}

// Register offers the API of the shim that keeps the container id, whose bundle is a
// directory.
func Register(server *ttrpc.Server, shim Shim, id, bundle string) {
	s := &service{shim: shim, id: id, bundle: bundle}
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":     method(s.state),
		"Start":     method(s.start),
		"Delete":    method(s.delete),
		"Pids":      method(s.pids),
		"Kill":      method(s.kill),
		"Exec":      method(s.exec),
		"ResizePty": method(s.resizePty),
		"CloseIO":   method(s.closeIO),
		"Wait":      method(s.wait),
		"Stats":     method(s.stats),
		"Connect":   method(s.connect),
		"Shutdown":  method(s.shutdown),

		"Create":     refuse("a container is created by the shim's own Create: this one cannot say where its log goes"),
		"Pause":      refuse("a container is not paused here: its stop deadline would go on"),
		"Resume":     refuse("a container is not paused here"),
		"Update":     refuse("resources are changed through the daemon, which keeps them on record"),
		"Checkpoint": refuse("a container is not checkpointed here"),
	}}
	for _, name := range Services {
		server.RegisterService(name, desc)
	}
}

// method lets ttrpc call f. ttrpc wants types that package protobuf knows. An empty one
// does: all that comes is unknown to it and kept, and what is unknown to it is sent.
func method(f func(context.Context, message) (message, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var request, answer pb.KillResponse
		if err := unmarshal(&request); err != nil {
			return nil, kind.As(kind.Invalid, err)
		}
		m, err := f(ctx, message(request.ProtoReflect().GetUnknown()))
		if err != nil {
			return nil, err
		}
		answer.ProtoReflect().SetUnknown(protoreflect.RawFields(m))
		return &answer, nil
	}
}

// refuse is a method that there is not, and why.
func refuse(why string) ttrpc.Method {
	return method(func(context.Context, message) (message, error) {
		return nil, kind.Errorf(kind.Unsupported, "%s", why)
	})
}

// service is the API of one shim.
type service struct {
	shim   Shim
	id     string
	bundle string
	execs  execs
}

// The fields by which nearly every request says whom it means.
const (
	fieldID     = 1
	fieldExecID = 2
)

// check refuses a request that is not meant for this shim's container.
func (s *service) check(m message) error {
	switch id := m.text(fieldID); id {
	case s.id:
		return nil
	case "":
		return kind.Errorf(kind.Invalid, "id is empty")
	default:
		return kind.Errorf(kind.NotFound, "no container %.100q in this shim, which keeps %q", id, s.id)
	}
}

// The numbers of containerd.v1.types.Status. 0 is unknown.
const (
	statusCreated = 1
	statusRunning = 2
	statusStopped = 3
)

var statusOf = [...]uint64{
	pb.Phase_PHASE_CREATED: statusCreated,
	pb.Phase_PHASE_RUNNING: statusRunning,
	pb.Phase_PHASE_EXITED:  statusStopped,
}

// look asks for the container's state.
func (s *service) look(ctx context.Context) (*pb.StateResponse, error) {
	st, err := s.shim.State(ctx, &pb.StateRequest{Id: s.id})
	if err == nil && st.Phase == pb.Phase_PHASE_EMPTY {
		err = kind.Errorf(kind.NotFound, "container %s is not created yet", s.id)
	}
	return st, err
}

func (s *service) state(ctx context.Context, m message) (message, error) {
	// ctr sends no id where its user gives none, and there is one container only.
	if m.text(fieldID) != "" {
		if x, err := s.target(m); err != nil {
			return nil, err
		} else if x != nil {
			return s.stateOf(x), nil
		}
	}
	st, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	return message(nil).
		putText(1, s.id).
		putText(2, s.bundle).
		putUint(3, uint64(st.Init.GetPid())).
		putUint(4, statusOf[st.Phase]).
		putBool(8, st.Terminal).
		putUint(9, uint64(st.Exit.GetCode())).
		putTime(10, st.Exit.GetExitedAt()), nil
}

func (s *service) connect(ctx context.Context, m message) (message, error) {
	if err := s.check(m); err != nil {
		return nil, err
	}
	hello, err := s.shim.Hello(ctx, &pb.HelloRequest{Id: s.id})
	if err != nil {
		return nil, err
	}
	st, err := s.shim.State(ctx, &pb.StateRequest{Id: s.id})
	if err != nil {
		return nil, err
	}
	return message(nil).
		putUint(1, uint64(hello.Shim.GetPid())).
		putUint(2, uint64(st.Init.GetPid())).
		putText(3, hello.Version), nil
}

func (s *service) start(ctx context.Context, m message) (message, error) {
	x, err := s.target(m)
	if err != nil {
		return nil, err
	}
	if x != nil {
		return s.startExec(x)
	}
	r, err := s.shim.Start(ctx, &pb.StartRequest{Id: s.id})
	if err != nil {
		return nil, err
	}
	return message(nil).putUint(1, uint64(r.Init.GetPid())), nil
}

func (s *service) wait(ctx context.Context, m message) (message, error) {
	x, err := s.target(m)
	if err != nil {
		return nil, err
	}
	if x != nil {
		return s.waitFor(ctx, x)
	}
	for {
		r, err := s.shim.Wait(ctx, &pb.WaitRequest{Id: s.id})
		if err != nil {
			return nil, err
		}
		if r.Exited {
			return message(nil).putUint(1, uint64(r.Exit.GetCode())).putTime(2, r.Exit.GetExitedAt()), nil
		}
	}
}

func (s *service) kill(ctx context.Context, m message) (message, error) {
	signal, all := uint32(m.uint(3)), m.bool(4)
	x, running, err := s.targetStarted(m)
	switch {
	case err != nil:
		return nil, err
	case x != nil:
		return nil, running.Kill(signal, all)
	}
	_, err = s.shim.Kill(ctx, &pb.KillRequest{Id: s.id, Signal: signal, All: all})
	return nil, err
}

func (s *service) pids(ctx context.Context, m message) (message, error) {
	if err := s.check(m); err != nil {
		return nil, err
	}
	r, err := s.shim.Pids(ctx, &pb.PidsRequest{Id: s.id})
	if err != nil {
		return nil, err
	}
	var answer message
	for _, pid := range r.Pids {
		answer = answer.putMessage(1, message(nil).putUint(1, uint64(pid)))
	}
	return answer, nil
}

// delete is for a container that was never started. One that has ended goes by itself.
func (s *service) delete(ctx context.Context, m message) (message, error) {
	x, err := s.target(m)
	if err != nil {
		return nil, err
	}
	if x != nil {
		return s.deleteExec(x)
	}
	st, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	r, err := s.shim.Delete(ctx, &pb.DeleteRequest{Id: s.id})
	if err != nil {
		return nil, err
	}
	return message(nil).
		putUint(1, uint64(st.Init.GetPid())).
		putUint(2, uint64(r.Exit.GetCode())).
		putTime(3, r.Exit.GetExitedAt()), nil
}

func (s *service) resizePty(ctx context.Context, m message) (message, error) {
	x, err := s.target(m)
	if err != nil {
		return nil, err
	}
	if x != nil {
		return nil, s.resizeExec(x, m.uint(3), m.uint(4))
	}
	_, err = s.shim.ResizePty(ctx, &pb.ResizePtyRequest{
		Id:     s.id,
		Width:  uint32(m.uint(3)),
		Height: uint32(m.uint(4)),
	})
	return nil, err
}

// shutdown needs no id: it does nothing to a container.
func (s *service) shutdown(context.Context, message) (message, error) { return nil, s.shim.Shutdown() }
