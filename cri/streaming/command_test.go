package streaming

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// caller is a client's end of exec or attach, over whatever protocol.
type caller struct {
	stdin          io.Writer
	closeStdin     func() error // nil: the protocol has no such thing
	resize         func(w, h int) error
	stdout, stderr *bytes.Buffer
	status         chan string // what the channel of errors has said, when all has ended
	hangup         func() error
}

// dial opens a session.
func (f *fake) dial(t *testing.T, protocol string, r stream.Request) *caller {
	t.Helper()
	if name, ok := strings.CutPrefix(protocol, "spdy "); ok {
		return f.dialSPDY(t, name, r)
	}
	return f.dialWeb(t, strings.TrimPrefix(protocol, "ws "), r)
}

func (f *fake) dialSPDY(t *testing.T, name string, r stream.Request) *caller {
	t.Helper()
	conn, agreed, err := f.spdyDial(f.put(r), name)
	if err != nil || agreed != name {
		t.Fatalf("agreed on %q: %v", agreed, err)
	}
	t.Cleanup(func() { conn.Close() })
	create := func(kind string) httpstream.Stream {
		s, err := conn.CreateStream(http.Header{"streamType": {kind}})
		must.Succeed(t, err)
		return s
	}
	c := &caller{
		stdout: new(bytes.Buffer),
		stderr: new(bytes.Buffer),
		status: make(chan string, 1),
		hangup: conn.Close,
	}
	end := create("error")
	var outputs sync.WaitGroup
	if r.Stdin {
		in := create("stdin")
		c.stdin, c.closeStdin = in, in.Close
	}
	if r.Stdout {
		s := create("stdout")
		outputs.Go(func() { io.Copy(c.stdout, s) })
	}
	if r.Stderr {
		s := create("stderr")
		outputs.Go(func() { io.Copy(c.stderr, s) })
	}
	if r.TTY && name > "v3" {
		s := create("resize")
		c.resize = func(w, h int) error {
			_, err := fmt.Fprintf(s, "{\"Width\":%d,\"Height\":%d}\n", w, h) // as kubectl says it
			return err
		}
	}
	go func() {
		b, _ := io.ReadAll(end)
		outputs.Wait()
		c.status <- string(b)
	}()
	return c
}

// dialWeb sends messages of the other kind, text or binary, where the name says swapped.
func (f *fake) dialWeb(t *testing.T, name string, r stream.Request) *caller {
	t.Helper()
	name, swapped := strings.CutPrefix(name, "swapped ")
	var names []string
	if name != "" {
		names = []string{name}
	}
	ws, err := f.webDial(f.put(r), names...)
	if err != nil || ws.Subprotocol() != name {
		t.Fatalf("agreed on %q: %v", ws.Subprotocol(), err)
	}
	t.Cleanup(func() { ws.Close() })
	text := strings.Contains(name, "base64")
	kind := websocket.BinaryMessage
	if text != swapped {
		kind = websocket.TextMessage
	}
	var mu sync.Mutex
	send := func(channel byte, p []byte) error {
		mu.Lock()
		defer mu.Unlock()
		if text {
			return ws.WriteMessage(kind, []byte(string('0'+channel)+base64.StdEncoding.EncodeToString(p)))
		}
		return ws.WriteMessage(kind, append([]byte{channel}, p...))
	}
	c := &caller{
		stdin:  writerFunc(func(p []byte) (int, error) { return len(p), send(0, p) }),
		resize: func(w, h int) error { return send(4, fmt.Appendf(nil, `{"Width":%d,"Height":%d}`, w, h)) },
		stdout: new(bytes.Buffer),
		stderr: new(bytes.Buffer),
		status: make(chan string, 1),
		hangup: ws.Close,
	}
	if strings.HasPrefix(name, "v5") {
		c.closeStdin = func() error { return send(255, []byte{0}) }
	}
	go func() {
		var status []byte
		for first := true; ; first = false {
			_, b, err := ws.ReadMessage()
			if err != nil {
				if !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
					status = append(status, err.Error()...)
				}
				c.status <- string(status)
				return
			}
			channel, payload := b[0], b[1:]
			if text {
				channel -= '0'
				payload, _ = base64.StdEncoding.DecodeString(string(payload))
			}
			if first && len(payload) > 0 {
				status = append(status, "no message came first"...)
			}
			switch channel {
			case 1:
				c.stdout.Write(payload)
			case 2:
				c.stderr.Write(payload)
			case 3:
				status = append(status, payload...)
			}
		}
	}()
	return c
}

type writerFunc func(p []byte) (int, error)

func (w writerFunc) Write(p []byte) (int, error) { return w(p) }

var everyProtocol = []string{
	"spdy channel.k8s.io", "spdy v2.channel.k8s.io", "spdy v3.channel.k8s.io", "spdy v4.channel.k8s.io",
	"ws ", "ws channel.k8s.io", "ws base64.channel.k8s.io", "ws v4.channel.k8s.io", "ws v4.base64.channel.k8s.io",
	"ws v5.channel.k8s.io", "ws swapped ", "ws swapped v4.channel.k8s.io", "ws swapped v4.base64.channel.k8s.io",
	"ws swapped v5.channel.k8s.io",
}

// Whether the end is told as JSON.
func hasStatus(protocol string) bool {
	return strings.Contains(protocol, "v4.") || strings.Contains(protocol, "v5.")
}

func TestCommand(t *testing.T) {
	exit7 := `{"status":"Failure","message":"command terminated with non-zero exit code: command terminated with exit ` +
		`code 7","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}`
	for _, p := range everyProtocol {
		for _, c := range []struct {
			name   string
			cmd    string
			attach bool
			status string // as JSON
			text   string // as text
		}{
			{"success", "read x; printf out$x; printf err >&2", false, `{"status":"Success"}`, ""},
			{"exit code", "read x; printf out$x; printf err >&2; exit 7", false, exit7,
				"command terminated with non-zero exit code: command terminated with exit code 7"},
			{"attach", "read x; printf out$x; printf err >&2; exit 7", true, `{"status":"Success"}`, ""},
		} {
			t.Run(p+" "+c.name, func(t *testing.T) {
				f := newFake(t, nil)
				r := stream.Request{
					Kind:   stream.Exec,
					ID:     "c",
					Cmd:    []string{"/bin/sh", "-c", c.cmd},
					Stdin:  true,
					Stdout: true,
					Stderr: true,
				}
				if c.attach {
					r.Kind = stream.Attach
				}
				if p == "spdy channel.k8s.io" {
					r.Cmd[2] = strings.Replace(c.cmd, "read x", "x=1", 1) // its input has no end and no begin
					r.Stdin = false
				}
				cl := f.dial(t, p, r)
				if r.Stdin {
					io.WriteString(cl.stdin, "1\n")
				}
				status := <-cl.status
				want := c.text
				if hasStatus(p) {
					want = c.status
				}
				// The first version closes the stream of errors before there are any.
				if status != want && p != "spdy channel.k8s.io" {
					t.Errorf("status %s, want %s", status, want)
				}
				if out, err := cl.stdout.String(), cl.stderr.String(); out != "out1" || err != "err" {
					t.Errorf("stdout %q, stderr %q", out, err)
				}
			})
		}
	}
}

func TestCommandThatCannotStart(t *testing.T) {
	f := newFake(t, nil)
	for _, p := range everyProtocol[3:] {
		c := f.dial(t, p, stream.Request{Kind: stream.Exec, Cmd: []string{"/missing"}, Stdout: true})
		if s := <-c.status; !strings.Contains(s, "error executing command in container: there is no /missing") {
			t.Errorf("%s: status %q", p, s)
		}
	}
}

// Much goes both ways, and the end of the input arrives behind it; over TLS as well.
func TestEcho(t *testing.T) {
	block := bytes.Repeat([]byte("0123456789abcde\n"), 1<<14)
	for _, secure := range []bool{false, true} {
		f := newFake(t, nil)
		if secure {
			f.withTLS()
		}
		for _, p := range []string{"spdy v4.channel.k8s.io", "ws v5.channel.k8s.io"} {
			t.Run(fmt.Sprintf("%s %v", p, secure), func(t *testing.T) {
				nothingLeft(t)
				c := f.dial(t, p, stream.Request{Kind: stream.Exec, Cmd: []string{"/bin/cat"}, Stdin: true,
					Stdout: true})
				want := sha256.New()
				for range 32 {
					want.Write(block)
					if _, err := c.stdin.Write(block); err != nil {
						t.Fatal(err)
					}
				}
				must.Succeed(t, c.closeStdin())
				if s := <-c.status; s != `{"status":"Success"}` {
					t.Errorf("status %s", s)
				}
				if got := sha256.Sum256(c.stdout.Bytes()); !bytes.Equal(got[:], want.Sum(nil)) {
					t.Errorf("%d bytes came back, and not those that were sent", c.stdout.Len())
				}
			})
		}
	}
}

// The first size is there before the process is, and later ones are seen.
func TestSizes(t *testing.T) {
	for _, p := range everyProtocol {
		t.Run(p, func(t *testing.T) {
			f := newFake(t, nil)
			f.sizeWait = patient // the first size may come late
			c := f.dial(t, p, stream.Request{
				Kind:   stream.Exec,
				Cmd:    []string{"/bin/sh", "-c", "read x"},
				Stdin:  true,
				Stdout: true,
				TTY:    true,
			})
			first := []client.Size{{}} // nobody says one
			if c.resize != nil {
				first = []client.Size{{Width: 100, Height: 30}}
				c.resize(100, 30)
			}
			eventually(t, "the process is started", func() bool { return len(f.seen()) > 0 })
			if got := f.seen(); !reflect.DeepEqual(got, first) {
				t.Errorf("the process is started with %v, want %v", got, first)
			}
			if c.resize != nil {
				c.resize(120, 40)
				second := []client.Size{{Width: 120, Height: 40}}
				eventually(t, "it sees another size", func() bool { return reflect.DeepEqual(f.seen()[1:], second) })
			}
			io.WriteString(c.stdin, "\n")
		})
	}
}

// A process that says nothing, and one that does not read what its client sends, are
// hung up when the client has gone.
func TestClientGone(t *testing.T) {
	wait := func(ctx context.Context, _ stream.Request, _ client.Streams) (client.SessionExit, error) {
		<-ctx.Done()
		return client.SessionExit{}, context.Cause(ctx)
	}
	for _, p := range everyProtocol {
		for _, stdin := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s %v", p, stdin), func(t *testing.T) {
				f := newFake(t, wait)
				nothingLeft(t)
				c := f.dial(t, p, stream.Request{Kind: stream.Exec, Stdin: stdin, Stdout: true})
				eventually(t, "the process runs", func() bool { return len(f.seen()) > 0 })
				if stdin {
					// More than what is taken in, and less than what the kernel takes: behind
					// a full window no end is seen until a probe of the kernel fails.
					left := stdinQueue + 20<<10
					for block := make([]byte, 512); left > 0; left -= len(block) {
						if _, err := c.stdin.Write(block); err != nil {
							t.Fatal(err)
						}
					}
				}
				c.hangup()
				if err := f.waitForEnd(); err == nil || !strings.Contains(err.Error(), errGone.Error()) {
					t.Errorf("it ended because of %v", err)
				}
			})
		}
	}
}
