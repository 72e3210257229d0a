package streaming

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// channels is a WebSocket protocol of exec and attach: what a message looks like, whose
// first character is a channel.
type channels struct {
	name   string
	text   bool // base64
	close  bool // a message on the channel of this name ends a stream
	status bool // the end is told as JSON, success as well
}

// protocols are those of the clients there are. Which one is for the client to prefer;
// one that names none speaks the first.
var protocols = []channels{
	{name: remotecommand.StreamProtocolV1Name},
	{name: "base64." + remotecommand.StreamProtocolV1Name, text: true},
	{name: remotecommand.StreamProtocolV4Name, status: true},
	{name: "v4.base64." + remotecommand.StreamProtocolV1Name, text: true, status: true},
	{name: remotecommand.StreamProtocolV5Name, close: true, status: true},
}

// readSize is how much is read of a WebSocket at a time, in bytes.
const readSize = 64 << 10

// maxSize bounds the message with a terminal's size, in bytes.
const maxSize = 1 << 10

// webSocket is a link that speaks WebSocket. The library makes the handshake and
// reads; what is sent is written here, without a copy.
type webSocket struct {
	*websocket.Conn
	link *link
}

// upgradeTo makes a request a WebSocket. On an error the client has its answer.
func upgradeTo(u *upgrade, req *http.Request, names []string) (*webSocket, error) {
	upgrader := websocket.Upgrader{
		Subprotocols:   names,
		ReadBufferSize: readSize,
		// A token is proof enough: nobody has one because of a cookie.
		CheckOrigin: func(*http.Request) bool { return true },
	}
	u.wrap = func(l *link) net.Conn { return l }
	ws, err := upgrader.Upgrade(u, req, nil)
	if err != nil {
		return nil, err
	}
	w := &webSocket{ws, u.link}
	ws.SetPingHandler(func(data string) error {
		return w.link.answer(append(messageHead(nil, websocket.PongMessage, len(data)), data...))
	})
	ws.SetCloseHandler(func(int, string) error { return nil }) // the end is told in the end
	return w, nil
}

// messageHead appends the header of a message of the server, whole in one frame
// (RFC 6455, section 5.2).
func messageHead(b []byte, kind, length int) []byte {
	b = append(b, 0x80|byte(kind))
	switch {
	case length < 126:
		return append(b, byte(length))
	case length < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(length))
	}
	return binary.BigEndian.AppendUint64(append(b, 127), uint64(length))
}

// send sends a message that has a beginning and a payload.
func (w *webSocket) send(kind int, first, payload []byte) error {
	head := messageHead(make([]byte, 0, 64), kind, len(first)+len(payload))
	return w.link.write(append(head, first...), payload)
}

// bye says that the WebSocket is at its end.
func (w *webSocket) bye() {
	w.send(websocket.CloseMessage, nil, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
}

// commandSocket is exec or attach over WebSocket.
type commandSocket struct {
	*webSocket
	channels
	stdin  *queue // nil: not wanted
	resize chan remotecommand.TerminalSize
}

// webCommand serves exec and attach over WebSocket.
func (s *Server) webCommand(u *upgrade, req *http.Request, r stream.Request) {
	offered := websocket.Subprotocols(req)
	names := make([]string, 0, len(protocols))
	for _, p := range protocols {
		names = append(names, p.name)
	}
	web, err := upgradeTo(u, req, names)
	if err != nil {
		return
	}
	w := &commandSocket{webSocket: web, channels: protocols[0]}
	w.resize = make(chan remotecommand.TerminalSize, 1)
	for _, p := range protocols {
		if p.name == web.Subprotocol() {
			w.channels = p
		}
	}
	if len(offered) > 0 && web.Subprotocol() == "" {
		w.bye() // none of them is known
		return
	}
	st := client.Streams{}
	lowest := byte(remotecommand.StreamErr)
	if r.Stdin {
		w.stdin = newQueue()
		defer w.stdin.abandon()
		st.Stdin = w.stdin
	}
	if r.Stderr {
		st.Stderr, lowest = channel{w, remotecommand.StreamStdErr}, remotecommand.StreamStdErr
	}
	if r.Stdout {
		st.Stdout, lowest = channel{w, remotecommand.StreamStdOut}, remotecommand.StreamStdOut
	}
	channel{w, lowest}.Write(nil) // the client sees that it is connected
	go w.read()
	w.tell(r.Kind, s.run(req.Context(), r, st, w.resize))
	w.bye()
}

// read takes messages until the connection ends, and then says so.
func (w *commandSocket) read() {
	defer close(w.resize)
	var err error
	for err == nil {
		var kind int
		var message io.Reader
		if kind, message, err = w.NextReader(); err == nil {
			err = w.take(kind, message)
		}
	}
	if w.stdin != nil {
		w.stdin.end(errGone)
	}
	w.link.conn.cancel(fmt.Errorf("%w: %w", errGone, err))
}

// take takes a message.
func (w *commandSocket) take(kind int, message io.Reader) error {
	if (kind == websocket.TextMessage) != w.text {
		return errors.New("a message is not of the kind that was agreed on")
	}
	var number [1]byte
	if _, err := io.ReadFull(message, number[:]); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return err
	}
	if w.text {
		number[0] -= '0'
		message = base64.NewDecoder(base64.StdEncoding, message)
	}
	switch {
	case number[0] == remotecommand.StreamStdIn && w.stdin != nil:
		_, err := w.stdin.ReadFrom(message)
		return err
	case number[0] == remotecommand.StreamResize:
		var size remotecommand.TerminalSize
		if err := json.NewDecoder(io.LimitReader(message, maxSize)).Decode(&size); err == nil {
			w.newest(size)
		}
	case number[0] == remotecommand.StreamClose && w.close:
		_, err := io.ReadFull(message, number[:])
		if err == nil && number[0] == remotecommand.StreamStdIn && w.stdin != nil {
			w.stdin.end(io.EOF)
		}
	}
	return nil
}

// newest has the process see the size, and none that is older.
func (w *commandSocket) newest(size remotecommand.TerminalSize) {
	for {
		select {
		case w.resize <- size:
			return
		default:
		}
		select {
		case <-w.resize:
		default:
		}
	}
}

// channel writes to the client on one of its channels.
type channel struct {
	to     *commandSocket
	number byte
}

func (c channel) Write(p []byte) (int, error) {
	kind, number, payload := websocket.BinaryMessage, c.number, p
	if c.to.text {
		kind, number = websocket.TextMessage, '0'+c.number
		payload = base64.StdEncoding.AppendEncode(nil, p)
	}
	if err := c.to.send(kind, []byte{number}, payload); err != nil {
		return 0, err
	}
	return len(p), nil
}

// status is the end of a session, in the words of the Kubernetes API.
type status struct {
	Status  string   `json:"status,omitempty"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes,omitempty"`
}

type cause struct {
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// statusOf is what the library says over SPDY as well.
func statusOf(k stream.Kind, err error) status {
	if err == nil {
		return status{Status: "Success"}
	}
	if exit, ok := errors.AsType[utilexec.ExitError](err); ok && exit.Exited() {
		return status{
			Status:  "Failure",
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.ExitStatus())}}},
		}
	}
	what := "executing command in"
	if k == stream.Attach {
		what = "attaching to"
	}
	return status{
		Status:  "Failure",
		Reason:  "InternalError",
		Message: fmt.Sprintf("Internal error occurred: error %s container: %v", what, err),
		Code:    http.StatusInternalServerError,
	}
}

// tell tells the client how its session has ended.
func (w *commandSocket) tell(k stream.Kind, err error) {
	st := statusOf(k, err)
	text := []byte(st.Message)
	if w.status {
		text, _ = json.Marshal(st) // of such a type it never fails
	}
	if len(text) > 0 {
		channel{w, remotecommand.StreamErr}.Write(text)
	}
}
