package streaming

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"net"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"

	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// keepsLittle fails if f makes the server keep more than some bytes.
func keepsLittle(t *testing.T, limit int64, f func()) {
	t.Helper()
	before := heap()
	f()
	if grown := heap() - before; grown > limit {
		t.Errorf("%d KiB are kept, want at most %d", grown>>10, limit>>10)
	}
}

// A connection that has had many streams keeps none of those that are over, whether the
// client has ended its streams of errors or not.
func TestManyStreams(t *testing.T) {
	const pairs, atOnce = 4000, 50
	for _, ends := range []bool{true, false} {
		f := newFake(t, nil)
		port := serve(t, func(c *net.TCPConn) { c.Close() })
		r := f.raw(t, stream.Request{Kind: stream.PortForward}, "portforward.k8s.io")
		over := make(chan struct{}, 2*atOnce) // one for each stream under way
		go func() {
			for {
				frame, err := r.ReadFrame()
				if err != nil {
					return
				}
				data, ok := frame.(*spdy.DataFrame)
				if _, reset := frame.(*spdy.RstStreamFrame); reset || ok && data.Flags&spdy.DataFlagFin != 0 {
					<-over
				}
			}
		}()
		next := func(id int, kind string, request int) {
			over <- struct{}{}
			err := r.syn(id, "streamtype", kind, "port", fmt.Sprint(port), "requestid", fmt.Sprint(request))
			must.Succeed(t, err)
			if ends || kind == "data" {
				r.WriteFrame(&spdy.DataFrame{StreamId: spdy.StreamId(id), Flags: spdy.DataFlagFin})
			}
		}
		keepsLittle(t, 2<<20, func() {
			for i := range pairs {
				next(4*i+1, "error", i)
				next(4*i+3, "data", i)
			}
			for range 2 * atOnce {
				over <- struct{}{}
			}
		})
		r.Conn.Close()
	}
}

// A message or a size that has no end is not kept.
func TestEndlessInput(t *testing.T) {
	f := newFake(t, nil)
	block := make([]byte, 64<<20)
	for i := range block {
		block[i] = 'x'
	}
	sizes := f.raw(t, stream.Request{
		Kind:  stream.Exec,
		Cmd:   []string{"/bin/cat"},
		Stdin: true,
		TTY:   true,
	}, "v4.channel.k8s.io")
	for id, kind := range []string{"error", "stdin", "resize"} {
		sizes.syn(2*id+1, "streamtype", kind)
	}
	port := serve(t, func(*net.TCPConn) {})
	ws, err := f.webDial(f.put(stream.Request{Kind: stream.PortForward, Ports: []int32{port}}), "v4.channel.k8s.io")
	must.Succeed(t, err)
	defer ws.Close()
	keepsLittle(t, 4<<20, func() {
		sizes.WriteFrame(&spdy.DataFrame{StreamId: 5, Data: []byte(`{"Width":1,"x":"`)})
		if err := sizes.WriteFrame(&spdy.DataFrame{StreamId: 5, Data: block[:10<<20]}); err != nil {
			t.Error(err)
		}
		ws.SetWriteDeadline(time.Now().Add(time.Second))
		ws.WriteMessage(websocket.BinaryMessage, block) // its reader takes nothing
	})
	f.decent(t)
}

// A pod in which connections are not made keeps no other one waiting.
func TestPortThatDoesNotAnswer(t *testing.T) {
	f := newFake(t, nil)
	good := serve(t, echo)
	f.Dial = func(ctx context.Context, netns, address string) (net.Conn, error) {
		if _, port, _ := net.SplitHostPort(address); port != fmt.Sprint(good) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return dialHere(ctx, netns, address)
	}
	conn := f.forwarding(t, "SPDY")
	for i := range 100 {
		open(t, conn, i, 1)
	}
	data, _ := open(t, f.forwarding(t, "SPDY"), 1, good)
	io.WriteString(data, "hi")
	data.Close()
	if b, err := io.ReadAll(data); err != nil || string(b) != "hi" {
		t.Errorf("%q came back, %v", b, err)
	}
}

// nonsense sends frames, most of which are in order each for itself.
func (r *raw) nonsense(random *rand.Rand, port int32) {
	kinds := []string{"error", "data", "stdin", "stdout", "resize", ""}
	ports := []string{fmt.Sprint(port), fmt.Sprint(port), "0", "x"}
	var err error
	for id := 1; err == nil && random.Intn(100) > 0; {
		some := spdy.StreamId(random.Intn(id + 3))
		switch random.Intn(8) {
		case 0, 1, 2:
			err = r.syn(id, "streamtype", kinds[random.Intn(len(kinds))], "port", ports[random.Intn(len(ports))],
				"requestid", fmt.Sprint(random.Intn(10)))
			id += 2
		case 3, 4:
			err = r.data(int(some), random.Intn(1e5))
		case 5:
			err = r.WriteFrame(&spdy.DataFrame{StreamId: some, Flags: spdy.DataFlagFin})
		case 6:
			err = r.WriteFrame(&spdy.RstStreamFrame{StreamId: some, Status: spdy.Cancel})
		default:
			b := make([]byte, headSize+random.Intn(20))
			random.Read(b)
			binary.BigEndian.PutUint32(b, controlBit|version3|uint32(random.Intn(12)))
			binary.BigEndian.PutUint32(b[4:], uint32(random.Intn(4))<<24|uint32(len(b)-headSize))
			_, err = r.Conn.Write(b)
		}
	}
}

// Clients that speak nonsense, and go, leave nothing.
func TestNonsense(t *testing.T) {
	f := newFake(t, nil)
	port := serve(t, echo)
	nothingLeft(t)
	random := rand.New(rand.NewSource(1))
	for range 300 {
		wanted, version := stream.Request{Kind: stream.PortForward}, "portforward.k8s.io"
		if random.Intn(2) == 0 {
			wanted = stream.Request{Kind: stream.Exec, Stdin: true, Stdout: true, Cmd: []string{"/bin/cat"}}
			version = "v4.channel.k8s.io"
		}
		r := f.raw(t, wanted, version)
		go io.Copy(io.Discard, r.Conn)
		r.nonsense(random, port)
		r.Conn.Close()
	}
	eventually(t, "the server is idle", func() bool { return f.Idle() > 0 })
	f.decent(t)
}
