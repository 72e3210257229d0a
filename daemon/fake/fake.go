// Package fake lets tests of the daemon's parts run without root, without an OCI
// runtime and without mounts. Its shim is a real process, started by the real
// launcher, with the real protocol and the real files; what it keeps is a plain
// process instead of a container. Its Node is the rest of a machine.
//
// Only tests import it.
package fake

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// binaryName is one that package shims takes for that of a shim.
const binaryName = "holdfast-shim-fake"

var binary string // the test binary, under that name

// Main runs tests, and belongs into TestMain: os.Exit(fake.Main(m.Run)). A process
// that was started as a shim becomes one there.
func Main(run func() int) int {
	if filepath.Base(os.Args[0]) == binaryName {
		code := 0
		if err := runShim(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		syscall.Exit(code) // in os.Exit the race detector makes a process linger for a second
	}
	dir, err := os.MkdirTemp("", "fake")
	if err == nil {
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, binaryName)
		err = copySelf(binary)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot prepare the fake shim:", err)
		return 1
	}
	return run()
}

// copySelf makes the test binary available under another name.
func copySelf(to string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if os.Link(self, to) == nil { // not on another file system, and not for another user
		return nil
	}
	b, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}
