// Package netns enters network namespaces that are pinned by bind mounts. It
// knows nothing of what is in them.
package netns

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// OnThread runs f on an OS thread of its own, so that f may enter or make
// namespaces. The thread ends with f.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Getpid() == unix.Gettid() {
			// The main thread cannot end, and it is what /proc/self shows: it
			// would stay in the pod's namespaces and keep them alive. While
			// this goroutine holds it, another one gets another thread.
			inner := make(chan struct{})
			go func() { defer close(inner); run() }()
			<-inner
			runtime.UnlockOSThread()
			return
		}
		done <- f()
		// Not unlocked: the runtime ends the thread with the goroutine.
	}
	go run()
	return <-done
}

// Enter takes the calling thread into the namespace at path; "" changes nothing.
// The thread has to be locked, and to end, as OnThread's does.
func Enter(path string) error {
	if path == "" {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open network namespace: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot enter network namespace: %w", err)
	}
	return nil
}

// IsPinned says whether a namespace, of whatever kind, is mounted at path.
func IsPinned(path string) bool {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && st.Type == unix.NSFS_MAGIC
		}
	}
}
