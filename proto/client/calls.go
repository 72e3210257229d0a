package client

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Hello connects, unless that is done, and gives what the shim says of itself.
// Calling it early takes the connecting out of the way of a later call.
func (c *Client) Hello(ctx context.Context) (Shim, error) {
	l, err := c.connect(ctx)
	if err != nil {
		return Shim{}, err
	}
	return *l.shim, nil
}

// Create has the shim create the container, and gives its init.
func (c *Client) Create(ctx context.Context, launch rundir.Launch, spec *specs.Spec) (rundir.Process, error) {
	wire, err := proto.MarshalAny(spec)
	if err != nil {
		return rundir.Process{}, err
	}
	req := proto.LaunchOf(launch)
	req.Id, req.Spec = c.dir.ID(), wire
	payload, err := proto.Pack(req)
	if err != nil {
		return rundir.Process{}, err
	}
	if payload != nil {
		defer payload.Close()
		req = &proto.CreateRequest{Id: req.Id, PayloadPath: procPath(payload)}
	}
	resp, err := call(ctx, c, slow, proto.ShimService.Create, req)
	return resp.GetInit().File(), err
}

// Start has the shim start the container. It gives init and when it was started;
// repeating it gives the same.
func (c *Client) Start(ctx context.Context) (rundir.Process, time.Time, error) {
	resp, err := call(ctx, c, slow, proto.ShimService.Start, &proto.StartRequest{Id: c.dir.ID()})
	return resp.GetInit().File(), proto.Time(resp.GetStartedAt()), err
}

// State is all that a shim knows of its container.
type State struct {
	rundir.Status
	Shim     rundir.Process
	Exit     *rundir.Exit // nil before the end
	OOMKills uint64       // of processes of the container since Create
	Terminal bool
	Execs    int          // that run now
	Log      *LogCounters // nil without a log
}

// LogCounters is what has become of the output.
type LogCounters struct {
	Bytes        uint64 `json:"bytes"` // in the log
	Lines        uint64 `json:"lines"` // records, full and partial
	DroppedBytes uint64 `json:"droppedBytes"`
	Error        string `json:"error,omitempty"` // of the last write or reopening, while it lasts
}

// State asks the shim for all it knows.
func (c *Client) State(ctx context.Context) (State, error) {
	r, err := call(ctx, c, quick, proto.ShimService.State, &proto.StateRequest{Id: c.dir.ID()})
	if err != nil {
		return State{}, err
	}
	s := State{
		Status: rundir.Status{
			Phase:     r.GetPhase().File(),
			Init:      r.GetInit().File(),
			BootID:    rundir.BootID(),
			CreatedAt: proto.Time(r.GetCreatedAt()),
			StartedAt: proto.Time(r.GetStartedAt()),
			Stop:      r.GetStop().File(),
			Cgroups:   r.GetCgroups(),
			Seq:       r.GetLastEvent(),
		},
		Shim:     r.GetShim().File(),
		Exit:     r.GetExit().File(proto.Time(r.GetStartedAt())),
		OOMKills: r.GetOomKills(),
		Terminal: r.GetTerminal(),
		Execs:    int(r.GetExecs()),
	}
	if l := r.GetLog(); l != nil {
		s.Log = &LogCounters{
			Bytes:        l.GetBytes(),
			Lines:        l.GetLines(),
			DroppedBytes: l.GetDroppedBytes(),
			Error:        l.GetError(),
		}
	}
	return s, nil
}

// Wait gives the exit, or nil when the container has not ended within limit. A
// shim waits for a minute at most. When the container was started is not in it.
func (c *Client) Wait(ctx context.Context, limit time.Duration) (*rundir.Exit, error) {
	resp, err := call(ctx, c, limit+quick, proto.ShimService.Wait,
		&proto.WaitRequest{Id: c.dir.ID(), TimeoutMs: uint32(limit.Milliseconds())})
	if err != nil || !resp.GetExited() {
		return nil, err
	}
	return resp.GetExit().File(time.Time{}), nil
}

// Kill sends a signal to init, or to every process of the container.
func (c *Client) Kill(ctx context.Context, signal int, all bool) error {
	_, err := call(ctx, c, quick, proto.ShimService.Kill,
		&proto.KillRequest{Id: c.dir.ID(), Signal: uint32(signal), All: all})
	return err
}

// Stop hands the deadline to the shim and returns; the end comes by Watch.
func (c *Client) Stop(ctx context.Context, signal int, grace time.Duration) error {
	_, err := call(ctx, c, quick, proto.ShimService.Stop,
		&proto.StopRequest{Id: c.dir.ID(), Signal: uint32(signal), GraceMs: uint64(grace.Milliseconds())})
	return err
}

// Delete ends a container that never ran, or with force any, and then the shim.
// It gives the exit, nil if there never was a container.
func (c *Client) Delete(ctx context.Context, force bool) (*rundir.Exit, error) {
	resp, err := call(ctx, c, slow, proto.ShimService.Delete, &proto.DeleteRequest{Id: c.dir.ID(), Force: force})
	return resp.GetExit().File(time.Time{}), err
}

// ReopenLog has the shim switch to a new log file.
func (c *Client) ReopenLog(ctx context.Context) error {
	_, err := call(ctx, c, quick, proto.ShimService.ReopenLog, &proto.ReopenLogRequest{Id: c.dir.ID()})
	return err
}

// Resize sets the size of the terminal of an exec or, with an empty execID, of the
// container.
func (c *Client) Resize(ctx context.Context, execID string, size Size) error {
	_, err := call(ctx, c, quick, proto.ShimService.ResizePty, &proto.ResizePtyRequest{
		Id:     c.dir.ID(),
		ExecId: execID,
		Width:  uint32(size.Width),
		Height: uint32(size.Height),
	})
	return err
}

// Update has the shim set the resources of the container, all of them or none. Without
// resources it waits for an update that is under way, and makes sure that none comes any
// more that was asked for earlier. AskedAt is now if it is not set.
func (c *Client) Update(ctx context.Context, u rundir.Update) error {
	u.AskedAt = cmp.Or(u.AskedAt, rundir.BootTime())
	update, err := json.Marshal(u)
	if err != nil {
		return err
	}
	req := &proto.UpdateRequest{Id: c.dir.ID(), Update: update}
	_, err = call(ctx, c, slow, proto.ShimService.Update, req)
	return err
}

// Freeze stops all processes of a running container until Thaw, or for the limit at most.
func (c *Client) Freeze(ctx context.Context, limit time.Duration) error {
	_, err := call(ctx, c, slow, proto.ShimService.Freeze,
		&proto.FreezeRequest{Id: c.dir.ID(), LimitMs: uint64(limit.Milliseconds())})
	return err
}

// Thaw has a container go on that Freeze has frozen, when a Checkpoint that is under way is
// over.
func (c *Client) Thaw(ctx context.Context, limit time.Duration) error {
	_, err := call(ctx, c, limit, proto.ShimService.Thaw, &proto.ThawRequest{Id: c.dir.ID()})
	return err
}

// Checkpoint saves the processes of a frozen container in an empty directory. The shim
// goes on with it until the limit of Freeze is over, whatever ctx says.
func (c *Client) Checkpoint(ctx context.Context, dir string, limit time.Duration) error {
	_, err := call(ctx, c, limit, proto.ShimService.Checkpoint,
		&proto.CheckpointRequest{Id: c.dir.ID(), Dir: dir})
	return err
}

// Pids lists the processes of the container, as the host numbers them.
func (c *Client) Pids(ctx context.Context) ([]int, error) {
	resp, err := call(ctx, c, quick, proto.ShimService.Pids, &proto.PidsRequest{Id: c.dir.ID()})
	var pids []int
	for _, pid := range resp.GetPids() {
		pids = append(pids, int(pid))
	}
	return pids, err
}

// Exec is a command to run in a container.
type Exec struct {
	// Process as far as it differs from the container's: without Env, Cwd or User
	// it has those of the container. SetUser says that User is meant as it is.
	Process *specs.Process
	SetUser bool
	Timeout time.Duration // 0: none; then the command and all that it started is killed
	// A nil stream is /dev/null. The shim opens a *os.File itself, through /proc:
	// a pipe or a memory file. Anything else goes through a pipe.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Limit          uint64 // bytes of each stream; what is beyond is dropped. 0: none
}

// ExecResult is how a command ended.
type ExecResult struct {
	Code         int // 128 + signal for a death by signal
	TimedOut     bool
	StdoutBytes  int64 // that were written
	StderrBytes  int64
	DroppedBytes uint64
}

// Exec runs a command in the container until it has ended. It has a connection
// of its own: the shim kills the command when that closes, so cancelling ctx, or
// the death of this process, ends it. It is never repeated.
func (c *Client) Exec(ctx context.Context, e Exec) (ExecResult, error) {
	wire, err := proto.MarshalAny(e.Process)
	if err != nil {
		return ExecResult{}, err
	}
	if e.Timeout > 0 {
		// The shim keeps the time; this is for a shim that does not. It runs the
		// OCI runtime first and kills a tree in the end.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, e.Timeout+slow)
		defer cancel()
	}
	req := &proto.ExecSyncRequest{
		Id:          c.dir.ID(),
		Process:     wire,
		SetUser:     e.SetUser,
		TimeoutMs:   uint64(e.Timeout.Milliseconds()),
		OutputLimit: e.Limit,
	}
	var r *proto.ExecSyncResponse
	err = e.attach(ctx, req, func() error {
		payload, err := proto.Pack(req)
		if err != nil {
			return err
		}
		if payload != nil {
			defer payload.Close()
			req = &proto.ExecSyncRequest{Id: req.Id, PayloadPath: procPath(payload)}
		}
		return c.alone(ctx, func(shim proto.ShimService) (err error) {
			r, err = shim.ExecSync(ctx, req)
			return err
		})
	})
	if err != nil {
		return ExecResult{}, err
	}
	return ExecResult{
		Code:         int(r.GetExitCode()),
		TimedOut:     r.GetTimedOut(),
		StdoutBytes:  int64(r.GetStdoutBytes()),
		StderrBytes:  int64(r.GetStderrBytes()),
		DroppedBytes: r.GetDroppedBytes(),
	}, nil
}
