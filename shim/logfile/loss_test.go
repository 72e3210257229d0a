package logfile

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// tinyDisk mounts a tmpfs with room for so many pages.
func tinyDisk(t *testing.T, pages int) string {
	t.Helper()
	must.BeRoot(t)
	dir := t.TempDir()
	options := fmt.Sprintf("size=%d,huge=never", pages*os.Getpagesize())
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, options))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	dir := tinyDisk(t, 64)
	ballast := filepath.Join(dir, "ballast")
	check(t, os.WriteFile(ballast, make([]byte, 32*os.Getpagesize()), 0o600))
	f, err := Open(dir, "0.log")
	check(t, err)
	line := strings.Repeat("x", 99) + "\n"
	d := feeder{f: f, s: Stdout}
	fed := 0
	feed := func(n int) {
		d.feed(t, strings.Repeat(line, n))
		fed += n * len(line)
	}
	for f.Counters().DroppedBytes == 0 {
		feed(100)
	}
	for range 50 {
		feed(100)
	}
	c := f.Counters()
	if !strings.Contains(c.Err, "no space left on device") {
		t.Errorf("error %q", c.Err)
	}
	if int(c.Bytes+c.DroppedBytes) != fed {
		t.Errorf("%+v, but %d bytes were fed", c, fed)
	}
	before := parse(t, read(t, dir+"/0.log")) // no torn record while it is full
	check(t, os.Remove(ballast))
	feed(3)
	feed(3)
	if e := f.Counters().Err; e != "" {
		t.Errorf("still %s", e)
	}
	after := parse(t, read(t, dir+"/0.log"))[len(before):]
	if len(after) != 7 {
		t.Fatalf("%d records after the disk had room again: %.300v", len(after), after)
	}
	n, ok := after[0].missing()
	if !ok || n != c.DroppedBytes || !strings.HasSuffix(after[0].text, "no space left on device") {
		t.Errorf("the first of them is %v, and %d bytes were dropped", after[0], c.DroppedBytes)
	}
	if got := output(after[1:], Stdout); got != strings.Repeat(line, 6) {
		t.Errorf("got %q", got)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// losses feeds two outputs to f, calls weather now and then, and checks that the
// log is whole records, in order, which account for every byte. log gives all of
// the log after f was closed; exact says that no torn record stays in it.
func losses(t *testing.T, f *File, random *rand.Rand, weather func(), log func() []byte, exact bool) {
	t.Helper()
	var fed [streams]strings.Builder
	var feeders [streams]feeder
	for s := range streams {
		feeders[s] = feeder{f: f, s: s}
	}
	for range 200 {
		s := Stream(random.IntN(int(streams)))
		var b []byte
		for range random.IntN(30) {
			// Every piece of it is there only once, and no line is empty.
			for range random.IntN(1 << random.IntN(12)) {
				b = strconv.AppendInt(b, int64(fed[s].Len()+len(b)), 10)
				b = append(b, ',')
			}
			b = append(b, '.')
			if random.IntN(4) > 0 {
				b = append(b, '\n')
			}
		}
		feeders[s].feed(t, string(b))
		fed[s].Write(b)
		if random.IntN(8) == 0 {
			weather()
		}
	}
	for s := range streams {
		feeders[s].end(t)
	}
	b := log()
	c := f.Counters()
	if total := fed[0].Len() + fed[1].Len(); int(c.Bytes+c.DroppedBytes) != total {
		t.Errorf("%+v, but %d bytes were fed", c, total)
	}
	var missing, ends uint64
	records := slices.DeleteFunc(parse(t, b), func(r record) bool {
		n, ok := r.missing()
		missing += n
		if r.text == "" {
			ends++ // of a line that lost its rest
		}
		return ok
	})
	for s := range streams {
		rest := fed[s].String()
		for line := range strings.Lines(output(records, s)) {
			var ok bool
			line = strings.TrimSuffix(line, "\n")
			if _, rest, ok = strings.Cut(rest, line); !ok {
				t.Fatalf("%s: a line that was not fed in one piece, or not here, or only once: %.100q", s, line)
			}
		}
	}
	if missing != c.DroppedBytes {
		t.Errorf("the log says that %d bytes are missing, the counters %d", missing, c.DroppedBytes)
	}
	written := uint64(len(output(records, Stdout)) + len(output(records, Stderr)))
	if exact && written-ends != c.Bytes {
		t.Errorf("the log has %d bytes, the counters %d", written-ends, c.Bytes)
	}
	if c.Err != "" {
		t.Errorf("error %q after it works again", c.Err)
	}
}

func TestFullDiskAgainAndAgain(t *testing.T) {
	const pages = 40
	dropped := uint64(0)
	for seed := range uint64(30) {
		dir := tinyDisk(t, pages)
		ballast, err := os.Create(filepath.Join(dir, "ballast"))
		check(t, err)
		defer ballast.Close()
		f, err := Open(dir, "0.log")
		check(t, err)
		random := rand.New(rand.NewPCG(seed, 2))
		var old []byte
		losses(t, f, random, func() {
			// Another amount of room, once all of the log is out of the way. It is
			// rotated as the kubelet does it, or cut by the hand of a person.
			old = append(old, read(t, dir+"/0.log")...)
			ballast.Truncate(0)
			if random.IntN(2) == 0 {
				check(t, os.Remove(dir+"/0.log"))
				if _, err := f.Reopen(); err != nil {
					t.Fatal(err)
				}
			} else if err := os.Truncate(dir+"/0.log", 0); err != nil {
				t.Fatal(err)
			}
			ballast.WriteAt(make([]byte, random.IntN(pages+1)*os.Getpagesize()), 0)
		}, func() []byte {
			ballast.Truncate(0)
			check(t, f.Close())
			return append(old, read(t, dir+"/0.log")...)
		}, true)
		dropped += f.Counters().DroppedBytes
	}
	if dropped == 0 {
		t.Error("the disk was never full")
	}
}

// fullable is a pipe: as a log it takes part of a write and cannot be cut.
func fullable(t *testing.T) (p [2]int) {
	t.Helper()
	check(t, unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	t.Cleanup(func() { unix.Close(p[0]) })
	return p
}

func TestTornRecordIsCompleted(t *testing.T) {
	dropped := uint64(0)
	for seed := range uint64(60) {
		p := fullable(t)
		random := rand.New(rand.NewPCG(seed, 3))
		f := Resume("a", "pipe", p[1], new(State))
		var log []byte
		drain := func(size int) {
			b := make([]byte, size)
			n, err := unix.Read(p[0], b)
			if err == nil {
				log = append(log, b[:n]...)
			}
		}
		losses(t, f, random, func() { drain(random.IntN(1 << random.IntN(18))) }, func() []byte {
			drain(1 << 20)
			check(t, f.Close())
			drain(1 << 20)
			return log
		}, false)
		dropped += f.Counters().DroppedBytes
	}
	if dropped == 0 {
		t.Error("the pipe was never full")
	}
}

// An output of which a line was cut off does not swallow the next line.
func TestLineThatLostItsRestEnds(t *testing.T) {
	dir := tinyDisk(t, 16)
	ballast := filepath.Join(dir, "ballast")
	f, err := Open(dir, "0.log")
	check(t, err)
	defer f.Close()
	out, other := feeder{f: f, s: Stdout}, feeder{f: f, s: Stderr}
	out.feed(t, strings.Repeat("x", MaxLine+1)) // one P
	other.feed(t, strings.Repeat("y", MaxLine+1))
	b, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY, 0o600)
	check(t, err)
	for err == nil {
		_, err = b.Write(make([]byte, os.Getpagesize()))
	}
	b.Close()
	out.feed(t, strings.Repeat("x", MaxLine)+"\n")
	if f.Counters().DroppedBytes == 0 {
		t.Fatal("the disk is not full")
	}
	os.Remove(ballast)
	out.feed(t, "next\n")
	other.feed(t, "z\n")
	got := fmt.Sprintf("%.40v", parse(t, read(t, dir+"/0.log"))[2:])
	x, y := Stdout, Stderr
	want := fmt.Sprintf("%.40v", []record{{x, full, ""}, {y, full, ""},
		{y, full, "holdfast: 16386 bytes of output are missing here"}, {x, full, "next"}, {y, full, "yz"}})
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A torn record stays in its file, and is completed there if that is possible.
func TestReopenAfterATornRecord(t *testing.T) {
	for _, room := range []int{0, 1 << 20} {
		p, dir := fullable(t), t.TempDir()
		check(t, os.WriteFile(dir+"/0.log", nil, 0o600))
		f := Resume(dir, "0.log", p[1], new(State))
		for f.Counters().DroppedBytes == 0 {
			f.Append(Stdout, time.Now(), []byte(strings.Repeat("x", 9999)+"\n"), false)
		}
		old := make([]byte, 1<<20)
		n := 0
		read1 := func(size int) {
			if m, err := unix.Read(p[0], old[n:n+size]); err == nil {
				n += m
			}
		}
		read1(room)
		if _, err := f.Reopen(); err != nil {
			t.Fatal(err)
		}
		read1(1 << 16)
		if room > 0 {
			parse(t, old[:n])
		}
		f.Append(Stdout, time.Now(), []byte("next\n"), false)
		if got := parse(t, read(t, dir+"/0.log")); len(got) != 2 || got[1].text != "next" {
			t.Errorf("got %.300v", got)
		}
		f.Close()
	}
}

// A disk that hangs holds up the writer, and nobody who asks how it goes.
func TestCountersDuringAWriteThatHangs(t *testing.T) {
	p := fullable(t)
	check(t, unix.SetNonblock(p[1], false))
	f := Resume("a", "pipe", p[1], new(State))
	appended := make(chan struct{})
	go func() {
		defer close(appended)
		for range 4 {
			f.Append(Stdout, time.Now(), []byte(strings.Repeat("x\n", 1<<14)), false)
		}
	}()
	for f.mu.TryLock() { // until the write hangs, or a moment before
		f.mu.Unlock()
	}
	f.Trim()
	if c := f.Counters(); c.Lines == 4<<14 || c.Err != "" {
		t.Errorf("%+v while the write hangs", c)
	}
	var log []byte
	for n := 4 << 14 * (headerLen + 2); len(log) < n; {
		check(t, unix.SetNonblock(p[0], false))
		b := make([]byte, 1<<16)
		m, err := unix.Read(p[0], b)
		check(t, err)
		log = append(log, b[:m]...)
	}
	<-appended
	parse(t, log)
	if c := f.Counters(); c.Lines != 4<<14 || c.DroppedBytes != 0 {
		t.Errorf("%+v", c)
	}
	f.Close()
}
