package cri

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A message is the same whatever its size, and large ones are counted until they are
// sent.
func TestCodec(t *testing.T) {
	rooms := 0
	c := newCodec(func(*runtimeapi.ExecSyncResponse) func() { rooms++; return func() { rooms-- } })
	for _, size := range []int{0, 10, maxPooled - 100, maxPooled + 100, 16 << 20} {
		some := make([]byte, size)
		for i := range some {
			some[i] = byte(i)
		}
		for _, want := range []proto.Message{
			&runtimeapi.ExecSyncResponse{Stdout: some, ExitCode: 7},
			&runtimeapi.ExecSyncResponse{Stderr: some, ExitCode: -1},
			&runtimeapi.ExecSyncResponse{Stdout: some, Stderr: some[:size/2]},
			&runtimeapi.StatusResponse{Info: map[string]string{"x": strings.Repeat("x", size)}},
		} {
			b, err := c.Marshal(want)
			must.Succeed(t, err)
			if n := c.large.Load(); (n > 0) != (proto.Size(want) > maxPooled) {
				t.Errorf("%d bytes: %d large messages", size, n)
			}
			got := want.ProtoReflect().New().Interface()
			if err := c.Unmarshal(b, got); err != nil || !proto.Equal(got, want) {
				t.Errorf("%T, %d bytes: %v", want, size, err)
			}
			if _, output := want.(*runtimeapi.ExecSyncResponse); output && proto.Size(want) > maxPooled && rooms != 1 {
				t.Errorf("%d bytes: the room of %d answers is kept while one is sent", size, rooms)
			}
			b.Free()
			if rooms != 0 {
				t.Errorf("%d bytes: the room of %d answers is kept for ever", size, rooms)
			}
			if n := c.large.Load(); n != 0 {
				t.Errorf("%d bytes: %d large messages are still being sent", size, n)
			}
		}
	}
}
