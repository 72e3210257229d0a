package shim

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// oomWatch keeps the last count of OOM kills that could be read: the cgroup
// can vanish with the container's last process.
//
// With systemd it can vanish even before the kernel, which holds notifications
// back for up to 10 ms, tells of the kill. The cgroup above counts it too, and
// what rises there between the last look at both and the moment when ours has
// gone was ours.
type oomWatch struct {
	cgroups cgroup.Set
	parent  cgroup.Set       // nil: there is none that counts, or nothing is watched
	notify  *cgroup.OOMWatch // nil where it could not be watched

	mu    sync.Mutex
	base  uint64 // at create
	now   uint64
	above uint64    // of the parent, when ours was last read
	rise  time.Time // when the count was last seen to have risen; zero: nobody watched it rise
	final bool      // the container has ended; what follows is not its
}

// oomFresh is how long before the end of init a kill may have been to be its
// cause: a large process takes a while to die, and another one of the same
// container that died yesterday is not the cause.
const oomFresh = 10 * time.Second

// watchOOM counts from now on, or goes on from what another supervisor has counted.
// Without a memory controller nothing is counted. close ends it.
func watchOOM(c cgroup.Set, before *rundir.OOM, log *slog.Logger) *oomWatch {
	w := &oomWatch{cgroups: c}
	n, err := c.OOMKills()
	if before != nil {
		w.base, w.now, w.rise = before.Base, before.Count, before.RoseAt
	} else if err == nil {
		w.base, w.now = n, n
	}
	if err == nil {
		w.notify, err = c.WatchOOM()
	}
	if err != nil {
		log.Warn("OOM kills will not be noticed when they happen", "error", err)
		return w
	}
	if p, ok := c.OOMParent(); ok {
		if above, err := p.OOMKills(); err == nil {
			w.parent, w.above = p, above
		}
	}
	return w
}

// begin calls rose each time the count may have risen.
func (w *oomWatch) begin(rose func()) {
	if w.notify == nil {
		return
	}
	go func() { // close ends it
		var last uint64
		for n := w.count(); ; n = w.countSettled(last) {
			if n > last {
				last = n
				rose()
			}
			if w.notify.Wait() != nil {
				return
			}
		}
	}()
}

// countSettled is count, after the time that the kernel takes to pick a victim when it
// gives notice of a shortage early. Nothing tells when it has, so only the first
// victim is waited for.
func (w *oomWatch) countSettled(last uint64) uint64 {
	n := w.count()
	for pause := time.Millisecond; w.notify.Early && last == 0 && n == 0 && pause < time.Second; pause *= 2 {
		time.Sleep(pause)
		n = w.count()
	}
	return n
}

// record is what another supervisor has to know.
func (w *oomWatch) record() *rundir.OOM {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.notify == nil {
		return nil
	}
	return &rundir.OOM{Base: w.base, Count: w.now, RoseAt: w.rise}
}

// count is the number of kills since create.
func (w *oomWatch) count() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.countLocked()
}

func (w *oomWatch) countLocked() uint64 {
	if w.final {
		return w.now - w.base
	}
	// The parent comes first: a kill between the two looks must not be missed.
	above, aerr := uint64(0), cgroup.ErrNone
	if w.parent != nil {
		above, aerr = w.parent.OOMKills()
	}
	n, err := w.cgroups.OOMKills()
	switch {
	case err == nil && n > w.now:
		w.now, w.rise = n, time.Now()
		if w.notify == nil {
			w.rise = time.Time{} // it may have been long ago
		}
		if w.parent != nil {
			above, aerr = w.parent.OOMKills() // has it too, now or already
		}
	case err != nil && aerr == nil && above > w.above:
		w.now, w.rise = w.now+1, time.Now()
	}
	if aerr == nil {
		w.above = above
	}
	return w.now - w.base
}

// verdict is what the OOM killer had to do with the end of a container.
type verdict struct {
	killed bool   // it caused the end
	says   string // which processes it killed, and when; empty: none
}

// verdict weighs the end of init, which came at a time, and the kills before. ours says
// that the shim has sent SIGKILL, asked that the container was to stop. It reads the
// counter, so it comes before Reap.
//
// Init itself was killed if it died of SIGKILL that was not the shim's. Another process
// was if init then ended by itself with an error: most often it ran the victim, or could
// not do without it, and whoever looks for the cause finds it in no other place. Beyond
// oomFresh, or after success, a kill is worth a sentence and no more.
func (w *oomWatch) verdict(end reaper.Status, at time.Time, ours, asked bool) verdict {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.countLocked()
	w.final = true
	if n == 0 {
		return verdict{}
	}
	unseen := w.rise.IsZero()
	if unseen && (ours || end.Signal != unix.SIGKILL) {
		return verdict{false, fmt.Sprintf("the OOM killer killed processes of the container (%d in all), "+
			"and nobody saw when", n)}
	}
	before := max(0, at.Sub(w.rise)).Round(time.Millisecond)
	fresh := !ours && (unseen || before < oomFresh)
	switch {
	case fresh && end.Signal == unix.SIGKILL:
		return verdict{true, "the OOM killer killed the first process of the container: it, or a group that the " +
			"container is in, has reached its memory limit"}
	case fresh && (failedByItself(end) && !asked || end.Code == rundir.CodeSignalOffset+int(unix.SIGKILL)):
		return verdict{true, fmt.Sprintf("the OOM killer killed a process of the container, and not the first one, "+
			"%s before the first one ended by itself with code %d", before, end.Code)}
	}
	return verdict{false, fmt.Sprintf("the OOM killer killed processes of the container (%d in all), "+
		"the last one %s before the end", n, before)}
}

// failedByItself says that a process has ended with an error and that nobody had
// ended it.
func failedByItself(end reaper.Status) bool {
	switch end.Signal {
	case 0:
		return end.Code != 0
	case unix.SIGABRT, unix.SIGSEGV, unix.SIGBUS:
		return true
	}
	return false
}

func (w *oomWatch) close() {
	w.notify.Close()
}

// oomRose notes that processes of the container were killed for want of memory. Only
// the first is an event.
func (t *task) oomRose() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.status.Phase == rundir.PhaseExited {
		return
	}
	event := rundir.EventOOM
	if slices.ContainsFunc(t.status.Events, func(e rundir.Event) bool { return e.Type == event }) {
		event = noEvent
	} else {
		t.log.Warn("process killed: out of memory")
	}
	t.updateLocked(event, func(s *rundir.Status) { s.OOM = t.container.oom.record() })
}
