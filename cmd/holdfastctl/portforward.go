package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupPortForward(a *app, fs *flag.FlagSet) runFunc {
	address := fs.String("address", "127.0.0.1", "listen on `IP` of this host")
	return func(ctx context.Context, dir rundir.Dir, ports []string) error {
		ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
		defer stop()
		namespace, err := networkOf(ctx, dir)
		if err != nil {
			return err
		}
		defer namespace.Close()
		f := &forwarder{app: a, netns: fmt.Sprintf("/proc/self/fd/%d", namespace.Fd())}
		var all []net.Listener
		defer func() {
			for _, l := range all {
				l.Close()
			}
			f.running.Wait()
		}()
		for _, p := range ports {
			local, remote, err := portsOf(p)
			if err != nil {
				return err
			}
			l, err := net.Listen("tcp", net.JoinHostPort(*address, local))
			if err != nil {
				return fmt.Errorf("cannot forward port %s: %w", remote, err)
			}
			all = append(all, l)
			fmt.Fprintf(a.stdout, "Forwarding from %s to port %s\n", l.Addr(), remote)
			f.running.Go(func() { f.serve(ctx, l, remote) })
		}
		<-ctx.Done()
		return nil
	}
}

// portsOf reads [LOCAL:]REMOTE. A LOCAL that is empty or 0 is any port.
func portsOf(text string) (local, remote string, err error) {
	local, remote, both := strings.Cut(text, ":")
	if !both {
		remote = local
	}
	for _, p := range []*string{&local, &remote} {
		n, perr := strconv.ParseUint(*p, 10, 16)
		if p == &local && both && (*p == "" || n == 0 && perr == nil) {
			*p = "0"
		} else if perr != nil || n == 0 {
			return "", "", usagef("port-forward: %q is no [LOCAL:]PORT", text)
		}
	}
	return local, remote, nil
}

// networkOf opens the network namespace of a container that lives.
func networkOf(ctx context.Context, dir rundir.Dir) (f *os.File, err error) {
	err = withShim(ctx, dir, func(c *client.Client) error {
		state, err := c.State(ctx)
		if err != nil {
			return err
		}
		f, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", state.Init.PID))
		if err == nil && !state.Init.Alive() { // what was opened may be another process's
			f.Close()
			err = errEnded
		}
		return err
	})
	return f, err
}

type forwarder struct {
	app     *app
	netns   string
	running sync.WaitGroup
}

// serve takes connections until the listener is closed, and joins each with a port.
func (f *forwarder) serve(ctx context.Context, l net.Listener, port string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		f.running.Go(func() {
			defer conn.Close()
			pod, err := netns.Dial(ctx, f.netns, net.JoinHostPort("localhost", port))
			if err != nil {
				fmt.Fprintf(f.app.stderr, "holdfastctl: %s\n", lines(err.Error()))
				return
			}
			defer pod.Close()
			defer context.AfterFunc(ctx, func() { conn.Close(); pod.Close() })()
			var half sync.WaitGroup
			half.Go(func() { pump(pod, conn) })
			pump(conn, pod)
			half.Wait()
		})
	}
}

// pump copies until the end of one direction, and passes the end on.
func pump(to, from net.Conn) {
	io.Copy(to, from)
	if w, ok := to.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
}
