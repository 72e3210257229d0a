// Package footprint holds what a shim costs: there is one for each container of
// a node, so its dependencies and its memory are everybody's.
package footprint

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var update = flag.Bool("update", false, "write deps.txt")

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

// deps.txt lists what the shim links beyond the standard library. A change of
// it is to be seen in review.
func TestDependencies(t *testing.T) {
	root, err := harness.Root()
	must.Succeed(t, err)
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps",
		"-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./cmd/holdfast-shim")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	deps := strings.Fields(string(out))
	slices.Sort(deps)
	got := strings.Join(deps, "\n") + "\n"
	if *update {
		must.Succeed(t, os.WriteFile("deps.txt", []byte(got), 0o644))
	}
	want, err := os.ReadFile("deps.txt")
	must.Succeed(t, err)
	listed := strings.Fields(string(want))
	for _, d := range deps {
		if !slices.Contains(listed, d) {
			t.Errorf("the shim links %s now: if that is meant, make update-footprint", d)
		}
	}
	for _, d := range listed {
		if !slices.Contains(deps, d) {
			t.Errorf("the shim links %s no more: make update-footprint", d)
		}
	}
}

// The bound is far above what is usual, so that it fails for a reason and not
// by chance. The log has the figures.
func TestIdleMemory(t *testing.T) {
	const limit = 4096 // kB
	n := harness.New(t)
	pod := n.RunPod("idle")
	var ids []string
	// Two of them, so that what they share is not counted as private.
	for _, name := range []string{"one", "two"} {
		ids = append(ids, pod.Run(name, []string{"sleep", "1000"}).ID)
	}
	pids := n.ShimPIDs()
	for _, id := range ids {
		pid := pids[id]
		if pid == 0 {
			t.Fatalf("cannot find the shim of %s", id)
		}
		m := smaps(t, pid)
		private := m["Private_Clean"] + m["Private_Dirty"]
		t.Logf("an idle shim: %d kB private, %d kB anonymous, Pss %d kB, Rss %d kB", private, m["Anonymous"], m["Pss"],
			m["Rss"])
		if private > limit {
			t.Errorf("an idle shim has %d kB of private memory, more than %d", private, limit)
		}
	}
}

// A shim that has answered for days, to a daemon that asks once a minute, has given back
// what the answers took.
func TestMemoryAfterManyCalls(t *testing.T) {
	const limit = 4096 // kB
	n := harness.New(t)
	id := n.RunPod("asked").Run("c", []string{"sleep", "1000"}).ID
	c := client.New(rundir.Dir(n.Path("state/containers/" + id)))
	defer c.Close()
	for range 4000 {
		if _, err := c.Events(t.Context(), 2, time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	pid := n.ShimPIDs()[id]
	if pid == 0 {
		t.Fatalf("cannot find the shim of %s", id)
	}
	harness.Eventually(t, time.Minute, "the memory is given back", func() bool {
		return smaps(t, pid)["Anonymous"] < limit
	})
	t.Logf("after 4000 calls: %d kB anonymous", smaps(t, pid)["Anonymous"])
}

// smaps is /proc/PID/smaps_rollup, in kB.
func smaps(t *testing.T, pid int) map[string]int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "smaps_rollup"))
	must.Succeed(t, err)
	m := map[string]int{}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 3 && f[2] == "kB" {
			m[strings.TrimSuffix(f[0], ":")], _ = strconv.Atoi(f[1])
		}
	}
	return m
}
