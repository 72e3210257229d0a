package sessions

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Commands run sixteen at a time while the daemon dies. Each that was answered has its
// own output and exit code, and nothing is left of any.
func TestManyExecs(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("many").Run("many", []string{"sleep", "1000"})
	protocols := []string{"SPDY", "WebSocket"}
	request := func(i int) error {
		command := []string{"sh", "-c", fmt.Sprintf("cat; echo %d; exit %d", i, i%200)}
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := n.Runtime.Exec(ctx, &cri.ExecRequest{ContainerId: c.ID, Cmd: command, Stdin: true, Stdout: true})
		if err != nil {
			return nil // the daemon is down: nothing was answered
		}
		var out strings.Builder
		err = stream(executor(t, protocols[i%2], r.Url), remotecommand.StreamOptions{
			Stdin:  strings.NewReader("input "),
			Stdout: &out,
		})
		wantCode(t, err, i%200)
		if want := fmt.Sprintf("input %d\n", i); out.String() != want {
			t.Errorf("command %d: output %q, want %q", i, out.String(), want)
		}
		return err
	}
	request(0)
	before := descriptors(n.StreamPID())
	total := int64(100)
	if os.Getenv("HOLDFAST_DRILL") != "" {
		total = 500
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for i := next.Add(1); i <= total; i = next.Add(1) {
				if i == total/2 {
					n.Kill()
					n.Start()
				}
				request(int(i))
			}
		})
	}
	workers.Wait()
	run := filepath.Join(n.State, "containers", c.ID)
	harness.Eventually(t, patience, "nothing is left of the commands", func() bool {
		c.Exec(10, "true") // what outlived an exec for a moment is removed by a later one
		execs, _ := os.ReadDir(filepath.Join(run, "exec"))
		tokens, _ := os.ReadDir(filepath.Join(n.State, "stream/tokens"))
		cgroups, _ := filepath.Glob("/sys/fs/cgroup/pids/*/*" + c.ID + "*/exec-*")
		return len(execs) == 0 && len(tokens) == 0 && len(cgroups) == 0 && descriptors(n.StreamPID()) <= before+2
	})
	if out := c.Output("ps"); strings.Contains(out, "cat; echo") {
		t.Errorf("processes of commands live on:\n%s", out)
	}
}

func descriptors(pid int) int {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(fds)
}

// A client that hangs up ends its command. One whose connection is lost, because
// holdfast-stream was killed, leaves it to its lease: it runs on.
func TestClientsThatGo(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("gone").Run("gone", []string{"sleep", "1000"})
	begin := func(t *testing.T, protocol, mark string) (hangUp context.CancelFunc, ended <-chan error) {
		script := fmt.Sprintf("echo begun; for i in $(seq 600); do echo %s > /tmp/%s; sleep 0.1; done", mark, mark)
		url := execURL(t, c.With(t), &cri.ExecRequest{Cmd: []string{"sh", "-c", script}, Stdin: true, Stdout: true})
		ctx, cancel := context.WithCancel(t.Context())
		r, w := io.Pipe()
		over := make(chan error, 1)
		go func() {
			err := executor(t, protocol, url).StreamWithContext(ctx, remotecommand.StreamOptions{
				Stdin:  neverReads{ctx},
				Stdout: w,
			})
			w.CloseWithError(io.EOF)
			over <- err
		}()
		if _, err := io.ReadFull(r, make([]byte, len("begun\n"))); err != nil {
			t.Fatal(err, <-over)
		}
		return cancel, over
	}
	runs := func(mark string) bool { return strings.Contains(c.Output("ps"), "/tmp/"+mark) }
	both(t, func(t *testing.T, protocol string) {
		hangUp, ended := begin(t, protocol, "hungup"+protocol)
		hangUp()
		<-ended
		harness.Eventually(t, 20*time.Second, "the command ends with its client",
			func() bool { return !runs("hungup" + protocol) })

		hangUp, ended = begin(t, protocol, "lost"+protocol)
		defer hangUp()
		if err := syscall.Kill(n.StreamPID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err == nil && protocol != "SPDY" { // of which the library takes it for a success
			t.Error("the client was not told that its connection is lost")
		}
		for range 10 {
			if !runs("lost" + protocol) {
				t.Fatal("the command has ended with holdfast-stream")
			}
		}
	})
}

// neverReads is an input that is silent until its client goes.
type neverReads struct{ ctx context.Context }

func (r neverReads) Read([]byte) (int, error) {
	<-r.ctx.Done()
	return 0, io.EOF
}

// Programs that take the whole screen.
func TestScreenPrograms(t *testing.T) {
	n := harness.New(t)
	c := n.RunPod("screen").Run("screen", []string{"sleep", "1000"})
	for _, p := range []struct {
		command string
		dialog  []string // what the screen shows, then what is typed, and so on
		text    string   // of the file, in the end
	}{
		{
			"busybox vi /tmp/text",
			[]string{"- /tmp/text", "ihöllo", "höllo", "\x1b", "- /tmp/text [Modified]", ":wq\r"},
			"höllo",
		},
		{"busybox top", []string{"PID", "q"}, ""},
	} {
		t.Run(p.command, func(t *testing.T) {
			term := newTerminal(t, 100, 30)
			url := execURL(t, c.With(t), &cri.ExecRequest{
				Cmd:    strings.Fields(p.command),
				Stdin:  true,
				Stdout: true,
				Tty:    true,
			})
			ended := make(chan error, 1)
			go func() {
				ended <- stream(executor(t, "WebSocket", url), remotecommand.StreamOptions{
					Stdin:             term.client,
					Stdout:            term.client,
					Tty:               true,
					TerminalSizeQueue: term,
				})
			}()
			for i := 0; i < len(p.dialog); i += 2 {
				term.see(p.dialog[i])
				if _, err := term.person.WriteString(p.dialog[i+1]); err != nil {
					t.Fatal(err)
				}
			}
			wantCode(t, <-ended, 0)
			close(term.sizes)
			if p.text != "" {
				if text := c.Output("cat", "/tmp/text"); text != p.text+"\n" {
					t.Errorf("the file holds %q", text)
				}
			}
		})
	}
}
