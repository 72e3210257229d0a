package shim_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/shim"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// call is the frame of a request, as the PROTOCOL.md of ttrpc has it.
// A field that nobody knows makes it larger.
func call(t *testing.T, stream uint32, method string, req proto.Message, more int) []byte {
	t.Helper()
	payload, err := proto.Marshal(req)
	must.Succeed(t, err)
	if more > 0 {
		payload = protowire.AppendTag(payload, 1000, protowire.BytesType)
		payload = protowire.AppendBytes(payload, make([]byte, more))
	}
	msg, err := proto.Marshal(&ttrpc.Request{Service: "holdfast.shim.v1.Shim", Method: method, Payload: payload})
	must.Succeed(t, err)
	b := binary.BigEndian.AppendUint32(nil, uint32(len(msg)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, 1, 0), msg...)
}

// A client that sends calls and reads no answer is cut off before it takes much memory,
// and others are served all the time.
func TestClientThatReadsNothing(t *testing.T) {
	b := newBox(t)
	cmd := b.launch()
	for _, c := range []struct {
		name   string
		method string
		req    proto.Message
		frames int
		more   int // bytes of each call
	}{
		{"answers", "Hello", &pb.HelloRequest{Id: b.id}, 200_000, 0},
		{"long polls", "Events", &pb.EventsRequest{Id: b.id, WaitMs: 60_000}, 20_000, 0},
		{"large requests", "Events", &pb.EventsRequest{Id: b.id, WaitMs: 60_000}, 500, 1 << 20},
	} {
		for range 3 { // what one has taken is there for the next one
			conn, err := b.dir.Dial(t.Context())
			must.Succeed(t, err)
			sent := 0
			for ; sent < c.frames; sent++ {
				if _, err := conn.Write(call(t, uint32(2*sent+1), c.method, c.req, c.more)); err != nil {
					break
				}
			}
			conn.Close()
			if sent == c.frames {
				t.Errorf("%s: %d calls were taken", c.name, sent)
			}
			if _, err := b.client.Hello(b.ctx(), &pb.HelloRequest{Id: b.id}); err != nil {
				t.Errorf("%s: another client: %v", c.name, err)
			}
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	must.Succeed(t, err)
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil || kib > 150<<10 && !raceEnabled {
		t.Errorf("the shim took %d KiB, %v", kib, err)
	}
	t.Logf("at most %d KiB", kib)
}

// Connections beyond the bound wait, and do not disturb those that are there.
func TestManyConnections(t *testing.T) {
	b := newBox(t)
	b.launch()
	hello := &pb.HelloRequest{Id: b.id}
	if _, err := b.client.Hello(b.ctx(), hello); err != nil {
		t.Fatal(err)
	}
	var idle []net.Conn
	for range shim.MaxConns - 1 {
		_, _, conn := b.dial()
		idle = append(idle, conn)
	}
	late, conn, _ := b.dial()
	defer conn.Close()
	answer := make(chan error, 1)
	go func() {
		_, err := late.Hello(b.ctx(), hello)
		answer <- err
	}()
	for range 3 {
		if _, err := b.client.Hello(b.ctx(), hello); err != nil {
			t.Error(err)
		}
	}
	select {
	case err := <-answer:
		t.Errorf("one more connection was served: %v", err)
	default:
	}
	for _, c := range idle {
		c.Close()
	}
	if err := <-answer; err != nil {
		t.Errorf("it was not served when there was room: %v", err)
	}
}
