package streaming

import (
	"io"
	"sync"
)

// queueSize is how much of a client's input waits for the process, in bytes.
const queueSize = 128 << 10

// queue is the input of a process on its way from one goroutine that reads the
// connection to one that writes to the process. It is a ring: both work on parts of
// it of their own, so bytes are not copied in between.
type queue struct {
	mu    sync.Mutex
	cond  *sync.Cond
	buf   []byte // made with the first byte: many clients send none
	first int    // of the bytes that wait
	n     int    // how many wait
	err   error  // what comes after the last one
	gone  bool   // nobody takes any more
}

func newQueue() *queue {
	q := &queue{}
	q.cond = sync.NewCond(&q.mu)
	return q
}

// ReadFrom puts what r gives, until its end. It waits for room, and throws away what
// nobody takes any more. Its error is one of r.
func (q *queue) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	for {
		room := q.room()
		if room == nil {
			n, err := io.Copy(io.Discard, r)
			return total + n, err
		}
		n, err := r.Read(room)
		total += int64(n)
		q.mu.Lock()
		q.n += n
		q.cond.Broadcast()
		q.mu.Unlock()
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// room waits for free bytes and gives them. nil: nobody takes any more.
func (q *queue) room() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.buf == nil {
		q.buf = make([]byte, queueSize)
	}
	for q.n == len(q.buf) && !q.gone {
		q.cond.Wait()
	}
	if q.gone || q.err != nil {
		return nil
	}
	last := (q.first + q.n) % len(q.buf)
	if last < q.first {
		return q.buf[last:q.first]
	}
	return q.buf[last:]
}

// waiting waits for bytes and gives them. Without an error there is at least one.
func (q *queue) waiting() ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n == 0 && q.err == nil && !q.gone {
		q.cond.Wait()
	}
	if q.gone {
		return nil, io.ErrClosedPipe
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
	b, err := q.waiting()
	if err != nil {
		return 0, err
	}
	n := copy(p, b)
	q.taken(n)
	return n, nil
}

// WriteTo takes all bytes until the end.
func (q *queue) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		b, err := q.waiting()
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
