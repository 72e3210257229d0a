package e2e

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// slow is a registry before the node's own that sends layers piece by piece,
// each when the test says so.
type slow struct {
	host    string // of its images' names
	pieces  chan struct{}
	waiting atomic.Int64 // requests that want a piece
}

// piece is much more than what a connection that breaks there counts as nothing.
const piece = 64 << 10

// newSlow makes a slow registry for images of that host.
func newSlow(t *testing.T, n *harness.Node, host string) *slow {
	t.Helper()
	s := &slow{host: host, pieces: make(chan struct{})}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, err := http.NewRequestWithContext(r.Context(), r.Method, "http://"+n.Registry.Host+r.URL.RequestURI(), nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		req.Header = r.Header
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		for r.Method == http.MethodGet && resp.ContentLength > piece {
			s.waiting.Add(1)
			select {
			case <-s.pieces:
				s.waiting.Add(-1)
			case <-r.Context().Done():
				s.waiting.Add(-1)
				return
			}
			if _, err := io.CopyN(w, resp.Body, piece); err != nil {
				return // the end, or the other side has gone
			}
			if http.NewResponseController(w).Flush() != nil {
				return
			}
		}
		io.Copy(w, resp.Body)
	}))
	t.Cleanup(server.Close)
	toml := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", server.URL, server.URL)
	dir := n.Path("certs.d/" + host)
	check(t, os.MkdirAll(dir, 0o755))
	check(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o600))
	return s
}

// send lets pieces go, as long as somebody takes them.
func (s *slow) send(pieces int) {
	for range pieces {
		s.pieces <- struct{}{}
	}
}

// idle waits until nobody wants a piece any more: the end of a pull is known here
// a moment later, and the next piece would be lost to it.
func (s *slow) idle(t *testing.T) {
	t.Helper()
	harness.Eventually(t, patience, "the registry knows that the pull has ended",
		func() bool { return s.waiting.Load() == 0 })
}

// hurry lets all go from now on.
func (s *slow) hurry() { close(s.pieces) }
