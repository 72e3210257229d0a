package harness

import (
	"os"
	"strings"
)

// Arm replaces the failpoints of a node, each "STEP ACTION [N]" as proto/step has
// it, and forgets what was reached. Processes that run have them at once.
func (n *Node) Arm(lines ...string) {
	n.T.Helper()
	fresh := n.failpoints + ".new"
	err := os.WriteFile(fresh, []byte(strings.Join(lines, "\n")), 0o600)
	if err == nil {
		err = os.RemoveAll(n.failpoints + ".reached")
	}
	if err == nil {
		err = os.Rename(fresh, n.failpoints)
	}
	if err != nil {
		n.T.Fatalf("cannot set failpoints: %v", err)
	}
}

// Reached says how often each step was reached since Arm.
func (n *Node) Reached() map[string]int {
	b, _ := os.ReadFile(n.failpoints + ".reached") // none: nothing was
	times := map[string]int{}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 2 {
			times[f[1]]++
		}
	}
	return times
}

// Ended says whether the daemon has ended by itself, or was killed by others.
func (n *Node) Ended() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.ended:
		return true
	default:
		return false
	}
}
