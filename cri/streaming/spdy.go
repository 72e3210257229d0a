package streaming

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// commandStreams are the streams of exec or attach.
type commandStreams struct {
	all    map[string]*spdyStream // by type; nil: it has not come yet
	left   int                    // of all, that have not come
	ready  chan struct{}          // closed when all have
	stdin  *queue
	resize *queue
}

// wantStreams is what the client of a request will open.
func wantStreams(r stream.Request, protocol string) *commandStreams {
	c := &commandStreams{
		all:   map[string]*spdyStream{remotecommand.StreamTypeError: nil},
		ready: make(chan struct{}),
	}
	resizes := protocol == remotecommand.StreamProtocolV4Name || protocol == remotecommand.StreamProtocolV3Name
	for kind, wanted := range map[string]bool{
		remotecommand.StreamTypeStdin:  r.Stdin,
		remotecommand.StreamTypeStdout: r.Stdout,
		remotecommand.StreamTypeStderr: r.Stderr,
		remotecommand.StreamTypeResize: r.TTY && resizes,
	} {
		if wanted {
			c.all[kind] = nil
		}
	}
	c.left = len(c.all)
	return c
}

// opened takes a stream. It is called by one goroutine.
func (c *commandStreams) opened(s *spdyStream) error {
	kind := s.headers.Get(typeHeader)
	if had, wanted := c.all[kind]; !wanted || had != nil {
		return fmt.Errorf("%w: a stream %q is not expected", errProtocol, kind)
	}
	switch kind {
	case remotecommand.StreamTypeStdin:
		c.stdin = s.take(stdinQueue)
	case remotecommand.StreamTypeResize:
		c.resize = s.take(sizeQueue)
	}
	c.all[kind] = s
	s.accept()
	if c.left--; c.left == 0 {
		close(c.ready)
	}
	return nil
}

// spdyCommand serves exec and attach over SPDY.
func (s *Server) spdyCommand(u *upgrade, req *http.Request, r stream.Request) {
	protocol, err := upgradeSPDY(u, req, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return
	}
	c := wantStreams(r, protocol)
	conn := newSPDY(u.link, u.link, u.link.write, u.link.answer, len(c.all), c.opened)
	defer conn.end()
	go conn.serve() // until the connection is closed
	select {
	case <-c.ready:
	case <-time.After(s.CreationTimeout):
		u.conn.cancel(errSlow)
		return
	case <-req.Context().Done():
		return
	}
	status := c.all[remotecommand.StreamTypeError]
	if protocol == remotecommand.StreamProtocolV1Name {
		// Its clients wait for that before they send anything.
		status.Close()
		if stdin := c.all[remotecommand.StreamTypeStdin]; stdin != nil {
			stdin.Close()
		}
	}
	var st client.Streams
	if c.stdin != nil {
		st.Stdin = c.stdin
	}
	if out := c.all[remotecommand.StreamTypeStdout]; out != nil {
		st.Stdout = out
	}
	if errs := c.all[remotecommand.StreamTypeStderr]; errs != nil {
		st.Stderr = errs
	}
	err = s.run(req.Context(), r, st, c.sizes())
	if protocol != remotecommand.StreamProtocolV1Name {
		tell(status, protocol == remotecommand.StreamProtocolV4Name, r.Kind, err)
	}
}

// sizes reads those of the client's terminal, until its stream ends.
func (c *commandStreams) sizes() <-chan client.Size {
	if c.resize == nil {
		return nil
	}
	sizes := make(chan client.Size, 1)
	go func() {
		defer close(sizes)
		defer c.resize.abandon() // what follows is no size
		limited := &io.LimitedReader{R: c.resize}
		for decoder := json.NewDecoder(limited); ; {
			limited.N = maxSize
			var size client.Size
			if decoder.Decode(&size) != nil {
				return
			}
			newest(sizes, size)
		}
	}()
	return sizes
}
