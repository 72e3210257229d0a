package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var headerFormat = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([PF]) $`)

const headerLen = 40

// outputs reads a log and gives each stream's bytes.
func outputs(t testing.TB, log []byte) map[string]string {
	t.Helper()
	streams := map[string]*bytes.Buffer{"stdout": {}, "stderr": {}}
	for line := range bytes.Lines(log) {
		text, ended := bytes.CutSuffix(line, []byte("\n"))
		m := headerFormat.FindSubmatch(text[:min(len(text), headerLen)])
		if m == nil || !ended {
			t.Fatalf("not a record: %.200q", line)
		}
		b := streams[string(m[1])]
		b.Write(text[headerLen:])
		if m[2][0] == 'F' {
			b.WriteByte('\n')
		}
	}
	return map[string]string{"stdout": streams["stdout"].String(), "stderr": streams["stderr"].String()}
}

func newLog(t testing.TB) (log *logfile.File, path string) {
	t.Helper()
	dir := t.TempDir()
	log, err := logfile.Open(dir, "0.log")
	must.Succeed(t, err)
	t.Cleanup(func() { log.Close() })
	return log, filepath.Join(dir, "0.log")
}

// newMemory is one for a Hub, or none.
func newMemory(t testing.TB, want bool) *Memory {
	t.Helper()
	if !want {
		return nil
	}
	m, err := NewMemory()
	must.Succeed(t, err)
	t.Cleanup(m.Close)
	return m
}

func contents(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must.Succeed(t, err)
	return b
}

// pipe is one with a blocking read end, as a shim inherits it, or not.
func pipe(t testing.TB, blocking bool) (r, w *os.File) {
	t.Helper()
	if !blocking {
		r, w, err := os.Pipe()
		must.Succeed(t, err)
		t.Cleanup(func() { w.Close() })
		return r, w
	}
	var p [2]int
	must.Succeed(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
	r, w = os.NewFile(uintptr(p[0]), "r"), os.NewFile(uintptr(p[1]), "w")
	t.Cleanup(func() { w.Close() })
	return r, w
}

const patience = 3 * time.Minute

func wait(t testing.TB, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		b := make([]byte, 1<<16)
		t.Fatalf("%s: not after %v\n%s", what, patience, b[:runtime.Stack(b, true)])
	}
}

var until = must.Come

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// randomOutput is lines of all lengths with bytes of all values.
func randomOutput(random *rand.Rand, size int) string {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(random.Uint32())}).Read(b)
	for i := 0; i < size; i += 1 + random.IntN(1<<random.IntN(17)) {
		b[i] = '\n'
	}
	return string(b)
}

// checkOutput sends two outputs through pipes, in the pieces that seed makes of
// them, and checks what is in the log.
func checkOutput(t *testing.T, stdout, stderr string, seed uint64) {
	log, path := newLog(t)
	s := New(log, newMemory(t, seed%3 == 0))
	want := map[string]string{"stdout": stdout, "stderr": stderr}
	var wg sync.WaitGroup
	for _, stream := range []logfile.Stream{logfile.Stdout, logfile.Stderr} {
		r, w := pipe(t, seed%2 == 0)
		data := want[stream.String()]
		s.Add(stream, r)
		chunks := rand.New(rand.NewPCG(seed, uint64(stream)))
		wg.Go(func() {
			defer w.Close()
			for data != "" {
				n := min(len(data), 1+chunks.IntN(1<<chunks.IntN(18)))
				if _, err := io.WriteString(w, data[:n]); err != nil {
					t.Error(err)
					return
				}
				data = data[n:]
			}
		})
	}
	drained := s.Drained()
	wg.Wait()
	wait(t, "drained", drained)
	got := outputs(t, contents(t, path))
	for stream := range want {
		if got[stream] != want[stream] {
			t.Errorf("%s: %d bytes came out as %d, or others", stream, len(want[stream]), len(got[stream]))
		}
	}
	if c := log.Counters(); int(c.Bytes) != len(stdout)+len(stderr) || c.DroppedBytes != 0 || c.Err != "" {
		t.Errorf("%+v", c)
	}
}

func TestOutputReachesTheLog(t *testing.T) {
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 4))
		checkOutput(t, randomOutput(random, 400_000), randomOutput(random, 400_000), seed)
	}
}

func FuzzOutput(f *testing.F) {
	f.Add("", "\n", uint64(0))
	f.Add("a\x00b\r\n\r\n\rc", "\n\n\n", uint64(1))
	f.Add(strings.Repeat("x", logfile.MaxLine)+"\n", strings.Repeat("y", 5*logfile.MaxLine), uint64(2))
	f.Fuzz(checkOutput)
}

func TestDrained(t *testing.T) {
	s := New(nil, nil)
	if !isDone(s.Drained()) {
		t.Error("not drained without an output")
	}
	r1, w1 := pipe(t, false)
	r2, w2 := pipe(t, true)
	s.Add(logfile.Stdout, r1)
	s.Add(logfile.Stderr, r2)
	drained := s.Drained()
	w1.Close()
	if _, err := w2.Write([]byte("x\n")); err != nil {
		t.Fatal(err)
	}
	if isDone(drained) {
		t.Error("drained with one output open")
	}
	w2.Close()
	wait(t, "drained", drained)
	s.Close()
	s.Close()
}

func TestWithoutLogOutputIsDropped(t *testing.T) {
	s := New(nil, nil)
	r, w := pipe(t, true)
	s.Add(logfile.Stdout, r)
	for range 100 {
		if _, err := w.Write(make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	wait(t, "drained", s.Drained())
}

func TestLinesAreVisibleAtOnce(t *testing.T) {
	log, path := newLog(t)
	s := New(log, nil)
	defer s.Close()
	r, w := pipe(t, true)
	s.Add(logfile.Stdout, r)
	for i := range 10 {
		fmt.Fprintf(w, "%d\nbegin of the next ", i)
		until(t, "line", func() bool { return log.Counters().Lines == uint64(i+1) })
		if got := outputs(t, contents(t, path))["stdout"]; !strings.HasSuffix(got, fmt.Sprintf("%d\n", i)) {
			t.Errorf("got %q", got)
		}
	}
}

// terminal makes one, and gives its master and what opens it.
func terminal(t testing.TB, blocking bool) (master *os.File, open func() *os.File) {
	t.Helper()
	flags := unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	if !blocking {
		flags |= unix.O_NONBLOCK
	}
	fd, err := unix.Open("/dev/ptmx", flags, 0)
	must.Succeed(t, err)
	unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	must.Succeed(t, err)
	return os.NewFile(uintptr(fd), "ptmx"), func() *os.File {
		t.Helper()
		tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
		must.Succeed(t, err)
		return tty
	}
}

func TestTerminal(t *testing.T) {
	var complaints bytes.Buffer
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.NewTextHandler(&complaints, nil)))
	for _, blocking := range []bool{true, false} {
		master, open := terminal(t, blocking)
		tty := open()
		log, path := newLog(t)
		s := New(log, nil)
		s.Add(logfile.Stdout, master)
		want := strings.Repeat("0123456789\r\n", 5000) + "$ "
		if _, err := io.WriteString(tty, strings.ReplaceAll(want, "\r", "")); err != nil {
			t.Fatal(err)
		}
		tty.Close()
		s.Finish()
		wait(t, "drained", s.Drained())
		if got := outputs(t, contents(t, path))["stdout"]; got != want {
			t.Errorf("got %d bytes, want %d", len(got), len(want))
		}
	}
	if complaints.Len() > 0 {
		t.Errorf("the end of a terminal is no error: %s", &complaints)
	}
}

// reads is how many calls of read(2) this process has made. Counting makes a few itself.
func reads(t *testing.T) (n int) {
	t.Helper()
	b := contents(t, "/proc/self/io")
	if _, after, found := bytes.Cut(b, []byte("syscr: ")); found {
		fmt.Sscan(string(after), &n)
	}
	return n
}

// A program may close its terminal, or have it hung up as login does, and open it again,
// time and again, and under one Hub after the other. All is one output for the log and
// for a client. While nobody has the terminal open nothing turns round.
func TestTerminalOpenedAgain(t *testing.T) {
	master, open := terminal(t, false)
	log, path := newLog(t)
	h := New(log, nil)
	h.Add(logfile.Stdout, master)
	conn := newConn()
	client := h.Attach(conn, Options{Output: true})
	var want strings.Builder
	say := func(i int) {
		t.Helper()
		tty := open()
		fmt.Fprintf(tty, "%d\n", i)
		fmt.Fprintf(&want, "%d\r\n", i)
		until(t, "the line in the log", func() bool { return outputs(t, contents(t, path))["stdout"] == want.String() })
		if i%2 == 0 {
			unix.IoctlSetInt(int(tty.Fd()), unix.TIOCVHANGUP, 0) // fails if the test is not root's
		}
		tty.Close()
		time.Sleep(time.Millisecond) // in which nothing may come to its end
	}
	for i := range 50 {
		say(i)
	}
	before := reads(t)
	time.Sleep(50 * time.Millisecond) // in which nothing may be read
	if n := reads(t) - before; n > 100 {
		t.Errorf("%d reads of a terminal that nobody has open", n)
	}
	if isDone(h.Drained()) || isDone(client.Done()) {
		t.Error("a terminal that was closed is taken for one that comes to its end")
	}
	files, err := h.Leave()
	must.Succeed(t, err)
	if got := conn.output(logfile.Stdout); got != want.String() {
		t.Errorf("the client has %q, want %q", got, want.String())
	}
	h = New(log, nil)
	h.Add(logfile.Stdout, files.Outputs[logfile.Stdout])
	say(50)
	say(51)
	h.Finish()
	wait(t, "drained", h.Drained())
	h.Close()
}

// However it stands with the terminal, each way to end a Hub ends it, with all that was
// written.
func TestEndOfATerminal(t *testing.T) {
	for name, end := range map[string]func(h *Hub, tty *os.File){
		"closed":             func(_ *Hub, tty *os.File) { tty.Close() },
		"held":               func(*Hub, *os.File) {},
		"closed, finished":   func(h *Hub, tty *os.File) { tty.Close(); h.Finish(); <-h.Drained(); h.Finish() },
		"finished, closed":   func(h *Hub, tty *os.File) { h.Finish(); tty.Close(); <-h.Drained() },
		"finished, held":     func(h *Hub, _ *os.File) { h.Finish() },
		"finished meanwhile": func(h *Hub, tty *os.File) { go h.Finish(); tty.Close(); <-h.Drained() },
		"finished, more": func(h *Hub, tty *os.File) {
			h.Finish()
			io.WriteString(tty, "more")
			tty.Close()
			<-h.Drained()
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 20 {
				master, open := terminal(t, false)
				log, path := newLog(t)
				h := New(log, newMemory(t, true))
				h.Add(logfile.Stdout, master)
				tty := open()
				io.WriteString(tty, "line\n$ ")
				until(t, "the line", func() bool { return log.Counters().Lines == 1 })
				ended := make(chan struct{})
				go func() {
					end(h, tty)
					h.Close()
					h.Finish()
					close(ended)
				}()
				wait(t, "the end", ended)
				tty.Close()
				want := "line\r\n$ "
				if name == "finished, more" {
					want += "more"
				}
				if got := outputs(t, contents(t, path))["stdout"]; got != want {
					t.Errorf("got %q", got)
				}
			}
		})
	}
}

func TestRegularFile(t *testing.T) {
	log, path := newLog(t)
	want := strings.Repeat("0123456789\n", 50_000)
	name := filepath.Join(t.TempDir(), "f")
	must.Succeed(t, os.WriteFile(name, []byte(want), 0o600))
	for _, name := range []string{name, os.DevNull} {
		r, err := os.Open(name)
		must.Succeed(t, err)
		s := New(log, nil)
		s.Add(logfile.Stdout, r)
		wait(t, "drained", s.Drained())
	}
	if outputs(t, contents(t, path))["stdout"] != want {
		t.Error("the log differs")
	}
}

func TestCloseWithAHeldPipe(t *testing.T) {
	for _, blocking := range []bool{true, false} {
		log, path := newLog(t)
		s := New(log, nil)
		r, w := pipe(t, blocking)
		s.Add(logfile.Stdout, r)
		if _, err := io.WriteString(w, "line\n$ "); err != nil {
			t.Fatal(err)
		}
		drained := s.Drained()
		s.Close()
		if !isDone(drained) {
			t.Error("not drained after Close")
		}
		if got := outputs(t, contents(t, path))["stdout"]; got != "line\n$ " {
			t.Errorf("got %q", got)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
			t.Errorf("the pipe is still open for reading: %v", err)
		}
		s.Close()
		late, w := pipe(t, blocking)
		s.Add(logfile.Stdout, late)
		if _, err := w.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
			t.Errorf("Add after Close: %v", err)
		}
	}
}

// A process that writes without end, and faster than the log takes it, doesn't
// keep Close from ending. What was written before Close is in the log.
func TestCloseWhileAProcessGoesOnWriting(t *testing.T) {
	log, path := newLog(t)
	s := New(log, nil)
	r, w := pipe(t, true)
	s.Add(logfile.Stdout, r)
	const before = 200_000
	flood := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := []byte(strings.Repeat("\n", before))
		if _, err := w.Write(b); err != nil {
			t.Error(err)
		}
		close(flood)
		for {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})
	wait(t, "flood", flood)
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	wait(t, "Close", closed)
	wg.Wait()
	if got := outputs(t, contents(t, path))["stdout"]; len(got) < before {
		t.Errorf("%d bytes", len(got))
	}
}

func TestCloseOfAFileWithoutEnd(t *testing.T) {
	r, err := os.Open("/dev/zero")
	must.Succeed(t, err)
	s := New(nil, nil)
	s.Add(logfile.Stdout, r)
	drained := s.Drained()
	go s.Close()
	wait(t, "drained", drained)
}

func TestReopenWhileWriting(t *testing.T) {
	log, path := newLog(t)
	s := New(log, nil)
	var wg sync.WaitGroup
	var want strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&want, "%d %s\n", i, "..............................................."[:i%47])
	}
	for stream := logfile.Stdout; stream <= logfile.Stderr; stream++ {
		r, w := pipe(t, true)
		s.Add(stream, r)
		wg.Go(func() {
			defer w.Close()
			if _, err := io.WriteString(w, want.String()); err != nil {
				t.Error(err)
			}
		})
	}
	drained := s.Drained()
	var all []byte
	for i := 0; !isDone(drained); i++ {
		old := fmt.Sprintf("%s.%d", path, i)
		must.Succeed(t, os.Rename(path, old))
		if _, err := log.Reopen(); err != nil {
			t.Fatal(err)
		}
		// No line goes to the old file any more.
		all = append(all, contents(t, old)...)
		os.Remove(old)
	}
	wg.Wait()
	all = append(all, contents(t, path)...)
	for stream, got := range outputs(t, all) {
		if got != want.String() {
			t.Errorf("%s: lines are lost, doubled or in another order", stream)
		}
	}
}

// The reader goes on while the log's disk is full, and says so afterwards.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	must.Succeed(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,huge=never"))
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	log, err := logfile.Open(dir, "0.log")
	must.Succeed(t, err)
	s := New(log, nil)
	r, w := pipe(t, true)
	s.Add(logfile.Stdout, r)
	for range 50_000 { // much more than disk and pipe hold
		if _, err := io.WriteString(w, strings.Repeat("x", 79)+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "the pipe is empty", func() bool {
		c := log.Counters()
		return c.Bytes+c.DroppedBytes == 50_000*80
	})
	if c := log.Counters(); c.Err == "" || c.DroppedBytes == 0 {
		t.Fatalf("%+v", c)
	}
	must.Succeed(t, os.Rename(dir+"/0.log", dir+"/0.log.1"))
	if _, err := log.Reopen(); err != nil {
		t.Fatal(err)
	}
	must.Succeed(t, os.Remove(dir+"/0.log.1"))
	io.WriteString(w, "again\n")
	w.Close()
	wait(t, "drained", s.Drained())
	c := log.Counters()
	if c.Err != "" {
		t.Errorf("error %s", c.Err)
	}
	got := outputs(t, contents(t, dir+"/0.log"))
	missing := fmt.Sprintf("holdfast: %d bytes of output are missing here", c.DroppedBytes)
	if !strings.HasPrefix(got["stderr"], missing) ||
		strings.Count(got["stderr"], "\n") != 1 || got["stdout"] != "again\n" {
		t.Errorf("got %q, %+v", got, c)
	}
	log.Close()
}

// A busy time is paid for while it lasts only.
func TestIdleGivesBack(t *testing.T) {
	log, path := newLog(t)
	r, w := pipe(t, true)
	before, err := unix.FcntlInt(w.Fd(), unix.F_GETPIPE_SZ, 0)
	must.Succeed(t, err)
	s := New(log, nil)
	s.Add(logfile.Stdout, r)
	size := func() int {
		n, err := unix.FcntlInt(w.Fd(), unix.F_GETPIPE_SZ, 0)
		must.Succeed(t, err)
		return n
	}
	var want strings.Builder
	write := func(b string) {
		if _, err := io.WriteString(w, b); err != nil {
			t.Fatal(err)
		}
		want.WriteString(b)
	}
	until(t, "a larger pipe", func() bool {
		write(strings.Repeat("0123456789\n", 20_000))
		return size() > before
	})
	write("held, because it has no end")
	until(t, "a small pipe again", func() bool { return size() == before })
	write("\n")
	w.Close()
	wait(t, "drained", s.Drained())
	if outputs(t, contents(t, path))["stdout"] != want.String() {
		t.Error("the log differs")
	}
}

// Both kinds of memory give back what a busy time took, and no more.
func TestTrim(t *testing.T) {
	m, err := NewMemory()
	must.Succeed(t, err)
	defer m.Close()
	private := privatePart()
	defer private.free()
	r, w := pipe(t, false)
	defer r.Close()
	defer w.Close()
	raw, err := r.SyscallConn()
	must.Succeed(t, err)
	page := os.Getpagesize()
	parts := map[string]*part{"private": private, "stdout": m.part(logfile.Stdout), "stderr": m.part(logfile.Stderr)}
	for name, p := range parts {
		for _, held := range []int{0, 1, trimSize, 2*trimSize + 1, logfile.MaxLine} {
			for i := range p.data {
				p.data[i] = 'x'
			}
			c := &copier{raw: raw, part: p, held: held, used: bufferSize}
			c.trim()
			start := uintptr(unsafe.Pointer(&p.data[0])) &^ uintptr(page-1)
			pages := make([]byte, 1+bufferSize/page)
			if name != "stdout" { // it alone begins and ends within a page
				pages = pages[1:]
			}
			_, _, e := unix.Syscall(unix.SYS_MINCORE,
				start, uintptr(len(pages)*page), uintptr(unsafe.Pointer(&pages[0])))
			if e != 0 {
				t.Fatal(e)
			}
			resident := 0
			for _, p := range pages {
				resident += int(p&1) * page
			}
			if resident > held+2*trimSize {
				t.Errorf("%s: %d bytes in memory, and %d are held", name, resident, held)
			}
			if string(p.data[:held]) != strings.Repeat("x", held) {
				t.Errorf("%s: what was held is gone", name)
			}
		}
	}
	if m.head.layout != layout {
		t.Error("the head is gone")
	}
}

func TestDescriptors(t *testing.T) {
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		must.Succeed(t, err)
		return len(names)
	}
	before := 0
	for i := range 20 {
		if i == 1 {
			before = count() // the poller has its own by now
		}
		s := New(nil, nil)
		r1, w1 := pipe(t, true)
		r2, w2 := pipe(t, false)
		s.Add(logfile.Stdout, r1)
		s.Add(logfile.Stderr, r2)
		w1.Close()
		s.Close()
		w2.Close()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
