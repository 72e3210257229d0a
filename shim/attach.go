package shim

import (
	"errors"
	"net"
	"os"
	"sync"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/session"
	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/shim/stdio"
)

// attach gives a socket for a client of the container's own standard files.
func (t *task) attach(req *pb.OpenRequest) (socket string, err error) {
	c, err := t.alive()
	if err == nil && c == nil {
		err = kind.Errorf(kind.State, "cannot attach: the container is %s", rundir.PhaseExited)
	}
	if err != nil {
		return "", err
	}
	if req.Stdin && !c.stdio.TakesInput() {
		return "", kind.Errorf(kind.State, "cannot attach stdin: the container takes no input, or no more")
	}
	wanted := [3]bool{req.Stdin, req.Stdout, req.Stderr && !c.traits.Terminal}
	if wanted == [3]bool{} {
		return "", kind.Errorf(kind.Invalid, "none of stdin, stdout and stderr is wanted")
	}
	if n := t.attached.Add(1); n > maxAttached {
		t.attached.Add(-1)
		return "", kind.Errorf(kind.Exhausted, "the container has %d clients already", maxAttached)
	}
	socket, err = t.admit(c.life, admitTimeout, func(conn *net.UnixConn) {
		defer t.attached.Add(-1)
		if conn == nil {
			return
		}
		defer conn.Close()
		if err := t.serveAttached(c, conn, wanted); err != nil {
			t.log.Warn("client not attached", "error", err)
		}
	})
	if err != nil {
		t.attached.Add(-1)
	}
	return socket, err
}

// attached is a client of the hub: its ends of the pipes whose other ends the client of
// the session has.
type attached struct {
	stdin *os.File
	out   [2]*os.File // by logfile.Stream
	once  sync.Once
}

func (a *attached) WriteOutput(s logfile.Stream, b []byte) error {
	if f := a.out[s]; f != nil {
		_, err := f.Write(b)
		return err
	}
	return nil
}

func (a *attached) Read(b []byte) (int, error) { return a.stdin.Read(b) }

func (a *attached) Close() error {
	a.once.Do(func() { closeAll(a.stdin, a.out[logfile.Stdout], a.out[logfile.Stderr]) })
	return nil
}

// serveAttached makes whoever has connected a client of the container's standard files,
// and returns when it has gone, or the output has ended and the client knows.
func (t *task) serveAttached(c *container, conn *net.UnixConn, wanted [3]bool) error {
	f, err := openFiles(wanted)
	if err != nil {
		return err
	}
	m, list := f.message()
	m.Files.Terminal = c.traits.Terminal
	err = session.Send(conn, m, list...)
	closeAll(f.ours[:]...)
	if err != nil {
		f.close()
		return err
	}
	a := &attached{stdin: f.theirs[0]}
	a.out[logfile.Stdout], a.out[logfile.Stderr] = f.theirs[1], f.theirs[2]
	client := c.stdio.Attach(a, stdio.Options{
		Output: wanted[1] || wanted[2],
		Input:  wanted[0],
		Queue:  attachQueue,
	})
	go func() { // ends with conn
		for {
			m, err := receive(conn)
			if err != nil || m.Hangup || m.Detach {
				client.Detach()
				return
			}
			if m.Resize != nil {
				if err := t.Resize("", m.Resize.Width, m.Resize.Height); err != nil {
					t.log.Debug("terminal not resized", "error", err)
				}
			}
		}
	}()
	<-client.Done()
	a.Close() // the client reads an end of file, and then the message
	exit := session.Exit{}
	if _, missed, err := client.Result(); err != nil {
		exit.Error = err.Error()
		if errors.Is(err, stdio.ErrSlow) {
			exit.Reason = session.TooSlow
			t.log.Info("attached client cut off", "missed", missed)
		}
	}
	session.Send(conn, session.Message{Exit: &exit}) // or the client has gone
	return nil
}
