package shim

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// What a command has written before it ended is kept, also where the time to drain it is
// up before the first look at it: the shim was stopped meanwhile.
func TestOutputAfterTheDeadline(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	must.Succeed(t, os.WriteFile(path, nil, 0o600))
	o, err := newOutlet(path, "stdout_path", 0)
	must.Succeed(t, err)
	defer o.close()
	if _, err := o.child.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	o.giveUp()
	o.start()
	<-o.done
	if b, err := os.ReadFile(path); string(b) != "hello" || err != nil {
		t.Errorf("the output is %q (%v)", b, err)
	}
}
