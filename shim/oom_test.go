package shim

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/reaper"
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
		ours, asked bool
		killed      bool
		says        string
	}{
		"nothing was killed":              {end: died(unix.SIGKILL)},
		"init was killed":                 {end: died(unix.SIGKILL), kills: 1, killed: true, says: first},
		"a shell says that its child was": {end: exit(137), kills: 1, killed: true, says: other},
		"init failed after a child was killed": {end: exit(1), kills: 2, before: time.Second, killed: true,
			says: "1s before"},
		"init crashed after a child was killed":  {end: died(unix.SIGSEGV), kills: 1, killed: true, says: other},
		"init failed long after":                 {end: exit(1), kills: 2, before: time.Hour, says: "2 in all"},
		"init succeeded":                         {end: exit(0), kills: 1, says: "1 in all"},
		"the shim killed it":                     {end: died(unix.SIGKILL), kills: 1, ours: true, says: "1 in all"},
		"it was asked to stop and said an error": {end: exit(143), kills: 1, asked: true, says: "1 in all"},
		"somebody sent it a signal":              {end: died(unix.SIGTERM), kills: 1, says: "1 in all"},
		"it was to stop, and was killed for real": {end: died(unix.SIGKILL), kills: 1, asked: true, killed: true,
			says: first},
	} {
		at := time.Now()
		w := &oomWatch{now: c.kills, rise: at.Add(-c.before)}
		got := w.verdict(c.end, at, c.ours, c.asked)
		if got.killed != c.killed || !strings.Contains(got.says, c.says) || (c.says == "") != (got.says == "") {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
