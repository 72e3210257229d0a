package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/metrics"
)

func TestMetricsConfig(t *testing.T) {
	f := defaults()
	if c, _ := f.resolve("info"); c.Metrics != nil {
		t.Error("metrics are on by default")
	}
	for _, address := range []string{"127.0.0.1:9464", ":9464", "0.0.0.0:0", "[::1]:9464", "localhost:http"} {
		f.Metrics.Address = address
		if c, err := f.resolve("info"); c.Metrics == nil {
			t.Errorf("%s: %v", address, err)
		}
	}
	for _, address := range []string{"127.0.0.1", "9464", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1", "::1:9464",
		"http://127.0.0.1:9464", "127.0.0.1:no-such-port", " "} {
		f.Metrics.Address = address
		if _, err := f.resolve("info"); err == nil || !strings.Contains(err.Error(), "metrics.address") ||
			!strings.Contains(err.Error(), address) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestServeMetrics(t *testing.T) {
	m := metrics.New("1")
	log := slog.New(slog.DiscardHandler)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := l.Addr().String()
	g := m.Gatherer(func() metrics.Snapshot { return metrics.Snapshot{} })
	if _, err := serveMetrics(address, g, log); err == nil || !strings.Contains(err.Error(), "metrics.address") ||
		!strings.Contains(err.Error(), "in use") {
		t.Errorf("an address in use: %v", err)
	}
	check(t, l.Close())
	s, err := serveMetrics(address, g, log)
	check(t, err)
	for _, r := range []struct {
		method, path string
		code         int
	}{
		{"GET", "/metrics", 200}, {"HEAD", "/metrics", 200}, {"POST", "/metrics", 405}, {"DELETE", "/metrics", 405},
		{"GET", "/", 404}, {"GET", "/metrics/x", 404}, {"GET", "/debug/pprof/", 404}, {"GET", "/healthz", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://"+address+r.path, nil)
		check(t, err)
		resp, err := http.DefaultClient.Do(req)
		check(t, err)
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != r.code {
			t.Errorf("%s %s: %s", r.method, r.path, resp.Status)
		}
		if r.method == "GET" && r.code == 200 && !strings.Contains(string(b), "holdfast_build_info") {
			t.Errorf("%s", b)
		}
	}
	// A connection that stands idle does not keep it.
	s.close(context.Background())
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Error("it still listens")
	}
	(*metricsServer)(nil).close(context.Background())
}

// Connections that nobody uses have a bound, and keep no scrape out.
func TestMetricsConnectionsAreBounded(t *testing.T) {
	g := metrics.New("1").Gatherer(func() metrics.Snapshot { return metrics.Snapshot{} })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	check(t, l.Close())
	s, err := serveMetrics(l.Addr().String(), g, slog.New(slog.DiscardHandler))
	check(t, err)
	defer s.close(t.Context())
	var all []net.Conn
	for range 3 * connections {
		c, err := net.Dial("tcp", l.Addr().String())
		check(t, err)
		defer c.Close()
		all = append(all, c)
	}
	resp, err := http.Get("http://" + l.Addr().String() + "/metrics")
	check(t, err)
	resp.Body.Close()
	var open atomic.Int32
	var reads sync.WaitGroup
	for _, c := range all {
		c.SetReadDeadline(time.Now().Add(3 * time.Second))
		reads.Go(func() {
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				open.Add(1)
			}
		})
	}
	if reads.Wait(); open.Load() > connections {
		t.Errorf("%d connections stand open", open.Load())
	}
}
