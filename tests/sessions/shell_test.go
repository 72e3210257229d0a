package sessions

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// terminal is that of a person, who types at one end; the client has the other one.
type terminal struct {
	t      *testing.T
	person *os.File
	client *os.File
	sizes  chan remotecommand.TerminalSize

	mu  sync.Mutex
	all strings.Builder // that was shown
}

func newTerminal(t *testing.T, width, height uint16) *terminal {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	client, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := unix.IoctlGetTermios(int(client.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	raw.Iflag, raw.Oflag, raw.Lflag = 0, 0, 0 // as kubectl has it
	if err := unix.IoctlSetTermios(int(client.Fd()), unix.TCSETS, raw); err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, person: person, client: client, sizes: make(chan remotecommand.TerminalSize, 8)}
	go func() {
		b := make([]byte, 1<<12)
		for {
			n, err := person.Read(b)
			if err != nil {
				return
			}
			term.mu.Lock()
			term.all.Write(b[:n])
			term.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		client.Close()
		person.Close()
	})
	term.resize(width, height)
	return term
}

func (term *terminal) resize(width, height uint16) {
	term.sizes <- remotecommand.TerminalSize{Width: width, Height: height}
}

// Next gives the client the next size.
func (term *terminal) Next() *remotecommand.TerminalSize {
	if size, more := <-term.sizes; more {
		return &size
	}
	return nil
}

func (term *terminal) enter(line string) {
	term.t.Helper()
	if _, err := term.person.WriteString(line + "\r"); err != nil {
		term.t.Fatal(err)
	}
}

// see waits until something is shown.
func (term *terminal) see(what string) {
	term.t.Helper()
	shown := func() string {
		term.mu.Lock()
		defer term.mu.Unlock()
		return term.all.String()
	}
	defer func() {
		if term.t.Failed() {
			term.t.Logf("the terminal shows %q", shown())
		}
	}()
	harness.Eventually(term.t, patience, fmt.Sprintf("the terminal shows %q", what), func() bool {
		return strings.Contains(shown(), what)
	})
}

// A person works in a shell of a container, while the daemon dies again and again.
func TestShell(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("shell").Run("shell", []string{"sleep", "1000"})
	both(t, func(t *testing.T, protocol string) {
		term := newTerminal(t, 101, 33)
		// A process does not wait long for a size that comes late. The shell comes when it changes.
		const script = `while [ "$(stty size)" = "0 0" ]; do sleep 0.1; done; stty size
			trap 'echo "window changed"; stty size; PS1="$ " exec sh' WINCH
			while :; do sleep 0.1; done`
		url := execURL(t, c.With(t), &cri.ExecRequest{
			Cmd:    []string{"sh", "-c", script},
			Stdin:  true,
			Stdout: true,
			Tty:    true,
		})
		ended := make(chan error, 1)
		go func() {
			ended <- stream(executor(t, protocol, url), remotecommand.StreamOptions{
				Stdin:             term.client,
				Stdout:            term.client,
				Tty:               true,
				TerminalSizeQueue: term,
			})
		}()
		term.see("33 101\r\n")
		term.resize(120, 40)
		term.see("window changed\r\n40 120\r\n")
		term.see("$ ")
		term.enter("x=kept")
		for i := range 10 {
			n.Kill()
			term.enter(fmt.Sprintf(`echo "down" %d $x`, i))
			term.see(fmt.Sprintf("down %d kept\r\n", i))
			n.Start()
			term.enter(fmt.Sprintf(`echo "up" %d $x`, i))
			term.see(fmt.Sprintf("up %d kept\r\n", i))
		}
		term.enter("printf %s-\\\\n ünï")
		term.see("ünï-\r\n")
		term.enter("exit 7")
		wantCode(t, <-ended, 7)
		close(term.sizes)
	})
}
