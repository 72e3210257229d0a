package records

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Seen is what is known of a container: what its shim said last, or what its
// files and the kernel say in its place. A container never goes back to an
// earlier phase, and its first end stays.
type Seen struct {
	Phase rundir.Phase
	// Guessed says that no file tells the phase. RUNNING is the safest guess; it
	// holds until the shim answers.
	Guessed   bool
	Init      rundir.Process
	StartedAt time.Time    // zero: not started, or not known
	Exit      *rundir.Exit // nil: it has not ended
}

// State is the CRI's state. It is derived, never stored.
func (s *Seen) State() runtimeapi.ContainerState {
	switch {
	case s.Exit != nil:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case s.Phase == rundir.PhaseRunning:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	default:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	}
}

// Files is what the files of a shim say of its container. A file that is missing,
// empty or damaged is nil, and says nothing.
type Files struct {
	Status *rundir.Status
	Exit   *rundir.Exit // of the run directory, or else the durable one
}

// Kernel is what the kernel says of a container. It is asked apart from the
// files: one that is missing is no fact about processes.
type Kernel struct {
	Shim      bool // the container's shim lives
	Processes bool // processes of the container live: its init, or others in its cgroups
	// Unstarted says that init still waits to be started: the OCI runtime has
	// the FIFO that init opens. Without one nothing is known.
	Unstarted bool
}

// Action is what has to be done about a container.
type Action string

// What Decide can ask for.
const (
	Serve      Action = "serve"       // it has ended, and all of it is on record
	Watch      Action = "watch"       // its shim lives: follow it
	Bury       Action = "bury"        // its shim is gone: kill what is left, write the exit record
	WriteExit  Action = "write exit"  // it ended with the machine: write the exit record
	Undo       Action = "undo"        // it was never acknowledged: remove it
	Remove     Action = "remove"      // its removal was cut short: finish it
	GiveBack   Action = "give back"   // its removal may have been answered: nobody sees it, what is left of it goes
	Erase      Action = "erase"       // nobody knows what it was, and nothing of it lives: remove it
	LeaveAlone Action = "leave alone" // no record of it can be read, and it lives: never killed on a guess
)

// Verdict is what a container is, and what has to be done about it.
type Verdict struct {
	Seen Seen
	Do   Action
}

// Decide weighs what was wanted (nil: no record of it can be read), what the
// files say and what the kernel says. It is the only place that does.
func Decide(rec *Container, f Files, k Kernel) Verdict {
	seen := see(f, k)
	switch {
	case rec == nil && (k.Shim || k.Processes):
		return Verdict{seen, LeaveAlone}
	case rec == nil:
		return Verdict{seen, Erase}
	case rec.Phase == ContainerCreating:
		return Verdict{seen, Undo}
	case rec.Phase == ContainerRemoving && !k.Shim && !k.Processes:
		return Verdict{seen, GiveBack}
	case rec.Phase == ContainerRemoving:
		return Verdict{seen, Remove}
	case !ThisBoot(rec.BootID):
		if seen.Exit != nil {
			return Verdict{seen, Serve}
		}
		seen.Exit = rebooted(rec)
		seen.Phase, seen.StartedAt = rundir.PhaseExited, seen.Exit.StartedAt
		return Verdict{seen, WriteExit}
	case seen.Exit != nil && k.Processes && !k.Shim:
		return Verdict{seen, Bury}
	case seen.Exit != nil:
		return Verdict{seen, Serve}
	case k.Shim:
		return Verdict{seen, Watch}
	}
	return Verdict{seen, Bury}
}

// see is what is seen of a container whose shim has not answered yet.
func see(f Files, k Kernel) Seen {
	var s Seen
	switch {
	case f.Exit != nil:
		return Seen{Phase: rundir.PhaseExited, StartedAt: f.Exit.StartedAt, Exit: f.Exit}
	case f.Status != nil:
		s = Seen{Phase: f.Status.Phase, Init: f.Status.Init, StartedAt: f.Status.StartedAt}
	case k.Unstarted:
		s.Phase = rundir.PhaseCreated
	default:
		s.Phase, s.Guessed = rundir.PhaseRunning, true
	}
	if s.Phase == rundir.PhaseExited { // told before the exit record is read: it is on its way
		s.Phase = rundir.PhaseRunning
	}
	return s
}

// rebooted is the exit record of a container that the machine took along.
func rebooted(rec *Container) *rundir.Exit {
	return &rundir.Exit{
		Code:      rundir.CodeUnknown,
		StartedAt: rec.CreatedAt,
		ExitedAt:  time.Now(),
		Source:    rundir.SourceInferred,
		Reason:    rundir.ReasonUnknown,
		Message:   "the machine went down while it ran, before its end was on the disk",
	}
}

// Infer is the exit record of a container whose shim is gone without having
// written one. why is for whoever reads it. k is what the kernel said before
// anything was killed.
func Infer(f Files, k Kernel, why string) rundir.Exit {
	e := rundir.Exit{
		Code:     rundir.CodeUnknown,
		ExitedAt: time.Now(),
		Source:   rundir.SourceInferred,
		Reason:   rundir.ReasonShimDied,
		Message:  fmt.Sprintf("%s; how the container ended is not known", why),
	}
	if f.Status != nil {
		e.StartedAt = f.Status.StartedAt
	}
	switch {
	case e.StartedAt.IsZero() && k.Unstarted:
		// Both agree. Without the FIFO it may have been started by a shim that
		// was killed before it wrote that down.
		e.Reason = rundir.ReasonNeverRan
		e.Message = why + "; the container was never started"
	case k.Processes:
		e.Code = rundir.CodeSignalOffset + int(syscall.SIGKILL)
		e.Signal = int(syscall.SIGKILL)
		e.Message = why + "; the container still ran and was killed"
	}
	return e
}

// PodFiles is what the records of a pod say: its own, the copy in STATE, and what
// the shims of its containers keep. nil is missing or damaged.
type PodFiles struct {
	Record, Copy, Kept *Pod
	// Of is a container of the pod, if it has any.
	Of *Container
	// Pinned says that the kernel has a namespace of the pod pinned.
	Pinned bool
}

// DecidePod gives the record that holds and what has to be done. The record is
// nil if nothing is known of the pod but that something is named after it. It is
// rebuilt if it is not the pod's own.
func DecidePod(f PodFiles) (rec *Pod, do Action, rebuilt bool) {
	switch {
	case f.Record != nil && (f.Copy == nil || !f.Copy.stopsAfter(f.Record)):
		rec = f.Record
	case f.Copy != nil: // the record is damaged, or its disk was full when the pod was stopped
		rec, rebuilt = f.Copy, true
	case f.Kept != nil:
		// It was ready when the shim was given it, and is no more if its
		// namespaces are gone.
		kept := *f.Kept
		rec, rebuilt = &kept, true
		if rec.Phase = PodReady; !f.Pinned && rec.Namespaces != (Namespaces{}) {
			rec.Phase = PodStopping
		}
	case f.Of != nil:
		rec, rebuilt = podOf(f.Of), true
	default:
		return nil, Erase, false
	}
	switch rec.Phase {
	case PodCreating:
		return rec, Undo, rebuilt
	case PodRemoved:
		return rec, Remove, rebuilt
	}
	return rec, Serve, rebuilt
}

// stopsAfter says whether p tells more of the stop of a pod than another record of it.
func (p *Pod) stopsAfter(other *Pod) bool {
	phases := []PodPhase{PodReady, PodStopping, PodStopped}
	i := slices.Index(phases, other.Phase)
	return i >= 0 && slices.Index(phases, p.Phase) > i
}

// podOf is the record of a pod of which only a container is known. It takes no
// container, and can be stopped and removed with those that it has.
func podOf(c *Container) *Pod {
	const prefix = "io.kubernetes.pod." // labels that the kubelet gives both
	labels := map[string]string{}
	for k, v := range c.Config.M.GetLabels() {
		if strings.HasPrefix(k, prefix) {
			labels[k] = v
		}
	}
	name := cmp.Or(labels[prefix+"name"], "unknown-"+ShortID(c.PodID))
	return &Pod{
		ID:        c.PodID,
		Handler:   c.Handler,
		CreatedAt: c.CreatedAt,
		BootID:    c.BootID,
		Phase:     PodStopping,
		Network:   &Network{Phase: NetworkAdding, Attachment: Attachment{ID: c.PodID}},
		Config: Message[*runtimeapi.PodSandboxConfig]{M: &runtimeapi.PodSandboxConfig{
			Labels: labels,
			Metadata: &runtimeapi.PodSandboxMetadata{
				Name:      name,
				Namespace: labels[prefix+"namespace"],
				Uid:       labels[prefix+"uid"],
			},
		}},
	}
}
