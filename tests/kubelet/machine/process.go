package machine

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Patience is how long something may take on the slowest of machines.
const Patience = 4 * time.Minute

// Process is a program that runs. Its methods are for one goroutine.
type Process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the process has ended
}

// Start runs a program, with its output at the end of a file. It is in a process group
// of its own, so that Ctrl-C is for the test alone, which calls Stop.
func Start(log, path string, args ...string) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &Process{cmd: exec.Command(path, args...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// Await waits until the process is ready. It fails the test if it ends before.
func (p *Process) Await(t harness.T, what string, ready func() bool) {
	t.Helper()
	harness.Eventually(t, Patience, what, func() bool {
		select {
		case <-p.ended:
			t.Fatalf("not so: %s: the process has ended: %v", what, p.cmd.ProcessState)
		default:
		}
		return ready()
	})
}

// Stop ends the process with SIGTERM, and says if that was not enough.
func (p *Process) Stop() error {
	p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(time.Minute):
	}
	p.cmd.Process.Kill()
	<-p.ended
	return fmt.Errorf("%s does not end by SIGTERM", p.cmd)
}

// ShowLog shows the end of a log, if the test has failed.
func ShowLog(t harness.T, path string) {
	t.Helper()
	if b, err := os.ReadFile(path); err == nil && t.Failed() {
		t.Logf("%s ends with:\n%s", path, b[max(0, len(b)-8000):])
	}
}

// complaint is the beginning of a line of a log that tells a warning or an error.
var complaint = regexp.MustCompile(`^[EWF]\d{4} [\d:.]+ +\d+ `)

// Complaints are the warnings and errors in the log of a program of Kubernetes, without
// their times.
func Complaints(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if at := complaint.FindStringIndex(s.Text()); at != nil {
			lines = append(lines, s.Text()[:1]+" "+s.Text()[at[1]:])
		}
	}
	return lines, s.Err()
}
