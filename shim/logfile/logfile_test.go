package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

var headerFormat = regexp.MustCompile(`^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) $`)

type record struct {
	stream Stream
	tag    byte
	text   string
}

var markerFormat = regexp.MustCompile(`^holdfast: (\d+) bytes of output are missing here: `)

// missing is how many bytes r says are missing; ok is false if it is a
// container's line.
func (r record) missing() (n uint64, ok bool) {
	m := markerFormat.FindStringSubmatch(r.text)
	if m == nil || r.stream != Stderr || r.tag != full {
		return 0, false
	}
	n, err := strconv.ParseUint(m[1], 10, 64)
	return n, err == nil
}

// parse reads a log, every byte of which has to be of a record.
func parse(t testing.TB, log []byte) (records []record) {
	t.Helper()
	for line := range bytes.Lines(log) {
		text, ended := bytes.CutSuffix(line, []byte("\n"))
		m := headerFormat.FindSubmatch(text[:min(len(text), headerLen)])
		if m == nil || !ended {
			t.Fatalf("not a record: %.200q", line)
		}
		text = text[headerLen:]
		if _, err := time.Parse(time.RFC3339Nano, string(m[1])); err != nil {
			t.Fatal(err)
		}
		if len(text) > MaxLine {
			t.Fatalf("a record with %d bytes of text", len(text))
		}
		s := Stdout
		if string(m[2]) == "stderr" {
			s = Stderr
		}
		records = append(records, record{s, m[3][0], string(text)})
	}
	return records
}

// output puts the records of a stream together, as the kubelet does.
func output(records []record, s Stream) string {
	var b strings.Builder
	for _, r := range records {
		if r.stream == s {
			b.WriteString(r.text)
			if r.tag == full {
				b.WriteByte('\n')
			}
		}
	}
	return b.String()
}

// expected is how the records of a whole output have to look.
func expected(s Stream, data string) (records []record) {
	for line := range strings.Lines(data) {
		text, ended := strings.CutSuffix(line, "\n")
		for len(text) > MaxLine {
			records = append(records, record{s, partial, text[:MaxLine]})
			text = text[MaxLine:]
		}
		tag := byte(partial)
		if ended {
			tag = full
		}
		records = append(records, record{s, tag, text})
	}
	return records
}

// feeder gives an output to a File in pieces, as a copier does.
type feeder struct {
	f      *File
	s      Stream
	buffer []byte
}

func (d *feeder) feed(t testing.TB, data string) {
	d.buffer = append(d.buffer, data...)
	n := d.f.Append(d.s, time.Now(), d.buffer, false)
	d.buffer = d.buffer[n:]
	if len(d.buffer) > MaxLine || bytes.IndexByte(d.buffer, '\n') >= 0 {
		t.Fatalf("Append left %d bytes", len(d.buffer))
	}
}

func (d *feeder) end(t testing.TB) {
	if n := d.f.Append(d.s, time.Now(), d.buffer, true); n != len(d.buffer) {
		t.Fatalf("Append left %d bytes at the end", len(d.buffer)-n)
	}
	d.buffer = nil
}

func newFile(t testing.TB) (f *File, path string) {
	t.Helper()
	dir := t.TempDir()
	f, err := Open(dir, "c/0.log")
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f, filepath.Join(dir, "c/0.log")
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}

func TestRecordLooksLikeThis(t *testing.T) {
	f, path := newFile(t)
	at := time.Date(2026, 1, 2, 5, 4, 5, 600, time.FixedZone("", 2*3600))
	f.Append(Stdout, at, []byte("hello\n\nrest"), true)
	f.Append(Stderr, at, []byte("oh\n"), true)
	want := "2026-01-02T03:04:05.000000600Z stdout F hello\n" +
		"2026-01-02T03:04:05.000000600Z stdout F \n" +
		"2026-01-02T03:04:05.000000600Z stdout P rest\n" +
		"2026-01-02T03:04:05.000000600Z stderr F oh\n"
	if got := string(read(t, path)); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got, want := f.Counters(), (Counters{Bytes: 14, Lines: 4}); got != want {
		t.Errorf("counters %+v, want %+v", got, want)
	}
}

// The lines of a terminal are as the program wrote them: "\r" is the terminal's, at
// the end of a line alone.
func TestTerminalLines(t *testing.T) {
	long := strings.Repeat("x", MaxLine-1)
	for name, c := range map[string]struct {
		terminal bool
		output   string
		want     []string
	}{
		"lines":                  {true, "one\r\ntwo\r\n\r\n", []string{"one", "two", ""}},
		"several":                {true, "one\r\r\n", []string{"one"}},
		"within a line":          {true, "50%\r100%\r\n", []string{"50%\r100%"}},
		"without a newline":      {true, "prompt\r", []string{"prompt\r"}},
		"at the end of a record": {true, long + "\r\nx\r\n", []string{long, "x"}},
		"across two records":     {true, long + "x\r\n", []string{long + "x", ""}},
		"no terminal":            {false, "one\r\n", []string{"one\r"}},
	} {
		t.Run(name, func(t *testing.T) {
			f, path := newFile(t)
			if c.terminal {
				f.OfTerminal()
			}
			d := feeder{f: f}
			for part := range slices.Chunk([]byte(c.output), 7000) {
				d.feed(t, string(part))
			}
			d.end(t)
			var got []string
			for _, r := range parse(t, read(t, path)) {
				got = append(got, r.text)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got %.200q", got)
			}
		})
	}
}

func TestLongLines(t *testing.T) {
	for _, n := range []int{0, 1, MaxLine - 1, MaxLine, MaxLine + 1, 2 * MaxLine, 2*MaxLine + 1, 100 * MaxLine} {
		for _, end := range []string{"", "\n", "\nmore\n"} {
			f, path := newFile(t)
			data := strings.Repeat("x", n) + end
			d := feeder{f: f, s: Stderr}
			for rest := data; rest != ""; {
				k := min(len(rest), 5000)
				d.feed(t, rest[:k])
				rest = rest[k:]
			}
			d.end(t)
			if got, want := fmt.Sprint(parse(t, read(t, path))), fmt.Sprint(expected(Stderr, data)); got != want {
				t.Errorf("%d bytes and %q: got %.200s, want %.200s", n, end, got, want)
			}
		}
	}
}

// fuzzOutput checks that two outputs, given in the pieces that seed makes of
// them, come out as they went in.
func fuzzOutput(t *testing.T, out, err string, seed uint64) {
	f, path := newFile(t)
	random := rand.New(rand.NewPCG(seed, 0))
	data := [streams]string{out, err}
	feeders := [streams]feeder{{f: f, s: Stdout}, {f: f, s: Stderr}}
	rest := data
	for rest[0]+rest[1] != "" {
		s := random.IntN(int(streams))
		n := random.IntN(1 << random.IntN(18))
		n = min(n, len(rest[s]), 64<<10-len(feeders[s].buffer))
		feeders[s].feed(t, rest[s][:n])
		rest[s] = rest[s][n:]
	}
	parse(t, read(t, path))
	for s := range streams {
		feeders[s].end(t)
	}
	records := parse(t, read(t, path))
	for s := range streams {
		if got := output(records, s); got != data[s] {
			t.Fatalf("%s: %d bytes came out as %d, or others", s, len(data[s]), len(got))
		}
		var got []record
		for _, r := range records {
			if r.stream == s {
				got = append(got, r)
			}
		}
		if !slices.Equal(got, expected(s, data[s])) {
			t.Fatalf("%s: the records depend on how the output was cut", s)
		}
	}
	want := Counters{Bytes: uint64(len(out) + len(err)), Lines: uint64(len(records))}
	if got := f.Counters(); got != want {
		t.Fatalf("counters %+v, want %+v", got, want)
	}
}

func FuzzOutput(f *testing.F) {
	f.Add("", "", uint64(0))
	f.Add("\n", "\n\n\n", uint64(1))
	f.Add("a\x00b\r\n\r\n\rc", "2026-01-02T03:04:05.000000600Z stdout F x\n", uint64(2))
	f.Add(strings.Repeat("x", MaxLine)+"\n", strings.Repeat("y", 3*MaxLine+1), uint64(3))
	f.Fuzz(fuzzOutput)
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

func TestRandomOutput(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		fuzzOutput(t, randomOutput(random, 300_000), randomOutput(random, 100_000), seed)
	}
}

func TestReopenSwitchesBetweenRecords(t *testing.T) {
	f, path := newFile(t)
	long := strings.Repeat("x", MaxLine+3)
	d := feeder{f: f, s: Stdout}
	d.feed(t, "one\n"+long)
	check(t, os.Rename(path, path+".1"))
	d.feed(t, "-") // nobody asked yet
	inode, err := f.Reopen()
	check(t, err)
	st, err := os.Stat(path)
	check(t, err)
	if got := statInode(st); got != inode {
		t.Errorf("inode %d, the file has %d", inode, got)
	}
	d.feed(t, "\ntwo\n")
	got := fmt.Sprint(parse(t, read(t, path+".1")))
	if want := fmt.Sprint([]record{{Stdout, full, "one"}, {Stdout, partial, long[:MaxLine]}}); got != want {
		t.Errorf("old file: %.100s", got)
	}
	got = fmt.Sprint(parse(t, read(t, path)))
	if want := fmt.Sprint([]record{{Stdout, full, "xxx-"}, {Stdout, full, "two"}}); got != want {
		t.Errorf("new file: %s, want %s", got, want)
	}
}

func TestReopenFails(t *testing.T) {
	f, path := newFile(t)
	old := path + ".1"
	check(t, os.Rename(path, old))
	check(t, os.Mkdir(path, 0o755))
	if _, err := f.Reopen(); err == nil {
		t.Fatal("Reopen took a directory")
	}
	f.Append(Stdout, time.Now(), []byte("goes on\n"), false)
	if c := f.Counters(); c.Err == "" || c.Lines != 1 || c.DroppedBytes != 0 {
		t.Errorf("counters %+v", c)
	}
	if got := output(parse(t, read(t, old)), Stdout); got != "goes on\n" {
		t.Errorf("the old file has %q", got)
	}
	check(t, os.Remove(path))
	// The kubelet renames the old file back and tries again later.
	check(t, os.Rename(old, path))
	if _, err := f.Reopen(); err != nil {
		t.Fatal(err)
	}
	f.Append(Stdout, time.Now(), []byte("and on\n"), false)
	if got := output(parse(t, read(t, path)), Stdout); got != "goes on\nand on\n" {
		t.Errorf("the file has %q", got)
	}
	if c := f.Counters(); c.Err != "" {
		t.Errorf("still there: %s", c.Err)
	}
}

// Whoever asks for a new file and gives up renames the old one back. Meanwhile a silent disk
// may have had the new one made. Records go to the file that has the name in the end.
func TestReopenGivenUp(t *testing.T) {
	over, giveUp := context.WithCancel(t.Context())
	giveUp()
	for name, c := range map[string]struct {
		ctx    context.Context
		before bool // the old file has its name again before the new one would come into use
		want   error
	}{
		"replaced":           {t.Context(), true, errReplaced},
		"given up":           {over, false, context.Canceled},
		"given up, replaced": {over, true, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			f, path := newFile(t)
			old := path + ".1"
			check(t, os.Rename(path, old))
			o, err := open(f.directory, f.path)
			check(t, err)
			if c.before {
				check(t, os.Rename(old, path))
			}
			if err := f.use(c.ctx, o); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if _, err := unix.FcntlInt(uintptr(o.fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Errorf("the new file is not closed: %v", err)
			}
			if !c.before {
				check(t, os.Rename(old, path))
			}
			f.Append(Stdout, time.Now(), []byte("goes on\n"), false)
			if got := output(parse(t, read(t, path)), Stdout); got != "goes on\n" {
				t.Errorf("the file has %q", got)
			}
		})
	}
}

// A write that takes longer than the caller waits leaves no new file.
func TestReopenWaitsForWrite(t *testing.T) {
	f, path := newFile(t)
	check(t, os.Rename(path, path+".1"))
	ctx, giveUp := context.WithCancel(t.Context())
	reopened := make(chan error, 1)
	f.mu.Lock()
	go func() {
		_, err := f.ReopenContext(ctx)
		reopened <- err
	}()
	giveUp()
	f.mu.Unlock()
	if err := <-reopened; !errors.Is(err, context.Canceled) || f.Counters().Err == "" {
		t.Errorf("got %v, and counters %+v", err, f.Counters())
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a new file: %v", err)
	}
	if _, err := f.ReopenContext(t.Context()); err != nil || f.Counters().Err != "" {
		t.Errorf("once more: %v, %+v", err, f.Counters())
	}
}

func TestReopenMakesNoDirectory(t *testing.T) {
	f, path := newFile(t)
	check(t, os.RemoveAll(filepath.Dir(path)))
	if _, err := f.Reopen(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Reopen: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Error("a pod's log directory came back after it was removed")
	}
}

func TestReopenWhileWriting(t *testing.T) {
	const lines, reopens = 20_000, 300
	f, path := newFile(t)
	var wg sync.WaitGroup
	for s := range streams {
		wg.Go(func() {
			d := feeder{f: f, s: s}
			for i := range lines {
				d.feed(t, fmt.Sprintf("%s %d\n", s, i))
			}
			d.end(t)
		})
	}
	var files []string
	for i := range reopens {
		name := fmt.Sprintf("%s.%d", path, i)
		check(t, os.Rename(path, name))
		files = append(files, name)
		if _, err := f.Reopen(); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	var log []byte
	for _, name := range append(files, path) {
		b := read(t, name)
		parse(t, b) // each by itself
		log = append(log, b...)
	}
	records := parse(t, log)
	for s := range streams {
		var want strings.Builder
		for i := range lines {
			fmt.Fprintf(&want, "%s %d\n", s, i)
		}
		if output(records, s) != want.String() {
			t.Errorf("%s: lines are lost, doubled or in another order", s)
		}
	}
}

// The file that was opened last is the one in use, whoever opened it.
func TestReopenFromSeveralSides(t *testing.T) {
	f, path := newFile(t)
	for i := range 100 {
		var wg sync.WaitGroup
		for j := range 4 {
			wg.Go(func() {
				os.Rename(path, fmt.Sprintf("%s.%d.%d", path, i, j))
				if _, err := f.Reopen(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		line := fmt.Sprintf("%d\n", i)
		f.Append(Stdout, time.Now(), []byte(line), false)
		if got := output(parse(t, read(t, path)), Stdout); got != line {
			t.Fatalf("the log has %q, want %q", got, line)
		}
	}
}

func TestClosed(t *testing.T) {
	f, path := newFile(t)
	f.Append(Stdout, time.Now(), make([]byte, 2*trimSize), true)
	check(t, f.Close())
	before := len(read(t, path))
	if n := f.Append(Stdout, time.Now(), []byte("late\npart"), false); n != 9 {
		t.Errorf("Append took %d bytes", n)
	}
	if c := f.Counters(); c.DroppedBytes != 9 || c.Err == "" {
		t.Errorf("counters %+v", c)
	}
	if _, err := f.Reopen(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Reopen: %v", err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Close: %v", err)
	}
	f.Trim()
	if n := len(read(t, path)); n != before {
		t.Errorf("the log has %d bytes, and had %d", n, before)
	}
	os.Remove(path)
	f.Reopen()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("Reopen after Close left a file")
	}
}

func TestTrim(t *testing.T) {
	f, path := newFile(t)
	data := strings.Repeat("0123456789\n", 5000)
	for range 3 {
		f.Append(Stdout, time.Now(), []byte(data), false)
		if n := resident(t, f.out[:outSize]); n < 2*trimSize {
			t.Errorf("%d bytes in memory before", n)
		}
		f.Trim()
		if n := resident(t, f.out[:outSize]); n > trimSize {
			t.Errorf("%d bytes in memory after", n)
		}
	}
	if output(parse(t, read(t, path)), Stdout) != strings.Repeat(data, 3) {
		t.Error("the log differs")
	}
}

// resident is how many bytes of a mapping are in memory.
func resident(t *testing.T, b []byte) (n int) {
	t.Helper()
	pages := make([]byte, len(b)/os.Getpagesize())
	_, _, e := unix.Syscall(unix.SYS_MINCORE,
		uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&pages[0])))
	if e != 0 {
		t.Fatal(e)
	}
	for _, p := range pages {
		n += int(p&1) * os.Getpagesize()
	}
	return n
}

var check = must.Succeed
