package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/session"
)

func setupAttach(a *app, fs *flag.FlagSet) runFunc {
	exec := fs.String("exec", "", "come back to the exec `EXEC`, such as exec-3, and not to the container itself")
	stdin := fs.Bool("i", false, "pass on standard input")
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		return a.session(ctx, dir, client.SessionOptions{
			ExecID: *exec,
			Stdin:  *stdin,
			Stdout: true,
			Stderr: true,
		}, *stdin)
	}
}

// session joins this command with a session until that ends. input passes on standard
// input, which is a terminal's keys if both sides have one.
func (a *app) session(ctx context.Context, dir rundir.Dir, o client.SessionOptions, input bool) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	var exit client.SessionExit
	var id string
	detached := false
	err := withShim(ctx, dir, func(c *client.Client) error {
		s, err := c.OpenSession(ctx, o)
		if err != nil {
			return err
		}
		defer s.Close()
		id = s.ID
		exit, detached, err = a.join(ctx, s, input)
		return err
	})
	switch {
	case detached && id != "":
		fmt.Fprintf(a.stderr, "\nholdfastctl: detached; come back with: holdfastctl attach -i --exec %s %s\n",
			id, records.ShortID(dir.ID()))
		return nil
	case detached:
		return nil
	case err != nil:
		return err
	case exit.Reason == session.TimedOut:
		fmt.Fprintf(a.stderr, "holdfastctl: %s\n", lines(exit.Error))
		return exitCode(codeTimeout)
	case exit.Reason != "":
		return about(dir, errors.New(exit.Error))
	case exit.Code != 0:
		return exitCode(exit.Code)
	}
	return nil
}

// join is session once that is open.
func (a *app) join(ctx context.Context, s *client.Session, input bool) (client.SessionExit, bool, error) {
	st := client.Streams{Stdout: a.stdout, Stderr: a.stderr}
	if input {
		st.Stdin = a.stdin
	}
	var detached atomic.Bool
	if _, err := sizeOf(a.stdin); err == nil && s.Terminal && input {
		restore, err := setRaw(a.stdin)
		if err != nil {
			return client.SessionExit{}, false, err
		}
		defer restore()
		sizes, stop := sizesOf(a.stdin)
		defer stop()
		st.Resize = sizes
		st.Stdin = &keys{from: a.stdin, detach: func() {
			detached.Store(true)
			s.Detach()
		}}
	}
	exit, err := s.Copy(ctx, st)
	return exit, detached.Load(), err
}

// sizeOf gives the size of a terminal.
func sizeOf(f *os.File) (client.Size, error) {
	s, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return client.Size{}, err
	}
	return client.Size{Width: s.Col, Height: s.Row}, nil
}

// setRaw has a terminal pass on each byte as it is, both ways: what is joined with it
// is a terminal as well, and does the rest.
func setRaw(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("cannot read the mode of the terminal: %w", err)
	}
	raw := *old // cfmakeraw(3)
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP
	raw.Iflag &^= unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("cannot set the terminal to raw mode: %w", err)
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}

// sizesOf gives the size of a terminal now, and whenever it changes, until stop.
func sizesOf(f *os.File) (sizes <-chan client.Size, stop func()) {
	changed, quit := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(changed, unix.SIGWINCH)
	to := make(chan client.Size)
	go func() {
		for {
			if size, err := sizeOf(f); err == nil {
				select {
				case to <- size:
				case <-quit:
					return
				}
			}
			select {
			case <-changed:
			case <-quit:
				return
			}
		}
	}()
	return to, func() { signal.Stop(changed); close(quit) }
}

// keys is what is typed, in which Ctrl-P Ctrl-Q detaches. A Ctrl-P is passed on with
// the key after it.
type keys struct {
	from   io.Reader
	detach func()
	held   bool // a Ctrl-P
	over   bool
}

const (
	ctrlP = 'P' & 0x1f
	ctrlQ = 'Q' & 0x1f
)

func (k *keys) Read(b []byte) (int, error) {
	if len(b) < 2 {
		return 0, io.ErrShortBuffer
	}
	for !k.over {
		at := 0
		if k.held {
			b[0], at = ctrlP, 1
		}
		n, err := k.from.Read(b[at:])
		all := b[:at+n]
		if i := bytes.Index(all, []byte{ctrlP, ctrlQ}); i >= 0 {
			k.over, all = true, all[:i]
		} else if k.held = n > 0 && all[len(all)-1] == ctrlP; k.held {
			all = all[:len(all)-1]
		}
		if len(all) > 0 || err != nil {
			return len(all), err
		}
	}
	k.detach()
	return 0, io.EOF
}
