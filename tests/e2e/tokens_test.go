package e2e

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// execURL asks for the address of an exec, without an input.
func execURL(c *harness.Container, cmd ...string) (string, error) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := c.N.Runtime.Exec(ctx, &cri.ExecRequest{ContainerId: c.ID, Cmd: cmd, Stdout: true, Stderr: true})
	return r.GetUrl(), err
}

// session is one over WebSocket in which the client says nothing.
type session struct {
	conn net.Conn
	r    *bufio.Reader
}

// errNoSession says that the server has none for the token.
var errNoSession = errors.New("404")

func openSession(address string) (*session, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("tcp", u.Host, patience)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"+
		"Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n", u.RequestURI(), u.Host)
	s := &session{conn, bufio.NewReader(conn)}
	resp, err := http.ReadResponse(s.r, nil)
	if err == nil && resp.StatusCode == http.StatusNotFound {
		err = errNoSession
	}
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("the server answers %s", resp.Status)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

// finish gives all output and the status until the server closes the connection.
func (s *session) finish() (output, status string, err error) {
	defer s.conn.Close()
	const stdout, stderr, result = 1, 2, 3
	var channel byte
	for status == "" {
		opcode, b, err := s.frame()
		if err != nil {
			return output, status, err
		}
		switch opcode {
		case 2: // a message
			if len(b) == 0 {
				return output, status, errors.New("a message without a channel")
			}
			channel, b = b[0], b[1:]
		case 0: // more of it
		case 8:
			return output, status, errors.New("closed without a status")
		default:
			continue
		}
		switch channel {
		case stdout, stderr:
			output += string(b)
		case result:
			status += string(b)
		}
	}
	return output, status, nil
}

// frame reads one of RFC 6455, 5.2.
func (s *session) frame() (opcode byte, payload []byte, err error) {
	var h [8]byte
	if _, err := io.ReadFull(s.r, h[:2]); err != nil {
		return 0, nil, err
	}
	opcode = h[0] & 0x0f
	size := uint64(h[1] & 0x7f)
	switch size {
	case 126:
		_, err = io.ReadFull(s.r, h[:2])
		size = uint64(binary.BigEndian.Uint16(h[:2]))
	case 127:
		_, err = io.ReadFull(s.r, h[:8])
		size = binary.BigEndian.Uint64(h[:8])
	}
	if err == nil {
		payload = make([]byte, size)
		_, err = io.ReadFull(s.r, payload)
	}
	return opcode, payload, err
}

// wantSession opens the session of an address and looks at what its command has written.
func wantSession(t *testing.T, address, want string) {
	t.Helper()
	s, err := openSession(address)
	if err != nil {
		t.Errorf("%s: %v", address, err)
		return
	}
	output, status, err := s.finish()
	if err != nil || output != want || !strings.Contains(status, `"Success"`) {
		t.Errorf("%s: %q, %s, %v; want %q", address, output, status, err, want)
	}
}

func wantNoSession(t *testing.T, address string) {
	t.Helper()
	if s, err := openSession(address); !errors.Is(err, errNoSession) {
		t.Errorf("%s: %v, want none", address, err)
		if err == nil {
			s.conn.Close()
		}
	}
}

// host is the host and port of an address.
func host(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return err.Error()
	}
	return u.Host
}

// What a token stands for is there with the daemon dead, for one client, once.
func TestTokensOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	c := n.RunPod("tokens").Run("c", []string{"sleep", "1000"})
	n.Mark()
	var urls []string
	for i := range 4 {
		u, err := execURL(c, "echo", fmt.Sprint("number ", i))
		check(t, err)
		urls = append(urls, u)
	}
	pid := n.StreamPID()
	n.Kill()
	wantSession(t, urls[0], "number 0\n")
	wantNoSession(t, urls[0])
	n.Start()
	wantSession(t, urls[1], "number 1\n")
	wantNoSession(t, urls[1])
	wantNoSession(t, urls[0])
	// Of many that bring the same one, one gets it.
	var wg sync.WaitGroup
	var mu sync.Mutex
	sessions := 0
	for range 8 {
		wg.Go(func() {
			s, err := openSession(urls[2])
			if errors.Is(err, errNoSession) {
				return
			}
			if err == nil {
				_, _, err = s.finish()
			}
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			sessions++
			mu.Unlock()
		})
	}
	wg.Wait()
	if sessions != 1 {
		t.Errorf("one token gave %d sessions", sessions)
	}
	base, token, _ := strings.Cut(urls[3], "/exec/")
	for _, bad := range []string{
		base + "/exec/" + strings.Repeat("0", len(token)), base + "/exec/" + token[1:] + token[:1], base + "/exec/",
		base + "/exec/../" + token, base + "/exec/%2e%2e%2f" + token, base + "/tokens/" + token, base + "/" + token,
		base + "/exec/" + strings.Repeat("a", 5000),
	} {
		wantNoSession(t, bad)
	}
	wantSession(t, urls[3], "number 3\n")
	if now := n.StreamPID(); now != pid || pid == 0 {
		t.Errorf("sessions were served by process %d, and now by %d", pid, now)
	}
	n.CheckClean()
}

func TestTokensExpire(t *testing.T) {
	t.Parallel()
	if os.Getenv("HOLDFAST_DRILL") == "" {
		t.Skip("only HOLDFAST_DRILL=1 waits for a minute")
	}
	n := harness.New(t)
	c := n.RunPod("expiry").Run("c", []string{"sleep", "1000"})
	n.Mark()
	address, err := execURL(c, "true")
	check(t, err)
	time.Sleep(61 * time.Second) // nothing tells when it has expired
	wantNoSession(t, address)
	again, err := execURL(c, "echo", "again")
	check(t, err)
	wantSession(t, again, "again\n")
	n.CheckClean()
}

// What serves sessions ends when nobody has had one for five minutes, and the next
// request starts another.
func TestStreamEndsWhenIdle(t *testing.T) {
	t.Parallel()
	if os.Getenv("HOLDFAST_DRILL") == "" {
		t.Skip("only HOLDFAST_DRILL=1 waits for minutes")
	}
	n := harness.New(t)
	c := n.RunPod("idle").Run("c", []string{"sleep", "1000"})
	n.Mark()
	address, err := execURL(c, "echo", "first")
	check(t, err)
	wantSession(t, address, "first\n")
	harness.Eventually(t, 7*time.Minute, "it has ended", func() bool { return n.StreamPID() == 0 })
	n.CheckClean()
	again, err := execURL(c, "echo", "again")
	check(t, err)
	if host(again) != host(address) {
		t.Errorf("%s was the address before, %s is it now", address, again)
	}
	wantSession(t, again, "again\n")
	n.CheckClean()
}

// What serves sessions is killed: the next request starts another one, at the same port,
// and what was given out before is valid there.
func TestStreamIsKilled(t *testing.T) {
	t.Parallel()
	// A loopback address of its own: another node could take the port meanwhile.
	n := harness.New(t, harness.Options{Config: "[streaming]\naddress = \"127.9.1.1:0\"\n"})
	c := n.RunPod("killed").Run("c", []string{"sleep", "1000"})
	n.Mark()
	early, err := execURL(c, "echo", "early")
	check(t, err)
	for round := range 3 {
		pid := n.StreamPID()
		check(t, syscall.Kill(pid, syscall.SIGKILL))
		harness.Eventually(t, patience, "what serves sessions is gone", func() bool { return !harness.IsProcess(pid) })
		if round == 1 {
			n.Restart() // this daemon is not the parent of the next one's predecessor
		}
		text := fmt.Sprintln("round", round)
		address, err := execURL(c, "echo", strings.TrimSpace(text))
		check(t, err)
		if host(address) != host(early) || n.StreamPID() == 0 {
			t.Errorf("%s was the address before, %s is it now", early, address)
		}
		wantSession(t, address, text)
	}
	wantSession(t, early, "early\n")
	n.CheckClean()
}

// Requests come while the daemon is killed again and again: each that was answered has
// its session, and one process serves them all.
func TestSessionsAcrossRestarts(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	c := n.RunPod("restarts").Run("c", []string{"sleep", "1000"})
	n.Mark()
	first, err := execURL(c, "true")
	check(t, err)
	wantSession(t, first, "")
	pid := n.StreamPID()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				text := fmt.Sprintf("%d of %d\n", i, worker)
				if address, err := execURL(c, "echo", strings.TrimSpace(text)); err == nil {
					wantSession(t, address, text)
				}
			}
		})
	}
	for range 5 {
		check(t, n.Bounce())
	}
	close(done)
	wg.Wait()
	if now := n.StreamPID(); now != pid {
		t.Errorf("sessions were served by process %d, and now by %d", pid, now)
	}
	n.CheckClean()
}

// Other settings hold from the next session on; the sessions there are go on.
func TestStreamIsReplaced(t *testing.T) {
	t.Parallel()
	// A loopback address of its own: another node could take the port meanwhile.
	n := harness.New(t, harness.Options{Config: "[streaming]\naddress = \"127.9.1.2:0\"\n"})
	c := n.RunPod("replaced").Run("c", []string{"sleep", "1000"})
	n.Mark()
	c.Output("mkfifo", "/go")
	address, err := execURL(c, "sh", "-c", "echo begin; read x </go; echo $x")
	check(t, err)
	old, err := openSession(address)
	check(t, err)
	pid := n.StreamPID()
	config, err := os.OpenFile(n.Path("config.toml"), os.O_WRONLY|os.O_APPEND, 0)
	check(t, err)
	_, err = config.WriteString("idle_timeout = \"3h\"\n")
	check(t, errors.Join(err, config.Close()))
	n.Restart()
	next, err := execURL(c, "echo", "next")
	check(t, err)
	wantSession(t, next, "next\n")
	if host(next) != host(address) {
		t.Errorf("%s was the address before, %s is it now", address, next)
	}
	if !harness.IsProcess(pid) {
		t.Error("the process with a session has ended")
	}
	c.Output("sh", "-c", "echo end >/go")
	if output, status, err := old.finish(); err != nil || output != "begin\nend\n" {
		t.Errorf("the old session: %q, %s, %v", output, status, err)
	}
	c.Output("rm", "/go")
	harness.Eventually(t, patience, "the old process has ended", func() bool { return !harness.IsProcess(pid) })
	b, err := os.ReadFile(filepath.Join(fmt.Sprintf("/proc/%d", n.StreamPID()), "cmdline"))
	if err != nil || !strings.Contains(string(b), "3h") {
		t.Errorf("the new process is %q, %v", b, err)
	}
	n.CheckClean()
}
