package containers

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func newManager(t *testing.T) *Manager {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	s, err := state.Open(t.TempDir(), t.TempDir(), log)
	must.Succeed(t, err)
	t.Cleanup(func() { s.Close() })
	return New(Options{State: s, Log: log, Go: func(func(context.Context)) {}})
}

// News that come late or twice never take a container back.
func TestObserveGoesForward(t *testing.T) {
	c := newManager(t).Adopt(&records.Container{ID: "c"}, nil, records.Seen{})
	at := time.Unix(1000, 0)
	started := client.Event{Seq: 2, Type: client.Started, At: at, Init: rundir.Process{PID: 7, StartTime: 9}}
	c.take(started)
	c.take(client.Event{Seq: 1, Type: client.Created})
	got := c.Seen()
	if got.State() != runtimeapi.ContainerState_CONTAINER_RUNNING || !got.StartedAt.Equal(at) || got.Init.PID != 7 {
		t.Errorf("after a late Created: %+v", got)
	}
	c.take(client.Event{Seq: 3, Type: client.Exited, Exit: &rundir.Exit{Code: 3, Source: rundir.SourceWaited}})
	c.take(started)
	c.observe(func(s *records.Seen) { s.Exit = &rundir.Exit{Code: 99} })
	s := c.Seen()
	if s.State() != runtimeapi.ContainerState_CONTAINER_EXITED || s.Exit.Code != 3 || !s.Exit.StartedAt.Equal(at) {
		t.Errorf("after the end: %s, %+v", s.State(), s.Exit)
	}
	select {
	case <-c.exited:
	default:
		t.Error("nobody was told of the end")
	}
}

// A phase that was only guessed gives way to what the shim says.
func TestObserveGuess(t *testing.T) {
	guess := records.Seen{Phase: rundir.PhaseRunning, Guessed: true}
	c := newManager(t).Adopt(&records.Container{ID: "c"}, nil, guess)
	c.take(client.Event{Seq: 1, Type: client.Created})
	if got := c.Seen(); got.State() != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("after Created: %+v", got)
	}
	c.take(client.Event{Seq: 2, Type: client.Started})
	c.take(client.Event{Seq: 1, Type: client.Created})
	if got := c.Seen(); got.State() != runtimeapi.ContainerState_CONTAINER_RUNNING || got.Guessed {
		t.Errorf("after a late Created: %+v", got)
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

func TestFind(t *testing.T) {
	m := newManager(t)
	for _, id := range []string{"aabb", "aacc", "b"} {
		err := m.Add(m.Adopt(&records.Container{ID: id}, nil, records.Seen{}), func() error { return nil })
		must.Succeed(t, err)
	}
	for _, c := range []struct {
		id, found string
		err       error
	}{
		{"aabb", "aabb", nil},
		{"aab", "aabb", nil},
		{"b", "b", nil},
		{"aa", "", kind.Invalid},
		{"", "", kind.NotFound},
		{"aabbcc", "", kind.NotFound},
	} {
		got, err := m.Find(c.id)
		if !errors.Is(err, c.err) || err == nil && got.ID() != c.found {
			t.Errorf("Find(%q) = %v, %v; want %s, %v", c.id, got, err, c.found, c.err)
		}
	}
}

// The containers of a pod are those that are known, and of it.
func TestOf(t *testing.T) {
	m := newManager(t)
	var all []*Container
	for _, id := range []string{"a1", "a2", "b1"} {
		c := m.Adopt(&records.Container{ID: id, PodID: id[:1]}, nil, records.Seen{})
		must.Succeed(t, m.Add(c, func() error { return nil }))
		all = append(all, c)
	}
	stranger := m.Adopt(&records.Container{ID: "a1", PodID: "a"}, nil, records.Seen{})
	m.forget(stranger) // which is not the known one
	for _, want := range []string{"a1 a2|b1|", "a2|b1|", "|b1|", "||"} {
		got := ""
		for _, pod := range []string{"a", "b", "c"} {
			var ids []string
			for _, c := range m.Of(pod) {
				ids = append(ids, c.ID())
			}
			slices.Sort(ids)
			got += strings.Join(ids, " ") + "|"
		}
		if got = strings.TrimSuffix(got, "|"); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if len(all) > 0 {
			m.forget(all[0])
			all = all[1:]
		}
	}
	if len(m.pods) > 0 {
		t.Errorf("left: %v", m.pods)
	}
}

// What a container can have is what both the machine and the OCI runtime of its handler have.
func TestHostForHandler(t *testing.T) {
	m := newManager(t)
	runtime := func(features string) string {
		path := filepath.Join(t.TempDir(), "runtime")
		must.Succeed(t, os.WriteFile(path, []byte("#!/bin/sh\necho '"+features+"'\n"), 0o755))
		return path
	}
	var err error
	m.Runtimes, err = runtimes.Probe(map[string]string{
		"without": runtime(`{"linux": {"seccomp": {"enabled": false}}}`),
		"silent":  runtime(`{}`),
	}, "silent", t.TempDir(), false, m.Log)
	must.Succeed(t, err)
	for _, c := range []struct {
		handler       string
		machine, want bool
	}{{"without", true, false}, {"silent", true, true}, {"silent", false, false}} {
		m.Host.SeccompSupported = c.machine
		if h, err := m.HostFor(c.handler); err != nil || h.SeccompSupported != c.want {
			t.Errorf("%+v: got %v, %v", c, h.SeccompSupported, err)
		}
	}
}
