package streaming

import (
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// patience is how much longer the library waits for streams than this package, which
// closes the connection: a stream that comes when the library has just stopped waiting
// would never be answered.
const patience = time.Second

// spdyCommand serves exec and attach over SPDY.
func (s *Server) spdyCommand(u *upgrade, req *http.Request, r stream.Request) {
	c := &command{server: s, request: r}
	c.timeout = time.AfterFunc(s.CreationTimeout, func() {
		u.conn.cancel(errSlow)
		u.conn.Close()
	})
	defer c.timeout.Stop()
	u.wrap = func(l *link) net.Conn {
		c.guard = newGuard(l, l, l.write, &s.budget, streamsOf(req, r))
		return c.guard
	}
	defer func() {
		if c.guard != nil {
			c.guard.release()
		}
	}()
	options := &remotecommand.Options{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, TTY: r.TTY}
	wait := s.CreationTimeout + patience
	protocols := remotecommand.SupportedStreamingProtocols
	if r.Kind == stream.Exec {
		remotecommand.ServeExec(u, req, c, "", "", r.ID, r.Cmd, options, 0, wait, protocols)
	} else {
		remotecommand.ServeAttach(u, req, c, "", "", r.ID, options, 0, wait, protocols)
	}
}

// streamsOf is how many streams the library waits for. It takes no other ones.
func streamsOf(req *http.Request, r stream.Request) int {
	n := 1 // for the status
	for _, wanted := range []bool{r.Stdin, r.Stdout, r.Stderr, r.TTY && resizes(req)} {
		if wanted {
			n++
		}
	}
	return n
}

// resizes says whether the protocol that will be agreed on has a stream for sizes.
func resizes(req *http.Request) bool {
	for _, value := range req.Header.Values(httpstream.HeaderProtocolVersion) {
		for protocol := range strings.SplitSeq(value, ",") {
			protocol = strings.Trim(protocol, " ")
			if slices.Contains(remotecommand.SupportedStreamingProtocols, protocol) {
				return protocol == remotecommand.StreamProtocolV4Name || protocol == remotecommand.StreamProtocolV3Name
			}
		}
	}
	return false
}

// command is the library's way to run the process of one request.
type command struct {
	server  *Server
	request stream.Request
	guard   *guard
	timeout *time.Timer // until all streams are there
}

// ExecInContainer runs the command of the request.
func (c *command) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader,
	out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return c.AttachContainer(ctx, "", "", "", in, out, err, tty, resize)
}

// AttachContainer joins the client with the container of the request.
func (c *command) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader,
	out, err io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	c.timeout.Stop()
	st := client.Streams{Stdin: in, Stdout: out, Stderr: err}
	if s, ok := in.(counted); ok {
		st.Stdin = reader{s, c.guard}
	}
	return c.server.run(ctx, c.request, st, resize)
}
