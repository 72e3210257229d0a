package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/pty"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/shim/taskapi"
)

// fifoExec is an exec whose standard files are copied from and to FIFOs that its caller
// has named. The process does not get these themselves: a container could change their
// owner and mode, and a FIFO whose writer has not come yet would be at its end.
//
// It waits for whoever reads the FIFOs as long as it lives. After its end the rest of its
// output waits for them, as long as they take some of it within the default lease.
//
// It is the exec's execStdio, and what package taskapi has of the exec.
type fifoExec struct {
	exec     *exec
	terminal bool
	fifos    [3]*os.File // stdin, stdout, stderr; nil: not wanted, or a pump's
	holds    [3]*os.File // read ends of what is written; nil: see fifos
	files    files       // those that are no pump's
	in       *fifoInput  // nil: no input is wanted
	pumps    [3]*pump
	exited   chan struct{} // closed when the process has ended

	// For others only after exited.
	code int
	at   time.Time
}

// StartExec starts a command for package taskapi.
func (s *service) StartExec(o taskapi.ExecOptions) (taskapi.Exec, error) {
	p, err := processOf("spec", o.Process)
	if err != nil {
		return nil, err
	}
	if p.Terminal = o.Terminal; o.Terminal && o.Width > 0 && o.Height > 0 {
		p.ConsoleSize = &specs.Box{Width: uint(o.Width), Height: uint(o.Height)}
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	e, err := s.task.newExec(ctx)
	if err != nil {
		return nil, err
	}
	x := &fifoExec{exec: e, terminal: o.Terminal, exited: make(chan struct{})}
	e.stdio = x
	if err := x.open(o.FIFOs); err != nil {
		e.end()
		return nil, err
	}
	go e.run(p, true)
	select {
	case <-e.started:
		return x, nil
	case <-e.done:
		return nil, e.err
	}
}

// open opens the FIFOs and makes the process's files.
func (x *fifoExec) open(fifos [3]string) (err error) {
	if x.terminal {
		fifos[2] = ""
	}
	for i, field := range []string{"stdin", "stdout", "stderr"} {
		if fifos[i] == "" {
			continue
		}
		f, err := openFIFO(fifos[i], field)
		if err != nil {
			return err
		}
		if i == 0 {
			x.fifos[i] = f
			continue
		}
		x.holds[i] = f
		if x.fifos[i], err = reopen(f, unix.O_WRONLY); err != nil { // which fails without a reader
			return fmt.Errorf("cannot write to %s %.200q: %w", field, fifos[i], err)
		}
	}
	if x.fifos[0] != nil {
		if x.in, err = newFIFOInput(x.fifos[0]); err != nil {
			return err
		}
	}
	if x.terminal {
		return nil
	}
	x.files, err = openFiles([3]bool{x.fifos[0] != nil, x.fifos[1] != nil, x.fifos[2] != nil})
	return err
}

// openFIFO opens a FIFO that the caller named, and nothing else, for reading.
func openFIFO(path, field string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, kind.Errorf(kind.Invalid, "%s %.200q is not the absolute path of a FIFO", field, path)
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "cannot open %s %.200q: %w", field, path, err)
	}
	place := os.NewFile(uintptr(fd), path)
	defer place.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, kind.Errorf(kind.Invalid, "%s %.200q is not a FIFO", field, path)
	}
	return reopen(place, unix.O_RDONLY)
}

// reopen opens the file behind a descriptor once more.
func reopen(f *os.File, flags int) (*os.File, error) {
	var fd int
	err := descriptor.Lend(f, func(old int) (err error) {
		fd, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", old), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func (x *fifoExec) child() runc.IO { return x.files.child() }

// begin starts to copy. A terminal is read even if nobody wants its output, as its
// process would wait otherwise.
func (x *fifoExec) begin(master *os.File) {
	x.files.passed(master)
	if x.terminal && master != nil {
		for i, wanted := range []bool{x.in != nil, true} {
			if !wanted {
				continue
			}
			var err error
			if x.files.ours[i], err = descriptor.Dup(master); err != nil {
				x.exec.task.log.Error("exec without its terminal", "exec", x.exec.id, "error", err)
			}
		}
	}
	for i, ours := range x.files.ours {
		switch {
		case ours == nil:
			continue
		case i == 0:
			p := &pump{r: x.fifos[i], w: ours}
			x.pumps[i] = p.start(x.in)
		default:
			p := &pump{r: ours, w: x.fifos[i], hold: x.holds[i]}
			x.pumps[i] = p.start(pty.NewReader(ours, p.hurried))
		}
		x.files.ours[i], x.fifos[i], x.holds[i] = nil, nil, nil
	}
}

// drain leaves the rest of the output to whoever reads it.
func (x *fifoExec) drain(e *exec) {
	for _, p := range x.pumps[1:] {
		p.hurry(defaultLease) // before Close can ask for less
	}
	x.code, x.at = e.status.Code, time.Now()
	close(x.exited)
	x.pumps[0].stop()
	for _, p := range x.pumps[1:] {
		if p == nil {
			continue
		}
		select {
		case <-p.done:
		case <-e.c.life.Done():
			p.stop()
		}
	}
}

func (x *fifoExec) close() {
	closeAll(x.fifos[:]...)
	closeAll(x.holds[:]...)
	x.files.close()
}

func (x *fifoExec) Pid() int { return x.exec.process.PID }

// Exited is closed when the process has ended.
func (x *fifoExec) Exited() <-chan struct{} { return x.exited }

// Exit is for after Exited.
func (x *fifoExec) Exit() (code int, at time.Time) { return x.code, x.at }

// Kill sends a signal, to a process that has ended without doing anything.
func (x *fifoExec) Kill(signal uint32, all bool) error {
	sig, err := signalOf(signal)
	if err != nil {
		return err
	}
	select {
	case <-x.exited:
		return nil
	default:
	}
	p := x.exec.process
	switch {
	case all && sig == unix.SIGKILL:
		ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
		defer cancel()
		return p.KillTree(ctx)
	case all:
		return p.SignalTree(sig)
	}
	return p.Signal(sig)
}

// Resize sets the size of the terminal.
func (x *fifoExec) Resize(width, height uint16) error {
	if x.files.master == nil {
		return kind.Errorf(kind.State, "the exec has no terminal")
	}
	return pty.Resize(x.files.master, width, height)
}

// CloseStdin ends the input after what is in its FIFO now.
func (x *fifoExec) CloseStdin() {
	if x.in != nil {
		x.in.finish()
	}
}

// Close returns when the rest of the output is in the FIFOs, or their readers take no
// more of it. Its caller has no use for what a background child may still write.
func (x *fifoExec) Close() {
	for _, p := range x.pumps[1:] {
		p.leave(execDrain)
	}
	if !wait(x.exec.done, time.After(drainTotal)) {
		for _, p := range x.pumps[1:] {
			p.stop()
		}
		<-x.exec.done
	}
}
