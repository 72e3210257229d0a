package streaming

import (
	"net"
	"sync"
	"testing"
)

// discard is a connection that takes everything.
type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// A ping is answered, whatever is written at that moment.
func TestPongBesideWriter(t *testing.T) {
	for range 20_000 {
		l := &link{Conn: discard{}}
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() { l.write([]byte("x"), nil) })
			all.Go(func() { l.answer([]byte("pong")) })
		}
		if all.Wait(); l.pong != nil {
			t.Fatal("the pong waits for another write")
		}
	}
}
