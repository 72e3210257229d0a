package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// WaitAhead moves a process to where it is.
func TestWaitAhead(t *testing.T) {
	before, err := os.ReadFile("/proc/self/cgroup")
	check(t, err)
	dir := ownDir()
	if dir == "" {
		t.Skip("this process is in no cgroup of v1 but the roots")
	}
	members, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil || !slices.Contains(strings.Fields(string(members)), strconv.Itoa(os.Getpid())) {
		t.Errorf("%s has the processes %q, %v, but not %d", dir, members, err, os.Getpid())
	}
	for range 3 {
		WaitAhead()
	}
	until(t, "the end of its wait", func() bool { return !waiting.Load() })
	if after, err := os.ReadFile("/proc/self/cgroup"); err != nil || string(after) != string(before) {
		t.Errorf("it was moved: %q, %v, before %q", after, err, before)
	}
}
