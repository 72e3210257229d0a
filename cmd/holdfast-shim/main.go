// Command holdfast-shim keeps one container. The daemon starts it; see package
// shim for what it does, and package rundir for what lies in its directory.
//
// Descriptor 3, if it is a Unix socket, is a handshake with the launcher:
//
//	launcher: one byte      you are in your session and cgroup now; go
//	shim:     0x00          ready: the lock is held, the socket listens
//	shim:     0x01, text    why it could not become ready
//
// End of file before the first byte ends the shim, with nothing left behind.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/shim"
)

// version is set by the linker.
var version = "unknown"

func main() {
	// First of all, so that nothing can take the descriptor for another one.
	launcher := handshake()
	// The shim needs one processor, and each costs memory for the life of the
	// container. A launcher that sets it in the environment saves what it costs
	// to change it.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}

	// It is also that of the OCI runtime, which leaves it to the processes of execs.
	unix.Umask(0o022)

	dir := flag.String("dir", "", "run `directory` of the container; its base name is the container's id")
	level := flag.String("log-level", "info", "debug, info, warn or error")
	createTimeout := flag.Duration("create-timeout", time.Minute, "end when no Create came for so long")
	flag.Parse()
	if err := run(launcher, *dir, *level, *createTimeout); err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-shim:", err)
		os.Exit(1)
	}
}

func run(launcher *os.File, dir, level string, createTimeout time.Duration) (err error) {
	proceed, err := awaitGo(launcher)
	if !proceed || err != nil {
		return err
	}
	ready := false
	defer func() {
		if err != nil && !ready && launcher != nil {
			launcher.Write(append([]byte{1}, err.Error()...))
		}
	}()
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir || dir == "/" {
		return fmt.Errorf("--dir %q is not the clean absolute path of a run directory", dir)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	stop, reappear := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(make(chan os.Signal, 1), shim.Signals...)
	signal.Notify(stop, unix.SIGTERM)
	signal.Notify(reappear, rundir.SignalReappear)
	return shim.Run(shim.Config{
		Dir:           rundir.Dir(dir),
		CreateTimeout: createTimeout,
		Version:       version,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l,
			ReplaceAttr: kind.ShortenAttr})),
		Stop:     stop,
		Reappear: reappear,
		Ready: func() {
			ready = true
			if launcher != nil {
				launcher.Write([]byte{0}) // it may have died meanwhile
				launcher.Close()
			}
		},
	})
}

// handshake gives the launcher's socket, or nil for a shim started by hand.
func handshake() *os.File {
	const fd = 3
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return nil
	}
	unix.CloseOnExec(fd) // the container must not get it
	return os.NewFile(fd, "launcher")
}

// awaitGo waits for the launcher's byte. false: the launcher has gone.
func awaitGo(launcher *os.File) (bool, error) {
	if launcher == nil {
		return true, nil
	}
	var b [1]byte
	n, err := launcher.Read(b[:])
	if n == 1 {
		return true, nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return false, nil
	}
	return false, fmt.Errorf("cannot hear the launcher: %w", err)
}
