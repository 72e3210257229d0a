package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

var restConfig = &rest.Config{TLSClientConfig: rest.TLSClientConfig{Insecure: true}}

var protocols = []string{"SPDY", "WebSocket"}

// session runs a session of exec or attach through the kubelet. Where the runtime may
// be killed at any time, it is asked for again until there is one.
func (k *kubelet) session(protocol string, u *url.URL, o remotecommand.StreamOptions) error {
	k.t.Helper()
	e, err := executor(protocol, u)
	if err != nil {
		k.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * harness.Tick) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := e.StreamWithContext(ctx, o)
		cancel()
		var exit interface{ ExitStatus() int }
		if err == nil || !k.killing || errors.As(err, &exit) || time.Now().After(deadline) {
			return err
		}
	}
}

func executor(protocol string, u *url.URL) (remotecommand.Executor, error) {
	if protocol == "SPDY" {
		return remotecommand.NewSPDYExecutor(restConfig, "POST", u)
	}
	return remotecommand.NewWebSocketExecutor(restConfig, "GET", u.String())
}

// address is that of an endpoint of the kubelet for a container or a pod.
func address(verb string, query url.Values, names ...string) *url.URL {
	path := strings.Join(append([]string{"", verb, namespace}, names...), "/")
	return &url.URL{Scheme: "https", Host: server, Path: path, RawQuery: query.Encode()}
}

// exec is what a command in a container writes. It has to succeed.
func (k *kubelet) exec(pod, name string, command ...string) string {
	k.t.Helper()
	u := address("exec", url.Values{"command": command, "output": {"1"}, "error": {"1"}}, podName(pod), name)
	var out, errs strings.Builder
	if err := k.session("WebSocket", u, remotecommand.StreamOptions{Stdout: &out, Stderr: &errs}); err != nil {
		k.t.Fatalf("%v in %s of %s: %v: %s", command, name, pod, err, errs.String())
	}
	return out.String()
}

// Exec, attach and port-forward, each in both protocols.
func checkSessions(k *kubelet) {
	k.ready("sessions")
	for _, protocol := range protocols {
		k.t.Run(protocol, func(t *testing.T) {
			k := k.with(t)
			k.checkExec(protocol)
			k.checkAttach(protocol)
			k.checkForward(protocol)
		})
	}
}

func (k *kubelet) checkExec(protocol string) {
	k.t.Helper()
	query := url.Values{
		"command": {"sh", "-c", "cat; echo err >&2; exit 42"},
		"input":   {"1"},
		"output":  {"1"},
		"error":   {"1"},
	}
	var out, errs strings.Builder
	err := k.session(protocol, address("exec", query, podName("sessions"), "server"), remotecommand.StreamOptions{
		Stdin:  strings.NewReader("in\n"),
		Stdout: &out,
		Stderr: &errs,
	})
	var exit interface{ ExitStatus() int }
	if !errors.As(err, &exit) || exit.ExitStatus() != 42 || out.String() != "in\n" || errs.String() != "err\n" {
		k.t.Errorf("exec: stdout %q, stderr %q, %v; want exit code 42", out.String(), errs.String(), err)
	}
	query = url.Values{"command": {"sh", "-c", "tty; stty size"}, "input": {"1"}, "output": {"1"}, "tty": {"1"}}
	out.Reset()
	err = k.session(protocol, address("exec", query, podName("sessions"), "server"), remotecommand.StreamOptions{
		Stdin:             strings.NewReader(""),
		Stdout:            &out,
		Tty:               true,
		TerminalSizeQueue: &oneSize{Width: 97, Height: 31},
	})
	if err != nil || !strings.Contains(out.String(), "/dev/pts/") {
		k.t.Errorf("exec with a terminal: %q, %v", out.String(), err)
	}
}

// oneSize is a terminal that has one size for good.
type oneSize remotecommand.TerminalSize

func (s *oneSize) Next() *remotecommand.TerminalSize {
	if s.Width == 0 {
		return nil
	}
	size := remotecommand.TerminalSize(*s)
	s.Width = 0
	return &size
}

// An attach of the test ends when the process that it attaches to has ended, as the
// container of each protocol does after one line.
func (k *kubelet) checkAttach(protocol string) {
	k.t.Helper()
	name := "attach-" + strings.ToLower(protocol)
	var out strings.Builder
	query := url.Values{"input": {"1"}, "output": {"1"}, "error": {"1"}}
	err := k.session(protocol, address("attach", query, podName("sessions"), name), remotecommand.StreamOptions{
		Stdin:  strings.NewReader("word\n"),
		Stdout: &out,
		Stderr: io.Discard,
	})
	if err != nil || out.String() != "got word\n" {
		k.t.Errorf("attach: %q, %v", out.String(), err)
	}
}

func (k *kubelet) checkForward(protocol string) {
	k.t.Helper()
	u := address("portForward", nil, podName("sessions"))
	var failure error
	harness.Eventually(k.t, patience, "a port is forwarded", func() bool {
		failure = forwardEcho(protocol, u)
		return failure == nil || !k.killing
	})
	if failure != nil {
		k.t.Errorf("port-forward: %v", failure)
	}
}

// forwardEcho sends something through a forwarded port and reads it again.
func forwardEcho(protocol string, u *url.URL) error {
	d, err := dialer(protocol, u)
	if err != nil {
		return err
	}
	stop, ready, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	f, err := portforward.New(d, []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return err
	}
	go func() { done <- f.ForwardPorts() }()
	select {
	case err := <-done:
		return err
	case <-ready:
	}
	defer func() {
		close(stop)
		<-done
	}()
	ports, err := f.GetPorts()
	if err != nil {
		return err
	}
	return echo(fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
}

func dialer(protocol string, u *url.URL) (httpstream.Dialer, error) {
	if protocol == "WebSocket" {
		return portforward.NewSPDYOverWebsocketDialer(u, restConfig)
	}
	transport, upgrader, err := spdy.RoundTripperFor(restConfig)
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u), nil
}

// echo fails unless an address answers with what it is sent.
func echo(address string) error {
	conn, err := net.DialTimeout("tcp", address, time.Minute)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(conn)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("%s answers with %q", address, b)
	}
	return err
}
