// Package journal keeps what has happened to pods and containers, also those that are gone,
// for as long as there is room: the oldest goes first.
//
// It is two files of lines of JSON in a directory of its own: now, and before, which now
// becomes when it is full. Nothing is synced: a killed process loses what it has not come to
// write, which is milliseconds old, and a power cut some more.
package journal

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// DirName is what the directory is called below ROOT.
const DirName = "journal"

const (
	nowName    = "now"
	beforeName = "before"

	maxFile    = 2 << 20 // bytes of each of the two files
	maxText    = 1 << 10 // bytes of one text
	maxWaiting = 4096    // entries that wait to be written
)

// Journal is written by one process at a time. Close ends it.
type Journal struct {
	dir     string
	log     *slog.Logger
	waiting chan records.Entry
	quit    chan struct{} // closed by Close
	dropped atomic.Uint64
	done    sync.WaitGroup

	file *os.File // nil: it could not be opened; only of the goroutine that writes
	size int64
}

// Open opens the journal in a directory, which is made when it is needed. One that cannot be written is no reason
// not to go on: the log says so.
func Open(dir string, log *slog.Logger) *Journal {
	j := &Journal{dir: dir, log: log, waiting: make(chan records.Entry, maxWaiting), quit: make(chan struct{})}
	j.done.Go(j.write)
	return j
}

// Add writes an entry soon. It never waits for the disk; what the disk does not take in
// time is left out.
func (j *Journal) Add(e records.Entry) {
	for _, text := range []*string{&e.Name, &e.Text} {
		if len(*text) > maxText {
			*text = strings.ToValidUTF8((*text)[:maxText], "")
		}
	}
	select {
	case j.waiting <- e:
	default:
		j.dropped.Add(1)
	}
}

// Close writes what waits. What is added later is lost.
func (j *Journal) Close() {
	close(j.quit)
	j.done.Wait()
}

// next gives the next entry that waits; not ok: there is none, and none comes.
func (j *Journal) next() (e records.Entry, ok bool) {
	select {
	case e = <-j.waiting:
		return e, true
	case <-j.quit:
	}
	select {
	case e = <-j.waiting:
		return e, true
	default:
		return e, false
	}
}

func (j *Journal) write() {
	failed := false
	for e, ok := j.next(); ok; e, ok = j.next() {
		err := j.writeOne(e)
		if err != nil && !failed {
			j.log.Warn("cannot write the journal; some of what happens will not be told later", "error", err)
		}
		failed = err != nil
	}
	if j.file != nil {
		j.file.Close()
	}
	if n := j.dropped.Load(); n > 0 {
		j.log.Warn("the journal lacks some of what happened", "entries", n)
	}
}

func (j *Journal) writeOne(e records.Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if j.file == nil {
		if err := j.open(); err != nil {
			return err
		}
	}
	if j.size > 0 && j.size+int64(len(line)) > maxFile {
		if err := os.Rename(filepath.Join(j.dir, nowName), filepath.Join(j.dir, beforeName)); err != nil {
			return err
		}
		j.file.Close()
		if err := j.open(); err != nil {
			return err
		}
	}
	n, err := j.file.Write(append(line, '\n'))
	j.size += int64(n)
	if err != nil { // a part of the line may be there: the next one begins another
		j.file.Close()
		j.file = nil
	}
	return err
}

func (j *Journal) open() error {
	j.file = nil
	if err := os.Mkdir(j.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, size, err := openFile(filepath.Join(j.dir, nowName), os.O_RDWR|os.O_APPEND|os.O_CREATE)
	if err != nil {
		return err
	}
	if err := endLine(f, size); err != nil {
		f.Close()
		return err
	}
	j.file, j.size = f, size
	return nil
}

// endLine ends a line that a full disk or a power cut has cut short.
func endLine(f *os.File, size int64) error {
	var last [1]byte
	if size == 0 {
		return nil
	}
	if _, err := f.ReadAt(last[:], size-1); err != nil || last[0] == '\n' {
		return err
	}
	_, err := f.WriteString("\n")
	return err
}

// Read gives the entries of a journal, the oldest first, also where there is an error. A line that does not read, as a
// full disk leaves it, is left out. Of a file that is larger than a journal makes it only the end is read.
func Read(dir string) (all []records.Entry, err error) {
	for _, name := range []string{beforeName, nowName} {
		entries, ferr := readFile(filepath.Join(dir, name))
		all = append(all, entries...)
		if ferr != nil && !errors.Is(ferr, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("cannot read the journal: %w", ferr))
		}
	}
	return all, err
}

func readFile(path string) (all []records.Entry, err error) {
	f, size, err := openFile(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	from := max(0, size-maxFile)
	lines := bufio.NewScanner(io.NewSectionReader(f, from, size-from))
	lines.Buffer(nil, maxFile+1)
	for lines.Scan() {
		var e records.Entry
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.ID != "" {
			all = append(all, e)
		}
	}
	return all, lines.Err()
}

// openFile opens what has to be a file, without waiting for anybody, and gives its size in bytes.
func openFile(path string, flags int) (*os.File, int64, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file: %s", path, st.Mode())
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}
