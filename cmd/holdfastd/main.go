// Command holdfastd serves the Kubernetes CRI from what the shims and the
// records say. It may be killed at any time; starting it is recovering.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfast-cri/holdfast/cri"
	"github.com/holdfast-cri/holdfast/daemon"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// version is set by the build.
var version = "0.0.0-dev"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "holdfastd:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	config, root, state, address, logLevel string
	version                                bool
}

func parse() (o options, err error) {
	flag.StringVar(&o.config, "config", "", "config `file` (default "+defaultConfigFile+", which may be missing)")
	flag.StringVar(&o.root, "root", "", "`folder` for what survives a reboot")
	flag.StringVar(&o.state, "state", "", "`folder` for sockets, locks and pins, on a tmpfs")
	flag.StringVar(&o.address, "address", "", "`socket` of the CRI")
	flag.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	flag.BoolVar(&o.version, "version", false, "print the version and stop")
	flag.Parse()
	if flag.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q; see holdfastd -h", flag.Arg(0))
	}
	return o, err
}

func run() error {
	if os.Getenv("GOGC") == "" {
		// Little garbage is made, most of it by pulls: letting the heap grow by
		// half instead of doubling it costs no time that can be measured.
		debug.SetGCPercent(50)
	}
	// What this process and its children make is as open as it is said to be,
	// whatever the umask of whoever started it.
	syscall.Umask(0o022)
	o, err := parse()
	if err != nil {
		return err
	}
	if o.version {
		fmt.Println("holdfastd", version)
		return nil
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return fmt.Errorf("cannot use --log-level %q: debug, info, warn and error are known", o.logLevel)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level, ReplaceAttr: kind.ShortenAttr}))

	f, err := readConfig(o.config)
	if err != nil {
		return err
	}
	f.Root, f.State = cmp.Or(o.root, f.Root), cmp.Or(o.state, f.State)
	f.Address = cmp.Or(o.address, f.Address)
	cfg, err := f.resolve(o.logLevel)
	if err != nil {
		return err
	}
	f.warn(log)
	if os.Geteuid() != 0 {
		return errors.New("cannot run without root")
	}
	return serve(cfg, f.Metrics.Address, log)
}

// serve runs the daemon until it is told to end, or cannot go on.
func serve(cfg daemon.Config, metricsAddress string, log *slog.Logger) error {
	// The socket is for this process alone: children that see it would speak to
	// the service manager too.
	notifySocket := os.Getenv("NOTIFY_SOCKET")
	os.Unsetenv("NOTIFY_SOCKET")

	d, err := daemon.Open(cfg, log)
	if err != nil {
		return err
	}
	var scraped *metricsServer // nil: off
	if cfg.Metrics != nil {
		if scraped, err = serveMetrics(metricsAddress, cfg.Metrics.Gatherer(d.Snapshot), log); err != nil {
			return errors.Join(err, shutdown(d, nil, nil))
		}
	}
	l, err := listen(cfg.Address)
	if err != nil {
		return errors.Join(err, shutdown(d, nil, scraped))
	}
	server := cri.NewServer(d, version, log)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	if err := notify(notifySocket, "READY=1"); err != nil {
		log.Warn("cannot tell the service manager that the daemon is ready", "error", err)
	}
	log.Info("serving", "address", cfg.Address, "version", version, "pid", os.Getpid())

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err = <-served:
	case s := <-signals:
		log.Info("shutting down; containers go on", "signal", s)
		if nerr := notify(notifySocket, "STOPPING=1"); nerr != nil {
			log.Debug("cannot tell the service manager", "error", nerr)
		}
	}
	return errors.Join(err, shutdown(d, server, scraped))
}

// shutdown lets calls under way end, within a bound: what is cut short is
// finished or undone by the next start.
func shutdown(d *daemon.Daemon, server *grpc.Server, scraped *metricsServer) error {
	d.EndPulls()
	d.Events.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if server != nil {
		stop := context.AfterFunc(ctx, server.Stop)
		server.GracefulStop()
		stop()
	}
	scraped.close(ctx)
	// What was cut short has to end as well.
	ctx, cancel = context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return d.Close(ctx)
}

// notify speaks to systemd's socket, if there is one (sd_notify(3)).
func notify(address, message string) error {
	if address == "" {
		return nil
	}
	c, err := net.Dial("unixgram", address)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(message))
	return err
}
