// Command holdfast-shim keeps one container. The daemon starts it, with a handshake
// (package handshake); see package shim for what it does, and package rundir for what
// lies in its directory.
package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/handshake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/tail"
	"github.com/holdfast-cri/holdfast/shim"
)

// version is set by the linker.
var version = "unknown"

func main() {
	// First of all, so that nothing can take the descriptor for another one.
	launcher := handshake.Take()
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

func run(launcher *handshake.Launcher, dir, level string, createTimeout time.Duration) (err error) {
	proceed, err := launcher.Await()
	if !proceed || err != nil {
		return err
	}
	defer func() {
		if err != nil {
			launcher.Fail(err)
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
		Log: slog.New(slog.NewTextHandler(tail.New(os.Stderr), &slog.HandlerOptions{Level: l,
			ReplaceAttr: kind.ShortenAttr})),
		Stop:     stop,
		Reappear: reappear,
		Ready:    launcher.Ready,
	})
}
