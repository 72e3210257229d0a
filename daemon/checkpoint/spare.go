package checkpoint

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	// lookEvery is after how many bytes the file system is asked for its room again.
	lookEvery = 16 << 20
	// leastRoom is what is left of a file system for others, in bytes; of a small one it is a
	// sixteenth.
	leastRoom = 1 << 30
	// hole is how many bytes that are zero become a hole.
	hole = 64 << 10
)

var zeros [hole]byte

// Spare writes a file from its beginning. Zeros become holes, and Finish comes last. It
// fails, with kind.Exhausted, before its file system is full: the node lives on
// that. It has one user.
type Spare struct {
	File *os.File

	at   int64 // where the next byte goes
	till int64 // bytes that may be written before the next look
}

// Write is that of io.Writer.
func (s *Spare) Write(b []byte) (done int, err error) {
	for len(b) > 0 {
		p := b[:min(len(b), hole)]
		if !bytes.Equal(p, zeros[:len(p)]) {
			if err := s.look(int64(len(p))); err != nil {
				return done, err
			}
			if _, err := s.File.WriteAt(p, s.at); err != nil {
				return done, err
			}
		}
		s.at, done, b = s.at+int64(len(p)), done+len(p), b[len(p):]
	}
	return done, nil
}

// Finish gives the file its size.
func (s *Spare) Finish() error { return s.File.Truncate(s.at) }

func (s *Spare) look(n int64) error {
	if s.till -= n; s.till >= 0 {
		return nil
	}
	if err := Room(s.File, lookEvery); err != nil {
		return err
	}
	s.till = lookEvery - n
	return nil
}

// Room says why the file system of a file has not so many bytes to spare; nil if it has.
func Room(f *os.File, need int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot ask how much room there is for %s: %w", f.Name(), err))
	}
	free, all := int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
	if keep := min(leastRoom, all/16); free-keep < need {
		return kind.Errorf(kind.Exhausted, "no room for %s: %d bytes are needed, and of the %d that are free %d are "+
			"kept for others", f.Name(), need, free, keep)
	}
	return nil
}
