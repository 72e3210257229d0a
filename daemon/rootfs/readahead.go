package rootfs

import (
	"context"
	"fmt"
	"hash"
	"io"
)

const (
	aheadBuffers = 3
	aheadSize    = 64 << 10
)

// ahead reads and hashes a stream in a goroutine of its own, so that
// decompressing and hashing on one side and writing files on the other use two
// processors. It is an io.Reader for one goroutine.
type ahead struct {
	full  chan []byte
	free  chan []byte
	quit  chan struct{}
	err   error // why full was closed; read after that only
	rest  []byte
	whole []byte // the buffer that rest is a part of

	failed error // of Read, if not io.EOF
}

// readAhead starts reading. Whoever calls it calls stop. The hash may be used
// once Read has returned an error, io.EOF for instance.
func readAhead(ctx context.Context, r io.Reader, h hash.Hash, limit int64) *ahead {
	a := &ahead{
		full: make(chan []byte, aheadBuffers),
		free: make(chan []byte, aheadBuffers),
		quit: make(chan struct{}),
	}
	for range aheadBuffers {
		a.free <- make([]byte, aheadSize)
	}
	go a.pump(ctx, r, h, limit)
	return a
}

func (a *ahead) pump(ctx context.Context, r io.Reader, h hash.Hash, left int64) {
	defer close(a.full)
	for {
		var b []byte
		select {
		case b = <-a.free:
		case <-a.quit:
			return
		}
		n, err := readSome(r, b[:aheadSize])
		h.Write(b[:n])
		if left -= int64(n); left < 0 {
			a.err = fmt.Errorf("%w: the archive is larger than the limit", ErrBadLayer)
			return
		}
		a.full <- b[:n] // never blocks: as many places as buffers
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			a.err = err
			return
		}
	}
}

// readSome fills b unless the stream ends: a decompressor hands out small pieces.
func readSome(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.whole != nil {
			a.free <- a.whole
			a.whole = nil
		}
		b, ok := <-a.full
		if !ok {
			if a.err != io.EOF {
				a.failed = a.err
			}
			return 0, a.err
		}
		a.rest, a.whole = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop waits until nothing reads the stream any more.
func (a *ahead) stop() {
	close(a.quit)
	for range a.full {
	}
}
