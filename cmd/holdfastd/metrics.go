package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrapes may run at a time; the others are turned away, as whoever reaches the
// address can ask.
const scrapes = 4

// connections may stand open; a new one ends the one on which least has happened lately.
const connections = 64

// checkHostPort checks an address to listen on and gives its host.
func checkHostPort(address string) (host string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil && port == "" {
		err = errors.New("the port is missing")
	}
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	return host, err
}

// metricsServer serves GET /metrics until it is shut down, and nothing else.
type metricsServer struct {
	http  *http.Server
	ended chan struct{}
}

// serveMetrics listens on address.
func serveMetrics(address string, g prometheus.Gatherer, log *slog.Logger) (*metricsServer, error) {
	// Children do not inherit it: Go's descriptors are closed on exec.
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("cannot serve metrics: metrics.address = %q: %w", address, err)
	}
	mux := http.NewServeMux()
	// Not compressed: it is small, and stays on the node or in its network.
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{
		MaxRequestsInFlight: scrapes,
		DisableCompression:  true,
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}))
	s := &metricsServer{
		ended: make(chan struct{}),
		http: &http.Server{
			Handler:        mux,
			MaxHeaderBytes: 16 << 10,
			ReadTimeout:    10 * time.Second,
			WriteTimeout:   30 * time.Second,
			IdleTimeout:    3 * time.Minute, // scrapes come once a minute or more often
			ConnState:      new(bound).note,
			// What strangers get wrong is no event here.
			ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}
	go func() {
		defer close(s.ended)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("no metrics any more", "error", err)
		}
	}()
	log.Info("serving metrics", "address", l.Addr().String())
	return s, nil
}

// bound keeps the number of connections within its limit.
type bound struct {
	mu   sync.Mutex
	open []net.Conn // that on which least has happened lately first
}

func (b *bound) note(c net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open = slices.DeleteFunc(b.open, func(o net.Conn) bool { return o == c })
	if state == http.StateClosed || state == http.StateHijacked {
		return
	}
	if b.open = append(b.open, c); len(b.open) > connections {
		b.open[0].Close()
		b.open = b.open[1:]
	}
}

// close ends it, within ctx.
func (s *metricsServer) close(ctx context.Context) {
	if s == nil {
		return
	}
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	<-s.ended
}
