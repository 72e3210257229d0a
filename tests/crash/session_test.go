package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// session is an exec over WebSocket, as kubectl's (v5.channel.k8s.io).
type session struct{ *websocket.Conn }

const (
	channelStdin  = 0
	channelStdout = 1
	channelStatus = 3
)

// openSession goes to an address that the daemon gave out.
func openSession(url string) (*session, error) {
	d := websocket.Dialer{Subprotocols: []string{"v5.channel.k8s.io"}, HandshakeTimeout: limit * slow}
	c, _, err := d.Dial(strings.Replace(url, "http", "ws", 1), nil)
	if err != nil {
		return nil, err
	}
	c.SetReadDeadline(time.Now().Add(limit * slow))
	return &session{c}, nil
}

// finish says something to the command and gives all its output and its status.
func (s *session) finish(input string) (output, status string, err error) {
	defer s.Close()
	if input != "" {
		if err := s.WriteMessage(websocket.BinaryMessage, append([]byte{channelStdin}, input...)); err != nil {
			return "", "", err
		}
	}
	for status == "" {
		_, b, err := s.ReadMessage()
		switch {
		case err != nil:
			return output, "", err
		case len(b) == 0:
			return output, "", errors.New("a message without a channel")
		case b[0] == channelStdout:
			output += string(b[1:])
		case b[0] == channelStatus:
			status += string(b[1:])
		}
	}
	return output, status, nil
}

// execURL asks until there is an address for an exec in a container. Empty: the container
// has ended with its shim.
func (k *kubelet) execURL(c *harness.Container, script string) (url string) {
	k.t.Helper()
	k.do("Exec", func(ctx context.Context) error {
		r, err := k.n.Runtime.Exec(ctx, &cri.ExecRequest{
			ContainerId: c.ID,
			Cmd:         []string{"sh", "-c", script},
			Stdin:       true,
			Stdout:      true,
		})
		url = r.GetUrl()
		return k.unlessLost(ctx, c, err)
	})
	return url
}

// converse has a session with a container, and a second one meanwhile. The first one does
// not notice what happens to the daemon, or to one that is only asked for the second.
func (k *kubelet) converse(c *harness.Container) {
	k.t.Helper()
	var first *session
	if !k.ofStream && !k.ofShim {
		var err error
		if first, err = openSession(k.execURL(c, "read a; echo got $a; exit 5")); err != nil {
			k.lose(harness.Sessions, "the first session: %v", err)
			return
		}
	}
	// It may break once, where the disaster is of a process that serves it, and for as long as that is stopped.
	began := time.Now()
	for tries := 0; ; tries++ {
		err := k.oneSession(c)
		if err == nil {
			break
		}
		if k.action == "kill" && k.lost == ending {
			k.awaitExit(c) // it may be seen a moment later
			break
		}
		if tries > 0 && time.Since(began) > 2*k.hold || !k.ofStream && !k.ofShim {
			k.lose(harness.Sessions, "a session: %v", err)
			break
		}
		k.failed++
	}
	if first == nil {
		return
	}
	output, status, err := first.finish("this\n")
	if err != nil || output != "got this\n" || !strings.Contains(status, `"5"`) {
		k.lose(harness.Sessions, "the session from before: %q, %s, %v", output, status, err)
	}
}

// oneSession has one session from its address to its end.
func (k *kubelet) oneSession(c *harness.Container) error {
	url := k.execURL(c, "echo one; echo two; exit 3")
	if url == "" {
		return nil
	}
	s, err := openSession(url)
	if err != nil {
		return err
	}
	output, status, err := s.finish("")
	if err != nil || output != "one\ntwo\n" || !strings.Contains(status, `"3"`) {
		return fmt.Errorf("%q, %s: %v", output, status, err)
	}
	return nil
}

// endStream kills the holdfast-stream of an earlier life.
func (k *kubelet) endStream() {
	k.t.Helper()
	k.eventually("no holdfast-stream runs", func() bool {
		pid := k.n.StreamPID()
		if pid > 0 {
			unix.Kill(pid, unix.SIGKILL)
		}
		return pid == 0
	})
}

// dropTokens removes the tokens whose addresses nobody was told. They live for a minute,
// which only a drill waits for.
func (k *kubelet) dropTokens() {
	k.t.Helper()
	tokens := func() []string {
		list, _ := filepath.Glob(k.n.State + "/stream/tokens/*")
		return list
	}
	if drill {
		k.eventually("unused tokens expire", func() bool { return len(tokens()) == 0 })
	}
	for _, path := range tokens() {
		os.Remove(path)
	}
}

// subscribe has events told until the returned function is called, which wants the end of
// a container to be among them. A subscription that ends is begun again.
func (k *kubelet) subscribe() (wantEnd func(id string)) {
	ctx, cancel := context.WithCancel(k.t.Context())
	ended := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ; ctx.Err() == nil; time.Sleep(harness.Tick) {
			stream, err := k.n.Runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{})
			for err == nil {
				var e *cri.ContainerEventResponse
				if e, err = stream.Recv(); err == nil &&
					e.ContainerEventType == cri.ContainerEventType_CONTAINER_STOPPED_EVENT {
					ended <- e.ContainerId
				}
			}
		}
	}()
	return func(id string) {
		k.t.Helper()
		defer func() { cancel(); <-done }()
		late := time.After(limit * slow)
		for {
			select {
			case got := <-ended:
				if got == id {
					return
				}
			case <-late:
				k.lose(harness.Statuses, "no event tells of the end of %s", id)
				return
			}
		}
	}
}
