package stdio

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// input is where the input of clients goes: the write end of a pipe, or the master
// of a terminal.
type input struct {
	turn chan struct{} // full while a client writes: pieces of several are not mixed

	mu       sync.Mutex
	file     *os.File // nil: there is none, or it was closed
	terminal bool
	once     bool    // closed when the first client with input has left
	closed   func()  // called then
	ending   bool    // nothing is written any more
	writer   *Client // that has its turn
}

// SetInput gives the Hub, which owns it from now on, the file where the clients'
// input goes. It must be non-blocking. With once it is closed when the first client
// with input has left, or has come to the end of its input, and closed is called
// then. A terminal cannot be closed without ending the container. Its program gets an
// end of file character instead, as somebody at the keyboard would type it.
func (h *Hub) SetInput(file *os.File, terminal, once bool, closed func()) {
	in := &h.input
	in.mu.Lock()
	defer in.mu.Unlock()
	in.file, in.terminal, in.once, in.closed = file, terminal, once, closed
}

// TakesInput says whether input of clients goes anywhere.
func (h *Hub) TakesInput() bool {
	h.input.mu.Lock()
	defer h.input.mu.Unlock()
	return h.input.file != nil && !h.input.ending
}

// write writes for a client. false: the container takes no input, or not from this
// client any more.
func (in *input) write(c *Client, b []byte) bool {
	select {
	case in.turn <- struct{}{}:
	case <-c.left:
		return false
	}
	defer func() { <-in.turn }()
	in.mu.Lock()
	file := in.file
	select {
	case <-c.left: // interrupt has been here, or will see the writer
		file = nil
	default:
	}
	if file == nil || in.ending {
		in.mu.Unlock()
		return false
	}
	in.writer = c
	file.SetWriteDeadline(time.Time{})
	in.mu.Unlock()
	_, err := file.Write(b)
	in.mu.Lock()
	in.writer = nil
	in.mu.Unlock()
	return err == nil
}

// interrupt ends a write that is under way for the client.
func (in *input) interrupt(c *Client) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.writer == c && in.file != nil {
		in.file.SetWriteDeadline(time.Unix(1, 0))
	}
}

// clientLeft is called when a client with input gives no more.
func (in *input) clientLeft() {
	in.mu.Lock()
	if !in.once || in.file == nil || in.ending {
		in.mu.Unlock()
		return
	}
	in.ending = true
	if in.writer != nil {
		in.file.SetWriteDeadline(time.Unix(1, 0))
	}
	in.mu.Unlock()
	in.turn <- struct{}{}
	in.mu.Lock()
	file := in.file
	in.file = nil
	in.mu.Unlock()
	<-in.turn
	if file == nil { // the Hub was closed meanwhile
		return
	}
	if in.terminal {
		endOfFile(file)
	}
	file.Close()
	in.closed()
}

// dup gives a second descriptor of the file; nil if there is none, or no input is
// taken any more.
func (in *input) dup() (*os.File, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.file == nil || in.ending {
		return nil, nil
	}
	return descriptor.Dup(in.file)
}

// close closes the input without telling anybody.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.file != nil {
		in.file.Close()
		in.file = nil
	}
}

// endOfFile types the terminal's character for the end of the input, if it is in a
// mode that knows one. Twice: the first ends a line that has been begun.
func endOfFile(master *os.File) {
	var mode *unix.Termios
	err := descriptor.Lend(master, func(fd int) (err error) {
		mode, err = unix.IoctlGetTermios(fd, unix.TCGETS)
		return err
	})
	if err == nil && mode.Lflag&unix.ICANON != 0 {
		eof := mode.Cc[unix.VEOF]
		master.SetWriteDeadline(time.Now().Add(time.Second)) // a full terminal takes no more
		master.Write([]byte{eof, eof})
	}
}
