package stdio

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/shim/logfile"
)

const (
	// A busy pipe is made this large, so that its writer can go on while the disk
	// is slow. Not every pipe: there is a limit per user (pipe-user-pages-soft in
	// pipe(7)), beyond which the pipes that unprivileged processes of that user
	// make become very small, and the containers' processes are such.
	largePipe = 1 << 20
	// What a busy time took is given back when nothing was written for idleAfter.
	idleAfter = time.Second
	// trimSize is how much may be in use without being given back.
	trimSize = 4 << 10
)

// copier takes one output to the log and to the clients. All fields but ending are
// of the goroutine of run.
type copier struct {
	log     *logfile.File // nil: there is none
	clients *clients
	stream  logfile.Stream
	r       *os.File     // closed by run
	ending  atomic.Int32 // an ending
	part    *part        // freed by run

	raw  syscall.RawConn
	held int // bytes at the beginning of part: a line that has no end yet
	n    int // what the last read gave
	err  error

	// Taken by a busy time, given back by trim.
	used  int // the most of part that was in use
	small int // the size of the pipe before it was made larger, 0 if it wasn't

	armed bool // the deadline that notices an idle time is set
	quiet bool // nothing was read since
}

// pollable gives a file for which the poller waits, so that a copier that waits
// costs no thread. It may be r itself, or replace it.
func pollable(r *os.File) *os.File {
	if r.SetReadDeadline(time.Time{}) == nil {
		return r
	}
	var fd int
	err := descriptor.Lend(r, func(old int) (err error) {
		fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return r // it works, with a thread
	}
	unix.SetNonblock(fd, true)
	defer r.Close()
	return os.NewFile(uintptr(fd), r.Name())
}

// ending says when and how run ends. A copier goes from one to a later one only.
type ending int32

const (
	goOn   ending = iota // at the end of a pipe; a terminal has none, as a process may open it again
	finish               // as soon as no process has the terminal open
	stop                 // now: take what is there to the log
	leave                // now: leave all as it is, for another process
)

// end tells run when to end, and has it look at once. It may be called from any goroutine.
func (c *copier) end(how ending) {
	c.ending.Store(int32(how))
	c.r.SetReadDeadline(time.Unix(1, 0)) // after the flag: see deadline
}

// deadline sets or clears the deadline for the next reads. One that end has set
// is not lost: either the flag is seen here or by the read that follows, or the
// deadline of end comes later.
func (c *copier) deadline(t time.Time) error {
	c.r.SetReadDeadline(t)
	c.armed = !t.IsZero()
	return c.stopped()
}

var errStopped = errors.New("stopped")

func (c *copier) stopped() error {
	if c.ending.Load() >= int32(stop) {
		return errStopped
	}
	return nil
}

// run copies until the end of the output, or until end.
func (c *copier) run() {
	defer c.r.Close()
	defer c.part.free()
	var err error
	if c.raw, err = c.r.SyscallConn(); err != nil {
		c.report(err)
		return
	}
	c.held = min(int(c.part.held.Load()), logfile.MaxLine)
	try := func(fd uintptr) bool { c.read(int(fd)); return true }
	wait := func(fd uintptr) bool { c.read(int(fd)); return c.err != unix.EAGAIN }

	for err == nil {
		err = c.next(try, wait)
	}
	if c.ending.Load() == int32(leave) && err == errStopped {
		return
	}
	if err == errStopped {
		err = c.rest(try)
	}
	if err != io.EOF {
		c.report(err)
	}
	c.pass(true)
}

func (c *copier) report(err error) {
	slog.Warn("cannot read an output of the container any more", "stream", c.stream.String(), "error", err)
}

// read is one read(2) behind the bytes that are held.
func (c *copier) read(fd int) {
	c.n, c.err = 0, unix.EINTR
	for c.err == unix.EINTR {
		c.n, c.err = unix.Read(fd, c.part.data[c.held:])
	}
	switch {
	case c.err == unix.EIO && c.ending.Load() == int32(goOn):
		// No process has the terminal open now. The poller is edge-triggered, so that run
		// does not turn round: what is written after the next open wakes it, as does end.
		c.n, c.err = 0, unix.EAGAIN
	case c.err == unix.EIO:
		c.n, c.err = 0, io.EOF
	case c.err != nil:
		c.n = 0
	case c.n == 0:
		c.err = io.EOF
	case c.n == len(c.part.data)-c.held && c.small == 0:
		c.enlarge(fd)
	}
}

// next waits for output and passes on what one read gives.
func (c *copier) next(try, wait func(uintptr) bool) error {
	if err := c.stopped(); err != nil {
		return err
	}
	err := c.raw.Read(try)
	if err == nil && c.err == unix.EAGAIN {
		if !c.armed && (c.used > trimSize || c.small > 0) {
			c.quiet = true
			if err := c.deadline(time.Now().Add(idleAfter)); err != nil {
				return err
			}
		}
		err = c.raw.Read(wait)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if c.quiet {
			c.trim()
		}
		return c.deadline(time.Time{})
	}
	if err != nil {
		return err
	}
	if c.err != nil {
		return c.err
	}
	c.quiet = false
	c.pass(false)
	return nil
}

// rest passes on what is in the pipe now. A process that goes on writing doesn't
// make it any longer.
func (c *copier) rest(try func(uintptr) bool) error {
	c.r.SetReadDeadline(time.Time{}) // or no read would be tried
	var left int
	c.raw.Control(func(fd uintptr) {
		left, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	})
	for left > 0 {
		if err := c.raw.Read(try); err != nil {
			return err
		}
		if c.err == unix.EAGAIN {
			break
		}
		if c.err != nil {
			return c.err
		}
		left -= c.n
		c.pass(false)
	}
	return io.EOF
}

// pass gives what was read to the clients, and with what was held to the log, which
// leaves the beginning of a line to be held, unless this is the end.
func (c *copier) pass(end bool) {
	data := c.part.data[:c.held+c.n]
	c.clients.push(c.stream, data[c.held:])
	c.n = 0
	c.used = max(c.used, len(data))
	taken := len(data)
	if c.log != nil {
		c.part.held.Store(0) // or another process might log it once more
		taken = c.log.Append(c.stream, time.Now(), data, end)
	}
	c.held = copy(data, data[taken:])
	c.part.held.Store(uint64(c.held))
}

// enlarge makes the pipe larger, if it is one.
func (c *copier) enlarge(fd int) {
	size, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		size = largePipe // nothing to do, now or later
	}
	c.small = size
	for try := largePipe; try > size; try /= 2 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, try); err == nil {
			return
		}
	}
}

// trim gives back what a busy time took.
func (c *copier) trim() {
	c.part.trim(max(c.held, 1))
	if c.small > 0 {
		c.raw.Control(func(fd uintptr) {
			unix.FcntlInt(fd, unix.F_SETPIPE_SZ, c.small)
		})
	}
	c.used, c.small = 0, 0
	if c.log != nil {
		c.log.Trim()
	}
}
