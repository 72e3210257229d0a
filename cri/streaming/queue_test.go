package streaming

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// fill gives a queue these bytes in pieces, the first ones before somebody takes them.
func fill(q *queue, all []byte) <-chan error {
	done, begun := make(chan error, 1), make(chan struct{})
	go func() {
		for n, first := 0, true; len(all) > 0; all, first = all[n:], false {
			n = min(len(all), 1+rand.IntN(48<<10))
			if _, err := q.ReadFrom(bytes.NewReader(all[:n])); err != nil {
				done <- err
			}
			if first {
				close(begun)
			}
		}
		q.end(io.EOF)
		done <- nil
	}()
	<-begun
	return done
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// to is a writer for a queue.
type to struct {
	io.Writer
	direct bool
}

func (t to) Direct() bool { return t.direct }

// Every byte arrives once and in order, whoever writes it.
func TestQueue(t *testing.T) {
	all := randomBytes(4 << 20)
	for _, direct := range []bool{false, true} {
		for range 4 {
			q := newQueue(stdinQueue)
			done := fill(q, all)
			var first [100]byte
			io.ReadFull(q, first[:])
			got := bytes.NewBuffer(bytes.Clone(first[:]))
			n, err := q.WriteTo(to{got, direct})
			if err != nil || int(n) != len(all)-len(first) || !bytes.Equal(got.Bytes(), all) {
				t.Errorf("direct %v: %d bytes arrived, %d are counted: %v", direct, got.Len(), n, err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
}

// A writer that fails has its error, and the rest can be thrown away.
func TestQueueOfFailingWriter(t *testing.T) {
	for _, direct := range []bool{false, true} {
		q := newQueue(stdinQueue)
		done := fill(q, randomBytes(4<<20))
		broken := errors.New("broken")
		taken := 0
		_, err := q.WriteTo(to{writerFunc(func(p []byte) (int, error) {
			if taken += len(p); taken > 1<<20 {
				return 0, broken
			}
			return len(p), nil
		}), direct})
		if !errors.Is(err, broken) {
			t.Errorf("direct %v: the writer has failed: %v", direct, err)
		}
		if n, err := io.Copy(io.Discard, q); err != nil || n == 0 || int(n) > 3<<20 {
			t.Errorf("direct %v: %d bytes were left, %v", direct, n, err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// One whose writer blocks can be abandoned; what comes is thrown away.
func TestAbandonedQueue(t *testing.T) {
	q := newQueue(stdinQueue)
	done := fill(q, randomBytes(4<<20))
	blocked, release := make(chan struct{}), make(chan struct{})
	result := make(chan error, 1)
	go func() {
		once := true
		_, err := q.WriteTo(to{writerFunc(func(p []byte) (int, error) {
			if once {
				once = false
				return len(p), nil
			}
			close(blocked)
			<-release
			return 0, io.ErrClosedPipe
		}), true})
		result <- err
	}()
	<-blocked
	q.abandon()
	close(release)
	if err := <-result; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("it ends with %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
