package shim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// MaxConns is for the tests with a shim.
const MaxConns = maxConns

// The headers are found however the bytes come.
func TestFrames(t *testing.T) {
	var bytes []byte
	for i, n := range []int{0, 1, 5000, 10} {
		bytes = binary.BigEndian.AppendUint32(bytes, uint32(n))
		bytes = binary.BigEndian.AppendUint32(bytes, uint32(i))
		bytes = append(bytes, byte(i+1), byte(i+2))
		bytes = append(bytes, make([]byte, n)...)
	}
	for size := 1; size <= len(bytes); size += 1 + size/7 {
		var s frames
		var found []frame
		for rest := bytes; len(rest) > 0; rest = rest[min(size, len(rest)):] {
			s.feed(rest[:min(size, len(rest))], func(f frame) { found = append(found, f) })
		}
		want := []frame{{0, 0, 1, 2}, {1, 1, 2, 3}, {5000, 2, 3, 4}, {10, 3, 4, 5}}
		if fmt.Sprint(found) != fmt.Sprint(want) {
			t.Fatalf("in pieces of %d: %v, want %v", size, found, want)
		}
	}
}

// short is a listener whose first accepts fail.
type short struct {
	net.Listener
	errs []unix.Errno
}

func (l *short) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", l.errs[0])}
	l.errs = l.errs[1:]
	return nil, err
}

// A machine that has had no memory for a connection takes it later. The socket stays.
func TestAcceptFails(t *testing.T) {
	dir := rundir.Dir(t.TempDir())
	l, err := dir.Listen()
	must.Succeed(t, err)
	defer l.Close()
	server, err := ttrpc.NewServer()
	must.Succeed(t, err)
	defer server.Close()
	pb.RegisterShimService(server, &service{identity: rundir.Identity{Nonce: "this one"}})
	calls := newCalls(slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() {
		errs := []unix.Errno{unix.ENOMEM, unix.ENOBUFS, unix.EMFILE, unix.EPERM}
		served <- server.Serve(context.Background(), calls.listener(&short{l, errs}))
	}()
	c, err := dir.Dial(t.Context())
	must.Succeed(t, err)
	conn := ttrpc.NewClient(c)
	defer conn.Close()
	r, err := pb.NewShimClient(conn).Hello(t.Context(), &pb.HelloRequest{Id: dir.ID()})
	if err != nil || r.Nonce != "this one" {
		t.Errorf("hello: %v, %v", r, err)
	}
	l.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ends with %v", err)
	}
}
