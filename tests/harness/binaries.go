package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// Root is the top of the source tree.
var Root = sync.OnceValues(func() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "cmd/holdfastd")); err == nil {
			return d, nil
		}
		if d == "/" {
			return "", fmt.Errorf("cannot find cmd/holdfastd above %s", dir)
		}
	}
})

// Binaries is the directory with the programs under test. It is HOLDFAST_BIN
// where that is set. Otherwise our own programs are built from the source as it
// is, the daemon with the race detector if the test has it, and runc and the
// plugins are those of bin/. RemoveBinaries removes what was built.
var Binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("HOLDFAST_BIN"); dir != "" {
		return dir, nil
	}
	return buildAll()
})

// failpointBinaries is Binaries, built from the source with the tag failpoint.
var failpointBinaries = sync.OnceValues(func() (string, error) { return buildAll("-tags=failpoint") })

// buildAll fills a directory with all programs.
func buildAll(flags ...string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "hf-bin-")
	if err != nil {
		return "", err
	}
	building.Lock()
	built = append(built, dir)
	building.Unlock()
	for _, name := range []string{"runc", "cni"} {
		path := filepath.Join(root, "bin", name)
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("cannot test without %s: run make build first", path)
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	plain := []string{"./cmd/holdfast-shim", "./cmd/holdfast-stream", "./cmd/holdfastctl", "./cmd/holdfast-pause"}
	if raceEnabled {
		if err := goBuild(root, dir, "1", append(flags, "-race", "./cmd/holdfastd")...); err != nil {
			return "", err
		}
	} else {
		plain = append(plain, "./cmd/holdfastd")
	}
	return dir, goBuild(root, dir, "0", append(flags, plain...)...)
}

var (
	building sync.Mutex // guards built: tests that need other programs begin together
	built    []string   // directories
)

// RemoveBinaries is to be called at the end of a test binary (TestMain).
func RemoveBinaries() {
	for _, dir := range built {
		os.RemoveAll(dir)
	}
}

// Testbox is the static helper program of the test images: the one beside the
// binaries, where no source is at hand, or else built from the source.
var testbox = sync.OnceValues(func() ([]byte, error) {
	if bin := os.Getenv("HOLDFAST_BIN"); bin != "" {
		if b, err := os.ReadFile(filepath.Join(bin, "testbox")); err == nil {
			return b, nil
		}
	}
	root, err := Root()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "hf-testbox-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := goBuild(root, dir, "0", "./tests/harness/testbox"); err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(dir, "testbox"))
})

func goBuild(root, dir, cgo string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	args = append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + "/"}, args...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot run go %v: %w\n%s", args, err, out)
	}
	return nil
}
