package harness

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Thing is what holdfastctl doctor says of something on the machine.
type Thing struct {
	Kind, Name, Owner, Why, Remedy string
	Doubt                          bool
}

// Ownerless says whether it has no owner.
func (t Thing) Ownerless() bool { return t.Owner == "" && !t.Doubt }

func (t Thing) String() string { return fmt.Sprintf("%s %s: %s", t.Kind, t.Name, t.Why) }

// Diagnosis is one run of holdfastctl doctor.
type Diagnosis struct {
	Code    int // of exit
	Things  []Thing
	Unknown []string
	Said    string // on the standard error
}

// Diagnose runs holdfastctl doctor, with more arguments if there are any.
func (n *Node) Diagnose(args ...string) Diagnosis {
	n.T.Helper()
	args = append([]string{"--state", n.State, "--json", "doctor", "--root", n.Root}, args...)
	ctx, cancel := Deadline()
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var d Diagnosis
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		d.Code = exit.ExitCode()
	} else if err != nil {
		n.T.Fatalf("cannot run holdfastctl doctor: %v", err)
	}
	if err := json.Unmarshal(stdout.Bytes(), &d); err != nil {
		n.T.Fatalf("holdfastctl doctor: %v\n%s%s", err, stdout.String(), stderr.String())
	}
	d.Said = stderr.String()
	return d
}

// strangers had no owner before the first node of this process: tests that were killed have left
// them.
var strangers struct {
	noted sync.Once
	names map[string]bool
}

// noteStrangers is called before the node's daemon is started.
func (n *Node) noteStrangers() {
	n.T.Helper()
	strangers.noted.Do(func() {
		none := &Node{T: n.T, shared: &shared{Bin: n.Bin, Root: n.Path("none/root"), State: n.Path("none/state")}}
		for _, dir := range []string{none.Root, none.State} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				n.T.Fatalf("%v", err)
			}
		}
		strangers.names = map[string]bool{}
		for _, t := range none.Diagnose().Things {
			strangers.names[t.Kind+" "+t.Name] = t.Ownerless()
		}
	})
}

// Doctor is what holdfastctl doctor finds that has no owner, or cannot be looked at.
func (n *Node) Doctor() (found []string) {
	n.T.Helper()
	d := n.Diagnose()
	for _, t := range d.Things {
		if t.Ownerless() && !strangers.names[t.Kind+" "+t.Name] {
			found = append(found, "no owner: "+t.String())
		}
	}
	for _, u := range d.Unknown {
		found = append(found, "not known: "+u)
	}
	return found
}

// CheckOwners fails the test if something has no owner. It waits a moment for what is just
// being taken away.
func (n *Node) CheckOwners() {
	n.T.Helper()
	if found := n.awaitOwners(); found != "" {
		n.T.Errorf("%s", found)
	}
}

// awaitOwners is CheckOwners without a verdict: it says what has no owner.
func (n *Node) awaitOwners() string {
	n.T.Helper()
	var found []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * Tick) {
		if found = n.Doctor(); len(found) == 0 {
			return ""
		}
	}
	return fmt.Sprintf("holdfastctl doctor finds %d things:\n  %s",
		len(found), strings.Join(found[:min(len(found), 40)], "\n  "))
}

// Explain is what holdfastctl explain tells of a pod or container.
func (n *Node) Explain(name string) string {
	n.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "explain", name).
		CombinedOutput()
	if err != nil {
		n.T.Errorf("holdfastctl explain %s: %v", name, err)
	}
	return string(out)
}
