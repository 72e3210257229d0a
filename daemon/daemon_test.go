package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func bare() *Daemon {
	return &Daemon{log: slog.New(slog.DiscardHandler), claims: map[string]*claim{}, containers: map[string]*container{}, pods: map[string]*pod{}}
}

// A record of a later version, with fields that this one does not know, must
// read, and what it has of the CRI's message must be whole.
func TestRecordOfALaterVersion(t *testing.T) {
	rec := podRecord{ID: "a", Phase: podReady, Config: message[*runtimeapi.PodSandboxConfig]{&runtimeapi.PodSandboxConfig{
		Hostname: "h", Metadata: &runtimeapi.PodSandboxMetadata{Name: "n", Attempt: 3}}}}
	b, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	var loose map[string]any
	if err := json.Unmarshal(b, &loose); err != nil {
		t.Fatal(err)
	}
	loose["later"] = 1
	loose["config"].(map[string]any)["later"] = map[string]any{"x": []int{1}}
	if b, err = json.Marshal(loose); err != nil {
		t.Fatal(err)
	}
	var back podRecord
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if back.Phase != podReady || back.Config.M.GetHostname() != "h" || back.Config.M.GetMetadata().GetAttempt() != 3 {
		t.Errorf("got %+v", &back)
	}
	var none containerRecord
	if err := json.Unmarshal([]byte(`{"id":"x","user":null}`), &none); err != nil || none.User.M != nil {
		t.Errorf("null message: %v, %v", none.User.M, err)
	}
}

func TestShare(t *testing.T) {
	const half = maxExecOutput / 2
	for _, c := range []struct{ out, err, wantOut, wantErr int64 }{
		{10, 20, 10, 20},
		{maxExecStream, 0, maxExecOutput, 0},
		{maxExecStream, 5, maxExecOutput - 5, 5},
		{5, maxExecStream, 5, maxExecOutput - 5},
		{maxExecStream, maxExecStream, half, half},
	} {
		if o, e := share(c.out, c.err); o != c.wantOut || e != c.wantErr {
			t.Errorf("share(%d, %d) = %d, %d, want %d, %d", c.out, c.err, o, e, c.wantOut, c.wantErr)
		}
	}
}

func TestClaims(t *testing.T) {
	d := bare()
	ctx := t.Context()
	begun, proceed := make(chan struct{}), make(chan struct{})
	runs := 0
	create := func(context.Context, *claim) error {
		runs++
		close(begun)
		<-proceed
		return nil
	}
	type result struct {
		id  string
		err error
	}
	results := make(chan result, 2)
	ask := func() {
		id, err := d.once(ctx, "x", "", "same", create)
		results <- result{id, err}
	}
	go ask()
	<-begun
	go ask()

	// A caller that gives up leaves the attempt going, and learns what it is at.
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := d.once(short, "x", "", "same", create); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("impatient caller: %v", err)
	}
	if _, err := d.once(ctx, "x", "", "other", create); !errors.Is(err, ErrExists) {
		t.Errorf("another config under the name: %v", err)
	}
	close(proceed)
	a, b := <-results, <-results
	if a.err != nil || b.err != nil || a.id != b.id || runs != 1 {
		t.Errorf("two callers got %v and %v from %d attempts", a, b, runs)
	}
	// The name is its until the object is gone.
	if id, err := d.once(ctx, "x", "", "same", nil); err != nil || id != a.id {
		t.Errorf("later request: %s, %v", id, err)
	}
	d.releaseName("x", a.id)
	boom := errors.New("boom")
	if _, err := d.once(ctx, "x", "", "third", func(context.Context, *claim) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("failing attempt: %v", err)
	}
	if _, err := d.once(ctx, "x", "", "fourth", func(context.Context, *claim) error { return nil }); err != nil {
		t.Errorf("a failed attempt keeps the name: %v", err)
	}
}

// A request for a name whose creation is being undone waits and starts afresh.
func TestClaimWaitsForUndo(t *testing.T) {
	d := bare()
	proceed := make(chan struct{})
	undo := d.undoing("x", "", "old", func(context.Context) error { <-proceed; return nil })
	go undo(t.Context())
	got := make(chan string)
	go func() {
		id, err := d.once(t.Context(), "x", "", "same", func(context.Context, *claim) error { return nil })
		if err != nil {
			t.Error(err)
		}
		got <- id
	}()
	close(proceed)
	if id := <-got; id == "old" || id == "" {
		t.Errorf("got id %q", id)
	}
}

// News that come late or twice never take a container back.
func TestObserveGoesForward(t *testing.T) {
	d := bare()
	c := newContainer(&containerRecord{ID: "c"}, rundir.Dir(t.TempDir()), seen{})
	started := client.Event{Seq: 2, Type: client.Started, Init: rundir.Process{PID: 7, StartTime: 9}}
	d.heard(c, started)
	d.heard(c, client.Event{Seq: 1, Type: client.Created})
	if got := c.seen.Load().state(); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a late CREATED: %s", got)
	}
	exit := &rundir.Exit{Code: 3, Source: rundir.SourceWaited}
	d.heard(c, client.Event{Seq: 3, Type: client.Exited, Exit: exit})
	d.heard(c, started)
	d.observe(c, func(s *seen) { s.exit = &rundir.Exit{Code: 99} })
	s := c.seen.Load()
	if s.state() != runtimeapi.ContainerState_CONTAINER_EXITED || s.exit.Code != 3 {
		t.Errorf("after the end: %s, code %d", s.state(), s.exit.Code)
	}
	select {
	case <-c.exited:
	default:
		t.Error("nobody was told of the end")
	}
}

func TestOplockGivesUp(t *testing.T) {
	l := newOplock()
	if err := l.lock(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := l.lock(ctx, "x"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
