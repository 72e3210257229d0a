package netns

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// unanswered listens at a port that makes no more connections: its backlog is full.
func unanswered(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		err = unix.Listen(fd, 0)
	}
	must.Succeed(t, err)
	l := os.NewFile(uintptr(fd), "listener")
	t.Cleanup(func() { l.Close() })
	name, err := net.FileListener(l)
	must.Succeed(t, err)
	t.Cleanup(func() { name.Close() })
	for full := false; !full; {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // more than a slow one takes
		c, err := Dial(ctx, "", name.Addr().String())
		cancel()
		if full = err != nil; !full {
			t.Cleanup(func() { c.Close() })
		}
	}
	return name.Addr().String()
}

func threads(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/task")
	must.Succeed(t, err)
	return len(all)
}

// Connections that are not made hold no threads, and end with their context.
func TestDialThatIsNotAnswered(t *testing.T) {
	address := unanswered(t)
	before, most := threads(t), 0
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if c, err := Dial(ctx, "", address); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, %v, want the end of its time", c, err)
			}
		})
	}
	for ; ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		most = max(most, threads(t))
	}
	all.Wait()
	if most > before+50 {
		t.Errorf("up to %d threads, before %d", most, before)
	}
}

func TestDial(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must.Succeed(t, err)
	address := l.Addr().String()
	c, err := Dial(t.Context(), "", strings.Replace(address, "127.0.0.1", "localhost", 1))
	must.Succeed(t, err)
	defer c.Close()
	if got := c.RemoteAddr().String(); got != address {
		t.Errorf("connected with %s, want %s", got, address)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Error(err)
	}
	l.Close()
	for _, bad := range []string{address, "name:80", "127.0.0.1", "127.0.0.1:99999", "::1:80"} {
		if _, err := Dial(t.Context(), "", bad); err == nil || !strings.HasPrefix(err.Error(), "cannot dial") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
