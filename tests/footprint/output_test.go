package footprint

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// memoryOf is a line of /proc/PID/status, in MiB.
func memoryOf(t *testing.T, pid int, name string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must.Succeed(t, err)
	_, rest, _ := strings.Cut(string(b), name+":")
	var kib int
	fmt.Sscan(rest, &kib)
	return kib >> 10
}

// The output of any number of commands at once takes no more of the daemon than that
// of a few, and is given back.
func TestOutputOfManyCommands(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("output").Run("c", []string{"sleep", "1000"})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			r, err := c.Exec(200, "head", "-c", "16000000", "/dev/zero")
			if err != nil || len(r.Stdout) != 16_000_000 {
				t.Errorf("%d bytes, %v", len(r.GetStdout()), err)
			}
		})
	}
	wg.Wait()
	pid := n.PID()
	t.Logf("at most %d MiB, now %d", memoryOf(t, pid, "VmHWM"), memoryOf(t, pid, "VmRSS"))
	if most := memoryOf(t, pid, "VmHWM"); most > 160 {
		t.Errorf("the daemon took %d MiB", most)
	}
	harness.Eventually(t, time.Minute, "the memory is given back", func() bool {
		return memoryOf(t, pid,
			"VmRSS") < 100
	})
	n.RemoveAllPods()
	n.CheckClean()
}
