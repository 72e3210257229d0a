package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A container that ends at once has its code and all of its output on record.
func TestQuickExit(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("quick")
	for i := range 10 {
		c := pod.Run(fmt.Sprintf("quick%d", i), []string{"sh", "-c", fmt.Sprintf("echo out; echo err >&2; exit %d", i)})
		s := c.WaitExited(patience)
		if int(s.ExitCode) != i {
			t.Errorf("exit code %d, want %d (%s: %s)", s.ExitCode, i, s.Reason, s.Message)
		}
		got := map[string]string{}
		for _, l := range c.Log() {
			got[l.Stream] += l.Text
		}
		if got["stdout"] != "out" || got["stderr"] != "err" {
			t.Errorf("the log holds %v", got)
		}
		if s.StartedAt < s.CreatedAt || s.FinishedAt < s.StartedAt {
			t.Errorf("created, started, finished at %d, %d, %d", s.CreatedAt, s.StartedAt, s.FinishedAt)
		}
	}
}

// A line longer than a record is cut into partial ones that give it back.
func TestLongLines(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("long")
	const length = 300_000
	c := pod.Run("long", []string{"sh", "-c",
		fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; echo; echo short; printf open", length)})
	c.WaitExited(patience)
	lines := c.Log()
	if len(lines) < 2 {
		t.Fatalf("the log has %d lines, want at least 2", len(lines))
	}
	if lines[0].Text != strings.Repeat("x", length) || lines[0].Parts < 2 {
		t.Errorf("the long line has %d bytes in %d parts, want %d in several", len(lines[0].Text), lines[0].Parts,
			length)
	}
	if lines[1].Text != "short" || lines[1].Parts != 1 {
		t.Errorf("the second line is %q in %d parts", lines[1].Text, lines[1].Parts)
	}
	b, err := os.ReadFile(c.LogPath())
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(b)), " open") {
		t.Errorf("the text without a newline is missing at the end of the log (%v)", err)
	}
}

func TestReopenLog(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("rotate")
	c := pod.Run("print", []string{"testbox", "print"})
	reopen := func() error {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: c.ID})
		return err
	}
	grows := func(path string) func() bool {
		lines, _ := harness.ReadLog(path)
		return func() bool {
			more, err := harness.ReadLog(path)
			return err == nil && len(more) > len(lines)+3
		}
	}
	var files []string
	for i := range 3 {
		if i == 1 {
			n.Restart() // the next daemon can ask for it as well
		}
		harness.Eventually(t, patience, "the log grows", grows(c.LogPath()))
		rotated := fmt.Sprintf("%s.%d", c.LogPath(), i)
		check(t, os.Rename(c.LogPath(), rotated))
		harness.Eventually(t, patience, "the renamed log grows until it is reopened", grows(rotated))
		check(t, reopen())
		files = append(files, rotated)
	}
	harness.Eventually(t, patience, "the new log grows", grows(c.LogPath()))

	// A reopen that fails leaves no new file, and the old one in use.
	rotated := c.LogPath() + ".3"
	check(t, os.Rename(c.LogPath(), rotated))
	check(t, os.Symlink("/etc/evil.log", c.LogPath()))
	if err := reopen(); err == nil {
		t.Error("the log was opened through a symbolic link")
	}
	if _, err := os.Lstat("/etc/evil.log"); err == nil {
		t.Error("a file outside of the log directory was made")
		os.Remove("/etc/evil.log")
	}
	harness.Eventually(t, patience, "the old log stays in use", grows(rotated))
	check(t, os.Remove(c.LogPath()))
	check(t, reopen())
	c.Stop(60)
	c.WaitExited(patience)

	var all []harness.Line
	for _, f := range append(files, rotated, c.LogPath()) {
		lines, err := harness.ReadLog(f)
		check(t, err)
		all = append(all, lines...)
	}
	if count, err := harness.Numbered("line", all); err != nil {
		t.Errorf("after %d good lines: %v", count, err)
	}
	if err := reopen(); status.Code(err) == codes.OK {
		t.Error("the log of a container that has ended was reopened")
	}
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("tty")
	c := pod.Run("tty", []string{"sh", "-c", "tty; echo err >&2; exit 5"},
		func(c *cri.ContainerConfig) { c.Tty = true })
	if code := c.WaitExited(patience).ExitCode; code != 5 {
		t.Errorf("exit code %d, want 5", code)
	}
	var text []string
	for _, l := range c.Log() {
		if l.Stream != "stdout" {
			t.Errorf("a terminal has one stream, the log has %s", l.Stream)
		}
		text = append(text, l.Text)
	}
	if len(text) != 2 || !strings.HasPrefix(text[0], "/dev/") || text[1] != "err" {
		t.Errorf("the log is %q", text)
	}
}
