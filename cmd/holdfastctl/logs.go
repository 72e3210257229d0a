package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// logFlags are what `logs` prints of a log, and how.
type logFlags struct {
	follow     bool
	timestamps bool
	raw        bool
	stream     string
}

func setupLogs(a *app, fs *flag.FlagSet) runFunc {
	var f logFlags
	fs.BoolVar(&f.follow, "f", false, "go on until the container has ended")
	fs.BoolVar(&f.timestamps, "t", false, "begin each line with its time")
	fs.BoolVar(&f.raw, "raw", false, "print the records as they are in the file")
	fs.StringVar(&f.stream, "stream", "", "print `STREAM` only, stdout or stderr")
	return func(ctx context.Context, args []string) error {
		if f.stream != "" && f.stream != "stdout" && f.stream != "stderr" {
			return usagef("logs: --stream is stdout or stderr")
		}
		if f.raw && (a.json || f.timestamps) {
			return usagef("logs: --raw goes with neither --json nor -t")
		}
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		file, err := openLog(dir)
		if err != nil {
			return err
		}
		defer file.Close()
		p := &logPrinter{app: a, flags: f}
		if err := file.copy(p); err != nil {
			return err
		}
		if f.follow {
			if err := file.follow(ctx, p); err != nil {
				return err
			}
		}
		return p.flush()
	}
}

// logFile is the log of a container, across rotations.
type logFile struct {
	dir  rundir.Dir
	root *os.Root // the pod's log directory: a link in it must not lead out
	path string   // below it
	file *os.File
	r    *bufio.Reader
	rest []byte // a record without its end so far
}

// errNoLog says that a container was created without one.
var errNoLog = errors.New("the container has no log: its output is dropped")

func openLog(dir rundir.Dir) (*logFile, error) {
	launch, err := dir.ReadLaunch()
	if err != nil {
		return nil, fmt.Errorf("cannot find the log: %w", err)
	}
	if launch.LogPath == "" {
		return nil, fmt.Errorf("container %s: %w", short(dir.ID()), errNoLog)
	}
	root, err := os.OpenRoot(launch.LogDirectory)
	if err != nil {
		return nil, fmt.Errorf("cannot open the log directory: %w", err)
	}
	l := &logFile{dir: dir, root: root, path: launch.LogPath}
	if l.file, err = l.open(); err != nil {
		root.Close()
		return nil, err
	}
	l.r = bufio.NewReaderSize(l.file, 64<<10)
	return l, nil
}

func (l *logFile) Close() {
	l.file.Close()
	l.root.Close()
}

// open opens what the path names now. Non-blocking, because a pod that can write
// to the directory may have put a FIFO there.
func (l *logFile) open() (*os.File, error) {
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

// copy prints the records up to the present end of the file.
func (l *logFile) copy(p *logPrinter) error {
	for {
		b, err := l.r.ReadSlice('\n')
		l.rest = append(l.rest, b...)
		switch {
		case err == nil:
			perr := p.print(l.rest)
			l.rest = l.rest[:0]
			if perr != nil {
				return perr
			}
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil
		default:
			return fmt.Errorf("cannot read the log: %w", err)
		}
	}
}

// followPeriod is how often a followed log is looked at. Rotations are seconds
// apart at the least.
const followPeriod = 200 * time.Millisecond

// follow prints what is written until the shim has ended. A file that another one
// took the name of is read to its end after the new one was seen, and once more
// after a pause, since the shim may be about to switch.
func (l *logFile) follow(ctx context.Context, p *logPrinter) error {
	rotated := false
	for {
		held, err := l.dir.Held()
		if err != nil {
			return err
		}
		if err := l.copy(p); err != nil {
			return err
		}
		next := l.successor()
		switch {
		case next != nil && (rotated || !held):
			if err := l.switchTo(next, p); err != nil {
				return err
			}
			rotated = false
			continue
		case next != nil:
			next.Close()
			rotated = true
		case !held:
			return nil
		}
		if !pause(ctx, followPeriod) {
			return ctx.Err()
		}
	}
}

// successor opens the file that has the log's name now, if it is another one.
// Between the renaming and the reopening there is none.
func (l *logFile) successor() *os.File {
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

// switchTo takes over the next file. Records end with their file.
func (l *logFile) switchTo(next *os.File, p *logPrinter) error {
	var err error
	if len(l.rest) > 0 {
		err = p.print(append(l.rest, '\n'))
	}
	l.file.Close()
	l.file, l.rest = next, nil
	l.r.Reset(next)
	return err
}

// logPrinter prints records of the CRI log format:
//
//	2016-10-06T00:17:09.669794202Z stdout F text
//
// where P instead of F says that the line goes on in the next record of the stream.
type logPrinter struct {
	app     *app
	flags   logFlags
	streams [2]partial
}

// partial is the beginning of a line of one stream.
type partial struct {
	time []byte
	text []byte
	open bool
}

// maxLine bounds what is kept of a line; a longer one is printed in pieces.
const maxLine = 4 << 20

func (p *logPrinter) print(record []byte) error {
	fields := bytes.SplitN(bytes.TrimSuffix(record, []byte("\n")), []byte(" "), 4)
	if len(fields) < 4 {
		return p.unreadable(record)
	}
	at, stream, tag, text := fields[0], string(fields[1]), fields[2], fields[3]
	if p.flags.stream != "" && stream != p.flags.stream {
		return nil
	}
	if p.flags.raw {
		_, err := p.app.stdout.Write(record)
		return err
	}
	i := 0
	switch stream {
	case "stdout":
	case "stderr":
		i = 1
	default:
		return p.unreadable(record)
	}
	line := &p.streams[i]
	if !line.open {
		line.open, line.time = true, bytes.Clone(at)
	}
	line.text = append(line.text, text...)
	// Tags may follow one another with colons; the first is P or F.
	first, _, _ := bytes.Cut(tag, []byte(":"))
	if string(first) == "P" && len(line.text) < maxLine {
		return nil
	}
	return p.end(i)
}

// unreadable prints a record that is not of the format as it is: somebody else
// wrote it, and whoever reads logs wants to know.
func (p *logPrinter) unreadable(record []byte) error {
	if p.app.json {
		return json.NewEncoder(p.app.stdout).Encode(map[string]string{"unreadable": string(record)})
	}
	_, err := p.app.stdout.Write(record)
	return err
}

// end prints the line of a stream.
func (p *logPrinter) end(i int) error {
	line := &p.streams[i]
	defer func() { *line = partial{text: line.text[:0]} }()
	if p.app.json {
		return json.NewEncoder(p.app.stdout).Encode(struct {
			Time   string `json:"time"`
			Stream string `json:"stream"`
			Log    string `json:"log"`
		}{string(line.time), streamNames[i], string(line.text)})
	}
	var out []byte
	if p.flags.timestamps {
		out = append(append(out, line.time...), ' ')
	}
	out = append(append(out, line.text...), '\n')
	to := p.app.stdout
	if i == 1 {
		to = p.app.stderr
	}
	_, err := to.Write(out)
	return err
}

var streamNames = [2]string{"stdout", "stderr"}

// flush prints lines whose end has not come.
func (p *logPrinter) flush() error {
	var errs []error
	for i := range p.streams {
		if p.streams[i].open {
			errs = append(errs, p.end(i))
		}
	}
	return errors.Join(errs...)
}
