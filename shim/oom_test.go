package shim

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/reaper"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// When a kill is the cause of an end, and what is said of it.
func TestOOMVerdict(t *testing.T) {
	const first, other = "killed the first process", "not the first one, 0s before"
	exit := func(code int) reaper.Status { return reaper.Status{Code: code} }
	died := func(sig unix.Signal) reaper.Status { return reaper.Status{Code: 128 + int(sig), Signal: sig} }
	for name, c := range map[string]struct {
		end         reaper.Status
		kills       uint64
		before      time.Duration
		unwatched   bool // nobody saw when
		ours, asked bool
		killed      bool
		says        string
	}{
		"nothing was killed":              {end: died(unix.SIGKILL)},
		"init was killed":                 {end: died(unix.SIGKILL), kills: 1, killed: true, says: first},
		"a shell says that its child was": {end: exit(137), kills: 1, killed: true, says: other},
		"init failed after a child was killed": {end: exit(1), kills: 2, before: time.Second, killed: true,
			says: "1s before"},
		"init crashed after a child was killed":    {end: died(unix.SIGSEGV), kills: 1, killed: true, says: other},
		"init failed long after":                   {end: exit(1), kills: 2, before: time.Hour, says: "2 in all"},
		"init failed, nobody knows how long after": {end: exit(1), kills: 2, unwatched: true, says: "nobody saw"},
		"init was killed, nobody saw when": {end: died(unix.SIGKILL), kills: 1, unwatched: true, killed: true,
			says: first},
		"init succeeded":                         {end: exit(0), kills: 1, says: "1 in all"},
		"the shim killed it":                     {end: died(unix.SIGKILL), kills: 1, ours: true, says: "1 in all"},
		"it was asked to stop and said an error": {end: exit(143), kills: 1, asked: true, says: "1 in all"},
		"somebody sent it a signal":              {end: died(unix.SIGTERM), kills: 1, says: "1 in all"},
		"it was to stop, and was killed for real": {end: died(unix.SIGKILL), kills: 1, asked: true, killed: true,
			says: first},
	} {
		at := time.Now()
		w := &oomWatch{now: c.kills, rise: at.Add(-c.before)}
		if c.unwatched {
			w.rise = time.Time{}
		}
		got := w.verdict(c.end, at, c.ours, c.asked)
		if got.killed != c.killed || !strings.Contains(got.says, c.says) || (c.says == "") != (got.says == "") {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// UnwatchedVerdict is that on an end with an error, by a shim that could not watch the counter.
func UnwatchedVerdict(c cgroup.Set) (killed bool, says string) {
	v := (&oomWatch{cgroups: c}).verdict(reaper.Status{Code: 1}, time.Now(), false, false)
	return v.killed, v.says
}

// What another supervisor has seen counts, also when the cgroup has gone meanwhile.
func TestOOMSeenBefore(t *testing.T) {
	before := &rundir.OOM{Base: 3, Count: 5, RoseAt: time.Now().Add(-time.Second)}
	w := watchOOM(cgroup.Set{}, before, slog.New(slog.DiscardHandler))
	defer w.close()
	if v := w.verdict(reaper.Status{Code: 1}, time.Now(), false, false); !v.killed || w.count() != 2 {
		t.Errorf("%d kills: %+v", w.count(), v)
	}
}
