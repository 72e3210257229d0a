package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrapes may run at a time; the others are turned away, as whoever reaches the
// address can ask.
const scrapes = 4

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
