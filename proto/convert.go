package proto

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// What the messages say and what the files say is the same. Here is the one
// place that turns one into the other: functions named …Of make messages, methods
// of messages make what package rundir has. A nil message is a zero value there.

// TimeOf is nil for the zero time.
func TimeOf(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// Time is the zero time for a missing one, where AsTime gives 1970.
func Time(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// ProcessOf is nil for no process.
func ProcessOf(p rundir.Process) *Process {
	if p.PID == 0 {
		return nil
	}
	return &Process{Pid: int32(p.PID), StartTime: p.StartTime}
}

// File is the process as the files have it.
func (p *Process) File() rundir.Process {
	return rundir.Process{PID: int(p.GetPid()), StartTime: p.GetStartTime()}
}

var phases = map[rundir.Phase]Phase{
	rundir.PhaseEmpty:    Phase_PHASE_EMPTY,
	rundir.PhaseCreating: Phase_PHASE_CREATING,
	rundir.PhaseCreated:  Phase_PHASE_CREATED,
	rundir.PhaseRunning:  Phase_PHASE_RUNNING,
	rundir.PhaseExited:   Phase_PHASE_EXITED,
}

// PhaseOf is the phase on the wire.
func PhaseOf(p rundir.Phase) Phase { return phases[p] }

// File is the phase as the files have it. One that only a younger shim knows
// keeps its number as its name.
func (p Phase) File() rundir.Phase {
	return rundir.Phase(strings.ToLower(strings.TrimPrefix(p.String(), "PHASE_")))
}

// EventTypeOf is the type of an event on the wire.
func EventTypeOf(t rundir.EventType) EventType {
	return EventType(EventType_value["EVENT_TYPE_"+strings.ToUpper(string(t))])
}

// ExitOf leaves out when the container was started.
func ExitOf(e *rundir.Exit) *Exit {
	if e == nil {
		return nil
	}
	return &Exit{
		Code:      uint32(e.Code),
		Signal:    uint32(e.Signal),
		ExitedAt:  TimeOf(e.ExitedAt),
		OomKilled: e.OOMKilled,
		Source:    e.Source,
		Reason:    e.Reason,
		Message:   e.Message,
	}
}

// File is the exit record, nil for none. The message does not say when the
// container was started; the zero time stands for never.
func (e *Exit) File(started time.Time) *rundir.Exit {
	if e == nil {
		return nil
	}
	return &rundir.Exit{
		Code:      int(e.Code),
		Signal:    int(e.Signal),
		StartedAt: started,
		ExitedAt:  Time(e.ExitedAt),
		OOMKilled: e.OomKilled,
		Source:    e.Source,
		Reason:    e.Reason,
		Message:   e.Message,
	}
}

// StopOf has the deadline on the wall clock, as far as that is known now.
func StopOf(s *rundir.Stop) *StopIntent {
	if s == nil {
		return nil
	}
	return &StopIntent{
		Signal:      uint32(s.Signal),
		RequestedAt: TimeOf(s.RequestedAt),
		KillAt:      TimeOf(rundir.WallTime(s.KillAt)),
	}
}

// File is the stop as the files have it, with the deadline on CLOCK_BOOTTIME.
func (s *StopIntent) File() *rundir.Stop {
	if s == nil {
		return nil
	}
	return &rundir.Stop{
		Signal:      int(s.Signal),
		RequestedAt: Time(s.RequestedAt),
		KillAt:      rundir.BootTime() + time.Until(Time(s.KillAt)),
	}
}

// LaunchOf is a request to create a container, but for its id and spec.
func LaunchOf(l rundir.Launch) *CreateRequest {
	return &CreateRequest{
		RequestId: l.RequestID,
		Runtime: &Runtime{
			Path:          l.Runtime.Path,
			Root:          l.Runtime.Root,
			SystemdCgroup: l.Runtime.SystemdCgroup,
		},
		Stdin:           l.Stdin,
		StdinOnce:       l.StdinOnce,
		Log:             &Log{Directory: l.LogDirectory, Path: l.LogPath},
		DurableDir:      l.DurableDir,
		RestoreDir:      l.RestoreDir,
		ContainerRecord: &anypb.Any{TypeUrl: l.Container.TypeURL, Value: l.Container.Value},
		SandboxRecord:   &anypb.Any{TypeUrl: l.Sandbox.TypeURL, Value: l.Sandbox.Value},
	}
}

// Launch is what a container is created with, as the files have it.
func (r *CreateRequest) Launch() rundir.Launch {
	return rundir.Launch{
		RequestID: r.GetRequestId(),
		Runtime: rundir.Runtime{
			Path:          r.GetRuntime().GetPath(),
			Root:          r.GetRuntime().GetRoot(),
			SystemdCgroup: r.GetRuntime().GetSystemdCgroup(),
		},
		Stdin:        r.GetStdin(),
		StdinOnce:    r.GetStdinOnce(),
		LogDirectory: r.GetLog().GetDirectory(),
		LogPath:      r.GetLog().GetPath(),
		DurableDir:   r.GetDurableDir(),
		RestoreDir:   r.GetRestoreDir(),
		Container: rundir.Opaque{
			TypeURL: r.GetContainerRecord().GetTypeUrl(),
			Value:   r.GetContainerRecord().GetValue(),
		},
		Sandbox: rundir.Opaque{
			TypeURL: r.GetSandboxRecord().GetTypeUrl(),
			Value:   r.GetSandboxRecord().GetValue(),
		},
	}
}
