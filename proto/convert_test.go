package proto

import (
	"reflect"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// fill sets every field to something else than zero, so that a field that a
// conversion forgets shows.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1234567890, 5).UTC()))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.String:
		v.SetString("/text")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint64:
		v.SetUint(8)
	case reflect.Slice:
		v.SetBytes([]byte("bytes"))
	default:
		panic(v.Kind())
	}
}

func filled[T any]() T {
	var v T
	fill(reflect.ValueOf(&v).Elem())
	return v
}

func TestConversionsKeepEveryField(t *testing.T) {
	process, exit, launch := filled[rundir.Process](), filled[rundir.Exit](), filled[rundir.Launch]()
	for name, c := range map[string]struct{ want, got any }{
		"process":    {process, ProcessOf(process).File()},
		"exit":       {exit, *ExitOf(&exit).File(exit.StartedAt)},
		"launch":     {launch, LaunchOf(launch).Launch()},
		"no process": {rundir.Process{}, ProcessOf(rundir.Process{}).File()},
		"no exit":    {(*rundir.Exit)(nil), ExitOf(nil).File(exit.StartedAt)},
		"no stop":    {(*rundir.Stop)(nil), StopOf(nil).File()},
		"no time":    {time.Time{}, Time(TimeOf(time.Time{}))},
	} {
		if !reflect.DeepEqual(c.want, c.got) {
			t.Errorf("%s: %+v became %+v", name, c.want, c.got)
		}
	}
	for n := range Phase_name {
		p := Phase(n)
		if p != Phase_PHASE_UNSPECIFIED && PhaseOf(p.File()) != p {
			t.Errorf("phase %v became %q", p, p.File())
		}
	}
	// The deadline goes by the wall clock and comes back, as well as clocks go.
	stop := filled[rundir.Stop]()
	stop.KillAt = rundir.BootTime() + time.Hour
	got := *StopOf(&stop).File()
	if d := got.KillAt - stop.KillAt; d < -time.Minute || d > time.Minute {
		t.Errorf("the deadline moved by %s", d)
	}
	if got.KillAt = stop.KillAt; got != stop {
		t.Errorf("%+v became %+v", stop, got)
	}
}
