package pods

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// What the host has in the place of a file keeps no pod waiting, and costs no memory.
func TestHostFile(t *testing.T) {
	for name, c := range map[string]struct {
		put  func(path string) error
		want string
		ok   bool
	}{
		"nothing": {func(string) error { return nil }, "", true},
		"a file":  {func(path string) error { return os.WriteFile(path, []byte("text"), 0o600) }, "text", true},
		"a link": {func(path string) error {
			return os.Symlink("/proc/sys/kernel/ostype", path)
		}, "Linux\n", true},
		"a FIFO":   {func(path string) error { return syscall.Mkfifo(path, 0o600) }, "", false},
		"a device": {func(path string) error { return os.Symlink("/dev/zero", path) }, "", false},
		"too much": {func(path string) error { return os.WriteFile(path, make([]byte, maxCopied+1), 0o600) }, "",
			false},
	} {
		path := filepath.Join(t.TempDir(), "hosts")
		must.Succeed(t, c.put(path))
		if text, err := hostFile(path); text != c.want || (err == nil) != c.ok {
			t.Errorf("%s: %d bytes, %v", name, len(text), err)
		}
	}
}
