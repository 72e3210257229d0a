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
	large largeBuffers
}

func newCodec() *codec { return &codec{CodecV2: encoding.GetCodecV2(grpcproto.Name)} }

// Marshal encodes a message.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok || proto.Size(m) <= maxPooled {
		return c.CodecV2.Marshal(v)
	}
	if r, ok := v.(*runtimeapi.ExecSyncResponse); ok {
		return c.output(r), nil
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{c.buffer(b)}, nil
}

func (c *codec) buffer(b []byte) mem.Buffer {
	if len(b) <= maxPooled {
		return mem.SliceBuffer(b)
	}
	c.large.Add(1)
	return mem.NewBuffer(&b, &c.large)
}

// output encodes the answer with the output of a command without copying that.
func (c *codec) output(r *runtimeapi.ExecSyncResponse) mem.BufferSlice {
	var all mem.BufferSlice
	for _, f := range []struct {
		number protowire.Number
		value  []byte
	}{{1, r.GetStdout()}, {2, r.GetStderr()}} {
		head := protowire.AppendTag(nil, f.number, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(f.value)))
		all = append(all, mem.SliceBuffer(head), c.buffer(f.value))
	}
	code := protowire.AppendTag(nil, 3, protowire.VarintType)
	return append(all, mem.SliceBuffer(protowire.AppendVarint(code, uint64(r.GetExitCode()))))
}

// largeBuffers counts the buffers that are being sent.
type largeBuffers struct{ atomic.Int64 }

// Get is of mem.BufferPool. Nobody asks for a buffer here.
func (*largeBuffers) Get(n int) *[]byte { b := make([]byte, n); return &b }

// Put is called when a buffer has been sent, or never will be.
func (l *largeBuffers) Put(*[]byte) {
	if l.Add(-1) == 0 {
		go debug.FreeOSMemory() // takes a moment, and grpc waits for this
	}
}
