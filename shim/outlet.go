package shim

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/runc"
)

// outlets are the standard files of an exec whose caller has named them.
type outlets struct {
	stdin          *os.File
	stdout, stderr *outlet
}

// openOutlets gives, after an error, what was opened until then: close it.
func openOutlets(req *pb.ExecSyncRequest) (o *outlets, err error) {
	o = new(outlets)
	if req.StdinPath != "" {
		// Without O_NONBLOCK a FIFO that nobody writes to would block the shim.
		if o.stdin, err = openFor(req.StdinPath, "stdin_path", unix.O_RDONLY); err != nil {
			return o, err
		}
	}
	if o.stdout, err = newOutlet(req.StdoutPath, "stdout_path", req.OutputLimit); err != nil {
		return o, err
	}
	o.stderr, err = newOutlet(req.StderrPath, "stderr_path", req.OutputLimit)
	return o, err
}

func (o *outlets) child() runc.IO {
	return runc.IO{Stdin: o.stdin, Stdout: o.stdout.child, Stderr: o.stderr.child}
}

func (o *outlets) begin(*os.File) {
	o.stdout.start()
	o.stderr.start()
}

// drain waits for the rest of the output, for a while.
func (o *outlets) drain(*exec) {
	limit := time.After(execDrain)
	for _, o := range []*outlet{o.stdout, o.stderr} {
		o.start()
		if !wait(o.done, limit) {
			o.giveUp()
			limit = time.After(0)
		}
		<-o.done
	}
}

func (o *outlets) close() {
	for _, o := range []*outlet{o.stdout, o.stderr} {
		if o != nil {
			o.close()
		}
	}
	closeAll(o.stdin)
}

const (
	pipeRoom  = 1 << 20     // bytes that a pipe holds at the most (pipe(7), pipe-max-size)
	lastWrite = time.Second // for the rest of an output that is given up
)

// outlet copies one output of an exec to the file that its caller named, up to
// a limit. What is beyond, or cannot be written, is read and dropped, so that
// the process never waits for it.
type outlet struct {
	child *os.File // write end, for the process; closed by start
	r     *os.File
	w     *os.File // nil: the output is not wanted
	limit uint64   // 0: none

	once sync.Once
	done chan struct{} // closed at the end of the output

	// For others only after done.
	written, dropped uint64
}

func newOutlet(path, field string, limit uint64) (*outlet, error) {
	o := &outlet{limit: limit, done: make(chan struct{})}
	var err error
	if path != "" {
		// O_APPEND: two outputs may go to the same file.
		if o.w, err = openFor(path, field, unix.O_WRONLY|unix.O_APPEND); err != nil {
			return nil, err
		}
	}
	if o.r, o.child, err = os.Pipe(); err != nil {
		closeAll(o.w)
		return nil, fmt.Errorf("cannot make %s of an exec: %w", field, err)
	}
	return o, nil
}

// start closes the child's end and begins to copy, once.
func (o *outlet) start() {
	o.once.Do(func() {
		o.child.Close()
		go o.copy()
	})
}

func (o *outlet) copy() {
	defer close(o.done)
	b := make([]byte, 32<<10)
	broken := false
	left := pipeRoom
	for {
		n, err := o.r.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = rest(o.r, b, &left)
		}
		if o.w != nil {
			keep := n
			if o.limit > 0 {
				keep = int(min(uint64(n), o.limit-o.written))
			}
			if broken {
				keep = 0
			}
			if keep > 0 {
				var werr error
				keep, werr = o.w.Write(b[:keep])
				broken = werr != nil
			}
			o.written += uint64(keep)
			o.dropped += uint64(n - keep)
		}
		if err != nil { // io.EOF, or giveUp
			return
		}
	}
}

// giveUp ends a copy whose output is kept open, or whose reader has stopped.
func (o *outlet) giveUp() {
	o.r.SetReadDeadline(time.Now())
	if o.w != nil {
		o.w.SetWriteDeadline(time.Now().Add(lastWrite))
	}
}

// rest reads what is in a pipe whose deadline has passed, as far as left goes, and then
// gives that error.
func rest(r *os.File, b []byte, left *int) (n int, err error) {
	if n = descriptor.ReadNow(r, b[:min(len(b), *left)]); n == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	*left -= n
	return n, nil
}

func (o *outlet) close() {
	o.once.Do(func() { // never started
		o.child.Close()
		close(o.done)
	})
	closeAll(o.r, o.w)
}
