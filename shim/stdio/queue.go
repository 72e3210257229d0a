package stdio

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/shim/logfile"
)

// queue holds the output that waits for one client: a ring of frames, each of which
// is a header and bytes of one output. Its memory is mapped, so that only what was
// in use costs any, and none does when the client has gone.
type queue struct {
	mu   sync.Mutex
	more sync.Cond // there is a frame, or over, or closed

	ring   []byte // unmapped by free
	start  int
	used   int            // bytes of the ring, headers included
	stream logfile.Stream // of the frame at start
	left   int            // of the frame at start, when its header was taken
	queued uint64         // bytes of output in the ring
	over   bool           // no more output follows
	closed bool           // nobody takes any more

	given, missed uint64
}

// frameHeader holds the stream in its first byte and the length in the others.
const frameHeader = 4

func newQueue(size int) *queue {
	if size <= 0 {
		size = DefaultQueue
	}
	ring, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("cannot map %d bytes: %v", size, err)) // as the heap does
	}
	q := &queue{ring: ring}
	q.more.L = &q.mu
	return q
}

// free gives the memory back. Nobody uses a slice of next any more.
func (q *queue) free() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closeLocked()
	unix.Munmap(q.ring)
	q.ring = nil
}

// put adds bytes of an output, or reports false if there is no room. At most
// bufferSize at once.
func (q *queue) put(s logfile.Stream, b []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || frameHeader+len(b) > len(q.ring)-q.used {
		q.missed += uint64(len(b))
		return q.closed
	}
	var header [frameHeader]byte
	binary.BigEndian.PutUint32(header[:], uint32(s)<<24|uint32(len(b)))
	q.appendLocked(header[:])
	q.appendLocked(b)
	q.queued += uint64(len(b))
	q.more.Signal()
	return true
}

func (q *queue) appendLocked(b []byte) {
	at := (q.start + q.used) % len(q.ring)
	n := copy(q.ring[at:], b)
	copy(q.ring, b[n:])
	q.used += len(b)
}

// next waits for output and lends some of it until took. nil: no more follows, or
// the queue was closed.
func (q *queue) next() (logfile.Stream, []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.used == 0 && !q.over && !q.closed {
		q.more.Wait()
	}
	if q.used == 0 || q.closed {
		return 0, nil
	}
	if q.left == 0 {
		var header [frameHeader]byte
		n := copy(header[:], q.ring[q.start:])
		copy(header[n:], q.ring)
		q.dropLocked(frameHeader)
		h := binary.BigEndian.Uint32(header[:])
		q.stream, q.left = logfile.Stream(h>>24), int(h&0xffffff)
	}
	return q.stream, q.ring[q.start:min(q.start+q.left, len(q.ring))]
}

// took says that the client has n bytes of what next lent.
func (q *queue) took(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dropLocked(n)
	q.left -= n
	q.queued -= uint64(n)
	q.given += uint64(n)
	if q.closed {
		q.missed -= uint64(n) // close took it for lost
	}
	if q.used == 0 {
		q.start = 0 // so that no more of the ring than necessary is ever in memory
	}
}

func (q *queue) dropLocked(n int) {
	q.start = (q.start + n) % len(q.ring)
	q.used -= n
}

// end says that no more output follows.
func (q *queue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.over = true
	q.more.Broadcast()
}

// close makes next return nil, whatever is queued.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closeLocked()
}

func (q *queue) closeLocked() {
	if !q.closed {
		q.closed = true
		q.missed += q.queued
		q.more.Broadcast()
	}
}
