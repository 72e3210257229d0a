package shim

import (
	"context"
	"errors"
	"math"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
)

// Capabilities tell a daemon what this build can do beyond the protocol's version.
var Capabilities = []string{
	"pty", "exec-sync", "exec-cgroup", "exec-user", "sessions", "payload", "oom", "stop-deadline", "events", "update",
	"checkpoint",
}

// longPoll is the longest that Wait and Events keep a caller, whatever it asked
// for. A client's own deadline should be longer.
const longPoll = time.Minute

// service is the ttrpc face of a task: it checks requests and converts. See onlyFor for what it is given.
type service struct {
	task     *task
	identity rundir.Identity
}

var _ pb.ShimService = (*service)(nil)

// convertErrors gives every method's error its code.
func convertErrors(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	resp, err := m(ctx, u)
	if err == nil {
		return resp, nil
	}
	if e, ok := errors.AsType[*runc.Error](err); ok && e.Unfinished() {
		err = kind.As(kind.Unavailable, err) // the same call may succeed when it is made again
	}
	return nil, kind.ToStatus(err)
}

// onlyFor has methods of the protocol see only requests that are complete, and meant for the container id.
func onlyFor(id string) ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
		return m(ctx, func(req any) error {
			if err := u(req); err != nil {
				return err
			}
			if err := pb.Unpack(req); err != nil {
				return kind.As(kind.Invalid, err)
			}
			r, ok := req.(interface{ GetId() string })
			switch {
			case !ok, r.GetId() == id: // package taskapi asks for itself
				return nil
			case r.GetId() == "":
				return kind.Errorf(kind.Invalid, "id is empty")
			}
			return kind.Errorf(kind.NotFound, "no container %q in this shim, which keeps %q", r.GetId(), id)
		})
	}
}

func (s *service) Hello(_ context.Context, req *pb.HelloRequest) (*pb.HelloResponse, error) {
	return &pb.HelloResponse{
		Id:           req.Id,
		Shim:         pb.ProcessOf(s.identity.Shim),
		BootId:       s.identity.BootID,
		Nonce:        s.identity.Nonce,
		ProtocolMin:  pb.ProtocolMin,
		ProtocolMax:  pb.ProtocolMax,
		Version:      s.identity.Version,
		Capabilities: Capabilities,
	}, nil
}

func (s *service) Create(ctx context.Context, req *pb.CreateRequest) (*pb.CreateResponse, error) {
	launch, err := launchOf(req)
	if err != nil {
		return nil, err
	}
	if got, want := req.Spec.GetTypeUrl(), specTypeURL(); got != want {
		return nil, kind.Errorf(kind.Invalid, "spec is a %q, not a %q", got, want)
	}
	init, err := s.task.Create(ctx, launch, req.Spec.Value)
	if err != nil {
		return nil, err
	}
	return &pb.CreateResponse{Init: pb.ProcessOf(init)}, nil
}

// specTypeURL is the type URL of an OCI spec.
var specTypeURL = sync.OnceValue(func() string {
	url, err := typeurl.TypeURL(&specs.Spec{})
	if err != nil {
		panic(err) // package proto registers it
	}
	return url
})

func launchOf(req *pb.CreateRequest) (rundir.Launch, error) {
	l := req.Launch()
	if l.RequestID == "" {
		return l, kind.Errorf(kind.Invalid, "request_id is empty")
	}
	// The shim's working directory is /, so a relative path would mean nothing.
	for field, path := range map[string]string{
		"runtime.path": l.Runtime.Path, "runtime.root": l.Runtime.Root,
		"log.directory": l.LogDirectory, "durable_dir": l.DurableDir, "restore_dir": l.RestoreDir,
	} {
		optional := path == "" && (field == "durable_dir" || field == "restore_dir" ||
			field == "log.directory" && l.LogPath == "")
		if !filepath.IsAbs(path) && !optional {
			return l, kind.Errorf(kind.Invalid, "%s %q is not absolute", field, path)
		}
	}
	return l, nil
}

func (s *service) Start(_ context.Context, req *pb.StartRequest) (*pb.StartResponse, error) {
	init, at, err := s.task.Start()
	if err != nil {
		return nil, err
	}
	return &pb.StartResponse{Init: pb.ProcessOf(init), StartedAt: pb.TimeOf(at)}, nil
}

func (s *service) State(_ context.Context, req *pb.StateRequest) (*pb.StateResponse, error) {
	return s.task.state(s.identity.Shim), nil
}

func (t *task) state(shim rundir.Process) *pb.StateResponse {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.status
	r := &pb.StateResponse{
		Id:        t.dir.ID(),
		Phase:     pb.PhaseOf(st.Phase),
		Shim:      pb.ProcessOf(shim),
		Init:      pb.ProcessOf(st.Init),
		CreatedAt: pb.TimeOf(st.CreatedAt),
		StartedAt: pb.TimeOf(st.StartedAt),
		Stop:      pb.StopOf(st.Stop),
		LastEvent: st.Seq,
		Execs:     uint32(len(t.execs)),
		Cgroups:   st.Cgroups,
	}
	if st.Phase == rundir.PhaseExited {
		r.Exit = pb.ExitOf(t.exit)
	}
	if c := t.container; c != nil {
		r.Terminal = c.traits.Terminal
		r.OomKills = c.oom.count()
		if c.log != nil {
			n := c.log.Counters()
			r.Log = &pb.LogCounters{Bytes: n.Bytes, Lines: n.Lines, DroppedBytes: n.DroppedBytes, Error: n.Err}
		}
	}
	return r
}

func (s *service) Wait(ctx context.Context, req *pb.WaitRequest) (*pb.WaitResponse, error) {
	limit := longPoll
	if req.TimeoutMs > 0 {
		limit = min(limit, milliseconds(uint64(req.TimeoutMs)))
	}
	e, err := s.task.Wait(ctx, limit)
	if err != nil {
		return nil, err
	}
	return &pb.WaitResponse{Exited: e != nil, Exit: pb.ExitOf(e)}, nil
}

func (s *service) Kill(_ context.Context, req *pb.KillRequest) (*pb.KillResponse, error) {
	sig, err := signalOf(req.Signal)
	if err != nil {
		return nil, err
	}
	return &pb.KillResponse{}, s.task.Kill(sig, req.All)
}

func signalOf(n uint32) (unix.Signal, error) {
	if n < 1 || n > 64 {
		return 0, kind.Errorf(kind.Invalid, "signal %d is none of 1..64", n)
	}
	return unix.Signal(n), nil
}

func (s *service) Stop(_ context.Context, req *pb.StopRequest) (*pb.StopResponse, error) {
	sig := unix.SIGKILL
	if req.GraceMs > 0 || req.Signal > 0 {
		var err error
		if sig, err = signalOf(req.Signal); err != nil {
			return nil, err
		}
	}
	at, err := s.task.Stop(sig, milliseconds(req.GraceMs))
	if err != nil {
		return nil, err
	}
	return &pb.StopResponse{KillAt: pb.TimeOf(rundir.WallTime(at))}, nil
}

// milliseconds bounds a duration so that adding it to a clock cannot overflow.
func milliseconds(n uint64) time.Duration {
	return time.Duration(min(n, math.MaxInt64/4/uint64(time.Millisecond))) * time.Millisecond
}

func (s *service) ExecSync(ctx context.Context, req *pb.ExecSyncRequest) (*pb.ExecSyncResponse, error) {
	p, err := processOf("process", req.Process)
	if err == nil && p.Terminal {
		err = kind.Errorf(kind.Invalid, "process.terminal: ExecSync has no terminal")
	}
	if err != nil {
		return nil, err
	}
	return s.task.ExecSync(ctx, p, req)
}

// processOf gives the process that a request has in a field.
func processOf(field string, in *anypb.Any) (*specs.Process, error) {
	p, err := pb.UnmarshalAny[specs.Process](in)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "%s: %w", field, err)
	}
	if len(p.Args) == 0 {
		return nil, kind.Errorf(kind.Invalid, "%s.args is empty", field)
	}
	return p, nil
}

func (s *service) Exec(ctx context.Context, req *pb.ExecRequest) (*pb.ExecResponse, error) {
	p, err := processOf("process", req.Process)
	switch {
	case err != nil:
		return nil, err
	case p.Terminal && req.Stderr:
		return nil, kind.Errorf(kind.Invalid, "stderr: a terminal has none of its own")
	}
	return s.task.Exec(ctx, p, req)
}

func (s *service) Open(_ context.Context, req *pb.OpenRequest) (*pb.OpenResponse, error) {
	socket, err := s.task.Open(req)
	return &pb.OpenResponse{Socket: socket}, err
}

func (s *service) ResizePty(_ context.Context, req *pb.ResizePtyRequest) (*pb.ResizePtyResponse, error) {
	if req.Width > math.MaxUint16 || req.Height > math.MaxUint16 {
		return nil, kind.Errorf(kind.Invalid, "width and height are at most %d", math.MaxUint16)
	}
	return &pb.ResizePtyResponse{}, s.task.Resize(req.ExecId, uint16(req.Width), uint16(req.Height))
}

func (s *service) ReopenLog(ctx context.Context, _ *pb.ReopenLogRequest) (*pb.ReopenLogResponse, error) {
	inode, err := s.task.ReopenLog(ctx)
	if err != nil {
		return nil, err
	}
	return &pb.ReopenLogResponse{Inode: inode}, nil
}

func (s *service) Pids(_ context.Context, req *pb.PidsRequest) (*pb.PidsResponse, error) {
	pids, err := s.task.Pids()
	if err != nil {
		return nil, err
	}
	r := &pb.PidsResponse{Pids: make([]int32, len(pids))}
	for i, pid := range pids {
		r.Pids[i] = int32(pid)
	}
	return r, nil
}

func (s *service) Delete(ctx context.Context, req *pb.DeleteRequest) (*pb.DeleteResponse, error) {
	e, err := s.task.Delete(ctx, req.Force)
	if err != nil {
		return nil, err
	}
	return &pb.DeleteResponse{Exit: pb.ExitOf(e)}, nil
}

func (s *service) Update(_ context.Context, req *pb.UpdateRequest) (*pb.UpdateResponse, error) {
	return &pb.UpdateResponse{}, s.task.Update(req.Update)
}

func (s *service) Freeze(ctx context.Context, req *pb.FreezeRequest) (*pb.FreezeResponse, error) {
	return &pb.FreezeResponse{}, s.task.Freeze(ctx, milliseconds(req.LimitMs))
}

func (s *service) Thaw(_ context.Context, req *pb.ThawRequest) (*pb.ThawResponse, error) {
	s.task.Thaw()
	return &pb.ThawResponse{}, nil
}

func (s *service) Checkpoint(_ context.Context, req *pb.CheckpointRequest) (*pb.CheckpointResponse, error) {
	return &pb.CheckpointResponse{}, s.task.Checkpoint(req.Dir)
}

// Shutdown is for package taskapi.
func (s *service) Shutdown() error { return s.task.Shutdown() }

func (s *service) Events(ctx context.Context, req *pb.EventsRequest) (*pb.EventsResponse, error) {
	events, err := s.task.Events(ctx, req.After, min(longPoll, milliseconds(uint64(req.WaitMs))))
	if err != nil {
		return nil, err
	}
	return &pb.EventsResponse{Events: events}, nil
}
