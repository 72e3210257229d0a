package rootfs

import (
	"bufio"
	"context"
	"fmt"
	"hash"
	"io"
)

const aheadSize = 64 << 10

// ahead reads and hashes a stream in a goroutine of its own, so that
// decompressing and hashing on one side and writing files on the other use two
// processors. It is an io.Reader for one goroutine.
type ahead struct {
	pipe   *io.PipeReader
	buffer *bufio.Reader
	done   chan struct{} // closed when nothing reads the stream any more
	failed error         // of Read, if not io.EOF
}

// readAhead starts reading. Whoever calls it calls stop. The hash may be used
// once Read has returned an error, io.EOF for instance.
func readAhead(ctx context.Context, r io.Reader, h hash.Hash, limit int64) *ahead {
	pipe, w := io.Pipe()
	a := &ahead{pipe: pipe, buffer: bufio.NewReaderSize(pipe, aheadSize), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		w.CloseWithError(pump(ctx, w, r, h, limit))
	}()
	return a
}

// pump passes on a stream in large pieces: a decompressor hands out small ones.
func pump(ctx context.Context, w io.Writer, r io.Reader, h hash.Hash, left int64) error {
	b := make([]byte, aheadSize)
	for {
		n, err := fill(r, b)
		h.Write(b[:n])
		if left -= int64(n); left < 0 {
			return fmt.Errorf("%w: the archive is larger than the limit", ErrBadLayer)
		}
		if n > 0 {
			if _, werr := w.Write(b[:n]); werr != nil {
				return werr
			}
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

// fill is io.ReadFull that leaves the error as it is: io.ErrUnexpectedEOF is what
// a decompressor says of half a stream.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func (a *ahead) Read(p []byte) (int, error) {
	n, err := a.buffer.Read(p)
	if err != nil && err != io.EOF {
		a.failed = err
	}
	return n, err
}

// stop waits until nothing reads the stream any more.
func (a *ahead) stop() {
	a.pipe.Close()
	<-a.done
}
