package containers_test

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// What a session is to be is written down in full, or refused and nothing is.
func TestSessions(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	terminal := fake.ContainerConfig("terminal", fake.Sleeps...)
	terminal.Tty, terminal.Stdin = true, true
	plain, withTTY := b.run("plain", fake.Sleeps...), b.Run(t, b.podID, terminal)
	ready, gone := b.create("created"), b.run("gone", fake.Sleeps...)
	check(t, b.Containers.Stop(ctx, gone, 0))
	exec := func(id string) *runtimeapi.ExecRequest {
		return &runtimeapi.ExecRequest{
			ContainerId: id,
			Cmd:         []string{"sh", "-c", "true"},
			Stdin:       true,
			Stdout:      true,
			Tty:         true,
		}
	}
	attach := func(id string, tty, stdin bool) *runtimeapi.AttachRequest {
		return &runtimeapi.AttachRequest{
			ContainerId: id,
			Tty:         tty,
			Stdin:       stdin,
			Stdout:      true,
			Stderr:      !tty,
		}
	}
	for name, c := range map[string]struct {
		req  any
		kind error
		text string
		want stream.Request
	}{
		"exec": {req: exec(plain[:12]), want: stream.Request{
			Kind:   stream.Exec,
			ID:     plain,
			RunDir: string(b.Dir(plain)),
			Cmd:    []string{"sh", "-c", "true"},
			Stdin:  true,
			Stdout: true,
			TTY:    true,
		}},
		"attach": {req: attach(plain[:12], false, false), want: stream.Request{
			Kind:   stream.Attach,
			ID:     plain,
			RunDir: string(b.Dir(plain)),
			Stdout: true,
			Stderr: true,
		}},
		"attach to a terminal": {req: attach(withTTY, true, true), want: stream.Request{
			Kind:   stream.Attach,
			ID:     withTTY,
			RunDir: string(b.Dir(withTTY)),
			Stdin:  true,
			Stdout: true,
			TTY:    true,
		}},
		"exec, unknown":       {req: exec("nobody"), kind: kind.NotFound, text: "container_id: "},
		"exec, not started":   {req: exec(ready), kind: kind.State, text: "container_id: "},
		"exec, ended":         {req: exec(gone), kind: kind.State, text: "container_id: "},
		"attach, unknown":     {req: attach("nobody", false, false), kind: kind.NotFound, text: "container_id: "},
		"attach, not started": {req: attach(ready, false, false), kind: kind.State, text: "container_id: "},
		"attach, ended":       {req: attach(gone, false, false), kind: kind.State, text: "container_id: "},
		"attach, no terminal": {req: attach(plain, true, false), kind: kind.Invalid,
			text: "tty: is true, and that of"},
		"attach, but as terminal": {req: attach(withTTY, false, true), kind: kind.Invalid, text: "tty: is false, and"},
		"attach, no input":        {req: attach(plain, false, true), kind: kind.Invalid, text: "stdin: is true, and"},
	} {
		var url string
		var err error
		switch r := c.req.(type) {
		case *runtimeapi.ExecRequest:
			url, err = b.Containers.Exec(ctx, r)
		case *runtimeapi.AttachRequest:
			url, err = b.Containers.Attach(ctx, r)
		}
		asked := b.Sessions.Asked()
		if c.kind != nil {
			if !errors.Is(err, c.kind) || !strings.HasPrefix(err.Error(), c.text) || url != "" || asked != nil {
				t.Errorf("%s: %q, %v, %+v", name, url, err, asked)
			}
			continue
		}
		if err != nil || url == "" || !reflect.DeepEqual(asked, []stream.Request{c.want}) {
			t.Errorf("%s: %q, %v\n%+v, want\n%+v", name, url, err, asked, c.want)
		}
	}
}

// Whoever brings the token finds the shim, although somebody has removed its socket.
func TestSessionWithoutSocket(t *testing.T) {
	b := newBed(t)
	id := b.run("c", fake.Sleeps...)
	for _, open := range []func() error{
		func() error {
			_, err := b.Containers.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}})
			return err
		},
		func() error {
			_, err := b.Containers.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: id, Stdout: true})
			return err
		},
	} {
		check(t, os.Remove(b.Dir(id).Path(rundir.SocketName)))
		check(t, open())
		conn, err := b.Dir(id).Dial(t.Context())
		check(t, err)
		conn.Close()
	}
	b.remove(id)
}
