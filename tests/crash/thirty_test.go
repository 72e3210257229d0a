// Package crash kills the daemon and looks at what the kubelet then sees, and at
// the machine. Everything goes through CRI. HOLDFAST_DRILL=1 runs the long form.
package crash

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

var drill = os.Getenv("HOLDFAST_DRILL") != ""

func TestMain(m *testing.M) {
	becomeSupervised()
	flag.Parse()
	flag.Set("test.parallel", "4") // more than there are processors: most of them wait
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

const (
	patience = 3 * time.Minute
	// More than twice what a pipe can hold at the most (1 MiB, pipe(7)).
	moreThanPipes = 5 << 19
)

// seen is what CRI said about a container, and what the machine did.
type seen struct {
	*harness.Container
	status *cri.ContainerStatus
	init   rundir.Process
}

// observe takes down a container that runs.
func observe(t *testing.T, c *harness.Container) *seen {
	t.Helper()
	p, err := rundir.FindProcess(c.Info().PID)
	if err != nil {
		t.Fatalf("%s: %v", c.Config.Metadata.Name, err)
	}
	return &seen{Container: c, status: c.Status(), init: p}
}

// Thirty containers, a third of which print, a third print more than a pipe
// holds, and a third wait to exit with a code of their own, which they do while
// the daemon is down.
func TestThirtyContainers(t *testing.T) {
	tally := harness.Drill(t, "ThirtyContainers")
	n := harness.New(t)
	const third = 10
	var printers, flooders, waiters []*seen
	for i := range third {
		pod := n.RunPod(fmt.Sprintf("pod%d", i))
		printers = append(printers, observe(t, pod.Run("print", []string{"testbox", "print"})))
		flooders = append(flooders, observe(t, pod.Run("flood", []string{"testbox", "flood", "-rate", "524288"})))
		waiters = append(waiters, observe(t, runWaiter(t, n, pod)))
	}
	var all []*seen
	all = append(append(append(all, printers...), flooders...), waiters...)
	podsBefore := podStatuses(t, all)

	took := flood(t, flooders)
	t.Logf("daemon up: each flooding log grew by %d bytes, the last one after %s", moreThanPipes, took)

	if drill {
		for range 20 {
			n.Restart()
			tally.Kill()
			checkList(t, n, all, nil)
		}
	}
	n.Kill()
	tally.Kill()
	printed := map[string]int{}
	for _, p := range printers {
		printed[p.ID] = lastLine(t, p.Container)
	}
	ends := map[string]end{}
	for i, w := range waiters {
		ends[w.ID] = letGo(t, w, 10*i) // one of them exits with 0
	}
	took = flood(t, flooders)
	t.Logf("daemon down: each flooding log grew by %d bytes, the last one after %s", moreThanPipes, took)
	for _, p := range printers {
		harness.Eventually(t, patience, "a printer goes on while the daemon is down", func() bool {
			return lastLine(t, p.Container) > printed[p.ID]
		})
	}
	n.Start()

	checkList(t, n, all, ends)
	for _, s := range all {
		checkStatus(t, s, ends)
	}
	podsAfter := podStatuses(t, all)
	for id, before := range podsBefore {
		if after := podsAfter[id]; !proto.Equal(before, after) {
			t.Errorf("a pod has another status after the restart:\n%v\n%v", before, after)
		}
	}

	for _, s := range append(printers, flooders...) {
		s.Stop(60)
		if code := s.WaitExited(patience).ExitCode; code != 0 {
			t.Errorf("%s exits with %d on SIGTERM, want 0", s.Config.Metadata.Name, code)
		}
	}
	for _, s := range printers {
		checkNumbers(t, s, "line")
	}
	for _, s := range flooders {
		checkNumbers(t, s, "flood")
	}
	n.RemoveAllPods()
	tally.CheckClean(n)
}

// runWaiter runs a container that exits with the number written into its fifo.
func runWaiter(t *testing.T, n *harness.Node, pod *harness.Pod) *harness.Container {
	t.Helper()
	dir := filepath.Join(n.Dir, "marks", pod.Config.Metadata.Name)
	check(t, os.MkdirAll(dir, 0o755))
	check(t, syscall.Mkfifo(filepath.Join(dir, "go"), 0o600))
	return pod.Run("wait", []string{"testbox", "wait", "/marks/go", "/marks/leaving"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/marks"}}
	})
}

// end is how a container was let go: its code, and the marks around its end.
type end struct {
	code          int
	before, after time.Time
}

// letGo tells a waiting container to exit, and waits until the kernel has
// forgotten its process: its parent has reaped it by then.
func letGo(t *testing.T, s *seen, code int) end {
	t.Helper()
	dir := s.Config.Mounts[0].HostPath
	check(t, os.WriteFile(filepath.Join(dir, "go"), fmt.Appendf(nil, "%d\n", code), 0))
	harness.Eventually(t, patience, s.Config.Metadata.Name+" was reaped", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", s.init.PID))
		return err != nil || !isProcess(s.init)
	})
	e := end{code: code, after: time.Now()}
	b, err := os.ReadFile(filepath.Join(dir, "leaving"))
	check(t, err)
	ns, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	check(t, err)
	e.before = time.Unix(0, ns)
	return e
}

// isProcess says whether the pid is still that process, be it a zombie.
func isProcess(p rundir.Process) bool {
	q, err := rundir.FindProcess(p.PID)
	return err != nil || p == q // an error here: a zombie, or gone a moment ago
}

// flood waits until each of the logs has grown by more than the pipes hold.
func flood(t *testing.T, flooders []*seen) time.Duration {
	t.Helper()
	start := time.Now()
	size := func(s *seen) int64 {
		st, err := os.Stat(s.LogPath())
		if err != nil {
			return 0
		}
		return st.Size()
	}
	base := map[string]int64{}
	for _, f := range flooders {
		base[f.ID] = size(f)
	}
	for _, f := range flooders {
		harness.Eventually(t, patience, "a flooding log grows",
			func() bool { return size(f) > base[f.ID]+moreThanPipes })
	}
	return time.Since(start).Round(time.Millisecond)
}

func lastLine(t *testing.T, c *harness.Container) int {
	t.Helper()
	return len(c.Log())
}

func podStatuses(t *testing.T, all []*seen) map[string]*cri.PodSandboxStatus {
	t.Helper()
	m := map[string]*cri.PodSandboxStatus{}
	for _, s := range all {
		if m[s.Pod.ID] == nil {
			m[s.Pod.ID] = s.Pod.Status()
		}
	}
	return m
}

// checkList compares ListContainers with what there must be.
func checkList(t *testing.T, n *harness.Node, all []*seen, ends map[string]end) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		t.Fatalf("ListContainers: %v", err)
	}
	states := map[string]cri.ContainerState{}
	for _, c := range r.Containers {
		states[c.Id] = c.State
	}
	if len(r.Containers) != len(all) {
		t.Errorf("%d containers are listed, want %d", len(r.Containers), len(all))
	}
	for _, s := range all {
		want := cri.ContainerState_CONTAINER_RUNNING
		if _, ended := ends[s.ID]; ended {
			want = cri.ContainerState_CONTAINER_EXITED
		}
		if got, listed := states[s.ID]; !listed || got != want {
			t.Errorf("%s of %s is listed (%v) as %s, want %s", s.Config.Metadata.Name, s.Pod.Config.Metadata.Name,
				listed, got, want)
		}
	}
}

// checkStatus compares a status after the restart with the one before: of a
// running container all of it is the same, and so is its process.
func checkStatus(t *testing.T, s *seen, ends map[string]end) {
	t.Helper()
	name := s.Config.Metadata.Name + " of " + s.Pod.Config.Metadata.Name
	status := s.Status()
	e, ended := ends[s.ID]
	if !ended {
		if !proto.Equal(status, s.status) {
			t.Errorf("%s has another status after the restart:\n%v\n%v", name, s.status, status)
		}
		if pid := s.Info().PID; pid != s.init.PID || !s.init.Alive() {
			t.Errorf("%s has pid %d after the restart, and had %d, alive: %v", name, pid, s.init.PID, s.init.Alive())
		}
		return
	}
	if int(status.ExitCode) != e.code {
		t.Errorf("%s has exit code %d, want %d", name, status.ExitCode, e.code)
	}
	finished := time.Unix(0, status.FinishedAt)
	if finished.Before(e.before) || finished.After(e.after) {
		t.Errorf("%s finished at %s, want a time between %s and %s", name, finished, e.before, e.after)
	}
	if status.StartedAt != s.status.StartedAt || status.CreatedAt != s.status.CreatedAt {
		t.Errorf("%s was created at %d and started at %d, and before the restart at %d and %d",
			name, status.CreatedAt, status.StartedAt, s.status.CreatedAt, s.status.StartedAt)
	}
	if log := s.Log(); len(log) != 1 || log[0].Text != fmt.Sprintf("leaving with %d", e.code) {
		t.Errorf("the log of %s is %v, want its last words", name, log)
	}
	want := "Completed"
	if e.code != 0 {
		want = "Error"
	}
	if status.Reason != want {
		t.Errorf("%s ended with reason %q, want %q", name, status.Reason, want)
	}
}

// checkNumbers: every line exactly once, in order.
func checkNumbers(t *testing.T, s *seen, prefix string) {
	t.Helper()
	count, err := harness.Numbered(prefix, s.Log())
	if err != nil {
		t.Errorf("the log of %s in %s after %d good lines: %v", s.Config.Metadata.Name, s.Pod.Config.Metadata.Name,
			count, err)
	}
	if count == 0 {
		t.Errorf("the log of %s is empty", s.Config.Metadata.Name)
	}
}
