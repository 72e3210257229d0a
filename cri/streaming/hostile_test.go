package streaming

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/spdystream/spdy"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func (f *fake) connect(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", f.addr)
	must.Succeed(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// answer is what a connection is answered with, or 0 if it is closed.
func answer(t *testing.T, c net.Conn, request string) int {
	t.Helper()
	c.SetDeadline(time.Now().Add(patient))
	io.WriteString(c, request) // it may be closed
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// decent runs a session, as a check that others are served.
func (f *fake) decent(t *testing.T) {
	t.Helper()
	r := stream.Request{Kind: stream.Exec, Cmd: []string{"/bin/echo", "hi"}, Stdout: true}
	c := f.dial(t, "ws v5.channel.k8s.io", r)
	if s := <-c.status; s != `{"status":"Success"}` || c.stdout.String() != "hi\n" {
		t.Errorf("another client is not served: status %s, stdout %q", s, c.stdout)
	}
}

func TestRequests(t *testing.T) {
	f := newFake(t, nil)
	const upgrade = "Host: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"
	exec := f.put(stream.Request{Kind: stream.Exec, Cmd: []string{"/bin/true"}, Stdout: true})
	token := exec[len("/exec"):]
	for _, c := range []struct {
		request string
		code    int
	}{
		{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"GET /metrics HTTP/1.1\r\n" + upgrade, 404},
		{"GET /exec/guess HTTP/1.1\r\n" + upgrade, 404},
		{"GET /exec HTTP/1.1\r\n" + upgrade, 404},
		{"GET /exec/../../etc/passwd HTTP/1.1\r\n" + upgrade, 404},
		{"GET " + exec + " HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		{"PUT " + exec + " HTTP/1.1\r\n" + upgrade, 405},
		{"GET " + exec + " HTTP/1.1\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n" + upgrade, 431},
		{"GET " + exec + " HTTP/1.1\r\n" + upgrade, 400}, // it names no version, and the token is used
		{"GET " + exec + " HTTP/1.1\r\n" + upgrade, 404},
		{"GET /attach" + token + " HTTP/1.1\r\n" + upgrade, 404},
	} {
		if code := answer(t, f.connect(t), c.request); code != c.code && (c.code != 431 || code != 0) {
			t.Errorf("%.60q: %d, want %d", c.request, code, c.code)
		}
	}
}

// A thousand connections that say nothing keep nobody out: the oldest ones are closed.
func TestSilentConnections(t *testing.T) {
	f := newFake(t, nil)
	nothingLeft(t)
	var all []net.Conn
	for range 1000 {
		all = append(all, f.connect(t))
	}
	f.decent(t)
	f.conns.mu.Lock()
	kept := len(f.conns.all)
	f.conns.mu.Unlock()
	if kept > maxSilent+1 {
		t.Errorf("%d connections are kept, want at most %d", kept, maxSilent)
	}
	for i, c := range all[:1000-maxSilent-1] {
		c.SetDeadline(time.Now().Add(patient))
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || strings.Contains(err.Error(), "timeout") {
			t.Fatalf("connection %d is not closed: %v", i, err)
		}
	}
	for _, c := range all {
		c.Close()
	}
	eventually(t, "the server is idle", func() bool { return f.Idle() > 0 })
}

// A client that does not read holds up its own process alone.
func TestSlowReader(t *testing.T) {
	f := newFake(t, nil)
	for _, p := range everyProtocol[3:4] {
		conn, _, err := f.spdyDial(f.put(stream.Request{
			Kind:   stream.Exec,
			Cmd:    []string{"/bin/cat", "/dev/zero"},
			Stdout: true,
		}), strings.TrimPrefix(p, "spdy "))
		must.Succeed(t, err)
		for _, kind := range []string{"error", "stdout"} {
			if _, err := conn.CreateStream(http.Header{"streamType": {kind}}); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the process runs", func() bool { return len(f.seen()) > 0 })
		f.decent(t)
		conn.Close()
		eventually(t, "the session has ended", func() bool { return f.Idle() > 0 })
	}
}

// raw is a client that speaks SPDY as it likes.
type raw struct {
	net.Conn
	*spdy.Framer
	t *testing.T
}

// raw upgrades to SPDY.
func (f *fake) raw(t *testing.T, r stream.Request, version string) *raw {
	t.Helper()
	c := f.connect(t)
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+
		"X-Stream-Protocol-Version: %s\r\n\r\n", f.put(r), version)
	c.SetDeadline(time.Now().Add(2 * patient))
	b := bufio.NewReader(c)
	if resp, err := http.ReadResponse(b, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("no SPDY: %v, %v", resp, err)
	}
	framer, err := spdy.NewFramer(c, b)
	must.Succeed(t, err)
	return &raw{c, framer, t}
}

// syn opens a stream. An error is for the test to see later: the connection may be closed.
func (r *raw) syn(id int, headers ...string) error {
	h := http.Header{}
	for i := 0; i < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	return r.WriteFrame(&spdy.SynStreamFrame{StreamId: spdy.StreamId(id), Headers: h})
}

func (r *raw) data(id, n int) error {
	return r.WriteFrame(&spdy.DataFrame{StreamId: spdy.StreamId(id), Data: make([]byte, n)})
}

// closed fails unless the server ends the connection.
func (r *raw) closed() {
	r.t.Helper()
	if _, err := io.Copy(io.Discard, r.Conn); err != nil && strings.Contains(err.Error(), "timeout") {
		r.t.Error("the connection goes on")
	}
}

// bomb is a frame that opens a stream, whose headers are a thousand times as large.
func bomb() []byte {
	var b bytes.Buffer
	z := zlib.NewWriter(&b)
	z.Write([]byte{0, 0, 0, 1, 0, 0x20, 0, 0}) // one header with a name of 2 MiB
	z.Write(make([]byte, 3<<20))
	z.Flush()
	head := binary.BigEndian.AppendUint32(nil, 1<<31|3<<16|kindSyn)
	head = binary.BigEndian.AppendUint32(head, uint32(b.Len()+10))
	head = append(head, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	return append(head, b.Bytes()...)
}

// Who breaks the rules is cut off, and nothing of it is left.
func TestRules(t *testing.T) {
	pair := func(r *raw, id int) error {
		err := r.syn(id, "streamtype", "error", "port", "1", "requestid", fmt.Sprint(id))
		if err == nil {
			err = r.syn(id+2, "streamtype", "data", "port", "1", "requestid", fmt.Sprint(id))
		}
		return err
	}
	for name, f := range map[string]func(r *raw){
		"headers that are a bomb": func(r *raw) { r.Conn.Write(bomb()) },
		"a stream for no port":    func(r *raw) { r.syn(1, "streamtype", "data", "port", "0", "requestid", "1") },
		"a large header":          func(r *raw) { r.syn(1, "streamtype", strings.Repeat("x", 300)) },
		"a large control frame": func(r *raw) {
			r.Conn.Write(binary.BigEndian.AppendUint64(nil, (1<<31|3<<16|kindSyn)<<32|1<<20))
		},
		"an even stream": func(r *raw) { r.syn(2, "streamtype", "data") },
		"streams that go back": func(r *raw) {
			for pair(r, 101) == nil {
			}
		},
		"unpaired streams": func(r *raw) {
			for id := 1; r.syn(id, "streamtype", "data", "port", "1", "requestid", fmt.Sprint(id)) == nil; id += 2 {
			}
		},
		"a stream that ends before it is there": func(r *raw) {
			for id := 1; pair(r, id) == nil; id += 4 {
				r.WriteFrame(&spdy.RstStreamFrame{StreamId: spdy.StreamId(id), Status: spdy.Cancel})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			fk := newFake(t, nil)
			fk.CreationTimeout = patient
			nothingLeft(t)
			r := fk.raw(t, stream.Request{Kind: stream.PortForward}, "portforward.k8s.io")
			r.SetDeadline(time.Now().Add(2 * patient))
			done := make(chan struct{})
			go func() { defer close(done); f(r) }()
			r.closed()
			r.Conn.Close()
			<-done
			eventually(t, "the server is idle", func() bool { return fk.Idle() > 0 })
		})
	}
}

// Halves of pairs have places as whole ones do: one pod gets as many over all connections.
func TestHalfPairs(t *testing.T) {
	f := newFake(t, nil)
	nothingLeft(t)
	f.CreationTimeout = 2 * patient
	const many = 1000
	var clients []*raw
	for range 2 {
		r := f.raw(t, stream.Request{Kind: stream.PortForward, ID: "pod"}, "portforward.k8s.io")
		clients = append(clients, r)
		for i := range many {
			if r.syn(2*i+1, "streamtype", "error", "port", "1", "requestid", fmt.Sprint(i)) != nil {
				break
			}
		}
		eventually(t, "all have places that can", func() bool { return f.forwards.count() >= many })
	}
	clients[1].closed()
	eventually(t, "those of one client", func() bool { return f.forwards.count() == many })
	clients[0].Conn.Close()
	eventually(t, "none", func() bool { return f.forwards.count() == 0 })
}

// Clients that vanish in the middle of what they do leave nothing.
func TestAbandoned(t *testing.T) {
	block := func(ctx context.Context, _ stream.Request, _ client.Streams) (client.SessionExit, error) {
		<-ctx.Done()
		return client.SessionExit{}, context.Cause(ctx)
	}
	f := newFake(t, block)
	f.CreationTimeout = time.Second
	nothingLeft(t)
	sink := serve(t, func(c *net.TCPConn) { // it takes nothing
		<-t.Context().Done()
		c.Close()
	})
	for range 20 {
		// Streams that are being opened, with bytes for streams that nobody reads.
		r := f.raw(t, stream.Request{Kind: stream.PortForward}, "portforward.k8s.io")
		for id := 1; id < 200; id += 4 {
			r.syn(id, "streamtype", "error", "port", fmt.Sprint(sink), "requestid", fmt.Sprint(id))
			r.syn(id+2, "streamtype", "data", "port", fmt.Sprint(sink), "requestid", fmt.Sprint(id))
			r.data(id, 1000)
			r.data(id+2, 1000)
		}
		r.Conn.Close()
		// An exec whose streams are never all there.
		r = f.raw(t, stream.Request{Kind: stream.Exec, Stdin: true, Stdout: true}, "v4.channel.k8s.io")
		r.syn(1, "streamtype", "error")
		r.Conn.Close()
		// One more stream than there are.
		r = f.raw(t, stream.Request{Kind: stream.Exec, Stdin: true}, "v4.channel.k8s.io")
		for id, kind := range []string{"error", "stdin", "stdout"} {
			r.syn(2*id+1, "streamtype", kind)
		}
		r.closed()
		r.Conn.Close()
	}
}

// What clients send and nobody reads is bounded: they wait.
func TestFlood(t *testing.T) {
	wait := func(ctx context.Context, r stream.Request, st client.Streams) (client.SessionExit, error) {
		if st.Stdin == nil {
			return runHere(ctx, r, st)
		}
		<-ctx.Done()
		return client.SessionExit{}, context.Cause(ctx)
	}
	f := newFake(t, wait)
	before := heap()
	var sent [40]atomic.Int64
	for i := range sent {
		r := f.raw(t, stream.Request{Kind: stream.Exec, Stdin: true}, "v4.channel.k8s.io")
		r.syn(1, "streamtype", "error")
		r.syn(3, "streamtype", "stdin")
		go func() {
			for r.data(3, 1<<16) == nil {
				sent[i].Add(1 << 16)
			}
		}()
	}
	eventually(t, "the queues are full", func() bool {
		for i := range sent {
			if sent[i].Load() < 2*stdinQueue {
				return false
			}
		}
		return true
	})
	f.decent(t)
	const ofClient = 2 << 20 // its own compressor takes most of it
	if grown := heap() - before; grown > int64(len(sent))*(stdinQueue+ofClient) {
		t.Errorf("%d MiB are kept", grown>>20)
	}
}

// heap is how many bytes are in use.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what is in pools stays for one
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A client that opens no streams is not waited for.
func TestCreationTimeout(t *testing.T) {
	f := newFake(t, nil)
	f.CreationTimeout = 50 * time.Millisecond
	r := f.raw(t, stream.Request{Kind: stream.Exec, Stdout: true}, "v4.channel.k8s.io")
	r.closed()
}

// A session in which nothing happens ends.
func TestIdleTimeout(t *testing.T) {
	f := newFake(t, func(ctx context.Context, _ stream.Request, _ client.Streams) (client.SessionExit, error) {
		<-ctx.Done()
		return client.SessionExit{}, context.Cause(ctx)
	})
	f.IdleTimeout = 2 * time.Second // more than a client needs to open its streams
	for _, p := range []string{"spdy v4.channel.k8s.io", "ws v5.channel.k8s.io"} {
		c := f.dial(t, p, stream.Request{Kind: stream.Exec, Stdout: true})
		if s := <-c.status; !strings.Contains(s, errIdle.Error()) {
			t.Errorf("%s: status %s", p, s)
		}
	}
}
