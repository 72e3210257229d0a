package audit

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var (
	idA = strings.Repeat("a", 64)
	idB = strings.Repeat("b", 64)
)

var check = must.Succeed

func TestPlaceOf(t *testing.T) {
	l := &look{parents: map[string]bool{"/kubepods/podX": true}}
	for path, want := range map[string]place{
		"/holdfast/shims/" + idA:                                                       {shimRole, idA, false, false},
		"/holdfast/shims/" + idA + "/x":                                                {shimRole, idA, true, false},
		"/holdfast/stream":                                                             {streamRole, "", false, false},
		"/holdfast/pods/" + idB:                                                        {podRole, idB, false, false},
		"/holdfast/pods/" + idB + "/" + idA:                                            {containerRole, idA, false, false},
		"/holdfast/pods/" + idB + "/" + idA + "/exec":                                  {containerRole, idA, true, false},
		"/kubepods/podX/" + idA:                                                        {containerRole, idA, false, true},
		"/kubepods/podX/" + idA + "/a/b":                                               {containerRole, idA, true, true},
		"/kubepods.slice/kubepods-podX.slice/holdfast-" + idA + ".scope":               {containerRole, idA, false, false},
		"/system.slice/holdfast-shim-" + idA + ".scope":                                {shimRole, idA, false, false},
		"/system.slice/holdfast-stream-12.scope":                                       {streamRole, "", false, false},
		"/docker/x/system.slice/holdfast-shim-" + idA + ".scope":                       {},
		"/user.slice/user-1.slice/user@1.service/app.slice/holdfast-" + idA + ".scope": {},
		"/kubepods/podY/" + idB + "/holdfast-shim-" + idA + ".scope":                   {},
		"/kubepods/podY/" + idA:                                                        {},
		"/kubepods/podX/other":                                                         {},
		"/holdfast/shims":                                                              {},
		"/system.slice/holdfastd.service":                                              {},
	} {
		got, ok := l.placeOf(path)
		if got != want || ok != (want != place{}) {
			t.Errorf("%s: %v, %v, want %v", path, got, ok, want)
		}
	}
}

// trees makes ROOT and STATE with one pod that owes what it says.
func trees(t *testing.T, phase records.PodPhase, debts []records.Debt) Options {
	t.Helper()
	dir := t.TempDir()
	o := Options{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"), Pause: time.Millisecond}
	pod := filepath.Join(o.Root, string(state.Pods), idA)
	check(t, errors.Join(os.MkdirAll(pod, 0o700), os.Mkdir(o.State, 0o700)))
	config, err := records.Encoded(&runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default"},
	})
	check(t, err)
	check(t, record.Write(filepath.Join(pod, "record.json"), records.Pod{
		ID:     idA,
		Config: config,
		BootID: rundir.BootID(),
		Phase:  phase,
		Debts:  debts,
	}, false))
	return o
}

// Whether a pod still owns what it had is told by its debts, not by its being there.
func TestDebtsDecide(t *testing.T) {
	for name, c := range map[string]struct {
		phase records.PodPhase
		debts []records.Debt
		owned bool
	}{
		"ready":            {records.PodReady, records.AllDebts, true},
		"of an old daemon": {records.PodStopped, nil, true},
		"given back":       {records.PodStopped, []records.Debt{records.DebtFiles}, false},
	} {
		o := trees(t, c.phase, c.debts)
		lock := filepath.Join(o.Root, "cni/running", idA)
		check(t, os.MkdirAll(filepath.Dir(lock), 0o700))
		check(t, os.WriteFile(lock, nil, 0o600))
		r, err := Look(t.Context(), o)
		check(t, err)
		if none := madeHere(r.Ownerless()); len(none) > 0 == c.owned {
			t.Errorf("%s: %v", name, none)
		}
		if len(r.Unknown) > 0 {
			t.Errorf("%s: %v", name, r.Unknown)
		}
	}
}

// A record that does not read says nothing: what is named after it is neither owned nor ownerless.
func TestDamagedRecord(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	check(t, os.WriteFile(filepath.Join(o.Root, "pods", idA, "record.json"), []byte("torn"), 0o600))
	r, err := Look(t.Context(), o)
	check(t, err)
	if none := madeHere(r.Ownerless()); len(none) > 0 || len(r.Unknown) == 0 {
		t.Errorf("%v, %v", none, r.Unknown)
	}
	if told, err := Stories(o, idA[:5]); err != nil || len(told) != 1 || !strings.Contains(told[0].Now, "no record") {
		t.Errorf("%+v, %v", told, err)
	}
}

// madeHere leaves out what the tests of other packages have on this machine meanwhile.
func madeHere(list []Thing) []Thing {
	return slices.DeleteFunc(list, func(t Thing) bool { return t.Kind == Cgroup || t.Kind == Process })
}

func fixOne(t *testing.T, o Options, thing Thing) (err error) {
	t.Helper()
	check(t, Fix(t.Context(), o, []Thing{thing}, func(_ Thing, e error) { err = e }))
	return err
}

// What comes and goes, or gets its record meanwhile, has no say; what is in use stays.
func TestFix(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	stray := filepath.Join(o.State, "stray")
	check(t, os.WriteFile(stray, nil, 0o600))
	find := func() Thing {
		t.Helper()
		r, err := Look(t.Context(), o)
		check(t, err)
		none := madeHere(r.Ownerless())
		if len(none) != 1 || none[0].Name != stray {
			t.Fatalf("%v", none)
		}
		return none[0]
	}
	old := find()
	check(t, errors.Join(os.Rename(stray, stray+".away"), os.WriteFile(stray, nil, 0o600), os.Remove(stray+".away")))
	if err := fixOne(t, o, old); !errors.Is(err, ErrOwned) {
		t.Errorf("another file of that name: %v", err)
	}
	f, err := os.Open(stray)
	check(t, err)
	if err := fixOne(t, o, find()); err == nil {
		t.Error("a file that is open was removed")
	}
	f.Close()
	check(t, fixOne(t, o, find()))
	if _, err := os.Lstat(stray); err == nil {
		t.Error("it is still there")
	}
}

// With a daemon alive, the directory of an object is not taken away before it is old.
func TestFixBesideDaemon(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	check(t, os.Mkdir(filepath.Join(o.Root, "pods", idB), 0o700))
	for _, runs := range []bool{true, false} {
		locks, err := state.Lock(o.Root, o.State)
		check(t, err)
		if !runs {
			for _, f := range locks {
				check(t, f.Close())
			}
		}
		r, err := Look(context.Background(), o)
		check(t, err)
		none := madeHere(r.Ownerless())
		if len(none) != 1 || r.DaemonRuns != runs || r.CanFix(none[0]) == runs {
			t.Fatalf("a daemon runs %v: %v, %v", runs, r.DaemonRuns, none)
		}
		err = fixOne(t, o, none[0])
		if _, serr := os.Lstat(none[0].Name); (serr == nil) != runs || (err == nil) == runs {
			t.Errorf("a daemon runs %v: %v, %v", runs, err, serr)
		}
		if runs {
			for _, f := range locks {
				check(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
				f.Close()
			}
		}
	}
}
