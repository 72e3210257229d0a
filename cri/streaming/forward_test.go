package streaming

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// serve answers each connection to a port with f.
func serve(t *testing.T, f func(c *net.TCPConn)) (port int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must.Succeed(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c.(*net.TCPConn))
		}
	}()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.Close()
}

// webConn is a WebSocket as a connection, as client-go has it.
type webConn struct {
	net.Conn
	ws *websocket.Conn
	r  io.Reader
}

func (c *webConn) Read(p []byte) (int, error) {
	for {
		if c.r == nil {
			_, r, err := c.ws.NextReader()
			if err != nil {
				return 0, err
			}
			c.r = r
		}
		n, err := c.r.Read(p)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		c.r = nil
	}
}

func (c *webConn) Write(p []byte) (int, error) {
	return len(p), c.ws.WriteMessage(websocket.BinaryMessage, p)
}

var ways = []string{"SPDY", "tunnel"}

// forwarding opens a session.
func (f *fake) forwarding(t *testing.T, way string, ports ...int32) httpstream.Connection {
	t.Helper()
	path := f.put(stream.Request{Kind: stream.PortForward, ID: "p", Ports: ports})
	if way == "SPDY" {
		conn, _, err := f.spdyDial(path, "portforward.k8s.io")
		must.Succeed(t, err)
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	ws, err := f.webDial(path, "SPDY/3.1+portforward.k8s.io")
	must.Succeed(t, err)
	conn, err := spdy.NewClientConnection(&webConn{Conn: ws.NetConn(), ws: ws})
	must.Succeed(t, err)
	t.Cleanup(func() { ws.Close() })
	return conn
}

// open opens the pair of streams of a connection to a port.
func open(t *testing.T, conn httpstream.Connection, id int, port int32) (data, errs httpstream.Stream) {
	t.Helper()
	h := http.Header{}
	h.Set("port", strconv.Itoa(int(port)))
	h.Set("requestID", strconv.Itoa(id))
	h.Set("streamType", "error")
	errs, err := conn.CreateStream(h)
	must.Succeed(t, err)
	errs.Close()
	h.Set("streamType", "data")
	if data, err = conn.CreateStream(h); err != nil {
		t.Fatal(err)
	}
	return data, errs
}

// Many connections share one session: a port at which nobody listens is an error of its
// own stream, and the end of each direction arrives behind its bytes.
func TestForward(t *testing.T) {
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			f := newFake(t, nil)
			nothingLeft(t)
			good := serve(t, echo)
			closed, err := net.Listen("tcp", "127.0.0.1:0")
			must.Succeed(t, err)
			bad := int32(closed.Addr().(*net.TCPAddr).Port)
			closed.Close()
			conn := f.forwarding(t, way)

			_, errs := open(t, conn, 0, bad)
			if b, err := io.ReadAll(errs); err != nil || !strings.Contains(string(b), "connection refused") {
				t.Errorf("a port that nobody has: %q, %v", b, err)
			}
			var wg sync.WaitGroup
			for i := range 50 {
				data, errs := open(t, conn, i+1, good)
				wg.Go(func() {
					want := bytes.Repeat([]byte(fmt.Sprintf("stream %02d ", i)), 20000)
					go func() {
						data.Write(want)
						data.Close()
					}()
					if got, err := io.ReadAll(data); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%d bytes came back, %d were sent: %v", len(got), len(want), err)
					}
					if b, err := io.ReadAll(errs); err != nil || len(b) > 0 {
						t.Errorf("error %q, %v", b, err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// A pod that closes its side still gets what the client sends.
func TestPodClosesItsSide(t *testing.T) {
	for _, way := range ways {
		f := newFake(t, nil)
		got := make(chan string, 1)
		port := serve(t, func(c *net.TCPConn) {
			io.WriteString(c, "hello")
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			c.Close()
			got <- string(b)
		})
		data, errs := open(t, f.forwarding(t, way), 1, port)
		if b, err := io.ReadAll(data); err != nil || string(b) != "hello" {
			t.Errorf("%s: the client got %q, %v", way, b, err)
		}
		io.WriteString(data, "and back")
		data.Close()
		if s := <-got; s != "and back" {
			t.Errorf("%s: the pod got %q", way, s)
		}
		if b, err := io.ReadAll(errs); err != nil || len(b) > 0 {
			t.Errorf("%s: error %q, %v", way, b, err)
		}
	}
}

// A client that wants no more of one connection, as when a download is cut short, keeps the
// others: any word on the stream of errors would have it end them all.
func TestClientResetsConnection(t *testing.T) {
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			f := newFake(t, nil)
			nothingLeft(t)
			endless := serve(t, func(c *net.TCPConn) {
				io.Copy(c, rand.Reader)
				c.Close()
			})
			conn := f.forwarding(t, way)
			data, errs := open(t, conn, 1, endless)
			if _, err := io.ReadFull(data, make([]byte, 1024)); err != nil {
				t.Fatal(err)
			}
			must.Succeed(t, data.Reset())
			if b, err := io.ReadAll(errs); err != nil || len(b) > 0 {
				t.Errorf("error %q, %v", b, err)
			}
			data, _ = open(t, conn, 2, serve(t, echo))
			io.WriteString(data, "hello")
			data.Close()
			if b, err := io.ReadAll(data); err != nil || string(b) != "hello" {
				t.Errorf("another connection gave %q, %v", b, err)
			}
			eventually(t, "nothing is forwarded", func() bool { return f.forwards.count() == 0 })
		})
	}
}

// What a client has sent arrives although it has gone, and nothing is left of it.
func TestForwardWithoutClient(t *testing.T) {
	f := newFake(t, nil)
	nothingLeft(t)
	got := make(chan int, 1)
	port := serve(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		c.Close()
		got <- len(b)
	})
	for range 20 {
		r := f.raw(t, stream.Request{Kind: stream.PortForward}, "portforward.k8s.io")
		r.syn(1, "streamtype", "error", "port", fmt.Sprint(port), "requestid", "1")
		r.syn(3, "streamtype", "data", "port", fmt.Sprint(port), "requestid", "1")
		r.data(3, 100_000)
		r.Conn.(*net.TCPConn).CloseWrite()
		if n := <-got; n != 100_000 {
			t.Errorf("the pod got %d bytes", n)
		}
		r.closed()
		r.Conn.Close()
	}
	eventually(t, "nothing is forwarded", func() bool { return f.forwards.count() == 0 })
}

func TestPortsThatWereAskedFor(t *testing.T) {
	f := newFake(t, nil)
	good := serve(t, echo)
	_, errs := open(t, f.forwarding(t, "SPDY", good+1, good+2), 1, good)
	if b, _ := io.ReadAll(errs); !strings.Contains(string(b), "which were asked for") {
		t.Errorf("another port: %q", b)
	}
}

// channels opens a session with one port over an older protocol, which has a pair of channels
// for each port, and they begin with its number.
func (f *fake) channels(t *testing.T, port int32) *websocket.Conn {
	t.Helper()
	ws, err := f.webDial(f.put(stream.Request{Kind: stream.PortForward, Ports: []int32{port}}), "v4.channel.k8s.io")
	must.Succeed(t, err)
	t.Cleanup(func() { ws.Close() })
	want := binary.LittleEndian.AppendUint16(nil, uint16(port))
	for channel := range 2 {
		if _, b, err := ws.ReadMessage(); err != nil || !bytes.Equal(b, append([]byte{byte(channel)}, want...)) {
			t.Fatalf("channel %d begins with %v, %v", channel, b, err)
		}
	}
	return ws
}

func TestForwardChannels(t *testing.T) {
	f := newFake(t, nil)
	ws := f.channels(t, serve(t, echo))
	for _, kind := range []int{websocket.BinaryMessage, websocket.TextMessage} {
		must.Succeed(t, ws.WriteMessage(kind, []byte("\x00hello")))
		if _, b, err := ws.ReadMessage(); err != nil || string(b) != "\x00hello" {
			t.Errorf("%q came back of kind %d, %v", b, kind, err)
		}
	}
	ws.Close()
	eventually(t, "nothing is forwarded", func() bool { return f.forwards.count() == 0 })
}

// With the older protocols the end of the connection is all that tells of the pod's end, so it
// comes at once, and the pod has what was sent before.
func TestPodClosesItsChannel(t *testing.T) {
	for _, half := range []bool{false, true} {
		t.Run(fmt.Sprintf("half %v", half), func(t *testing.T) {
			f := newFake(t, nil)
			nothingLeft(t)
			if half {
				f.waitLimit = 3 * time.Second // the rest may come late
			}
			got := make(chan string, 1)
			ws := f.channels(t, serve(t, func(c *net.TCPConn) {
				defer c.Close()
				b := make([]byte, 4)
				io.ReadFull(c, b)
				io.WriteString(c, "hello")
				if half {
					c.CloseWrite()
					rest, _ := io.ReadAll(c)
					b = append(b, rest...)
				}
				got <- string(b)
			}))
			must.Succeed(t, ws.WriteMessage(websocket.BinaryMessage, []byte("\x00name")))
			if _, b, err := ws.ReadMessage(); err != nil || string(b) != "\x00hello" {
				t.Errorf("the client got %q, %v", b, err)
			}
			want := "name"
			if half { // what the client goes on to send still comes
				want = "name, more"
				must.Succeed(t, ws.WriteMessage(websocket.BinaryMessage, []byte("\x00, more")))
			}
			ws.SetReadDeadline(time.Now().Add(quietLimit * 9 / 10)) // two such times, and less than the other limit
			if _, b, err := ws.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
				t.Errorf("the connection goes on with %q, %v", b, err)
			}
			if s := <-got; s != want {
				t.Errorf("the pod got %q", s)
			}
			eventually(t, "nothing is forwarded", func() bool { return f.forwards.count() == 0 })
		})
	}
}

func (f *forwards) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all
}

// Whoever takes all connections to ports that one pod gets, for pod after pod, leaves
// some to the next one, and what was given back can be had again.
func TestForwardsAreShared(t *testing.T) {
	f := &forwards{pods: map[string]int{}}
	var took []int
	for pod := range 12 {
		n := 0
		for f.enter(strconv.Itoa(pod)) {
			n++
		}
		took = append(took, n)
	}
	if took[0] < 1024 || took[11] < 10 || f.all > maxForwarded {
		t.Errorf("pod after pod took %v of %d, %d in all", took, maxForwarded, f.all)
	}
	for pod, n := range took {
		for range n {
			f.leave(strconv.Itoa(pod))
		}
	}
	if f.all != 0 || len(f.pods) != 0 || !f.enter("again") {
		t.Errorf("when all have left: %d of %d pods", f.all, len(f.pods))
	}
}
