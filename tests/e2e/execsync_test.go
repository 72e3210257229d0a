package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

func TestExecSync(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("exec")
	c := pod.Run("box", []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
		c.Envs = []*cri.KeyValue{{Key: "GREETING", Value: []byte("hello")}}
		c.WorkingDir = "/tmp"
	})

	t.Run("output and code", func(t *testing.T) {
		c := c.With(t)
		r, err := c.Exec(30, "sh", "-c", "echo $GREETING from $PWD; echo oops >&2; exit 7")
		check(t, err)
		if string(r.Stdout) != "hello from /tmp\n" || string(r.Stderr) != "oops\n" || r.ExitCode != 7 {
			t.Errorf("got %q, %q, %d", r.Stdout, r.Stderr, r.ExitCode)
		}
	})

	t.Run("no such program", func(t *testing.T) {
		c := c.With(t)
		if r, err := c.Exec(30, "/no/such/program"); err == nil && r.ExitCode == 0 {
			t.Errorf("a program that does not exist succeeded: %v", r)
		}
	})

	// At most 16 MiB of each stream, so that the answer fits the kubelet's limit.
	t.Run("large output", func(t *testing.T) {
		c := c.With(t)
		r, err := c.Exec(60, "sh", "-c", "head -c 20000000 /dev/zero; echo end >&2; exit 3")
		check(t, err)
		// What was dropped is told, as the last line of the other stream.
		if r.ExitCode != 3 || !strings.HasPrefix(string(r.Stderr), "end\n") ||
			!strings.Contains(string(r.Stderr), "bytes of output are missing here") {
			t.Errorf("exit code %d, stderr %q", r.ExitCode, r.Stderr)
		}
		if len(r.Stdout) == 0 || len(r.Stdout) > 16<<20 {
			t.Errorf("%d bytes of stdout, want some and at most 16 MiB", len(r.Stdout))
		}
	})

	// A child in the background holds the pipe open, and ends with the command.
	t.Run("timeout", func(t *testing.T) {
		c := c.With(t)
		_, err := c.Exec(1, "sh", "-c", "sleep 4321 & sleep 4322")
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the error is %v, want DeadlineExceeded", err)
		}
		harness.Eventually(t, patience, "the whole tree of the command is gone", func() bool {
			return !strings.Contains(c.Output("ps"), "sleep 432")
		})
	})

	t.Run("daemon killed meanwhile", func(t *testing.T) {
		c := c.With(t)
		n := c.N
		failed, seconds := make(chan error), number()
		go func() {
			_, err := c.Exec(1000, "sleep", seconds)
			failed <- err
		}()
		var pids []int
		harness.Eventually(t, patience, "the command runs",
			func() bool { pids = find("sleep\x00" + seconds); return len(pids) > 0 })
		n.Kill()
		if err := <-failed; err == nil {
			t.Error("an exec whose daemon was killed has succeeded")
		}
		harness.Eventually(t, patience, "the command has ended with its caller",
			func() bool { return len(find("sleep\x00"+seconds)) == 0 })
		n.Start()
		if out := c.Output("echo", "still here"); out != "still here\n" {
			t.Errorf("exec after the restart says %q", out)
		}
	})

	t.Run("after the end", func(t *testing.T) {
		c := c.With(t)
		c.Stop(0)
		if _, err := c.Exec(10, "true"); err == nil {
			t.Error("exec in a container that has ended succeeded")
		}
	})
}

// find gives the processes whose command line ends with these arguments.
func find(args string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		b, err := os.ReadFile(dir + "/cmdline")
		if err == nil && strings.HasSuffix(strings.TrimRight(string(b), "\x00"), args) {
			var pid int
			fmt.Sscan(filepath.Base(dir), &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}
