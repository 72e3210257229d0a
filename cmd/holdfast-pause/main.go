// Command holdfast-pause is the init process of a pod whose containers share a
// PID namespace: it reaps what the kernel hands to it, and ends when told to.
package main

import (
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func main() {
	// A second thread at work would only cost memory.
	runtime.GOMAXPROCS(1)

	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range ch {
		if s != syscall.SIGCHLD {
			return
		}
		// One SIGCHLD may stand for several children.
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if err != syscall.EINTR && pid <= 0 {
				break
			}
		}
	}
}
