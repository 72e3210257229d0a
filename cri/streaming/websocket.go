package streaming

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	resize chan client.Size
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
	w.resize = make(chan client.Size, 1)
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
		w.stdin = newQueue(stdinQueue)
		defer w.stdin.abandon()
		st.Stdin = w.stdin
	}
	if r.Stderr {
		st.Stderr, lowest = w.channel(remotecommand.StreamStdErr), remotecommand.StreamStdErr
	}
	if r.Stdout {
		st.Stdout, lowest = w.channel(remotecommand.StreamStdOut), remotecommand.StreamStdOut
	}
	w.channel(lowest).Write(nil) // the client sees that it is connected
	go w.read()
	tell(w.channel(remotecommand.StreamErr), w.status, r.Kind, s.run(req.Context(), r, st, w.resize))
	w.bye()
}

// read takes messages until the connection ends, and then says so.
func (w *commandSocket) read() {
	defer close(w.resize)
	var err error
	for err == nil {
		var message io.Reader
		if _, message, err = w.NextReader(); err == nil {
			err = w.take(message)
		}
	}
	if w.stdin != nil {
		w.stdin.end(errGone)
	}
	w.link.conn.cancel(fmt.Errorf("%w: %w", errGone, err))
}

// take takes a message.
func (w *commandSocket) take(message io.Reader) error {
	number, payload, err := parse(message, w.text)
	switch {
	case errors.Is(err, io.EOF):
	case err != nil:
		return err
	case number == remotecommand.StreamStdIn && w.stdin != nil:
		_, err := w.stdin.ReadFrom(payload)
		return err
	case number == remotecommand.StreamResize:
		var size client.Size
		if err := json.NewDecoder(io.LimitReader(payload, maxSize)).Decode(&size); err == nil {
			newest(w.resize, size)
		}
	case number == remotecommand.StreamClose && w.close:
		var which [1]byte
		_, err := io.ReadFull(payload, which[:])
		if err == nil && which[0] == remotecommand.StreamStdIn && w.stdin != nil {
			w.stdin.end(io.EOF)
		}
	}
	return nil
}

// parse takes a message apart. io.EOF: it is empty. Whether the client has sent it as text or
// as binary means nothing: some send whatever is a string to them as text.
func parse(message io.Reader, text bool) (number byte, payload io.Reader, err error) {
	var first [1]byte
	if _, err := io.ReadFull(message, first[:]); err != nil {
		return 0, nil, err
	}
	if text {
		return first[0] - '0', base64.NewDecoder(base64.StdEncoding, message), nil
	}
	return first[0], message, nil
}

// newest has the process see the size, and none that is older.
func newest(sizes chan client.Size, size client.Size) {
	for {
		select {
		case sizes <- size:
			return
		default:
		}
		select {
		case <-sizes:
		default:
		}
	}
}

func (w *commandSocket) channel(number byte) channel { return channel{w.webSocket, w.text, number} }

// channel writes to the client on one of its channels.
type channel struct {
	to     *webSocket
	text   bool
	number byte
}

func (c channel) Write(p []byte) (int, error) {
	kind, number, payload := websocket.BinaryMessage, c.number, p
	if c.text {
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

// statusOf is the end of a session as a kubelet's clients know it.
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

// tell tells a client how its session has ended.
func tell(to io.Writer, asJSON bool, k stream.Kind, err error) {
	st := statusOf(k, err)
	text := []byte(st.Message)
	if asJSON {
		text, _ = json.Marshal(st) // of such a type it never fails
	}
	if len(text) > 0 {
		to.Write(text)
	}
}
