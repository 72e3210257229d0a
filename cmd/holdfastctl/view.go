package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Where a view comes from.
const (
	sourceShim  = "shim"
	sourceFiles = "files"
)

// stateLost is the state of a container whose shim died and left no exit record.
// The daemon writes one when it finds that out.
const stateLost = "lost"

// view is what is known about a container. Its JSON is for scripts: fields are
// added, not renamed.
type view struct {
	ID        string            `json:"id"`
	State     string            `json:"state"`  // a rundir.Phase, or "lost"
	Source    string            `json:"source"` // "shim" or "files"
	Note      string            `json:"note,omitempty"`
	Name      string            `json:"name,omitempty"`
	Attempt   int               `json:"attempt"`
	PodID     string            `json:"podId,omitempty"`
	Pod       string            `json:"pod,omitempty"`
	Namespace string            `json:"namespace,omitempty"`
	Shim      rundir.Process    `json:"shim,omitzero"`
	Version   string            `json:"shimVersion,omitempty"`
	Init      rundir.Process    `json:"init,omitzero"`
	CreatedAt time.Time         `json:"createdAt,omitzero"`
	StartedAt time.Time         `json:"startedAt,omitzero"`
	Exit      *rundir.Exit      `json:"exit,omitempty"`
	Stop      *stopView         `json:"stop,omitempty"`
	OOMKills  uint64            `json:"oomKills,omitempty"`
	Terminal  bool              `json:"terminal,omitempty"`
	Execs     uint32            `json:"execs,omitempty"`
	LogFile   string            `json:"logFile,omitempty"`
	Log       *logView          `json:"log,omitempty"`
	LastEvent uint64            `json:"lastEvent,omitempty"`
	Cgroups   map[string]string `json:"cgroups,omitempty"`
	Dir       string            `json:"dir"`
}

type stopView struct {
	Signal      int       `json:"signal"`
	RequestedAt time.Time `json:"requestedAt,omitzero"`
	KillAt      time.Time `json:"killAt"`
}

type logView struct {
	Bytes        uint64 `json:"bytes"`
	Lines        uint64 `json:"lines"`
	DroppedBytes uint64 `json:"droppedBytes"`
	Error        string `json:"error,omitempty"`
}

func (a *app) containersDir() string { return filepath.Join(a.state, "containers") }

// dirs lists the run directories.
func (a *app) dirs() ([]rundir.Dir, error) {
	entries, err := os.ReadDir(a.containersDir())
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(a.state); serr == nil {
			return nil, nil // a daemon that never had a container
		}
		return nil, fmt.Errorf("cannot find containers: there is no %s; is --state right?", a.containersDir())
	}
	if err != nil {
		return nil, fmt.Errorf("cannot find containers: %w", err)
	}
	var dirs []rundir.Dir
	for _, e := range entries {
		// A name with a dot is on its way in or out.
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			dirs = append(dirs, rundir.Dir(filepath.Join(a.containersDir(), e.Name())))
		}
	}
	return dirs, nil
}

// dir finds the container whose id begins with prefix.
func (a *app) dir(prefix string) (rundir.Dir, error) {
	dirs, err := a.dirs()
	if err != nil {
		return "", err
	}
	var ids []string
	for _, d := range dirs {
		if d.ID() == prefix {
			return d, nil
		}
		if strings.HasPrefix(d.ID(), prefix) && prefix != "" {
			ids = append(ids, d.ID())
		}
	}
	switch len(ids) {
	case 0:
		return "", fmt.Errorf("no container matches %q in %s; is --state right? (holdfastctl shims lists them)", prefix, a.state)
	case 1:
		return rundir.Dir(filepath.Join(a.containersDir(), ids[0])), nil
	}
	return "", fmt.Errorf("%d containers match %q: %s; give more of the id", len(ids), prefix, strings.Join(ids[:min(len(ids), 5)], ", "))
}

// look asks the shim, and the files where it does not answer. After the exit
// record is there it has the last word.
func look(ctx context.Context, dir rundir.Dir) view {
	held, err := dir.Held()
	v := fromFiles(dir, held)
	if err != nil {
		v.addNote(err.Error())
	}
	if !held || v.Exit != nil {
		return v
	}
	s, err := connect(ctx, dir)
	if err != nil {
		v.addNote(err.Error())
		return v
	}
	defer s.Close()
	st, err := call(ctx, s, quick, proto.ShimService.State, &proto.StateRequest{Id: dir.ID()})
	if err != nil {
		v.addNote(err.Error())
		return v
	}
	v.apply(st)
	return v
}

// lookAll looks at many at once, so that a few silent shims cost the time of one.
func lookAll(ctx context.Context, dirs []rundir.Dir) []view {
	const atOnce = 32
	views := make([]view, len(dirs))
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, d := range dirs {
		slots <- struct{}{}
		wg.Go(func() {
			views[i] = look(ctx, d)
			<-slots
		})
	}
	wg.Wait()
	// The daemon may have removed one meanwhile.
	return slices.DeleteFunc(views, func(v view) bool {
		_, err := os.Stat(v.Dir)
		return errors.Is(err, fs.ErrNotExist)
	})
}

func (v *view) addNote(text string) {
	if v.Note != "" {
		v.Note += "; "
	}
	v.Note += text
}

// damaged notes a record that is there and does not read. A missing one only
// means "not yet".
func (v *view) damaged(err error) {
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.addNote(err.Error())
	}
}

// fromFiles is what the run directory says. held, whether the shim lives, has to
// be older than the reading: a shim that lets go has written its exit record.
func fromFiles(dir rundir.Dir, held bool) view {
	v := view{ID: dir.ID(), Source: sourceFiles, State: string(rundir.PhaseEmpty), Dir: string(dir)}
	identity, err := dir.ReadIdentity()
	v.damaged(err)
	if held {
		v.Shim = identity.Shim
	}
	v.Version = identity.Version

	st, err := dir.ReadStatus()
	v.damaged(err)
	if err == nil {
		v.State = string(st.Phase)
		v.CreatedAt, v.StartedAt = st.CreatedAt, st.StartedAt
		v.Cgroups, v.LastEvent = st.Cgroups, st.Seq
		if st.BootID == rundir.BootID() && st.Init.Alive() {
			v.Init = st.Init
		}
		if st.Stop != nil {
			v.Stop = &stopView{st.Stop.Signal, st.Stop.RequestedAt, wallClock(st.Stop.KillAt)}
		}
		if st.Error != "" {
			v.addNote(st.Error)
		}
	}
	launch, err := dir.ReadLaunch()
	v.damaged(err)
	if launch.LogPath != "" {
		v.LogFile = filepath.Join(launch.LogDirectory, launch.LogPath)
	}
	v.describe(launch)

	exit, err := dir.ReadExit()
	v.damaged(err)
	switch {
	case err == nil:
		v.State, v.Exit = string(rundir.PhaseExited), &exit
	case !held && st.Phase != "":
		v.State = stateLost
		v.addNote("the shim died and left no exit record: the daemon writes one when it starts")
		if v.Init.PID != 0 {
			v.addNote(fmt.Sprintf("the container's process %d still runs", v.Init.PID))
		}
	case !held:
		v.addNote("no shim: it died before Create, or was never started")
	}
	return v
}

// wallClock turns a time on CLOCK_BOOTTIME into one of the day.
func wallClock(boottime time.Duration) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(boottime - time.Duration(now.Nano())).Round(time.Millisecond)
}

// describe takes names out of the records that the shim keeps for the daemon. A
// record may be of any version of it, or another's altogether: what does not
// read stays empty.
func (v *view) describe(l rundir.Launch) {
	type metadata struct {
		Name      string `json:"name"`
		Attempt   int    `json:"attempt"`
		Namespace string `json:"namespace"`
	}
	type known struct {
		ID     string `json:"id"`
		PodID  string `json:"podId"`
		Config struct {
			Metadata metadata `json:"metadata"`
		} `json:"config"`
	}
	read := func(b []byte) (r known) {
		if record.Decode(b, &r) != nil {
			r = known{}
			if json.Unmarshal(b, &r) != nil {
				return known{}
			}
		}
		return r
	}
	container, sandbox := read(l.Container.Value), read(l.Sandbox.Value)
	v.Name, v.Attempt = container.Config.Metadata.Name, container.Config.Metadata.Attempt
	v.PodID = container.PodID
	if v.PodID == "" {
		v.PodID = sandbox.ID
	}
	v.Pod, v.Namespace = sandbox.Config.Metadata.Name, sandbox.Config.Metadata.Namespace
}

var phases = map[proto.Phase]rundir.Phase{
	proto.Phase_PHASE_EMPTY:    rundir.PhaseEmpty,
	proto.Phase_PHASE_CREATING: rundir.PhaseCreating,
	proto.Phase_PHASE_CREATED:  rundir.PhaseCreated,
	proto.Phase_PHASE_RUNNING:  rundir.PhaseRunning,
	proto.Phase_PHASE_EXITED:   rundir.PhaseExited,
}

// apply puts the shim's answer over what the files said.
func (v *view) apply(st *proto.StateResponse) {
	v.Source = sourceShim
	if p, ok := phases[st.GetPhase()]; ok {
		v.State = string(p)
	} else {
		v.State = st.GetPhase().String() // of a younger shim
	}
	v.Shim, v.Init = process(st.GetShim()), process(st.GetInit())
	v.CreatedAt, v.StartedAt = wireTime(st.GetCreatedAt()), wireTime(st.GetStartedAt())
	v.Terminal, v.Execs, v.OOMKills, v.LastEvent = st.GetTerminal(), st.GetExecs(), st.GetOomKills(), st.GetLastEvent()
	v.Stop = nil
	if s := st.GetStop(); s != nil {
		v.Stop = &stopView{int(s.GetSignal()), wireTime(s.GetRequestedAt()), wireTime(s.GetKillAt())}
	}
	if l := st.GetLog(); l != nil {
		v.Log = &logView{l.GetBytes(), l.GetLines(), l.GetDroppedBytes(), l.GetError()}
	}
	if len(st.GetCgroups()) > 0 {
		v.Cgroups = st.GetCgroups()
	}
	if st.GetExit() != nil {
		e := exitRecord(st.GetExit(), v.StartedAt)
		v.Exit = &e
		v.Init = rundir.Process{}
	}
}

func process(p *proto.Process) rundir.Process {
	return rundir.Process{PID: int(p.GetPid()), StartTime: p.GetStartTime()}
}

// wireTime is the zero time for a missing one, where AsTime gives 1970.
func wireTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func exitRecord(e *proto.Exit, started time.Time) rundir.Exit {
	return rundir.Exit{
		Code: int(e.GetCode()), Signal: int(e.GetSignal()),
		StartedAt: started, ExitedAt: wireTime(e.GetExitedAt()),
		OOMKilled: e.GetOomKilled(), Source: e.GetSource(), Reason: e.GetReason(), Message: e.GetMessage(),
	}
}
