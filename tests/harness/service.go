package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A daemon that systemd runs: the unit as it is installed, but for the command
// line and the file of its messages, which a drop-in changes.

// Systemctl runs systemctl and gives its output.
func Systemctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), CallTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func (n *Node) startService(args []string) error {
	dir := filepath.Join("/run/systemd/system", n.service+".d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dropIn := fmt.Sprintf("[Service]\nExecStart=\nExecStart=%s\nStandardError=append:%s\n", strings.Join(args, " "),
		n.DaemonLog())
	if err := os.WriteFile(filepath.Join(dir, "test.conf"), []byte(dropIn), 0o644); err != nil {
		return err
	}
	n.T.Cleanup(func() {
		os.RemoveAll(dir)
		Systemctl("daemon-reload")
	})
	if _, err := Systemctl("daemon-reload"); err != nil {
		return err
	}
	_, err := Systemctl("start", n.service) // returns when it is ready
	return err
}

// endService waits for the end of the process. systemd starts the next one after
// a SIGKILL, as the unit says.
func (n *Node) endService(sig syscall.Signal) error {
	pid := n.servicePID()
	var err error
	if sig == syscall.SIGKILL {
		_, err = Systemctl("kill", "--signal=KILL", n.service)
	} else {
		_, err = Systemctl("stop", n.service)
	}
	for deadline := time.Now().Add(StartTimeout); err == nil && pid != 0 && n.servicePID() == pid; time.Sleep(Tick) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon (process %d) still runs %s after %s", pid, StartTimeout, sig)
		}
	}
	return err
}

func (n *Node) servicePID() int {
	out, err := Systemctl("show", "--property=MainPID", "--value", n.service)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(out)
	if err != nil {
		return 0
	}
	return pid
}
