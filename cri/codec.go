package cri

import (
	"runtime/debug"
	"sync/atomic"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxPooled is the size of the largest message whose buffer is kept for the next one.
const maxPooled = 1 << 20

// codec is grpc's own, but for large messages: their memory is given back when the
// last of them has been sent. grpc would keep the buffers, and the collector the rest,
// for as long as nobody asks for more.
type codec struct {
	encoding.CodecV2
	// room hands over what is kept for the answer of a command until it is sent.
	room func(*runtimeapi.ExecSyncResponse) (sent func())

	large atomic.Int64 // large messages that are being sent
}

func newCodec(room func(*runtimeapi.ExecSyncResponse) (sent func())) *codec {
	return &codec{CodecV2: encoding.GetCodecV2(grpcproto.Name), room: room}
}

// Marshal encodes a message.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	sent := func() {}
	r, output := v.(*runtimeapi.ExecSyncResponse)
	if output {
		sent = c.room(r)
	}
	if proto.Size(m) <= maxPooled {
		sent()
		return c.CodecV2.Marshal(v)
	}
	var parts [][]byte
	if output {
		parts = split(r)
	} else {
		b, err := proto.Marshal(m)
		if err != nil {
			return nil, err
		}
		parts = [][]byte{b}
	}
	c.large.Add(1)
	return whenSent(parts, func() {
		sent()
		if c.large.Add(-1) == 0 {
			go debug.FreeOSMemory() // takes a moment, and grpc waits for this
		}
	}), nil
}

// split encodes the answer with the output of a command without copying that.
func split(r *runtimeapi.ExecSyncResponse) (parts [][]byte) {
	for i, output := range [][]byte{r.GetStdout(), r.GetStderr()} {
		head := protowire.AppendTag(nil, protowire.Number(i+1), protowire.BytesType)
		parts = append(parts, protowire.AppendVarint(head, uint64(len(output))), output)
	}
	code := protowire.AppendTag(nil, 3, protowire.VarintType)
	return append(parts, protowire.AppendVarint(code, uint64(r.GetExitCode())))
}

// whenSent makes buffers of a message, and calls f when none of them is needed any
// more. Those that grpc does not count, as they are small, are not waited for.
func whenSent(parts [][]byte, f func()) (all mem.BufferSlice) {
	s := &sending{over: f}
	s.left.Store(1)
	for _, p := range parts {
		if mem.IsBelowBufferPoolingThreshold(len(p)) {
			all = append(all, mem.SliceBuffer(p))
			continue
		}
		s.left.Add(1)
		all = append(all, mem.NewBuffer(&p, s))
	}
	s.Put(nil)
	return all
}

// sending is a message on its way.
type sending struct {
	left atomic.Int64
	over func()
}

// Get is of mem.BufferPool. Nobody asks for a buffer here.
func (*sending) Get(n int) *[]byte { b := make([]byte, n); return &b }

// Put is called when a buffer has been sent, or never will be.
func (s *sending) Put(*[]byte) {
	if s.left.Add(-1) == 0 {
		s.over()
	}
}
