package fake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
)

// shim is the service. What it does not serve panics, which is an error to the
// caller.
type shim struct {
	proto.ShimService
	dir      rundir.Dir
	identity rundir.Identity
	server   *ttrpc.Server
	lock     *os.File
	ended    chan struct{} // closed when the process may end

	mu     sync.Mutex
	launch rundir.Launch
	init   *exec.Cmd // nil: there is no container
	pidfd  int       // of init
	cgroup string
	status rundir.Status
	exit   *rundir.Exit

	updateAskedAt time.Duration
	events        []*proto.Event
	changed       chan struct{} // closed at the next event
	over          bool          // ended is closed
}

// runShim is the whole life of a shim. Its arguments are those of the real one.
func runShim() error {
	unix.CloseOnExec(3)
	launcher := os.NewFile(3, "launcher")
	if _, err := launcher.Read(make([]byte, 1)); err != nil {
		return err // the launcher has gone
	}
	reappear := make(chan os.Signal, 1)
	signal.Notify(reappear, rundir.SignalReappear)
	s := &shim{
		dir:     rundir.Dir(os.Args[slices.Index(os.Args, "--dir")+1]),
		ended:   make(chan struct{}),
		changed: make(chan struct{}),
		status:  rundir.Status{Phase: rundir.PhaseEmpty, BootID: rundir.BootID()},
	}
	self, err := rundir.FindProcess(os.Getpid())
	if err == nil {
		s.identity = rundir.Identity{Shim: self, BootID: rundir.BootID(), Nonce: fmt.Sprint(self), Version: "fake"}
		s.server, err = ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(withKinds))
	}
	if err == nil {
		proto.RegisterShimService(s.server, s)
		err = s.appear()
	}
	if err != nil {
		launcher.Write(append([]byte{1}, err.Error()...))
		return err
	}
	launcher.Write([]byte{0})
	launcher.Close()
	for running := true; running; {
		select {
		case <-reappear:
			if err := s.reappear(); err != nil {
				slog.Error("cannot be called again", "error", err)
			}
		case <-s.ended:
			running = false
		}
	}
	os.Remove(s.dir.Path(rundir.SocketName))
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s.server.Shutdown(ctx) // the answers under way are sent
	return nil
}

func withKinds(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	resp, err := m(ctx, u)
	return resp, kind.ToStatus(err)
}

// appear takes the lock and makes the socket and shim.json, as far as they are not
// there.
func (s *shim) appear() error {
	lock, err := s.dir.Lock()
	switch {
	case err == nil:
		if s.lock != nil {
			s.lock.Close()
		}
		s.lock = lock
	case s.lock == nil || !errors.Is(err, rundir.ErrLocked):
		return err
	}
	if conn, err := s.dir.Dial(context.Background()); err == nil {
		conn.Close()
	} else {
		l, err := s.dir.Listen()
		if err != nil {
			return err
		}
		go s.server.Serve(context.Background(), l)
	}
	return s.dir.WriteIdentity(s.identity)
}

func (s *shim) reappear() error {
	if err := os.MkdirAll(string(s.dir), 0o711); err != nil {
		return err
	}
	if err := s.appear(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dir.WriteStatus(s.status)
}

// tellLocked changes the status, makes an event of it, and writes it down. That it
// cannot be written is no error.
func (s *shim) tellLocked(t proto.EventType, change func(*rundir.Status)) {
	change(&s.status)
	s.status.Seq++
	at := time.Now()
	if t == proto.EventType_EVENT_TYPE_STARTED {
		at = s.status.StartedAt // the same as in the record
	}
	s.events = append(s.events, &proto.Event{
		Seq:  s.status.Seq,
		At:   proto.TimeOf(at),
		Type: t,
		Init: proto.ProcessOf(s.status.Init),
		Exit: proto.ExitOf(s.exit),
	})
	close(s.changed)
	s.changed = make(chan struct{})
	if err := s.dir.WriteStatus(s.status); err != nil {
		slog.Error("cannot write the status", "error", err)
	}
}

func (s *shim) endLocked() {
	if !s.over {
		s.over = true
		close(s.ended)
	}
}

func (s *shim) Hello(context.Context, *proto.HelloRequest) (*proto.HelloResponse, error) {
	return &proto.HelloResponse{
		Id:          s.dir.ID(),
		Shim:        proto.ProcessOf(s.identity.Shim),
		BootId:      s.identity.BootID,
		Nonce:       s.identity.Nonce,
		ProtocolMin: proto.ProtocolMin,
		ProtocolMax: proto.ProtocolMax,
		Version:     s.identity.Version,
	}, nil
}

func (s *shim) State(context.Context, *proto.StateRequest) (*proto.StateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &proto.StateResponse{
		Id:    s.dir.ID(),
		Phase: proto.PhaseOf(s.status.Phase),
		Shim:  proto.ProcessOf(s.identity.Shim),
		Init:  proto.ProcessOf(s.status.Init),
	}, nil
}

// Create starts init, which waits for a reader of its FIFO, as runc's does.
func (s *shim) Create(_ context.Context, r *proto.CreateRequest) (*proto.CreateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	launch := r.Launch()
	switch {
	case s.init != nil && s.launch.RequestID == launch.RequestID:
		return &proto.CreateResponse{Init: proto.ProcessOf(s.status.Init)}, nil
	case s.init != nil:
		return nil, kind.Errorf(kind.Exists, "there is a container")
	}
	spec, err := proto.UnmarshalAny[specs.Spec](r.Spec)
	if err != nil {
		return nil, kind.As(kind.Invalid, err)
	}
	keeps := filepath.Join(launch.Runtime.Root, s.dir.ID())
	err = errors.Join(
		s.dir.WriteLaunch(launch),
		record.ReplaceFile(s.dir.Path(rundir.SpecName), r.Spec.Value, 0o600, false),
		os.MkdirAll(spec.Linux.CgroupsPath, 0o700),
		os.MkdirAll(keeps, 0o700),
		os.WriteFile(filepath.Join(keeps, "state.json"), []byte("{}"), 0o600),
		unix.Mkfifo(filepath.Join(keeps, "exec.fifo"), 0o600),
	)
	if err != nil {
		return nil, err
	}
	// Like runc's, init has the FIFO before anybody can take its name away.
	fifo, err := os.OpenFile(filepath.Join(keeps, "exec.fifo"), unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer fifo.Close()
	const wait = `[ "$1" = ` + stubborn + ` ] && trap "" TERM && shift; echo > "$0" && exec "$@" 3>&-`
	command := spec.Process.Args
	if command[0] == "/pause" { // of the init of a pod, bound into its root
		command = Sleeps
	}
	init := exec.Command("/bin/sh", append([]string{"-c", wait, "/proc/self/fd/3"}, command...)...)
	init.ExtraFiles = []*os.File{fifo}
	init.Dir = spec.Linux.CgroupsPath
	init.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &s.pidfd}
	if err := init.Start(); err != nil {
		return nil, err
	}
	process, err := rundir.FindProcess(init.Process.Pid)
	if err != nil {
		return nil, err
	}
	s.launch, s.init, s.cgroup = launch, init, spec.Linux.CgroupsPath
	go s.finish()
	s.tellLocked(proto.EventType_EVENT_TYPE_CREATED, func(st *rundir.Status) {
		st.Phase, st.Init, st.CreatedAt = rundir.PhaseCreated, process, time.Now()
		st.Cgroups = map[string]string{"": s.cgroup}
	})
	return &proto.CreateResponse{Init: proto.ProcessOf(process)}, nil
}

// Start lets init go on.
func (s *shim) Start(ctx context.Context, _ *proto.StartRequest) (*proto.StartResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.status.Phase {
	case rundir.PhaseCreated:
		runtime := &runc.Runtime{Root: s.launch.Runtime.Root}
		if err := runtime.Release(ctx, s.dir.ID(), s.pidfd); err != nil {
			return nil, kind.As(kind.State, err)
		}
		s.tellLocked(proto.EventType_EVENT_TYPE_STARTED, func(st *rundir.Status) {
			st.Phase, st.StartedAt = rundir.PhaseRunning, time.Now()
		})
	case rundir.PhaseRunning:
	default:
		return nil, kind.Errorf(kind.State, "the container is %s", s.status.Phase)
	}
	return &proto.StartResponse{
		Init:      proto.ProcessOf(s.status.Init),
		StartedAt: proto.TimeOf(s.status.StartedAt),
	}, nil
}

// finish does all that follows the end of init.
func (s *shim) finish() {
	s.init.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	end := s.init.ProcessState.Sys().(syscall.WaitStatus)
	exit := rundir.Exit{
		Code:      end.ExitStatus(),
		StartedAt: s.status.StartedAt,
		ExitedAt:  time.Now(),
		Source:    rundir.SourceWaited,
		Reason:    rundir.ReasonError,
	}
	if end.Signaled() {
		exit.Signal = int(end.Signal())
		exit.Code = rundir.CodeSignalOffset + exit.Signal
	}
	switch {
	case exit.StartedAt.IsZero():
		exit.Reason = rundir.ReasonNeverRan
	case exit.Code == 0:
		exit.Reason = rundir.ReasonCompleted
	}
	s.exit = &exit
	for _, dir := range []string{string(s.dir), s.launch.DurableDir} {
		f, err := rundir.PrepareExit(dir, false)
		if err == nil {
			err = f.Commit(exit)
		}
		if err != nil {
			slog.Error("no exit record", "error", err)
		}
	}
	os.RemoveAll(filepath.Join(s.launch.Runtime.Root, s.dir.ID()))
	s.tellLocked(proto.EventType_EVENT_TYPE_EXITED, func(st *rundir.Status) { st.Phase = rundir.PhaseExited })
	s.endLocked()
}

// await waits for an event for which ok, called under mu, is true.
func (s *shim) await(ctx context.Context, limit time.Duration, ok func() bool) {
	given := time.After(limit)
	for {
		s.mu.Lock()
		done, changed := ok(), s.changed
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-given:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (s *shim) Events(ctx context.Context, r *proto.EventsRequest) (*proto.EventsResponse, error) {
	var list []*proto.Event
	s.await(ctx, time.Duration(r.WaitMs)*time.Millisecond, func() bool {
		list = s.events[min(int(r.After), len(s.events)):]
		return len(list) > 0
	})
	return &proto.EventsResponse{Events: list}, ctx.Err()
}

func (s *shim) Stop(_ context.Context, r *proto.StopRequest) (*proto.StopResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.init == nil {
		return nil, kind.Errorf(kind.State, "there is no container")
	}
	grace := time.Duration(r.GraceMs) * time.Millisecond
	stop := rundir.Stop{Signal: int(r.Signal), RequestedAt: time.Now(), KillAt: rundir.BootTime() + grace}
	s.tellLocked(proto.EventType_EVENT_TYPE_STOPPING, func(st *rundir.Status) { st.Stop = &stop })
	if grace > 0 {
		s.init.Process.Signal(syscall.Signal(r.Signal))
	}
	time.AfterFunc(grace, func() { s.init.Process.Kill() })
	return &proto.StopResponse{KillAt: proto.TimeOf(rundir.WallTime(stop.KillAt))}, nil
}

// Freeze freezes nothing.
func (s *shim) Freeze(context.Context, *proto.FreezeRequest) (*proto.FreezeResponse, error) {
	return &proto.FreezeResponse{}, nil
}

// Checkpoint writes what is not looked into, in the place of CRIU.
func (s *shim) Checkpoint(_ context.Context, r *proto.CheckpointRequest) (*proto.CheckpointResponse, error) {
	logs := s.dir.Path(rundir.CRIUName)
	return &proto.CheckpointResponse{}, errors.Join(
		os.MkdirAll(logs, 0o700),
		os.WriteFile(filepath.Join(logs, "stats-dump"), nil, 0o600),
		os.WriteFile(filepath.Join(logs, "dump.log"), nil, 0o600),
		os.WriteFile(filepath.Join(r.Dir, "core-1.img"), make([]byte, 1<<20), 0o600),
	)
}

// Thaw finds nothing frozen.
func (s *shim) Thaw(context.Context, *proto.ThawRequest) (*proto.ThawResponse, error) {
	return &proto.ThawResponse{}, nil
}

func (s *shim) Delete(ctx context.Context, r *proto.DeleteRequest) (*proto.DeleteResponse, error) {
	s.mu.Lock()
	if s.init == nil {
		s.endLocked()
		s.mu.Unlock()
		return &proto.DeleteResponse{}, nil
	}
	if s.status.Phase == rundir.PhaseRunning && !r.Force {
		s.mu.Unlock()
		return nil, kind.Errorf(kind.State, "the container runs")
	}
	s.init.Process.Kill()
	s.mu.Unlock()
	s.await(ctx, time.Minute, func() bool { return s.exit != nil })
	return &proto.DeleteResponse{}, ctx.Err()
}

// TooLittle is a memory limit that the shim refuses, in bytes.
const TooLittle = 4096

// Update writes down what it is asked for.
func (s *shim) Update(_ context.Context, r *proto.UpdateRequest) (*proto.UpdateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var u rundir.Update
	if err := json.Unmarshal(r.Update, &u); err != nil {
		return nil, kind.As(kind.Invalid, err)
	}
	if u.AskedAt < s.updateAskedAt {
		return nil, kind.Errorf(kind.Aborted, "a later update was asked for")
	}
	s.updateAskedAt = u.AskedAt
	if len(u.Resources) == 0 {
		return &proto.UpdateResponse{}, nil
	}
	var set specs.LinuxResources
	if err := json.Unmarshal(u.Resources, &set); err != nil {
		return nil, kind.As(kind.Invalid, err)
	}
	if set.Memory != nil && set.Memory.Limit != nil && *set.Memory.Limit == TooLittle {
		return nil, kind.Errorf(kind.State, "the container uses more")
	}
	return &proto.UpdateResponse{}, s.dir.WriteUpdate(u)
}

// ExecSync knows stdout and the exit code.
func (s *shim) ExecSync(ctx context.Context, r *proto.ExecSyncRequest) (*proto.ExecSyncResponse, error) {
	process, err := proto.UnmarshalAny[specs.Process](r.Process)
	if err != nil {
		return nil, kind.As(kind.Invalid, err)
	}
	cmd := exec.CommandContext(ctx, process.Args[0], process.Args[1:]...)
	cmd.Dir = s.cgroup
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		return nil, kind.As(kind.Invalid, err)
	}
	return &proto.ExecSyncResponse{
		ExitCode:    uint32(cmd.ProcessState.ExitCode()),
		StdoutBytes: uint64(len(out)),
	}, os.WriteFile(r.StdoutPath, out, 0)
}
