package sessions

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// forward has local addresses forwarded to ports of a pod, for as long as the test runs.
func forward(t *testing.T, p *harness.Pod, protocol string, ports ...int) (local []string) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	resp, err := p.N.Runtime.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	var wanted []string
	for _, port := range ports {
		wanted = append(wanted, fmt.Sprintf("0:%d", port))
	}
	stop, ready, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	f, err := portforward.New(dialer(t, protocol, u), wanted, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	go func() { done <- f.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("cannot forward: %v", err)
	case <-time.After(patience):
		t.Fatal("nothing is forwarded")
	}
	t.Cleanup(func() {
		close(stop)
		<-done
	})
	forwarded, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range forwarded {
		local = append(local, fmt.Sprintf("127.0.0.1:%d", port.Local))
	}
	return local
}

func dialer(t *testing.T, protocol string, u *url.URL) httpstream.Dialer {
	t.Helper()
	if protocol == "WebSocket" {
		d, err := portforward.NewSPDYOverWebsocketDialer(u, &rest.Config{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u)
}

// echo sends what in has to an address, then the end, and hashes what comes back.
func echo(address string, in io.Reader) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, in)
		conn.(*net.TCPConn).CloseWrite()
		sent <- err
	}()
	got := sha256.New()
	if _, err := io.Copy(got, conn); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", got.Sum(nil)), <-sent
}

// server answers with what it is sent. Its end of the answer comes behind the client's.
var server = []string{"testbox", "echo", "8080"}

func listening(t *testing.T, c *harness.Container) {
	t.Helper()
	harness.Eventually(t, patience, "the server listens", func() bool {
		return strings.Contains(c.Output("cat", "/proc/net/tcp", "/proc/net/tcp6"), ":1F90 ")
	})
}

func TestPortForward(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("forward")
	c := pod.Run("server", server)
	listening(t, c)
	both(t, func(t *testing.T, protocol string) {
		local := forward(t, pod.With(t), protocol, 8080)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				in := newNoise(1 << 20)
				if got, err := echo(local[0], in); err != nil || got != in.sum() {
					t.Errorf("what came back has the hash %s, want %s: %v", got, in.sum(), err)
				}
			})
		}
		wg.Wait()
	})
}

// Much goes to a pod and comes back, while the daemon dies again and again.
func TestCopyThroughPortForward(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("forward")
	listening(t, pod.Run("server", server))
	both(t, func(t *testing.T, protocol string) {
		local := forward(t, pod.With(t), protocol, 8080)
		stop := restarts(n)
		defer stop()
		in := newNoise(size())
		start := time.Now()
		got, err := echo(local[0], in)
		took := time.Since(start)
		if err != nil || got != in.sum() {
			t.Errorf("what came back has the hash %s, want %s: %v", got, in.sum(), err)
		}
		t.Logf("%d MiB there and back in %v, with %d restarts", size()>>20, took, stop())
	})
}
