package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Log is the log of a container, as others read it: one record after the other,
// across rotations.
type Log struct {
	dir  rundir.Dir
	root *os.Root // the pod's log directory: a link in it must not lead out
	path string   // below it
	file *os.File
	r    *bufio.Reader
	rest []byte // a record without its end so far
}

// OpenLog opens the log that is current now. Close it.
func OpenLog(dir rundir.Dir) (*Log, error) {
	launch, err := dir.ReadLaunch()
	if err != nil {
		return nil, fmt.Errorf("cannot find the log: %w", err)
	}
	if launch.LogPath == "" {
		return nil, errors.New("the container has no log: its output is dropped")
	}
	l := &Log{dir: dir, path: launch.LogPath}
	if l.root, err = os.OpenRoot(launch.LogDirectory); err != nil {
		return nil, fmt.Errorf("cannot open the log directory: %w", err)
	}
	if l.file, err = l.open(); err != nil {
		l.root.Close()
		return nil, err
	}
	l.r = bufio.NewReaderSize(l.file, 64<<10)
	return l, nil
}

// Close lets go of the files.
func (l *Log) Close() {
	l.file.Close()
	l.root.Close()
}

// open opens what the path names now. Non-blocking, because a pod that can write
// to the directory may have put a FIFO there.
func (l *Log) open() (*os.File, error) {
	f, err := l.root.OpenFile(l.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the log in %s: %w", l.root.Name(), err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("cannot read the log: %s is not a regular file", filepath.Join(l.root.Name(), l.path))
	}
	return f, nil
}

// Record is one record of the CRI log format:
//
//	2016-10-06T00:17:09.669794202Z stdout F text
//
// where P instead of F says that the line goes on in the next record of the stream.
type Record struct {
	Raw     []byte // the whole of it
	Time    []byte
	Stream  string // "stdout" or "stderr"; empty for what is not of the format
	Partial bool
	Text    []byte
}

func parse(raw []byte) Record {
	fields := bytes.SplitN(bytes.TrimSuffix(raw, []byte("\n")), []byte(" "), 4)
	if len(fields) < 4 || string(fields[1]) != "stdout" && string(fields[1]) != "stderr" {
		return Record{Raw: raw}
	}
	// Tags may follow one another with colons; the first is P or F.
	tag, _, _ := bytes.Cut(fields[2], []byte(":"))
	return Record{Raw: raw, Time: fields[0], Stream: string(fields[1]), Partial: string(tag) == "P", Text: fields[3]}
}

// Read calls f with each record up to the present end of the file. f must not
// keep the record.
func (l *Log) Read(f func(Record) error) error {
	for {
		b, err := l.r.ReadSlice('\n')
		l.rest = append(l.rest, b...)
		switch {
		case err == nil:
			ferr := f(parse(l.rest))
			l.rest = l.rest[:0]
			if ferr != nil {
				return ferr
			}
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil
		default:
			return fmt.Errorf("cannot read the log: %w", err)
		}
	}
}

// Follow calls f with each record until the shim has ended. A file that another
// one took the name of is read to its end after the new one was seen, and once
// more after a pause, since the shim may be about to switch.
func (l *Log) Follow(ctx context.Context, f func(Record) error) error {
	const period = 200 * time.Millisecond // rotations are seconds apart at the least
	for rotated := false; ctx.Err() == nil; {
		alive, err := l.dir.Alive()
		if err == nil {
			err = l.Read(f)
		}
		if err != nil {
			return err
		}
		next := l.successor()
		switch {
		case next != nil && (rotated || !alive):
			if err := l.take(next, f); err != nil {
				return err
			}
			rotated = false
			continue
		case next != nil:
			next.Close()
			rotated = true
		case !alive:
			return nil
		}
		pause(ctx, period)
	}
	return ctx.Err()
}

// successor opens the file that has the log's name now, if it is another one.
// Between the renaming and the reopening there is none.
func (l *Log) successor() *os.File {
	next, err := l.open()
	if err != nil {
		return nil
	}
	old, err1 := l.file.Stat()
	now, err2 := next.Stat()
	if err1 != nil || err2 != nil || os.SameFile(old, now) {
		next.Close()
		return nil
	}
	return next
}

// take goes on with the next file. Records end with their file.
func (l *Log) take(next *os.File, f func(Record) error) (err error) {
	if len(l.rest) > 0 {
		err = f(parse(append(l.rest, '\n')))
	}
	l.file.Close()
	l.file, l.rest = next, nil
	l.r.Reset(next)
	return err
}

// Lines puts lines together that a log has in several records.
type Lines struct{ open map[string]*Line } // by stream

// Line is a line of output. Its time is that of its beginning.
type Line struct {
	Time   []byte
	Stream string
	Text   []byte
}

// Add gives the line that ends with a record, nil if it goes on. A line of more
// than four MiB is given in pieces.
func (l *Lines) Add(r Record) *Line {
	const most = 4 << 20
	if l.open == nil {
		l.open = map[string]*Line{}
	}
	line := l.open[r.Stream]
	if line == nil {
		line = &Line{Time: bytes.Clone(r.Time), Stream: r.Stream}
		l.open[r.Stream] = line
	}
	line.Text = append(line.Text, r.Text...)
	if r.Partial && len(line.Text) < most {
		return nil
	}
	return l.End(r.Stream)
}

// End gives what there is of a line whose end has not come, nil for nothing.
func (l *Lines) End(stream string) *Line {
	line := l.open[stream]
	delete(l.open, stream)
	return line
}
