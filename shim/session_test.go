package shim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/session"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// session opens a session with the box's shim.
func (b *box) session(o client.SessionOptions) *client.Session {
	b.t.Helper()
	c := client.New(b.dir)
	b.t.Cleanup(c.Close)
	s, err := c.OpenSession(b.ctx(), o)
	must.Succeed(b.t, err)
	b.t.Cleanup(func() { s.Close() })
	return s
}

// runWithInput is run for a container that has stdin.
func (b *box) runWithInput(script string) {
	b.t.Helper()
	b.launch()
	req := b.request(b.spec(script))
	req.Stdin = true
	if _, err := b.client.Create(b.ctx(), req); err != nil {
		b.t.Fatal(err)
	}
	b.start()
}

func command(script string) client.SessionOptions {
	return client.SessionOptions{Process: sh(script), Stdin: true, Stdout: true, Stderr: true}
}

func terminal(script string) client.SessionOptions {
	p := sh(script)
	p.Terminal, p.ConsoleSize = true, &specs.Box{Width: 80, Height: 25}
	return client.SessionOptions{Process: p, Stdin: true, Stdout: true}
}

// idle waits until nothing of an exec or a session is left.
func (b *box) idle() {
	b.t.Helper()
	b.until("no exec is left", func() bool {
		entries, _ := os.ReadDir(b.dir.Path(rundir.ExecsName))
		if len(entries) > 0 && b.state().Execs == 0 { // of a child that has outlived it, a later exec removes the rest
			b.exec(sh("true"), &pb.ExecSyncRequest{})
		}
		return b.state().Execs == 0 && len(entries) == 0
	})
}

// read reads an output until a text has come.
func read(t *testing.T, r io.Reader, text string) string {
	t.Helper()
	var all []byte
	for buf := make([]byte, 4096); !strings.Contains(string(all), text); {
		n, err := r.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			t.Fatalf("%q, and then %v, without %q", all, err, text)
		}
	}
	return string(all)
}

func TestExecSession(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	large := strings.Repeat("0123456789abcdef", 1<<16)
	for _, c := range []struct {
		name           string
		script, in     string
		stdout, stderr string
		code           int
	}{
		{"code, half-close", "cat; echo oops >&2; exit 42", "input", "input", "oops\n", 42},
		{"large", "cat", large, large, "", 0},
		{"signal", "kill -9 $$", "", "", "", 137},
		{"a child keeps the output", "sleep 1000 & echo x; kill -9 $! &", "", "x\n", "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := b.session(command(c.script))
			var out, errs bytes.Buffer
			exit, err := s.Copy(b.ctx(), client.Streams{Stdin: strings.NewReader(c.in), Stdout: &out, Stderr: &errs})
			if err != nil || exit.Code != c.code || exit.Reason != "" {
				t.Errorf("%+v, %v", exit, err)
			}
			if out.String() != c.stdout || errs.String() != c.stderr {
				t.Errorf("stdout %.100q (%d), stderr %.100q", out.String(), out.Len(), errs.String())
			}
		})
	}
	b.idle()
}

// Where root of the container is nobody on the host, programs can open their standard files
// by name all the same.
func TestExecInUserNamespace(t *testing.T) {
	b := newBox(t)
	must.Succeed(t, os.Chmod(filepath.Dir(rootfs), 0o711))
	spec := b.spec("exec sleep 1000")
	ids := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = ids, ids
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	b.create(spec)
	b.start()
	for _, uid := range []uint32{0, 1000} {
		o := command("cat /dev/stdin >/dev/stdout; echo oops >/dev/stderr; cat /proc/self/uid_map")
		o.Process.User, o.SetUser = specs.User{UID: uid, GID: uid}, true
		var out, errs bytes.Buffer
		streams := client.Streams{Stdin: strings.NewReader("input\n"), Stdout: &out, Stderr: &errs}
		exit, err := b.session(o).Copy(b.ctx(), streams)
		if err != nil || exit.Code != 0 {
			t.Errorf("user %d: %+v, %v", uid, exit, err)
		}
		if got := strings.Join(strings.Fields(out.String()), " "); got != "input 0 100000 65536" ||
			errs.String() != "oops\n" {
			t.Errorf("user %d: stdout %q, stderr %q", uid, got, errs.String())
		}
	}
	named, path := memfd(t)
	must.Succeed(t, named.Chmod(0o600))
	_, err := b.exec(sh("cat"), &pb.ExecSyncRequest{StdinPath: path})
	if st, serr := named.Stat(); err != nil || serr != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the caller's file: %v, %v, %v", err, st.Mode(), serr)
	}
	b.idle()
}

// The size is right from the beginning, and what is typed arrives as it is.
func TestExecTerminal(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	s := b.session(terminal("stty -echo; stty size; echo $TERM; trap 'stty size' WINCH; " +
		"until read x; do :; done; echo got $x; exit 3"))
	if out := read(t, s.Stdout, "xterm"); !strings.Contains(out, "25 80\r\n") {
		t.Errorf("the size: %q", out)
	}
	must.Succeed(t, s.Resize(client.Size{Width: 132, Height: 43}))
	c := client.New(b.dir)
	defer c.Close()
	if err := c.Resize(b.ctx(), s.ID, client.Size{Width: 132, Height: 44}); err != nil {
		t.Error(err)
	}
	io.WriteString(s.Stdin, "höhe\n")
	if out := read(t, s.Stdout, "höhe\r\n"); !strings.Contains(out, "got höhe") {
		t.Errorf("got %q", out)
	}
	if exit, err := s.Wait(b.ctx()); err != nil || exit.Code != 3 {
		t.Errorf("%+v, %v", exit, err)
	}
	s.Close()
	b.idle()
}

// The output of an exec goes on where its process opens its terminal again. Where a child
// keeps the terminal after the end of the process, the exec ends all the same.
func TestExecTerminalOpenedAgain(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	copied := make(chan string, 1)
	s := b.session(terminal(reopening("/dev/tty")))
	go func() {
		var out bytes.Buffer
		exit, err := s.Copy(b.ctx(), client.Streams{Stdout: &out})
		copied <- fmt.Sprintf("%q %d %v", out.String(), exit.Code, err)
	}()
	b.awaitClosed()
	b.goOn()
	if got, want := <-copied, fmt.Sprintf("%q 3 <nil>", "early\r\nlate\r\n"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	b.idle()
	var out bytes.Buffer
	s = b.session(terminal("trap '' HUP; sleep 1000 & echo x; exit 4"))
	exit, err := s.Copy(b.ctx(), client.Streams{Stdout: &out})
	if err != nil || exit.Code != 4 || out.String() != "x\r\n" {
		t.Errorf("a child keeps the terminal: %+v, %v, %q", exit, err, out.String())
	}
}

// A client that goes without a word finds all again when it comes back in time: the
// process, the bytes that nobody has read, and the exit.
func TestSessionComesBack(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	s := b.session(command("read x; echo one $x; read y; echo two $y; exit 5"))
	io.WriteString(s.Stdin, "a\n")
	read(t, s.Stdout, "one a\n")
	s.Close()
	var again *client.Session
	c := client.New(b.dir)
	defer c.Close()
	b.until("the exec takes another client", func() (ok bool) {
		var err error
		again, err = c.OpenSession(b.ctx(), client.SessionOptions{ExecID: s.ID})
		if err != nil && !errors.Is(err, kind.State) {
			t.Fatal(err)
		}
		return err == nil
	})
	if _, err := c.OpenSession(b.ctx(), client.SessionOptions{ExecID: s.ID}); !errors.Is(err, kind.State) {
		t.Errorf("a second client at a time: %v", err)
	}
	// It ends while it has no client: one that had seen the end would not come back.
	input, err := descriptor.Dup(again.Stdin)
	must.Succeed(t, err)
	defer input.Close()
	again.Close()
	io.WriteString(input, "b\n")
	b.until("it takes a third one", func() (ok bool) {
		var err error
		again, err = c.OpenSession(b.ctx(), client.SessionOptions{ExecID: s.ID})
		if err != nil && !errors.Is(err, kind.State) {
			t.Fatal(err)
		}
		return err == nil
	})
	var out bytes.Buffer
	exit, err := again.Copy(b.ctx(), client.Streams{Stdout: &out})
	if err != nil || exit.Code != 5 || out.String() != "two b\n" {
		t.Errorf("%+v, %v, %q", exit, err, out.String())
	}
	b.idle()
}

// Every way in which a client can go, and what becomes of the process.
func TestClientGoes(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	const script = "trap 'echo hup %s >/proc/1/fd/1' HUP; echo ready; sleep 1000 & while :; do sleep 0.05; done"
	for _, c := range []struct {
		name  string
		leave func(*client.Session) error
		lives bool
	}{
		{"hang-up", (*client.Session).Hangup, false},
		{"a lease that ends", (*client.Session).Close, false},
		{"detached", (*client.Session).Detach, true},
	} {
		for kind, options := range map[string]func(string) client.SessionOptions{"pipes": command,
			"terminal": terminal} {
			name := c.name + " " + kind
			t.Run(name, func(t *testing.T) {
				o := options(fmt.Sprintf(script, name))
				o.Lease = 2 * time.Second // in which the client comes, also on a busy machine
				s := b.session(o)
				defer s.Close()
				read(t, s.Stdout, "ready")
				must.Succeed(t, c.leave(s))
				if c.lives {
					time.Sleep(2 * o.Lease) // of which nothing may come
					if b.state().Execs != 1 {
						t.Error("the process has gone with its client")
					}
					s = b.session(client.SessionOptions{ExecID: s.ID})
					s.Hangup()
				}
				b.idle()
				b.says("hup " + name)
			})
		}
	}
}

// A hang-up that comes when the process is just ending leaves nothing either: neither the
// exec for its lease, nor what the process has started.
func TestHangupAtTheEnd(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	for range 20 {
		o := command("(trap '' HUP; exec sleep 1000) & echo x")
		o.Lease = time.Hour
		s := b.session(o)
		read(t, s.Stdout, "x\n")
		s.Hangup()
	}
	b.until("no exec waits for its client", func() bool { return b.state().Execs == 0 })
}

// A command for which there can be no session is not run.
func TestRefusedExec(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	var taken []string
	for i := range 5 {
		path := b.dir.Path(fmt.Sprintf("%s/session-%d.sock", rundir.ExecsName, i+1))
		must.Succeed(t, os.MkdirAll(path, 0o700))
		must.Succeed(t, unix.Mount("tmpfs", path, "tmpfs", 0, "size=4k"))
		taken = append(taken, path)
	}
	c := client.New(b.dir)
	defer c.Close()
	for range 5 { // it may be killed before it has done anything
		if _, err := c.OpenSession(b.ctx(), command("echo ran >/proc/1/fd/1")); err == nil {
			t.Error("a session without a socket")
		}
	}
	for _, path := range taken {
		must.Succeed(t, unix.Unmount(path, 0))
		os.Remove(path)
	}
	s := b.session(command("echo next >/proc/1/fd/1"))
	if exit, err := s.Copy(b.ctx(), client.Streams{}); err != nil || exit.Code != 0 {
		t.Errorf("the next one: %+v, %v", exit, err)
	}
	b.idle()
	b.says("next")
	if strings.Contains(b.output(), "ran") {
		t.Error("a command that was refused has run")
	}
}

// The end of the container is the end of its sessions, each with an exit.
func TestSessionsEndWithContainer(t *testing.T) {
	b := newBox(t)
	b.runWithInput("read x; echo bye")
	exec := b.session(command("echo ready; sleep 1000"))
	read(t, exec.Stdout, "ready")
	watcher := b.session(client.SessionOptions{Stdout: true})
	writer := b.session(client.SessionOptions{Stdin: true, Stderr: true})
	b.session(client.SessionOptions{Process: sh("exec sleep 1000"), Lease: time.Hour}).Close()
	io.WriteString(writer.Stdin, "x\n")
	b.wait()
	for name, s := range map[string]*client.Session{"exec": exec, "watcher": watcher, "writer": writer} {
		exit, err := s.Wait(b.ctx())
		if err != nil || name == "exec" && exit.Code != 137 || name != "exec" && exit != (session.Exit{}) {
			t.Errorf("%s: %+v, %v", name, exit, err)
		}
	}
	if out, _ := io.ReadAll(watcher.Stdout); string(out) != "bye\n" {
		t.Errorf("attached: %q", out)
	}
	b.gone()
}

// received is an output that is looked at while it grows.
type received struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (r *received) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.Write(b)
}

func (r *received) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.String()
}

// All that are attached get each byte once and in order, but one that does not read is
// cut off and holds nobody up.
func TestAttach(t *testing.T) {
	b := newBox(t)
	// Each piece has room in the queue of a client, two have not.
	const pieces, lines = 6, 20000
	b.runWithInput(fmt.Sprintf("n=0; while [ $n -lt %d ] && read x; do n=$((n+1)); i=0; "+
		"while [ $i -lt %d ]; do echo 0123456789 $i; i=$((i+1)); done; done; echo oops >&2", pieces, lines))
	stuck := b.session(client.SessionOptions{Stdout: true})
	var outs [3]received
	results := make(chan error, len(outs))
	for i := range outs {
		s := b.session(client.SessionOptions{Stdout: true})
		go func() {
			exit, err := s.Copy(context.Background(), client.Streams{Stdout: &outs[i]})
			if exit != (session.Exit{}) {
				err = errors.Join(err, fmt.Errorf("exit %+v", exit))
			}
			results <- err
		}()
	}
	in := b.session(client.SessionOptions{Stdin: true, Stderr: true})
	var piece, want strings.Builder
	for i := range lines {
		fmt.Fprintf(&piece, "0123456789 %d\n", i)
	}
	for range pieces {
		io.WriteString(in.Stdin, "x\n")
		want.WriteString(piece.String())
		b.until("all that read have the next piece", func() bool {
			for i := range outs {
				if len(outs[i].String()) < want.Len() {
					return false
				}
			}
			return true
		})
	}
	exit, err := stuck.Wait(b.ctx())
	if err != nil || exit.Reason != session.TooSlow {
		t.Errorf("a client that does not read: %+v, %v", exit, err)
	}
	read(t, in.Stderr, "oops\n")
	b.wait()
	for i := range outs {
		if err := <-results; err != nil {
			t.Error(err)
		}
		if got := outs[i].String(); got != want.String() {
			t.Errorf("client %d got %d bytes, not %d", i, len(got), want.Len())
		}
	}
	if got := strings.Replace(b.output(), "oops\n", "", 1); got != want.String() {
		t.Errorf("the log has %d bytes", len(got))
	}
}

// More than a bound of clients are refused; when one has gone, the next one is let in.
func TestTooManyAttached(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	var last *client.Session
	for range 64 {
		last = b.session(client.SessionOptions{Stdout: true})
	}
	c := client.New(b.dir)
	defer c.Close()
	if _, err := c.OpenSession(b.ctx(), client.SessionOptions{Stdout: true}); !errors.Is(err, kind.Exhausted) {
		t.Errorf("one more: %v", err)
	}
	last.Close()
	b.until("there is room again", func() bool {
		s, err := c.OpenSession(b.ctx(), client.SessionOptions{Stdout: true})
		if err == nil {
			s.Close()
		}
		return err == nil
	})
}

func TestSessionErrors(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	c := client.New(b.dir)
	defer c.Close()
	missing := command("")
	missing.Process = &specs.Process{Args: []string{"/no/such/program"}}
	late := terminal("sleep 1000")
	late.Timeout = 3 * time.Second // which has to do for its start, too
	stderr := terminal("true")
	stderr.Stderr = true
	for name, o := range map[string]client.SessionOptions{
		"no such program":         missing,
		"a terminal with stderr":  stderr,
		"an exec that is not":     {ExecID: "exec-77"},
		"the way out of a folder": {ExecID: "../x"},
		"nothing wanted":          {},
	} {
		if _, err := c.OpenSession(b.ctx(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := c.OpenSession(b.ctx(), late)
	for ; err != nil && late.Timeout < limit; s, err = c.OpenSession(b.ctx(), late) {
		late.Timeout *= 2 // it was too short for the start
	}
	must.Succeed(t, err)
	if exit, err := s.Wait(b.ctx()); err != nil || exit.Reason != session.TimedOut || exit.Code != 137 {
		t.Errorf("at its timeout: %+v, %v", exit, err)
	}
	s.Close()
	b.idle()
}
