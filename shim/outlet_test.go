package shim

import (
	"os"
	"path/filepath"
	"testing"
)

// What a command has written before it ended is kept, also where the time to drain it is
// up before the first look at it: the shim was stopped meanwhile.
func TestOutputAfterTheDeadline(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := newOutlet(path, "stdout_path", 0)
	if err != nil {
		t.Fatal(err)
	}
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
