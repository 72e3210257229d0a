package containers

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// Output is kept as it was written, whatever its size, on a disk or without one.
func TestOutput(t *testing.T) {
	for name, dir := range map[string]string{"on a disk": t.TempDir(), "without a disk": "/no/such/directory"} {
		for _, size := range []int{0, 1, execMemory - 1, execMemory, execMemory + 1, 5*execMemory + 7} {
			want := make([]byte, size)
			for i := range want {
				want[i] = byte(i * 7)
			}
			o := &output{dir: dir}
			for rest := want; len(rest) > 0; {
				n := min(len(rest), 10000)
				if m, err := o.Write(rest[:n]); m != n || err != nil {
					t.Fatalf("%s: wrote %d of %d, %v", name, m, n, err)
				}
				rest = rest[n:]
			}
			if got, err := o.bytes(int64(size)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, %d bytes: %d came back, %v", name, size, len(got), err)
			}
			if got, err := o.bytes(int64(size / 2)); err != nil || !bytes.Equal(got, want[:size/2]) {
				t.Errorf("%s, half of %d bytes: %d came back, %v", name, size, len(got), err)
			}
			if len(o.memory) > execMemory {
				t.Errorf("%s: %d bytes in memory", name, len(o.memory))
			}
			o.Close()
		}
	}
}

// A disk that fails holds up no command: what is there is given, the rest dropped.
func TestOutputLost(t *testing.T) {
	closed, err := unnamed(t.TempDir())
	must.Succeed(t, err)
	closed.Close() // stands for a full disk
	o := &output{file: closed}
	for range 3 {
		if n, err := o.Write(make([]byte, execMemory)); n != execMemory || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
	}
	if o.err == nil {
		t.Error("nothing tells of the loss")
	}
}

func TestTellMissing(t *testing.T) {
	for stderr, want := range map[string]string{
		"":      "holdfast: 7 bytes of output are missing here",
		"end\n": "end\nholdfast: 7 bytes of output are missing here",
		"end":   "end\nholdfast: 7 bytes of output are missing here",
	} {
		if got := string(tellMissing([]byte(stderr), 7)); !strings.HasPrefix(got, want) ||
			!strings.HasSuffix(got, "\n") {
			t.Errorf("%q became %q", stderr, got)
		}
	}
}

// All large answers together have a bound: one waits until the others are sent, or
// their calls are over, for as long as its caller does. Small ones wait for nobody.
func TestAnswersHaveABound(t *testing.T) {
	m := New(Options{})
	for name, over := range map[string]func(r *runtimeapi.ExecSyncResponse, endCall func()){
		"it was sent": func(r *runtimeapi.ExecSyncResponse, endCall func()) {
			sent := m.Room(r)
			endCall() // grpc may have it in a queue still
			if m.answers.TryAcquire(1) {
				t.Error("there is room before it was sent")
			}
			sent()
			sent()
		},
		"it was never sent": func(_ *runtimeapi.ExecSyncResponse, endCall func()) { endCall() },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, endCall := context.WithCancel(t.Context())
			release, err := m.reserve(ctx, maxAnswers)
			must.Succeed(t, err)
			r := &runtimeapi.ExecSyncResponse{}
			m.keepRoom(ctx, r, release)
			if _, err := m.reserve(t.Context(), smallAnswer); err != nil {
				t.Errorf("a small one: %v", err)
			}
			short, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := m.reserve(short, smallAnswer+1); !errors.Is(err, kind.Unavailable) {
				t.Errorf("beyond the bound: %v", err)
			}
			waits := make(chan error)
			go func() {
				release, err := m.reserve(t.Context(), maxAnswers)
				if err == nil {
					release()
				}
				waits <- err
			}()
			over(r, endCall)
			if err := <-waits; err != nil {
				t.Error(err)
			}
		})
	}
}
