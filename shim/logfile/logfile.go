// Package logfile writes a container's log in the format of the CRI: one record
// per line,
//
//	2006-01-02T15:04:05.000000000Z stdout F text
//
// with F for a line that ends here and P for one that goes on in the next record
// of the same stream. The text is the container's bytes, unchanged.
//
// A reader of the log takes away the newline behind a P and keeps the one behind an
// F. So the records of a stream put together are exactly its bytes, and output
// that ends without a newline is a P. Some readers wait for the F that belongs
// to a P; the kubelet doesn't, and an F would add a newline that never was.
//
// The log never stops the container's output: what cannot be written is counted
// and dropped, and a record says so as soon as writing works again.
package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// outSize is the most that goes out with one write. It takes what one read of
// 64 KiB becomes, unless the lines are very short.
const outSize = 128 << 10

// trimSize is how much of a buffer stays in memory while nothing happens.
const trimSize = 4 << 10

// File is a log. Its methods may be called from several goroutines.
type File struct {
	directory, path string
	terminal        bool // see OfTerminal

	// reopening orders calls of Reopen and Close, so that the file that was
	// opened last is the one in use. It is taken before mu.
	reopening sync.Mutex

	// mu is held during writes: a disk that hangs keeps it.
	mu   sync.Mutex
	fd   int    // owned; -1 before the first Reopen, and once closed
	out  []byte // records to write, all of one stream; mapped on first use, unmapped by Close
	used int    // the most of out that was in use since the last Trim
	// Of the records in out.
	outRecords, outPartials int
	closed                  bool
	// state is guarded by mu. Its counters are changed under countersMu, too.
	state *State

	// countersMu is never held during a call to the kernel.
	countersMu          sync.Mutex
	writeErr, reopenErr error
}

// Counters say what became of the output.
type Counters struct {
	Bytes        uint64 // of output, newlines included, that are in the log
	Lines        uint64 // records, full and partial, that are in the log
	DroppedBytes uint64 // of output, that could not be written
	Err          string // of the last write or Reopen; empty when it works
}

// Prepare checks directory/path, and creates the directories between (0755) as needed.
// The file itself comes with Reopen: a kubelet counts the logs that it finds as starts
// of the container. No name in path may be a symbolic link, or be "..". What directory
// itself is made of is trusted: it is the kubelet's.
func Prepare(directory, path string) (*File, error) {
	if err := prepare(directory, path); err != nil {
		return nil, err
	}
	return Resume(directory, path, -1, new(State)), nil
}

// Open is Prepare and Reopen.
func Open(directory, path string) (*File, error) {
	f, err := Prepare(directory, path)
	if err != nil {
		return nil, err
	}
	if _, err := f.Reopen(); err != nil {
		return nil, err
	}
	return f, nil
}

// Resume goes on with a log that is open already, for appending, and of which
// state is remembered. It owns fd.
func Resume(directory, path string, fd int, state *State) *File {
	return &File{directory: directory, path: path, fd: fd, state: state}
}

// OfTerminal says that the output is that of a terminal, which makes "\r\n" of each
// "\n": the log has lines without the "\r". It is called before the first Append.
func (f *File) OfTerminal() { f.terminal = true }

// KeepIn makes the File remember in s, which is overwritten, from now on. s has to
// stay in place until the File is closed.
func (f *File) KeepIn(s *State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.countersMu.Lock()
	defer f.countersMu.Unlock()
	*s = *f.state
	f.state = s
}

// Dup gives a second descriptor of the file that is in use, for Resume, or -1 if none is.
func (f *File) Dup() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return -1, nil
	}
	fd, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("cannot duplicate the log %s below %s: %w", f.path, f.directory, err)
	}
	return fd, nil
}

// Reopen is ReopenContext for a caller that waits as long as it takes.
func (f *File) Reopen() (inode uint64, err error) { return f.ReopenContext(context.Background()) }

// ReopenContext opens the path anew, creating the file (mode 0640) if it is missing, and
// gives the new file's inode. Records go there from the next one on: a line that is in
// the old file as a P ends in the new one. On an error the old file stays in use.
//
// A disk can be silent for long. Whoever has given up meanwhile may have renamed the old
// file back, as the kubelet does. So the new file does not come into use once ctx is over,
// or when it has lost its name. No error leaves a new file, but that of a ctx that ended
// while the file was made: the name may be the old file's again, so it is not removed.
func (f *File) ReopenContext(ctx context.Context) (inode uint64, err error) {
	f.reopening.Lock()
	defer f.reopening.Unlock()
	inode, err = f.reopen(ctx)
	f.countersMu.Lock()
	f.reopenErr = err
	f.countersMu.Unlock()
	return inode, err
}

// reopen does the work of Reopen. The caller holds reopening, so that Close does
// not come between.
func (f *File) reopen(ctx context.Context) (inode uint64, err error) {
	f.mu.Lock()
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return 0, os.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return 0, f.notReopened(err)
	}
	o, err := open(f.directory, f.path)
	if err != nil {
		return 0, err
	}
	if err := f.use(ctx, o); err != nil {
		return 0, f.notReopened(err)
	}
	return o.inode, nil
}

func (f *File) notReopened(err error) error {
	return fmt.Errorf("cannot open the log %s below %s again: %w", f.path, f.directory, err)
}

// use has records go to o from the next one on. It owns o.
func (f *File) use(ctx context.Context, o opened) error {
	f.mu.Lock()
	if err := o.check(ctx); err != nil {
		f.mu.Unlock()
		unix.Close(o.fd)
		return err
	}
	f.completeLocked()
	f.state.loss.torn.n = 0 // of the old file, which is out of reach now
	old := f.fd
	f.fd = o.fd
	f.mu.Unlock()
	if old >= 0 {
		unix.Close(old)
	}
	return nil
}

// Counters doesn't wait for a write that hangs.
func (f *File) Counters() Counters {
	f.countersMu.Lock()
	defer f.countersMu.Unlock()
	c := Counters{Bytes: f.state.bytes, Lines: f.state.lines, DroppedBytes: f.state.droppedBytes}
	if err := errors.Join(f.writeErr, f.reopenErr); err != nil {
		c.Err = err.Error()
	}
	return c
}

// Close writes what there is to say about lost output, and closes the file.
func (f *File) Close() error {
	f.reopening.Lock()
	defer f.reopening.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return os.ErrClosed
	}
	f.closed = true
	var err error
	if f.fd >= 0 {
		f.mendLocked(time.Now())
		err = unix.Close(f.fd)
		f.fd = -1
	}
	if f.out != nil {
		unix.Munmap(f.out[:outSize])
		f.out, f.used = nil, 0
	}
	if err != nil {
		return fmt.Errorf("cannot close the log %s below %s: %w", f.path, f.directory, err)
	}
	return nil
}

// Append writes the lines in data, all with one time, and says how many bytes it
// took. The rest is the beginning of a line: at most MaxLine bytes, to be given again
// in front of what follows. With end nothing follows, and there is no rest.
//
// Append never fails: see Counters.
func (f *File) Append(s Stream, at time.Time, data []byte, end bool) (taken int) {
	fullHeader := header(at, s, full)
	partialHeader := fullHeader
	partialHeader[tagAt] = partial
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		f.count(0, 0, len(data), f.failed(os.ErrClosed))
		return len(data)
	}
	if f.out == nil {
		f.out = mapOut()
	}
	for {
		rest := data[taken:]
		i := bytes.IndexByte(rest[:min(len(rest), MaxLine+1)], '\n')
		h, text, newline := &fullHeader, rest, 0
		stripped := 0
		switch {
		case i >= 0:
			text, newline = rest[:i], 1
			if f.terminal {
				text = bytes.TrimRight(text, "\r")
				stripped = i - len(text)
			}
		case len(rest) > MaxLine:
			h, text = &partialHeader, rest[:MaxLine]
		case end && len(rest) > 0:
			h = &partialHeader
		default:
			f.flushLocked(s, at)
			return taken
		}
		n := headerLen + len(text) + len("\n")
		if n > cap(f.out)-len(f.out) {
			f.flushLocked(s, at)
		}
		f.out = f.out[:len(f.out)+n]
		r := f.out[len(f.out)-n:]
		copy(r, h[:])
		copy(r[headerLen:], text)
		r[n-1] = '\n'
		f.outRecords++
		f.outPartials += 1 - newline
		taken += len(text) + stripped + newline
	}
}

// mapOut maps memory rather than taking it from the heap, because then Trim can
// give it back at once.
func mapOut() []byte {
	b, err := unix.Mmap(-1, 0, outSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("cannot map %d bytes: %v", outSize, err)) // as the heap does
	}
	return b[:0]
}

// Trim gives back memory that a busy time took. Append takes it again.
func (f *File) Trim() {
	if !f.mu.TryLock() {
		return
	}
	defer f.mu.Unlock()
	if f.used > trimSize {
		unix.Madvise(f.out[trimSize:outSize], unix.MADV_DONTNEED)
		f.used = 0
	}
}

// flushLocked empties out: into the file, or into the count of what was dropped.
func (f *File) flushLocked(s Stream, at time.Time) {
	b, records, partials := f.out, f.outRecords, f.outPartials
	if len(b) == 0 {
		return
	}
	f.out, f.outRecords, f.outPartials = b[:0], 0, 0
	f.used = max(f.used, len(b))
	total := outputLen(b, records, partials)

	n, err := 0, f.mendLocked(at)
	if err == nil {
		n, err = f.write(b)
	}
	if err == nil {
		f.state.open[s] = partials > 0 && endsPartial(b)
		f.count(records, total, 0, nil)
		return
	}
	keep := bytes.LastIndexByte(b[:n], '\n') + 1
	f.cutLocked(b, keep, n)
	records, written := 0, 0
	for r := range bytes.Lines(b[:keep]) {
		p := 0
		if r[tagAt] == partial {
			p = 1
		}
		f.state.open[s] = p > 0
		records++
		written += outputLen(r, 1, p)
	}
	if f.state.loss.torn.n > 0 && n > keep {
		f.state.open[s] = b[keep+tagAt] == partial
	}
	f.state.loss.add(s, total-written, err)
	f.count(records, written, total-written, f.failed(err))
}

// endsPartial says whether the last of the records in b is a P.
func endsPartial(b []byte) bool {
	return b[bytes.LastIndexByte(b[:len(b)-1], '\n')+1+tagAt] == partial
}

func (f *File) count(records, written, dropped int, err error) {
	f.countersMu.Lock()
	defer f.countersMu.Unlock()
	f.state.lines += uint64(records)
	f.state.bytes += uint64(written)
	f.state.droppedBytes += uint64(dropped)
	f.writeErr = err
}

// write writes b as far as it can.
func (f *File) write(b []byte) (n int, err error) {
	for n < len(b) {
		m, err := unix.Write(f.fd, b[n:])
		switch {
		case m > 0:
			n += m
		case err == nil:
			return n, io.ErrShortWrite
		case err != unix.EINTR:
			return n, err
		}
	}
	return n, nil
}

func (f *File) failed(err error) error {
	return fmt.Errorf("cannot write the log %s below %s: %w", f.path, f.directory, err)
}

// cutLocked takes b[keep:n] back from the end of the file. Where that can't be done,
// it leaves a note of what makes whole records of it.
func (f *File) cutLocked(b []byte, keep, n int) {
	if keep == n {
		return
	}
	var st unix.Stat_t
	err := unix.Fstat(f.fd, &st)
	size := st.Size - int64(n-keep)
	if err == nil && size >= 0 && unix.Ftruncate(f.fd, size) == nil {
		return
	}
	record := bytes.LastIndexByte(b[:n], '\n') + 1
	if record < n {
		// At least the header, so that the record can be read.
		f.state.loss.torn.set(string(b[n:max(n, record+headerLen)]) + "\n")
	}
}

// completeLocked ends a torn record.
func (f *File) completeLocked() error {
	torn := &f.state.loss.torn
	n, err := f.write(torn.bytes())
	torn.set(string(torn.bytes()[n:]))
	return err
}

// mendLocked brings the log in order after a loss, if there was one: it ends the lines
// that lost their rest, and says how much is missing.
func (f *File) mendLocked(at time.Time) error {
	if f.state.loss.bytes == 0 {
		return nil
	}
	if err := f.completeLocked(); err != nil {
		return err
	}
	var b []byte
	add := func(s Stream, text string) {
		h := header(at, s, full)
		b = append(append(append(b, h[:]...), text...), '\n')
	}
	ends := f.state.loss.of
	ends[Stderr] = true // or the line below would become part of it
	for s := range streams {
		if f.state.open[s] && ends[s] {
			add(s, "")
		}
	}
	lost := &f.state.loss
	add(Stderr, fmt.Sprintf("holdfast: %d bytes of output are missing here: %s", lost.bytes, lost.cause.bytes()))
	if n, err := f.write(b); err != nil {
		f.cutLocked(b, 0, n)
		return err
	}
	for s := range streams {
		f.state.open[s] = f.state.open[s] && !ends[s]
	}
	f.state.loss = loss{}
	f.count(0, 0, 0, nil)
	return nil
}
