package records

import (
	"fmt"
	"syscall"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Entry is a line of the journal: something that has happened to a pod or container. It
// outlives both, so that their story can be told when they are gone.
type Entry struct {
	At   time.Time `json:"at"`
	ID   string    `json:"id"`
	Pod  string    `json:"pod,omitempty"`  // of a container: the id of its pod
	Name string    `json:"name,omitempty"` // of a pod: NAMESPACE/NAME
	What What      `json:"what"`
	Text string    `json:"text,omitempty"` // by whom, how
}

// What has happened.
type What string

// What there is, in the order of a life. A pod has no start and no exit, but for its init.
const (
	Asked    What = "asked"
	Failed   What = "failed" // to be created
	Created  What = "created"
	Started  What = "started"
	Stopping What = "stopping"
	Exited   What = "exited"
	Stopped  What = "stopped"
	Removed  What = "removed"
)

// Ending says how a container ended, and by whom, as far as its exit record and what its
// shim wrote down last tell. status may be nil.
func Ending(e *rundir.Exit, status *rundir.Status) string {
	var stop *rundir.Stop
	killed := false
	if status != nil {
		stop, killed = status.Stop, status.Killed
	}
	how := fmt.Sprintf("exit code %d", e.Code)
	switch {
	case e.Reason == rundir.ReasonStartError, e.Reason == rundir.ReasonNeverRan:
		return fmt.Sprintf("it never ran (%s: %s)", e.Reason, e.Message)
	case e.Source == rundir.SourceInferred:
		return fmt.Sprintf("how is not known (%s: %s)", e.Reason, e.Message)
	case e.OOMKilled:
		return fmt.Sprintf("the kernel killed it for want of memory (%s): %s", how, e.Message)
	case stop != nil && killed && e.Signal == int(syscall.SIGKILL):
		return fmt.Sprintf("its shim killed it when the time to stop was over (SIGKILL, %s)", how)
	case e.Signal != 0 && stop != nil:
		return fmt.Sprintf("%s ended it, %s after it was asked to stop (%s)", signalName(e.Signal),
			Age(e.ExitedAt.Sub(stop.RequestedAt)), how)
	case stop != nil:
		return fmt.Sprintf("by itself, %s after it was asked to stop (%s)", Age(e.ExitedAt.Sub(stop.RequestedAt)), how)
	case e.Signal != 0 && killed:
		return fmt.Sprintf("its shim killed it (SIGKILL, %s)", how)
	case e.Signal != 0:
		return fmt.Sprintf("%s ended it, which came from elsewhere (%s)", signalName(e.Signal), how)
	}
	return fmt.Sprintf("by itself, with %s", how)
}

func signalName(n int) string { return fmt.Sprintf("signal %d (%s)", n, syscall.Signal(n)) }
