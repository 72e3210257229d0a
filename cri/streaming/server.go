// Package streaming serves exec, attach and port-forward over HTTP. Whoever brings a
// token, which the daemon gave out, gets the session that it stands for, over SPDY
// or WebSocket. It runs in holdfast-stream, without a daemon.
package streaming

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// Bounds on a client that has shown no token yet.
const (
	headerLimit = 10 * time.Second // for the handshake of TLS and the request's header
	maxHeader   = 32 << 10         // bytes; the kubelet passes on what its client sent
)

var errSlow = errors.New("the client has opened too few streams in time")

// Config is what a server works with.
type Config struct {
	Take func(token string) (stream.Request, error) // as stream.Dir.Take
	Open Opener
	Dial Dialer
	// IdleTimeout ends a session in which nothing is sent or received for so long.
	IdleTimeout time.Duration
	// CreationTimeout is what a client has for opening the streams of a session.
	CreationTimeout time.Duration
	TLS             *tls.Config // nil: none
	Log             *slog.Logger
}

// Server serves sessions.
type Server struct {
	Config
	conns    *conns
	forwards forwards
	// The constants of these names; tests have others.
	sizeWait, waitLimit time.Duration
}

// New makes a server.
func New(c Config) (*Server, error) {
	cs, err := newConns()
	if err != nil {
		return nil, err
	}
	return &Server{
		Config:    c,
		conns:     cs,
		forwards:  forwards{pods: map[string]int{}},
		sizeWait:  sizeWait,
		waitLimit: waitLimit,
	}, nil
}

// Idle says for how long there has been no connection. While there is one it is 0.
func (s *Server) Idle() time.Duration { return s.conns.idle() }

type connKey struct{}

// Serve serves the connections of l, which is one of TCP, until l fails or is closed.
func (s *Server) Serve(l net.Listener) error {
	server := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       headerLimit,
		MaxHeaderBytes:    maxHeader,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/1.1 alone
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
			if t, ok := nc.(*tls.Conn); ok {
				nc = t.NetConn()
			}
			return context.WithValue(ctx, connKey{}, nc)
		},
	}
	l = &listener{l, s.conns}
	if s.TLS != nil {
		l = tls.NewListener(l, s.TLS)
	}
	return server.Serve(l)
}

// ServeHTTP serves one session.
func (s *Server) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	c := req.Context().Value(connKey{}).(*conn)
	what, token, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/"), "/")
	switch stream.Kind(what) {
	case stream.Exec, stream.Attach, stream.PortForward:
	default:
		http.NotFound(w, req)
		return
	}
	if req.Method != http.MethodGet && req.Method != http.MethodPost {
		http.Error(w, "a session is asked for with GET or POST", http.StatusMethodNotAllowed)
		return
	}
	if !upgrades(req) {
		http.Error(w, "a session needs a client that speaks SPDY/3.1 or WebSocket", http.StatusBadRequest)
		return
	}
	r, err := s.Take(token)
	if err == nil {
		err = step.Reach(step.StreamTaken)
	}
	switch {
	case errors.Is(err, kind.NotFound) || err == nil && string(r.Kind) != what:
		http.NotFound(w, req)
		return
	case err != nil:
		s.Log.Error("cannot use a token", "error", err)
		http.Error(w, "cannot use the token", http.StatusInternalServerError)
		return
	}
	c.admit()
	s.session(w, req, c, r)
}

// upgrades says whether a request asks for another protocol.
func upgrades(req *http.Request) bool {
	for _, v := range req.Header.Values("Connection") {
		if strings.Contains(strings.ToLower(v), "upgrade") {
			return req.Header.Get("Upgrade") != ""
		}
	}
	return false
}

// session serves the session of a token. Its context ends with the client.
func (s *Server) session(w http.ResponseWriter, req *http.Request, c *conn, r stream.Request) {
	log := s.Log.With("kind", r.Kind, "id", r.ID, "client", c.RemoteAddr())
	log.Debug("session begins")
	ctx, cancel := context.WithCancelCause(c.ctx)
	defer cancel(context.Canceled)
	defer c.endWhenIdle(s.IdleTimeout)()
	// Nobody waits for a client that has gone: neither to write to it nor to read.
	stop := context.AfterFunc(c.ctx, func() { c.tcp.SetDeadline(time.Now().Add(lingerLimit)) })
	defer stop()
	u := &upgrade{ResponseWriter: w, conn: c}
	defer u.finish()
	req = req.WithContext(ctx)
	switch {
	case r.Kind == stream.PortForward:
		s.forward(u, req, r)
	case websocket.IsWebSocketUpgrade(req):
		s.webCommand(u, req, r)
	default:
		s.spdyCommand(u, req, r)
	}
	log.Debug("session has ended", "cause", context.Cause(c.ctx))
}
