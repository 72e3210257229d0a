package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Disk mounts an ext4 of some MiB, which is made with options of mkfs.ext4, until the end of the
// test. Where there are no loop devices the test is skipped.
func Disk(t *testing.T, mib int, options ...string) (dir string) {
	t.Helper()
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", mib), file},
		append(append([]string{"mkfs.ext4", "-q"}, options...), file),
		{"mount", "-o", "loop", file, dir},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			if args[0] == "mount" {
				t.Skipf("needs a loop device: %v: %s", err, out)
			}
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		Eventually(t, 3*time.Minute, "nobody uses the disk", func() bool { return unix.Unmount(dir, 0) == nil })
	})
	return dir
}
