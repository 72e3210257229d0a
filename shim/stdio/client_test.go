package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// testConn is a client of a test. It gives the input that is written to in.
type testConn struct {
	*io.PipeReader // the client's input
	in             *io.PipeWriter
	gate           chan struct{} // an output waits for it, unless it is nil
	closed         chan struct{}

	mu  sync.Mutex
	got [streams]bytes.Buffer
}

func newConn() *testConn {
	r, w := io.Pipe()
	return &testConn{PipeReader: r, in: w, closed: make(chan struct{})}
}

func (c *testConn) WriteOutput(s logfile.Stream, b []byte) error {
	if c.gate != nil {
		select {
		case <-c.gate:
		case <-c.closed:
			return os.ErrClosed
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got[s].Write(b)
	return nil
}

func (c *testConn) Close() error {
	close(c.closed)
	return c.PipeReader.Close()
}

func (c *testConn) output(s logfile.Stream) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got[s].String()
}

// numbered is so many lines of ten bytes.
func numbered(lines int) string {
	var b strings.Builder
	for i := range lines {
		fmt.Fprintf(&b, "%09d\n", i)
	}
	return b.String()
}

// Clients come and go while two outputs are written, some of them slow. Each gets a
// part of each output that has no gap, and those that stay get the end. The log has all.
func TestClientsComeAndGo(t *testing.T) {
	log, path := newLog(t)
	h := New(log, newMemory(t, true))
	const lines = 200_000
	want := numbered(lines)
	var writers, clients sync.WaitGroup
	for _, stream := range []logfile.Stream{logfile.Stdout, logfile.Stderr} {
		r, w := pipe(t, true)
		h.Add(stream, r)
		writers.Go(func() {
			defer w.Close()
			for rest := want; rest != ""; {
				n := min(len(rest), 7777)
				io.WriteString(w, rest[:n])
				rest = rest[n:]
			}
		})
	}
	for i := range 60 {
		conn := newConn()
		o := Options{Output: true, Queue: 16 << 20} // more than there is
		if i%3 == 1 {                               // slow, and so cut off, or with luck just in time
			conn.gate, o.Queue = make(chan struct{}), 70_001
			close(conn.gate)
		}
		c := h.Attach(conn, o)
		until(t, "some output", func() bool { return conn.output(logfile.Stdout) != "" || isDone(c.Done()) })
		if i%3 == 2 {
			c.Detach()
		}
		clients.Go(func() { checkClient(t, c, conn, want, i%3 == 0, i%3 == 2) })
	}
	writers.Wait()
	wait(t, "drained", h.Drained())
	clients.Wait()
	for stream, got := range outputs(t, contents(t, path)) {
		if got != want {
			t.Errorf("%s: the log has %d bytes, or others", stream, len(got))
		}
	}
	late := h.Attach(newConn(), Options{Output: true, Input: true})
	wait(t, "the end of a late client", late.Done())
	h.Close()
}

// checkClient waits for the end of a client that was attached while want was written to
// both outputs. One that stays has the end of it; one that was detached may have missed
// anything.
func checkClient(t *testing.T, c *Client, conn *testConn, want string, stays, detached bool) {
	<-c.Done()
	given, missed, err := c.Result()
	out, errOut := conn.output(logfile.Stdout), conn.output(logfile.Stderr)
	for _, got := range []string{out, errOut} {
		if at := strings.Index(want, got); at < 0 {
			t.Errorf("%d bytes with a gap", len(got))
		} else if stays && at+len(got) != len(want) && got != "" {
			t.Errorf("the end is missing: %v", err)
		}
	}
	switch {
	case int(given) != len(out)+len(errOut):
		t.Errorf("given %d bytes, has %d", given, len(out)+len(errOut))
	case stays && (err != nil || missed != 0), !detached && (err == nil) != (missed == 0):
		t.Errorf("%d bytes missed, %v", missed, err)
	case err != nil && !errors.Is(err, ErrSlow):
		t.Error(err)
	}
}

// A client that takes nothing is cut off, and neither the log nor another client
// waits for it.
func TestClientThatHangs(t *testing.T) {
	log, path := newLog(t)
	h := New(log, nil)
	r, w := pipe(t, true)
	h.Add(logfile.Stdout, r)
	hung, fine := newConn(), newConn()
	hung.gate = make(chan struct{})
	slow := h.Attach(hung, Options{Output: true, Queue: 200_000})
	other := h.Attach(fine, Options{Output: true, Queue: 16 << 20})
	want := numbered(200_000)
	if _, err := io.WriteString(w, want); err != nil {
		t.Fatal(err)
	}
	wait(t, "cut off", slow.Done())
	given, missed, err := slow.Result()
	if !errors.Is(err, ErrSlow) || given != 0 || missed < 200_000-bufferSize || missed > 200_000+bufferSize {
		t.Errorf("given %d, missed %d, %v", given, missed, err)
	}
	w.Close()
	wait(t, "the end of the other", other.Done())
	if fine.output(logfile.Stdout) != want || outputs(t, contents(t, path))["stdout"] != want {
		t.Error("output is missing")
	}
	h.Close()
}

// A client that hangs at the end does not keep Close from returning.
func TestCloseWithAClientThatHangs(t *testing.T) {
	h := New(nil, nil)
	r, w := pipe(t, true)
	h.Add(logfile.Stdout, r)
	conn := newConn()
	conn.gate = make(chan struct{})
	c := h.Attach(conn, Options{Output: true})
	io.WriteString(w, "the end")
	w.Close()
	h.Close()
	wait(t, "cut off", c.Done())
	if _, missed, err := c.Result(); !errors.Is(err, ErrSlow) || missed != 7 {
		t.Errorf("missed %d, %v", missed, err)
	}
}

func TestInput(t *testing.T) {
	for _, once := range []bool{false, true} {
		h := New(nil, nil)
		out, outW := pipe(t, true) // what keeps the session open
		h.Add(logfile.Stdout, out)
		r, w, err := os.Pipe()
		must.Succeed(t, err)
		ended := make(chan struct{})
		h.SetInput(w, false, once, func() { close(ended) })
		first, second := newConn(), newConn()
		a, b := h.Attach(first, Options{Input: true}), h.Attach(second, Options{Input: true, Output: true})
		got, all := make(chan string, 1), make([]byte, 2000)
		arrived := make(chan struct{})
		go func() {
			io.ReadFull(r, all)
			close(arrived)
			rest, _ := io.ReadAll(r)
			got <- string(all) + string(rest)
		}()
		var writers sync.WaitGroup
		for i, c := range []*testConn{first, second} {
			writers.Go(func() {
				for range 1000 {
					fmt.Fprintf(c.in, "%d", i)
				}
			})
		}
		writers.Wait()
		wait(t, "all input", arrived) // or the end of the first might cut off the second
		first.in.Close()
		wait(t, "the first has left", a.Done())
		if once {
			wait(t, "closed", ended)
		}
		// The second one gives more, which is taken only if nothing has ended.
		fmt.Fprint(second.in, "x")
		fmt.Fprint(second.in, "y") // x has been dealt with
		if isDone(b.Done()) {
			t.Errorf("once %v: a client with output has ended with the input", once)
		}
		outW.Close()
		wait(t, "the second has ended", b.Done())
		h.Close()
		in := <-got
		if strings.Count(in, "0") != 1000 || strings.Count(in, "1") != 1000 || strings.Contains(in, "x") == once {
			t.Errorf("once %v: got %.60q, %d bytes", once, in, len(in))
		}
		if isDone(ended) != once {
			t.Errorf("once %v: closed %v", once, isDone(ended))
		}
	}
}

// A container that reads nothing holds up neither a client that leaves nor the end.
func TestInputThatNobodyReads(t *testing.T) {
	h := New(nil, nil)
	r, w, err := os.Pipe()
	must.Succeed(t, err)
	defer r.Close()
	ended := make(chan struct{})
	h.SetInput(w, false, true, func() { close(ended) })
	for i := range 3 {
		conn := newConn()
		c := h.Attach(conn, Options{Input: true})
		fed := make(chan struct{})
		go func() {
			defer close(fed)
			conn.in.Write(make([]byte, 1<<20)) // more than the pipe holds
		}()
		until(t, "a full pipe", func() bool {
			n, _ := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
			return n == 64<<10 || i > 0
		})
		c.Detach()
		wait(t, "gone", c.Done())
		wait(t, "the end of its input", fed)
	}
	wait(t, "closed", ended)
	h.Close()
}

// The program on a terminal gets an end of file when the first client has left.
func TestTerminalInputOnce(t *testing.T) {
	master, open := terminal(t, false)
	tty := open()
	input, err := descriptor.Dup(master)
	must.Succeed(t, err)
	h := New(nil, nil)
	h.Add(logfile.Stdout, master)
	ended := make(chan struct{})
	h.SetInput(input, true, true, func() { close(ended) })
	conn := newConn()
	c := h.Attach(conn, Options{Input: true, Output: true})
	fmt.Fprint(conn.in, "line\nrest")
	until(t, "the echo", func() bool { return strings.HasSuffix(conn.output(logfile.Stdout), "rest") })
	conn.in.Close()
	wait(t, "closed", ended)
	got, err := io.ReadAll(tty) // a terminal gives a line, its rest, and an end
	if string(got) != "line\nrest" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	tty.Close()
	h.Finish()
	wait(t, "the client has ended", c.Done())
	h.Close()
}

// One Hub after the other takes the outputs over, with copies of the descriptors and
// the memory. Nothing is lost or doubled, also of a line that has no end yet.
func TestLeave(t *testing.T) {
	log, path := newLog(t)
	memory, err := NewMemory()
	must.Succeed(t, err)
	log.KeepIn(memory.Log())
	want := strings.ReplaceAll(numbered(300_000), "7\n", "7 ") + "no end"
	var left [streams]*os.File
	var writers sync.WaitGroup
	for i := range left {
		r, w := pipe(t, true)
		left[i] = r
		writers.Go(func() {
			defer w.Close()
			for rest := want; rest != ""; {
				n := min(len(rest), 1234)
				io.WriteString(w, rest[:n])
				rest = rest[n:]
			}
		})
	}
	for over := false; !over; {
		h := New(log, memory)
		for i, r := range left {
			if r != nil {
				h.Add(logfile.Stream(i), r)
			}
		}
		before := log.Counters().Bytes
		until(t, "some output", func() bool { return isDone(h.Drained()) || log.Counters().Bytes > before+50_000 })
		over = isDone(h.Drained())
		files, err := h.Leave()
		must.Succeed(t, err)
		left = files.Outputs
		log, memory = resumeLog(t, log, memory)
	}
	writers.Wait()
	if c := log.Counters(); int(c.Bytes) != 2*len(want) || c.Err != "" {
		t.Errorf("%+v, want %d bytes", c, 2*len(want))
	}
	log.Close()
	memory.Close()
	for stream, got := range outputs(t, contents(t, path)) {
		if got != want {
			t.Errorf("%s: %d bytes came out as %d, or others", stream, len(want), len(got))
		}
	}
}

// resumeLog closes a log and its memory and opens copies of their descriptors.
func resumeLog(t *testing.T, log *logfile.File, memory *Memory) (*logfile.File, *Memory) {
	t.Helper()
	fd, err := log.Dup()
	must.Succeed(t, err)
	file, err := descriptor.Dup(memory.File())
	must.Succeed(t, err)
	next, err := OpenMemory(file)
	must.Succeed(t, err)
	log.Close()
	memory.Close()
	return logfile.Resume("dir", "0.log", fd, next.Log()), next
}

func TestOpenMemory(t *testing.T) {
	for name, spoil := range map[string]func(*os.File){
		"another size":   func(f *os.File) { f.Truncate(memorySize - 1) },
		"another layout": func(f *os.File) { f.WriteAt([]byte{layout + 1}, 0) },
	} {
		m, err := NewMemory()
		must.Succeed(t, err)
		f, err := descriptor.Dup(m.File())
		must.Succeed(t, err)
		m.Close()
		spoil(f)
		if m, err := OpenMemory(f); err == nil {
			t.Errorf("%s: opened", name)
			m.Close()
		}
	}
}
