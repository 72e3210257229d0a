// Package tail bounds the log of a process that lives for long. The log is the file that
// the process was started with as its stderr, so that the words of a crash are in it too.
package tail

import (
	"fmt"
	"io"
	"os"
	"sync"
)

// Max is how large a log may grow, in bytes. Then it is cut down to its last half.
const Max = 1 << 20

// Writer writes to a file that was opened for appending. Where that is no regular file,
// it has no bound. It may be used by several goroutines.
type Writer struct {
	f *os.File

	mu   sync.Mutex
	size int64 // of the file, as far as it is known
}

// New makes a writer; the file stays the caller's.
func New(f *os.File) *Writer {
	w := &Writer{f: f}
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		w.size = st.Size()
	}
	return w
}

// Write appends, and cuts the file first where it has become too large.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size += int64(len(p)); w.size > Max {
		w.size = int64(len(p))
		if st, err := w.f.Stat(); err == nil && st.Mode().IsRegular() {
			w.size += w.cutLocked(st.Size())
		}
	}
	return w.f.Write(p)
}

// cutLocked leaves the last part of the file, from the beginning of a line on, and gives
// its size. What cannot be read is lost: the bound comes first.
func (w *Writer) cutLocked(size int64) int64 {
	var last []byte
	if r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", w.f.Fd())); err == nil {
		last, _ = io.ReadAll(io.NewSectionReader(r, max(0, size-Max/2), Max/2))
		r.Close()
	}
	for i, b := range last {
		if b == '\n' {
			last = last[i+1:]
			break
		}
	}
	if w.f.Truncate(0) != nil {
		return size
	}
	n, _ := w.f.Write(last)
	return int64(n)
}
