package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
)

// waiting says that WaitAhead is at it.
var waiting atomic.Bool

// WaitAhead returns at once, and spares the OCI runtime a wait that begins when it moves
// a process into a cgroup of v1. The kernel lets the first such move of a while wait for
// an RCU grace period, which is about ten milliseconds, and those that follow closely
// not (cgroup_threadgroup_rwsem). So this process is moved to where it is, while the OCI
// runtime starts. On v2 processes are born in their cgroup, without a wait.
func WaitAhead() {
	if !waiting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer waiting.Store(false)
		if dir := ownDir(); dir != "" {
			// An error costs the wait that there would have been anyway.
			os.WriteFile(filepath.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(os.Getpid()), 10), 0)
		}
	}()
}

// ownDir is a cgroup of v1 in which this process is, and no root; empty if there is none.
func ownDir() (dir string) {
	procCgroups("self", func(controller, path string) {
		if d, ok := (Set{controller: path}).dir(controller); ok && controller != "" {
			dir = d
		}
	})
	return dir
}
