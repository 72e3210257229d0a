package shim

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
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
		if o.w != nil {
			o.w.Close()
		}
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
	for {
		n, err := o.r.Read(b)
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
		o.w.SetWriteDeadline(time.Now())
	}
}

func (o *outlet) close() {
	o.once.Do(func() { // never started
		o.child.Close()
		close(o.done)
	})
	o.r.Close()
	if o.w != nil {
		o.w.Close()
	}
}
