package client

import (
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	creack "github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// terminal gives a master, as it comes with a session, and the terminal.
func terminal(t *testing.T) (master, tty *os.File) {
	t.Helper()
	blocking, tty, err := creack.Open()
	must.Succeed(t, err)
	defer blocking.Close()
	t.Cleanup(func() { tty.Close() })
	must.Succeed(t, descriptor.Lend(blocking, func(fd int) error { return unix.SetNonblock(fd, true) }))
	master, err = descriptor.Dup(blocking)
	must.Succeed(t, err)
	t.Cleanup(func() { master.Close() })
	return master, tty
}

// The output of a terminal goes on where its process closes it and opens it again. It
// ends with the process, or with who has the terminal open then and goes on writing.
func TestCopyOutOfATerminal(t *testing.T) {
	for name, end := range map[string]func(ended chan<- struct{}, tty *os.File){
		"the process ends, then its files": func(ended chan<- struct{}, tty *os.File) {
			close(ended)
			tty.WriteString("rest")
			tty.Close()
		},
		"the files end, then the process": func(ended chan<- struct{}, tty *os.File) {
			tty.WriteString("rest")
			tty.Close()
			time.Sleep(time.Millisecond) // in which nothing may end
			close(ended)
		},
		"a child is silent": func(ended chan<- struct{}, tty *os.File) {
			tty.WriteString("rest")
			close(ended)
		},
		"a child closes it": func(ended chan<- struct{}, tty *os.File) {
			close(ended)
			time.Sleep(quietTimeout / 20)
			tty.WriteString("rest")
			tty.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			master, tty := terminal(t)
			r, w := io.Pipe()
			ended, done := make(chan struct{}), make(chan error, 1)
			go func() {
				done <- copyOut(w, master, ended)
				w.Close()
			}()
			buf := make([]byte, 16)
			for range 20 {
				tty.WriteString("text")
				if n, err := r.Read(buf); err != nil || string(buf[:n]) != "text" {
					t.Fatalf("read %q, %v", buf[:n], err)
				}
				tty.Close()
				time.Sleep(time.Millisecond) // in which nothing may end
				var err error
				tty, err = os.OpenFile(tty.Name(), os.O_RDWR|unix.O_NOCTTY, 0)
				must.Succeed(t, err)
			}
			defer tty.Close()
			go end(ended, tty)
			if rest, err := io.ReadAll(r); err != nil || string(rest) != "rest" {
				t.Errorf("read %q, %v", rest, err)
			}
			must.Succeed(t, <-done)
		})
	}
}

// A session that is closed ends the copy of a terminal that nobody has open.
func TestCopyOutOfAClosedSession(t *testing.T) {
	master, tty := terminal(t)
	tty.Close()
	done := make(chan error, 1)
	go func() { done <- copyOut(io.Discard, master, nil) }()
	select {
	case <-done:
		t.Fatal("the copy has ended by itself")
	case <-time.After(10 * time.Millisecond):
	}
	master.Close()
	must.Succeed(t, <-done)
}

// A client that was stopped sees that the time is over before it sees the output.
func TestCopyOutTakesWhatIsThere(t *testing.T) {
	ended := make(chan struct{})
	close(ended)
	for range 100 {
		r, w, err := os.Pipe()
		must.Succeed(t, err)
		r.SetReadDeadline(time.Unix(1, 0))
		over := make(chan struct{})
		var stops sync.WaitGroup
		stops.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
					r.SetReadDeadline(time.Unix(1, 0))
				}
			}
		})
		_, err = w.WriteString("rest")
		must.Succeed(t, err)
		var out strings.Builder
		if err := copyOut(&out, r, ended); err != nil || out.String() != "rest" {
			t.Fatalf("got %q, %v", out.String(), err)
		}
		close(over)
		stops.Wait()
		r.Close()
		w.Close() // until now as if a child had it
	}
}
