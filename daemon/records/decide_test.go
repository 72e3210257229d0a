package records

import (
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

// Each row is a place where a process was killed, or a file that is missing, empty
// or damaged (all the same here: nil), or of another boot. The numbers are those of
// the crash windows that the names of package step mark.
func TestDecide(t *testing.T) {
	rec := func(phase ContainerPhase) *Container {
		return &Container{ID: "c", BootID: rundir.BootID(), Phase: phase, CreatedAt: time.Unix(1000, 0)}
	}
	other := rec(ContainerCreated)
	other.BootID = "another"
	otherCreating := rec(ContainerCreating)
	otherCreating.BootID = "another"
	status := func(p rundir.Phase) *rundir.Status {
		s := &rundir.Status{Phase: p, Init: rundir.Process{PID: 7, StartTime: 9}}
		if p == rundir.PhaseRunning {
			s.StartedAt = time.Unix(1001, 0)
		}
		return s
	}
	exit := &rundir.Exit{Code: 3, Source: rundir.SourceWaited, Reason: rundir.ReasonError}
	shim, procs, fifo := Kernel{Shim: true}, Kernel{Processes: true}, Kernel{Unstarted: true, Processes: true}
	both := Kernel{Shim: true, Processes: true}

	for _, c := range []struct {
		name   string
		rec    *Container
		files  Files
		kernel Kernel
		state  runtimeapi.ContainerState
		do     Action
	}{
		{"6 container-record: nothing but the record", rec(ContainerCreating), Files{}, Kernel{}, running, Undo},
		{"7 container-shim: a shim without a container", rec(ContainerCreating),
			Files{Status: status(rundir.PhaseEmpty)}, shim, created, Undo},
		{"8 container-runtime: created, not on record", rec(ContainerCreating),
			Files{Status: status(rundir.PhaseCreated)}, both, created, Undo},
		{"9 the shim died in the runtime's create", rec(ContainerCreating), Files{Status: status(rundir.PhaseCreating)},
			fifo, created, Undo},
		{"9 of another boot", otherCreating, Files{}, Kernel{}, running, Undo},
		{"container-created: created, on record", rec(ContainerCreated), Files{Status: status(rundir.PhaseCreated)},
			Kernel{Shim: true, Processes: true, Unstarted: true}, created, Watch},
		{"10 container-started: started, no answer", rec(ContainerCreated), Files{Status: status(rundir.PhaseRunning)},
			both, running, Watch},
		{"11 started, not in state.json", rec(ContainerCreated), Files{Status: status(rundir.PhaseCreated)}, both,
			created, Watch},
		{"12 runs", rec(ContainerCreated), Files{Status: status(rundir.PhaseRunning)}, both, running, Watch},
		{"13 the shim was killed, the container runs", rec(ContainerCreated),
			Files{Status: status(rundir.PhaseRunning)}, procs, running, Bury},
		{"13 both were killed", rec(ContainerCreated), Files{Status: status(rundir.PhaseRunning)}, Kernel{}, running,
			Bury},
		{"13 the shim was killed before the start", rec(ContainerCreated), Files{Status: status(rundir.PhaseCreated)},
			fifo, created, Bury},
		{"14 exit.json is there, the shim lives", rec(ContainerCreated), Files{Status: status(rundir.PhaseRunning),
			Exit: exit}, shim, exited, Serve},
		{"14 exit.json is there, state.json says exited without", rec(ContainerCreated),
			Files{Status: status(rundir.PhaseExited)}, shim, running, Watch},
		{"14 exit.json is there, the shim was killed, others of the container live", rec(ContainerCreated),
			Files{Status: status(rundir.PhaseRunning), Exit: exit}, procs, exited, Bury},
		{"15 it ended while no daemon was there", rec(ContainerCreated), Files{Status: status(rundir.PhaseExited),
			Exit: exit}, Kernel{}, exited, Serve},
		{"17 container-removing", rec(ContainerRemoving), Files{Exit: exit}, Kernel{}, exited, GiveBack},
		{"17 container-removing, no disk took its exit", rec(ContainerRemoving), Files{}, Kernel{}, running, GiveBack},
		{"17 container-removing, its shim lives", rec(ContainerRemoving), Files{Exit: exit}, shim, exited, Remove},
		{"17 container-removing, others of it live", rec(ContainerRemoving), Files{Exit: exit}, procs, exited, Remove},
		{"17 container-removing, it lives", rec(ContainerRemoving), Files{Status: status(rundir.PhaseRunning)}, both,
			running, Remove},
		{"22 another boot, no exit record", other, Files{}, Kernel{}, exited, WriteExit},
		{"22 another boot, an exit record", other, Files{Exit: exit}, Kernel{}, exited, Serve},
		{"22 another boot, a status of then", other, Files{Status: status(rundir.PhaseRunning)}, Kernel{}, exited,
			WriteExit},

		{"no file, shim and container live", rec(ContainerCreated), Files{}, both, running, Watch},
		{"no file, shim and container live, not started", rec(ContainerCreated), Files{},
			Kernel{Shim: true, Processes: true, Unstarted: true}, created, Watch},
		{"no file, the shim lives", rec(ContainerCreated), Files{}, shim, running, Watch},
		{"no file, the container lives", rec(ContainerCreated), Files{}, procs, running, Bury},
		{"no file, nothing lives", rec(ContainerCreated), Files{}, Kernel{}, running, Bury},
		{"no record, a shim lives", nil, Files{}, both, running, LeaveAlone},
		{"no record, processes live", nil, Files{Status: status(rundir.PhaseRunning)}, procs, running, LeaveAlone},
		{"no record, nothing lives", nil, Files{Status: status(rundir.PhaseRunning)}, Kernel{}, running, Erase},
		{"no record, it has ended", nil, Files{Exit: exit}, Kernel{}, exited, Erase},
	} {
		v := Decide(c.rec, c.files, c.kernel)
		if v.Seen.State() != c.state || v.Do != c.do {
			t.Errorf("%s: %s, %s; want %s, %s", c.name, v.Seen.State(), v.Do, c.state, c.do)
		}
		if c.do == WriteExit && (v.Seen.Exit.Reason != rundir.ReasonUnknown || v.Seen.Exit.Code != rundir.CodeUnknown) {
			t.Errorf("%s: %+v", c.name, v.Seen.Exit)
		}
		if c.files.Exit != nil && v.Seen.Exit != exit {
			t.Errorf("%s: the exit record is not the one on file", c.name)
		}
	}
}

// Success, and "never started", are never said on a guess.
func TestInfer(t *testing.T) {
	createdStatus := &rundir.Status{Phase: rundir.PhaseCreated}
	runningStatus := &rundir.Status{Phase: rundir.PhaseRunning, StartedAt: time.Unix(1001, 0)}
	for _, c := range []struct {
		name   string
		files  Files
		kernel Kernel
		code   int
		reason string
	}{
		{"it waits to be started", Files{Status: createdStatus}, Kernel{Unstarted: true, Processes: true}, 255,
			rundir.ReasonNeverRan},
		{"the same without state.json", Files{}, Kernel{Unstarted: true, Processes: true}, 255, rundir.ReasonNeverRan},
		{"its start was not written down", Files{Status: createdStatus}, Kernel{Processes: true}, 137,
			rundir.ReasonShimDied},
		{"its start was not written down, and it has ended", Files{Status: createdStatus}, Kernel{}, 255,
			rundir.ReasonShimDied},
		{"it ran", Files{Status: runningStatus}, Kernel{Processes: true}, 137, rundir.ReasonShimDied},
		{"it ran, and has ended", Files{Status: runningStatus}, Kernel{}, 255, rundir.ReasonShimDied},
		{"nothing is known", Files{}, Kernel{}, 255, rundir.ReasonShimDied},
		{"a FIFO that somebody made", Files{Status: runningStatus}, Kernel{Unstarted: true, Processes: true}, 137,
			rundir.ReasonShimDied},
	} {
		e := Infer(c.files, c.kernel, "why")
		if e.Code != c.code || e.Reason != c.reason || e.Source != rundir.SourceInferred ||
			!strings.HasPrefix(e.Message, "why; ") {
			t.Errorf("%s: %+v", c.name, e)
		}
	}
}

func TestDecidePod(t *testing.T) {
	pod := func(phase PodPhase) *Pod {
		return &Pod{ID: "p", Phase: phase, BootID: rundir.BootID(), Namespaces: Namespaces{Net: "/run/netns/p"}}
	}
	labels := map[string]string{"io.kubernetes.pod.name": "web", "io.kubernetes.pod.uid": "u", "app": "x"}
	of := &Container{ID: "c", PodID: "p",
		Config: Message[*runtimeapi.ContainerConfig]{M: &runtimeapi.ContainerConfig{Labels: labels}}}
	for _, c := range []struct {
		name    string
		files   PodFiles
		phase   PodPhase
		do      Action
		rebuilt bool
	}{
		{"2..4 its creation was cut short", PodFiles{Record: pod(PodCreating)}, PodCreating, Undo, false},
		{"5 ready", PodFiles{Record: pod(PodReady), Copy: pod(PodCreating)}, PodReady, Serve, false},
		{"stopped on a full disk", PodFiles{Record: pod(PodReady), Copy: pod(PodStopped)}, PodStopped, Serve, true},
		{"stopping", PodFiles{Record: pod(PodStopping)}, PodStopping, Serve, false},
		{"stopped", PodFiles{Record: pod(PodStopped), Kept: pod(PodCreating), Pinned: true}, PodStopped, Serve, false},
		{"removed, with debts", PodFiles{Record: pod(PodRemoved)}, PodRemoved, Remove, false},
		{"23 damaged, there is a copy", PodFiles{Copy: pod(PodStopping), Kept: pod(PodCreating)}, PodStopping, Serve,
			true},
		{"23 both damaged, a shim keeps it", PodFiles{Kept: pod(PodCreating), Pinned: true}, PodReady, Serve, true},
		{"23 both damaged, a shim keeps it, it was stopped", PodFiles{Kept: pod(PodReady)}, PodStopping, Serve, true},
		{"23 all damaged, a container is known", PodFiles{Of: of}, PodStopping, Serve, true},
		{"nothing but a directory", PodFiles{}, "", Erase, false},
	} {
		rec, do, rebuilt := DecidePod(c.files)
		if do != c.do || rebuilt != c.rebuilt || rec != nil && rec.Phase != c.phase || (rec == nil) != (c.phase == "") {
			t.Errorf("%s: %+v, %s, %v", c.name, rec, do, rebuilt)
		}
		if c.files.Of != nil &&
			(rec.Config.M.GetMetadata().GetName() != "web" || rec.Config.M.GetLabels()["app"] != "") {
			t.Errorf("%s: %v", c.name, rec.Config.M)
		}
	}
}
