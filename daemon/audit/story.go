package audit

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/journal"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Story is what has happened to one pod or container.
type Story struct {
	ID    string `json:"id"`
	Pod   string `json:"podId,omitempty"` // of a container
	Name  string `json:"name"`
	Lines []Line `json:"lines"`
	// Now is what it is now; empty: it is gone.
	Now string `json:"now,omitempty"`
}

// Line is one thing that has happened.
type Line struct {
	At   time.Time    `json:"at"`
	What records.What `json:"what"`
	Text string       `json:"text,omitempty"`
}

// Stories tells of the pods and containers whose id begins with key, or whose name it is: of a pod also NAMESPACE/NAME,
// and with the containers of it. The oldest is the first.
func Stories(o Options, key string) ([]Story, error) {
	o, err := o.resolved()
	if err != nil {
		return nil, err
	}
	l := &look{Options: o}
	l.machine.processes = l.listProcesses()
	l.readOwners()
	all := stories{}
	entries, err := journal.Read(filepath.Join(o.Root, journal.DirName))
	for _, e := range entries {
		s := all.of(e.ID, e.Pod)
		s.Name = cmp.Or(s.Name, e.Name)
		s.add(Line{e.At, e.What, e.Text})
	}
	for id, p := range l.pods {
		tellPod(all.of(id, ""), p)
	}
	for id, c := range l.containers {
		l.tellContainer(all.of(id, c.PodID), c)
	}
	for id := range l.doubtful {
		all.of(id, "").Now = "no record of it reads; holdfastctl doctor says more"
	}
	var list []Story
	for _, s := range all {
		if s.matches(key, all) {
			slices.SortStableFunc(s.Lines, func(a, b Line) int { return a.At.Compare(b.At) })
			list = append(list, *s)
		}
	}
	slices.SortFunc(list, func(a, b Story) int { return cmp.Or(a.begin().Compare(b.begin()), cmp.Compare(a.ID, b.ID)) })
	return list, err
}

// stories are those of all that there is or was, by its id.
type stories map[string]*Story

// of gives the story of a pod, or of a container of a pod. The init of a pod has the pod's id, and is a part of its
// story.
func (all stories) of(id, pod string) *Story {
	if all[id] == nil {
		if pod == id {
			pod = ""
		}
		all[id] = &Story{ID: id, Pod: pod}
	}
	return all[id]
}

// once are what happens once: what is told of it again, by another daemon, is the same.
var once = []records.What{records.Asked, records.Created, records.Started, records.Exited, records.Removed}

func (s *Story) add(line Line) {
	again := func(other Line) bool { return other.What == line.What }
	if slices.Contains(once, line.What) && slices.ContainsFunc(s.Lines, again) {
		return
	}
	s.Lines = append(s.Lines, line)
}

func (s *Story) begin() time.Time {
	if len(s.Lines) == 0 {
		return time.Time{}
	}
	return s.Lines[0].At
}

// matches says whether a story is meant. An id that is given in full means no other one.
func (s *Story) matches(key string, all stories) bool {
	if key == "" {
		return false
	}
	if all[key] != nil {
		return s.ID == key || s.Pod == key
	}
	named := func(s *Story) bool {
		_, last, _ := strings.Cut(s.Name, "/")
		return strings.HasPrefix(s.ID, key) || s.Name == key || s.Pod == "" && last == key
	}
	pod := all[s.Pod]
	return named(s) || pod != nil && named(pod)
}

func tellPod(s *Story, p *records.Pod) {
	m := p.Config.M.GetMetadata()
	s.Name = cmp.Or(s.Name, m.GetNamespace()+"/"+m.GetName())
	s.Now = podState(p)
	if ips := p.IPs(); len(ips) > 0 && p.Phase == records.PodReady {
		s.Now += ", with " + strings.Join(ips, ", ")
	}
	s.add(Line{p.CreatedAt, records.Asked, "RunPodSandbox"})
}

// tellContainer adds what files say of a container that is there.
func (l *look) tellContainer(s *Story, c *container) {
	if c.Init {
		return
	}
	s.Name = cmp.Or(s.Name, c.Config.M.GetMetadata().GetName())
	s.Now = c.state()
	s.add(Line{c.CreatedAt, records.Asked, "CreateContainer"})
	var status *rundir.Status
	if st, err := l.runDir(c.ID).ReadStatus(); err == nil {
		status = &st
		s.tellStatus(st)
		if st.Init.Alive() && c.exit == nil {
			s.Now += fmt.Sprintf(", as process %d", st.Init.PID)
		}
	}
	if c.exit != nil {
		s.add(Line{c.exit.ExitedAt, records.Exited, records.Ending(c.exit, status)})
	}
}

// tellStatus adds what a shim has written down last.
func (s *Story) tellStatus(st rundir.Status) {
	for what, at := range map[records.What]time.Time{
		records.Created: st.CreatedAt, records.Started: st.StartedAt,
	} {
		if !at.IsZero() {
			s.add(Line{at, what, ""})
		}
	}
	stopping := func(other Line) bool { return other.What == records.Stopping }
	if st.Stop != nil && !slices.ContainsFunc(s.Lines, stopping) {
		text := fmt.Sprintf("through its shim: signal %d, and SIGKILL at %s", st.Stop.Signal,
			rundir.WallTime(st.Stop.KillAt).UTC().Format(time.TimeOnly))
		s.add(Line{st.Stop.RequestedAt, records.Stopping, text})
	}
}
