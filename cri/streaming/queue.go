package streaming

import (
	"io"
	"sync"
)

// How much of what a client sends waits for its reader, in bytes.
const (
	stdinQueue   = 128 << 10
	forwardQueue = 32 << 10 // for each connection to a port: there may be many
	sizeQueue    = 1 << 10
)

// queue is the input of a process, or of a port, on its way from one goroutine that
// reads the connection to one that writes to the process. It is a ring: both work on
// parts of it of their own, so bytes are not copied in between.
//
// While WriteTo waits for bytes, with a writer that wants it (direct), the goroutine that
// reads the connection writes to the process itself. To wake another one for each piece
// would take more time than all the rest.
type queue struct {
	size  int
	mu    sync.Mutex
	cond  *sync.Cond
	buf   []byte // made with the first byte: many clients send none
	first int    // of the bytes that wait
	n     int    // how many wait
	err   error  // what comes after the last one
	gone  bool   // nobody takes any more

	to     io.Writer // a direct one, while WriteTo waits
	toErr  error     // of to
	passed int64     // bytes that were written to to
}

func newQueue(size int) *queue {
	q := &queue{size: size}
	q.cond = sync.NewCond(&q.mu)
	return q
}

// direct is a writer that may hold up whoever reads the connection.
type direct interface{ Direct() bool }

// ReadFrom puts what r gives, until its end. It waits for room, and throws away what
// nobody takes any more. Its error is one of r.
func (q *queue) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	for {
		room, to := q.room()
		if room == nil {
			n, err := io.Copy(io.Discard, r)
			return total + n, err
		}
		n, err := r.Read(room)
		total += int64(n)
		if to != nil {
			q.pass(to, room[:n])
		} else {
			q.mu.Lock()
			q.n += n
			q.cond.Broadcast()
			q.mu.Unlock()
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// pass writes bytes past the queue. After an error WriteTo returns it.
func (q *queue) pass(to io.Writer, b []byte) {
	n, err := to.Write(b)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.passed += int64(n)
	if err != nil {
		q.to, q.toErr = nil, err
		q.cond.Broadcast()
	}
}

// room waits for free bytes and gives them, with a writer if what they get is to be
// written to it at once. nil: nobody takes any more.
func (q *queue) room() ([]byte, io.Writer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.buf == nil {
		q.buf = make([]byte, q.size)
	}
	for q.n == len(q.buf) && !q.gone {
		q.cond.Wait()
	}
	if q.gone || q.err != nil {
		return nil, nil
	}
	if q.n == 0 && q.to != nil {
		return q.buf, q.to
	}
	last := (q.first + q.n) % len(q.buf)
	if last < q.first {
		return q.buf[last:q.first], nil
	}
	return q.buf[last:], nil
}

// waiting waits for bytes and gives them. Without an error there is at least one.
// to, if it is not nil, gets what comes while the queue is empty.
func (q *queue) waiting(to io.Writer) ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.to = to
	for q.n == 0 && q.err == nil && q.toErr == nil && !q.gone {
		q.cond.Wait()
	}
	if q.gone {
		return nil, io.ErrClosedPipe
	}
	if q.toErr != nil {
		err := q.toErr
		q.toErr = nil
		return nil, err
	}
	if q.n == 0 {
		return nil, q.err
	}
	return q.buf[q.first:min(q.first+q.n, len(q.buf))], nil
}

func (q *queue) taken(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.first = (q.first + n) % len(q.buf)
	q.n -= n
	q.cond.Broadcast()
}

// Read takes bytes.
func (q *queue) Read(p []byte) (int, error) {
	b, err := q.waiting(nil)
	if err != nil {
		return 0, err
	}
	n := copy(p, b)
	q.taken(n)
	return n, nil
}

// WriteTo takes all bytes until the end.
func (q *queue) WriteTo(w io.Writer) (total int64, err error) {
	var to io.Writer
	if d, ok := w.(direct); ok && d.Direct() {
		to = w
	}
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.to = nil
		total += q.passed
		q.passed = 0
	}()
	for {
		b, err := q.waiting(to)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(b)
		q.taken(n)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// end says what comes after the bytes that wait: io.EOF or an error. The first counts.
func (q *queue) end(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
	q.cond.Broadcast()
}

// abandon says that nobody takes any more.
func (q *queue) abandon() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gone = true
	q.cond.Broadcast()
}
