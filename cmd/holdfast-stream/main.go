// Command holdfast-stream serves the sessions of a node: exec, attach and port-forward.
// The daemon starts it, with a handshake (package handshake); they agree by the files
// of package stream. Package streaming is what it does.
//
// It ends when it was idle for a while, or, after SIGTERM, with its last connection.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/holdfast-cri/holdfast/cri/streaming"
	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/proto/handshake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/proto/tail"
)

const (
	// idleLimit is how long the process lives without anything to do.
	idleLimit = 5 * time.Minute
	// idleCheck is how often it looks.
	idleCheck = 10 * time.Second
	// memoryLimit is where the collector of garbage begins to work harder. What is kept
	// at all has bounds of its own.
	memoryLimit = 512 << 20
)

// options are the command line.
type options struct {
	dir             string
	address         string
	tlsCert, tlsKey string
	idleTimeout     time.Duration
	creationTimeout time.Duration
	level           slog.Level
}

func main() {
	// First of all, so that nothing can take the descriptor for another one.
	launcher := handshake.Take()
	unix.Umask(0o077)
	debug.SetMemoryLimit(memoryLimit)

	var o options
	flag.StringVar(&o.dir, "dir", "", "the `directory` of sessions, STATE/stream")
	flag.StringVar(&o.address, "address", "127.0.0.1:0", "`HOST:PORT` to listen on; port 0: the last one, or any")
	flag.StringVar(&o.tlsCert, "tls-cert", "", "`FILE` with the certificate for TLS, PEM")
	flag.StringVar(&o.tlsKey, "tls-key", "", "`FILE` with its key, PEM")
	flag.DurationVar(&o.idleTimeout, "idle-timeout", 4*time.Hour, "end a session in which nothing is sent for so long")
	flag.DurationVar(&o.creationTimeout, "creation-timeout", 30*time.Second,
		"what a client has for opening its streams")
	flag.TextVar(&o.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	flag.Parse()
	if err := run(launcher, o); err != nil {
		launcher.Fail(err)
		fmt.Fprintln(os.Stderr, "holdfast-stream:", err)
		os.Exit(1)
	}
}

func run(launcher *handshake.Launcher, o options) error {
	proceed, err := launcher.Await()
	if !proceed || err != nil {
		return err
	}
	options := &slog.HandlerOptions{Level: o.level, ReplaceAttr: kind.ShortenAttr}
	log := slog.New(slog.NewTextHandler(tail.New(os.Stderr), options))
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
	if o.dir == "" || o.idleTimeout <= 0 || o.creationTimeout <= 0 {
		return errors.New("--dir is missing, or a timeout is not more than 0")
	}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, unix.SIGTERM)

	config := streaming.Config{
		Take:            stream.Dir(o.dir).Take,
		Open:            streaming.Open,
		Dial:            netns.Dial,
		IdleTimeout:     o.idleTimeout,
		CreationTimeout: o.creationTimeout,
		Log:             log,
	}
	scheme := "http"
	if o.tlsCert != "" || o.tlsKey != "" {
		if config.TLS, err = tlsConfig(o.tlsCert, o.tlsKey); err != nil {
			return err
		}
		scheme = "https"
	}
	lock, err := stream.Dir(o.dir).Lock()
	if err != nil {
		return fmt.Errorf("cannot serve sessions of %s: %w", o.dir, err)
	}
	if err := step.Reach(step.StreamLocked); err != nil {
		return err
	}
	l, err := listen(o.address, lock.LastPort())
	if err != nil {
		return err
	}
	if config.TLS == nil {
		warnOfPort(log, l.Addr().(*net.TCPAddr))
	}
	server, err := streaming.New(config)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	if err := lock.Announce(scheme + "://" + reachable(l.Addr())); err != nil {
		return err
	}
	if err := step.Reach(step.StreamAnnounced); err != nil {
		return err
	}
	launcher.Ready()
	log.Info("holdfast-stream serves sessions", "address", l.Addr(), "tls", config.TLS != nil)
	return live(server, lock, l, served, terminated)
}

// warnOfPort says what a port that any user may take means without TLS.
func warnOfPort(log *slog.Logger, address *net.TCPAddr) {
	if !reserved(address.Port) {
		log.Warn("without TLS, any user of the node can take this port when holdfast-stream was killed, and with it "+
			"the tokens of the last minute: leave the port to holdfast-stream, or give it a certificate",
			"address", address)
	}
}

// live waits until there is nothing more to do.
func live(server *streaming.Server, lock *stream.Server, l net.Listener, served <-chan error,
	terminated <-chan os.Signal) error {
	check := time.NewTicker(idleCheck)
	defer check.Stop()
	idle := func() bool { return server.Idle() > 0 }
	for {
		select {
		case err := <-served:
			return err
		case <-terminated:
			// The next one can have lock and port at once.
			l.Close()
			<-served
			lock.Close()
			slog.Info("holdfast-stream ends with its last connection")
			for !idle() {
				<-check.C
			}
			return nil
		case <-check.C:
			if err := lock.Sweep(context.Background()); err != nil {
				slog.Warn("tokens that have expired are left", "error", err)
			}
			if server.Idle() < idleLimit {
				continue
			}
			if retired, err := lock.Retire(context.Background(), idle); err != nil {
				slog.Warn("cannot end, though there is nothing to do", "error", err)
			} else if retired {
				slog.Info("holdfast-stream has nothing to do, and ends")
				return nil
			}
		}
	}
}
