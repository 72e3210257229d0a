package shim

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func process(p rundir.Process) *pb.Process {
	if p.PID == 0 {
		return nil
	}
	return &pb.Process{Pid: int32(p.PID), StartTime: p.StartTime}
}

func exit(e *rundir.Exit) *pb.Exit {
	if e == nil {
		return nil
	}
	return &pb.Exit{
		Code:      uint32(e.Code),
		Signal:    uint32(e.Signal),
		ExitedAt:  timestamp(e.ExitedAt),
		OomKilled: e.OOMKilled,
		Source:    e.Source,
		Reason:    e.Reason,
		Message:   e.Message,
	}
}

func stopIntent(s *rundir.Stop) *pb.StopIntent {
	if s == nil {
		return nil
	}
	return &pb.StopIntent{
		Signal:      uint32(s.Signal),
		RequestedAt: timestamp(s.RequestedAt),
		KillAt:      timestamp(wallTime(s.KillAt)),
	}
}

// wallTime is what a time on CLOCK_BOOTTIME is on the wall clock, as far as
// that is known now.
func wallTime(at time.Duration) time.Time { return time.Now().Add(at - bootNow()) }

var phases = map[rundir.Phase]pb.Phase{
	rundir.PhaseEmpty:    pb.Phase_PHASE_EMPTY,
	rundir.PhaseCreating: pb.Phase_PHASE_CREATING,
	rundir.PhaseCreated:  pb.Phase_PHASE_CREATED,
	rundir.PhaseRunning:  pb.Phase_PHASE_RUNNING,
	rundir.PhaseExited:   pb.Phase_PHASE_EXITED,
}
