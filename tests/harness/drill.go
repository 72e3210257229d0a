package harness

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
)

// Full says that drills take their full length, which may be hours.
var Full = os.Getenv("HOLDFAST_DRILL") != ""

// Loss is a kind of thing that a drill may find lost.
type Loss int

const (
	Statuses Loss = iota // of pods, containers and images, exit codes and times included
	Lines                // of a log, lost or doubled
	Sessions             // exec, attach and port-forward that broke
	Leaks                // what is left on the machine and has no owner
	losses
)

// Tally counts what one drill did and what was lost. Its methods may be called by
// several goroutines.
type Tally struct {
	t     testing.TB
	kills atomic.Int64
	mu    sync.Mutex
	lost  [losses]int
}

// Drill begins the tally of a drill. When the test ends it is logged as one row:
//
//	DRILL|NAME|KILLS|STATUSES|LINES|SESSIONS|LEAKS
//
// hack/test.sh makes a table of all rows.
func Drill(t testing.TB, name string) *Tally {
	d := &Tally{t: t}
	t.Cleanup(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		t.Logf("DRILL|%s|%d|%d|%d|%d|%d", name, d.kills.Load(),
			d.lost[Statuses], d.lost[Lines], d.lost[Sessions], d.lost[Leaks])
	})
	return d
}

// Kill counts one process that was killed, or one system call that was made to fail.
func (d *Tally) Kill() { d.kills.Add(1) }

// Kills counts several.
func (d *Tally) Kills(n int) { d.kills.Add(int64(n)) }

// Lost counts one thing that was lost, and fails the test.
func (d *Tally) Lost(what Loss, format string, args ...any) {
	d.t.Helper()
	d.mu.Lock()
	d.lost[what]++
	d.mu.Unlock()
	d.t.Errorf(format, args...)
}

// CheckClean is that of a node, and counts a leak. Whatever holdfastctl doctor finds is
// one as well.
func (d *Tally) CheckClean(n *Node) {
	d.t.Helper()
	if left := n.AwaitClean(func() {}); left != "" {
		d.Lost(Leaks, "%s", left)
	}
	if found := n.awaitOwners(); found != "" {
		d.Lost(Leaks, "%s", found)
	}
}
