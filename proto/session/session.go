// Package session is what a shim and the client of a session send each other, over a
// socket that Exec or Open of the shim has named.
//
// The socket takes one client and keeps messages apart (SOCK_SEQPACKET). The shim
// sends Files first, with the descriptors, and Exit last. Bytes of the standard files
// never pass the socket.
package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// Message is one message. A receiver ignores what it does not know.
type Message struct {
	// Of the shim.
	Files *Files `json:"files,omitempty"`
	Exit  *Exit  `json:"exit,omitempty"`

	// Of the client.
	Resize     *Size `json:"resize,omitempty"`
	CloseStdin bool  `json:"closeStdin,omitempty"` // the shim closes its own descriptor of it
	// Hangup ends the exec with all that it started, and Detach leaves it for good.
	// A client that goes without a word leaves it, or its exit, for the time of its
	// lease. Clients of the container itself just go.
	Hangup bool `json:"hangup,omitempty"`
	Detach bool `json:"detach,omitempty"`
}

// Files says which descriptors come with the message, in this order: of a terminal
// its master, alone; otherwise the write end of stdin and the read ends of stdout and
// stderr, as far as they are wanted.
type Files struct {
	Terminal bool `json:"terminal,omitempty"`
	Stdin    bool `json:"stdin,omitempty"`
	Stdout   bool `json:"stdout,omitempty"`
	Stderr   bool `json:"stderr,omitempty"`
}

// Size is that of a terminal, in characters.
type Size struct {
	Width  uint16 `json:"width"`
	Height uint16 `json:"height"`
}

// Exit is the end of an exec, or of the output of a container.
type Exit struct {
	Code   int    `json:"code"` // 128 + signal for a death by signal
	Reason Reason `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"` // in words, with any Reason
}

// Reason says why the end is not the process's own.
type Reason string

// The reasons.
const (
	TimedOut Reason = "timeout" // its time was up
	HungUp   Reason = "hangup"  // its client has gone
	Killed   Reason = "killed"  // with the container, or because the shim could not wait for it
	TooSlow  Reason = "slow"    // the client was cut off; the container goes on
)

const (
	maxMessage = 8 << 10 // bytes
	maxFiles   = 3
	// sendTimeout is for a peer that does not take messages: a socket's buffer has
	// room for all that a session needs.
	sendTimeout = 5 * time.Second
	maxError    = 2000 // characters, fewer of those that are long in JSON
)

// Send sends a message with the descriptors of files, which stay the caller's.
func Send(c *net.UnixConn, m Message, files ...*os.File) error {
	b, err := encode(m)
	if err != nil {
		return fmt.Errorf("cannot encode a message of a session: %w", err)
	}
	c.SetWriteDeadline(time.Now().Add(sendTimeout))
	err = withFDs(files, nil, func(fds []int) error {
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		_, _, err := c.WriteMsgUnix(b, rights, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot send a message of a session: %w", err)
	}
	return nil
}

// encode gives a message as it is sent. Of the text of an error it has as much as fits.
func encode(m Message) ([]byte, error) {
	if m.Exit == nil {
		return json.Marshal(m)
	}
	exit := *m.Exit
	m.Exit = &exit
	for length := maxError; ; length /= 2 {
		exit.Error = fmt.Sprintf("%.*s", length, exit.Error)
		if b, err := json.Marshal(m); err != nil || len(b) <= maxMessage || length == 0 {
			return b, err
		}
	}
}

// withFDs calls f with the descriptors of files, which it keeps open meanwhile.
func withFDs(files []*os.File, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	return descriptor.Lend(files[0], func(fd int) error { return withFDs(files[1:], append(fds, fd), f) })
}

// Receive waits for the next message; io.EOF: the peer has closed the connection.
// What comes with it is the caller's to close.
func Receive(c *net.UnixConn) (m Message, files []*os.File, err error) {
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if errors.Is(err, unix.ECONNRESET) {
		// The peer has closed the connection and left a message of ours unread. Its own
		// last messages come behind this error.
		n, oobn, flags, _, err = c.ReadMsgUnix(b, oob)
	}
	if files, err = filesOf(oob[:oobn], err); err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("it is too large")
	}
	if err == nil {
		err = json.Unmarshal(b[:n], &m)
	}
	if err == nil || errors.Is(err, io.EOF) {
		return m, files, err
	}
	for _, f := range files {
		f.Close()
	}
	return m, nil, fmt.Errorf("cannot receive a message of a session: %w", err)
}

func filesOf(oob []byte, err error) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, err
	}
	all, perr := unix.ParseSocketControlMessage(oob)
	err = errors.Join(err, perr)
	var files []*os.File
	for i := range all {
		fds, perr := unix.ParseUnixRights(&all[i])
		err = errors.Join(err, perr)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "session"))
		}
	}
	return files, err
}
