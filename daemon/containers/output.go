package containers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Output of one ExecSync. The CRI asks for a cap at 16 MiB of each stream, but
// the kubelet takes in no answer above 16 MiB: both have to fit together, with
// room for the rest of the message.
const (
	maxExecStream = 16 << 20
	maxExecOutput = 16<<20 - 64<<10
)

// Of all ExecSync together. Any number of commands may run and write: each has its
// first output in memory, and what is beyond in a file on the disk. When one has
// ended, its output comes back into memory for the answer. Large answers wait for each
// other until they have been sent: grpc would queue all of them for a slow client.
const (
	execMemory  = 64 << 10      // of each stream, while the command runs
	smallAnswer = 256 << 10     // does not wait: a probe's never is larger
	maxAnswers  = maxExecOutput // of all larger ones, until they have been sent
	// sendLimit is for how long a client that does not read holds up the others.
	sendLimit = 30 * time.Second
)

// reserve takes room for an answer, which release gives back, once.
func (m *Manager) reserve(ctx context.Context, size int64) (release func(), err error) {
	if size <= smallAnswer {
		return func() {}, nil
	}
	if err := m.answers.Acquire(ctx, size); err != nil {
		return nil, kind.Errorf(kind.Unavailable, "the output of other commands takes all room for it: %w", err)
	}
	return sync.OnceFunc(func() { m.answers.Release(size) }), nil
}

// keepRoom keeps the room of an answer until it is sent (Room), or its call has ended
// without that.
func (m *Manager) keepRoom(ctx context.Context, r *runtimeapi.ExecSyncResponse, release func()) {
	m.rooms.Store(r, release)
	context.AfterFunc(ctx, func() { m.Room(r)() })
}

// Room hands over the room that an answer takes to whoever sends it. The function is
// called when it has been sent.
func (m *Manager) Room(r *runtimeapi.ExecSyncResponse) (sent func()) {
	room, ok := m.rooms.LoadAndDelete(r)
	if !ok {
		return func() {}
	}
	release := room.(func())
	overdue := time.AfterFunc(sendLimit, release)
	return func() {
		overdue.Stop()
		release()
	}
}

// output keeps what one stream of a command has written. It is written to by one
// goroutine, and read when that has ended.
type output struct {
	dir    string // where there is room on a disk
	memory []byte
	file   *os.File // what is beyond execMemory; nil: nothing
	err    error    // of the first write to file that failed: the rest is dropped
}

func (c *Container) newOutput() *output { return &output{dir: c.m.State.Dir(state.Containers, c.ID())} }

// Write takes everything: a command that nobody reads from would wait for ever.
func (o *output) Write(b []byte) (int, error) {
	n := min(len(b), execMemory-len(o.memory))
	o.memory = append(o.memory, b[:n]...)
	if n == len(b) || o.err != nil {
		return len(b), nil
	}
	if o.file == nil {
		o.file, o.err = unnamed(o.dir)
	}
	if o.err == nil {
		_, o.err = o.file.Write(b[n:])
	}
	return len(b), nil
}

// unnamed makes a file that nobody else can open and that goes with its descriptor:
// on the disk, or where that cannot be, in memory.
func unnamed(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		if fd, err = unix.MemfdCreate("output", unix.MFD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("cannot make a file for the output of a command: %w", err)
		}
	}
	return os.NewFile(uintptr(fd), "output"), nil
}

// bytes are the first n bytes, or what there is of them.
func (o *output) bytes(n int64) ([]byte, error) {
	if n <= int64(len(o.memory)) || o.file == nil {
		return o.memory[:min(n, int64(len(o.memory)))], nil
	}
	b := make([]byte, n)
	copy(b, o.memory)
	m, err := o.file.ReadAt(b[len(o.memory):], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cannot read the output of the command: %w", err)
	}
	return b[:len(o.memory)+m], nil
}

func (o *output) Close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// share divides the room of an answer: a stream that needs less than half of it
// leaves the rest to the other one.
func share(out, err int64) (int64, int64) {
	const half = maxExecOutput / 2
	switch {
	case out+err <= maxExecOutput:
		return out, err
	case err <= half:
		return maxExecOutput - err, err
	case out <= half:
		return out, maxExecOutput - out
	}
	return half, half
}
