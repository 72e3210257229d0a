package image

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicSkip = []byte{0x2a, 0x4d, 0x18} // after 0x50 to 0x5f: a frame of zstd to skip
)

// maxWindow bounds the memory that a zstd stream may ask for.
const maxWindow = 128 << 20

// source notes whether reading failed, as opposed to what was read.
type source struct {
	r      io.Reader
	failed bool
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.failed = true
	}
	return n, err
}

// decompressor gives errors of the format their kind.
type decompressor struct {
	io.ReadCloser
	source *source
}

func (d decompressor) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !d.source.failed {
		err = fmt.Errorf("%w: cannot decompress it: %w", ErrCorrupt, err)
	}
	return n, err
}

// decompress decides by the content, as media types are known to be wrong.
func decompress(r io.Reader) (io.ReadCloser, error) {
	src := &source{r: r}
	br := bufio.NewReaderSize(src, 32<<10)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	skippable := len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.HasPrefix(magic[1:], magicSkip)
	switch {
	case bytes.HasPrefix(magic, magicGzip):
		z, err := gzip.NewReader(br)
		if err != nil && !src.failed {
			err = fmt.Errorf("%w: cannot decompress it: %w", ErrCorrupt, err)
		}
		if err != nil {
			return nil, err
		}
		return decompressor{z, src}, nil
	case bytes.HasPrefix(magic, magicZstd), skippable:
		z := idleZstd.Get().(zstdReader)
		if err := z.Reset(br); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		return decompressor{z, src}, nil
	}
	return io.NopCloser(br), nil
}

// idleZstd are decoders between two layers. Each has a window of megabytes;
// made anew for every layer, most of them would be garbage at any time.
var idleZstd = sync.Pool{New: func() any {
	// It works in the goroutine that reads, so it needs no end.
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err) // the options are wrong
	}
	return zstdReader{z}
}}

type zstdReader struct{ *zstd.Decoder }

func (z zstdReader) Close() error {
	err := z.Reset(nil) // lets go of what it read from
	idleZstd.Put(z)
	return err
}
