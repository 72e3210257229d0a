package shim

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// pump copies one standard file of an exec from or to a FIFO. Its goroutine, run, closes
// all files when it has come to the end.
type pump struct {
	from io.Reader // reads r
	r    *os.File
	w    *os.File      // nil: what is read is dropped
	hold *os.File      // reads what w writes, so that w does not fail without a reader; or nil
	cut  chan struct{} // closed when nobody will come any more
	once sync.Once     // closes cut
	done chan struct{}
	// patience is how many nanoseconds the reader of the FIFO may let pass once the
	// process has ended, at most defaultLease. 0: it may take what time it wants; below
	// 0: the copy is to end.
	patience atomic.Int64
}

// start begins to copy. from is r, or reads it.
func (p *pump) start(from io.Reader) *pump {
	p.from, p.cut, p.done = from, make(chan struct{}), make(chan struct{})
	go p.run()
	return p
}

func (p *pump) run() {
	defer close(p.done)
	defer closeAll(p.r, p.w)
	p.copy()
	if p.hold == nil {
		return
	}
	// What is in a FIFO is lost when nobody has it open. So one without a reader stays
	// open for a while; a reader that comes then has its end after that.
	p.hold.Close()
	if !hasReader(p.w) {
		select {
		case <-p.cut:
		case <-time.After(defaultLease):
		}
	}
}

// hasReader says whether the FIFO or pipe that w writes to is open for reading.
func hasReader(w *os.File) bool { return look(w)&unix.POLLERR == 0 }

// hasWriter says whether the pipe or terminal that r reads is open for writing.
func hasWriter(r *os.File) bool { return look(r)&unix.POLLHUP == 0 }

// look asks poll(2) how the other end of f is.
func look(f *os.File) int16 {
	poll := []unix.PollFd{{Events: unix.POLLOUT}}
	descriptor.Lend(f, func(fd int) error {
		poll[0].Fd = int32(fd)
		_, err := unix.Poll(poll, 0)
		return err
	})
	return poll[0].Revents
}

func (p *pump) copy() {
	b := make([]byte, 32<<10)
	left := pipeRoom
	for {
		p.expect(p.r.SetReadDeadline, execDrain)
		n, err := p.from.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = rest(p.r, b, &left)
		}
		if n > 0 && p.w != nil {
			p.expect(p.w.SetWriteDeadline, defaultLease)
			if _, werr := p.w.Write(b[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// expect sets a deadline, if there is to be one.
func (p *pump) expect(set func(time.Time) error, within time.Duration) {
	if patience := p.patience.Load(); patience != 0 {
		set(time.Now().Add(min(within, time.Duration(patience))))
	}
}

// hurried says whether the process has ended.
func (p *pump) hurried() bool { return p.patience.Load() != 0 }

// hurry is called when the process has ended: what it has written waits for its reader
// as long as that takes some of it within the patience, and what a background child
// writes is copied until it is quiet for execDrain, or has closed the terminal. It may be
// called again.
func (p *pump) hurry(patience time.Duration) {
	if p == nil {
		return
	}
	p.patience.Store(int64(patience)) // first: run may be about to set a deadline, or to wait for the terminal
	p.expect(p.r.SetReadDeadline, execDrain)
	if !hasWriter(p.r) {
		p.r.SetReadDeadline(time.Unix(1, 0)) // a Read may wait for a process that opens the terminal
	}
	if p.w != nil {
		p.expect(p.w.SetWriteDeadline, defaultLease)
	}
}

// leave is hurry for a pump whose reader has come, or will not.
func (p *pump) leave(patience time.Duration) {
	if p != nil {
		p.hurry(patience)
		p.once.Do(func() { close(p.cut) })
	}
}

// stop ends the copy, and returns when it has ended.
func (p *pump) stop() {
	if p != nil {
		p.leave(-time.Second)
		<-p.done
	}
}

// fifoInput reads a FIFO, which is at its end when its last writer has gone, and not
// while the first one has not come.
type fifoInput struct {
	file   *os.File
	raw    syscall.RawConn
	last   atomic.Bool // the end is where nothing more is there
	cutOff bool        // by Read: it has seen the deadline of finish
}

func newFIFOInput(file *os.File) (*fifoInput, error) {
	raw, err := file.SyscallConn()
	return &fifoInput{file: file, raw: raw}, err
}

func (in *fifoInput) Read(b []byte) (n int, err error) {
	for {
		last := in.last.Load()
		rerr := in.raw.Read(func(fd uintptr) bool {
			n, err = readFIFO(int(fd), b)
			return last || err != unix.EAGAIN
		})
		switch {
		case errors.Is(rerr, os.ErrDeadlineExceeded) && in.last.Load() && !in.cutOff:
			in.cutOff = true
			in.file.SetReadDeadline(time.Time{})
		case rerr != nil:
			return 0, rerr
		case err == unix.EAGAIN || err == nil && n == 0:
			return 0, io.EOF
		default:
			return max(n, 0), err
		}
	}
}

// finish makes the end of what is there now the end.
func (in *fifoInput) finish() {
	if !in.last.Swap(true) {
		in.file.SetReadDeadline(time.Unix(1, 0)) // ends a Read that waits
	}
}

// readFIFO is a read(2) that gives EAGAIN until the first writer has come.
func readFIFO(fd int, b []byte) (n int, err error) {
	for {
		n, err = unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if n > 0 || err != nil {
			return n, err
		}
		// fifo(7) has no way to ask, but poll(2) tells a FIFO that was closed by its
		// writers from one that had none since it was opened.
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		unix.Poll(poll, 0)
		if poll[0].Revents&unix.POLLIN != 0 { // a writer came just now
			continue
		}
		if poll[0].Revents&unix.POLLHUP != 0 {
			return 0, nil
		}
		return 0, unix.EAGAIN
	}
}
