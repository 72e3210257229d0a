package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupPull(a *app, fs *flag.FlagSet) runFunc {
	address := fs.String("address", "",
		"the daemon's `SOCKET` (default: as its config says, or holdfast.sock in the state directory)")
	creds := fs.String("creds", "", "pull as `USER`, with the password from the standard input")
	return func(ctx context.Context, args []string) (err error) {
		if args[0] == "" {
			return usagef("pull: the name of the image is empty")
		}
		if strings.Contains(*creds, ":") {
			return usagef("pull: --creds takes the user alone: " +
				"everybody can read a command line, so the password comes from the standard input")
		}
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		defer signal.Stop(signals)
		if *address == "" {
			if *address, err = addressFrom(a.config, a.state); err != nil {
				return err
			}
		}
		req := &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: args[0]}}
		if *creds != "" {
			password, err := a.password(*creds, signals)
			if err != nil {
				return err
			}
			req.Auth = &runtimeapi.AuthConfig{Username: *creds, Password: password}
		}
		id, err := a.pull(ctx, *address, req, signals)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(map[string]string{"image": args[0], "id": id})
		}
		return a.printf("%s\n", id)
	}
}

// password reads one from the standard input: of a terminal a line that it does
// not show, else all that there is.
func (a *app) password(user string, signals <-chan os.Signal) (string, error) {
	in := io.LimitReader(a.stdin, 64<<10)
	fd := int(a.stdin.Fd())
	if shown, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		hidden := *shown
		hidden.Lflag &^= unix.ECHO
		if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
			return "", fmt.Errorf("cannot hide the password: %w; use a pipe or a file", err)
		}
		defer func() {
			unix.IoctlSetTermios(fd, unix.TCSETS, shown)
			fmt.Fprintln(a.stderr)
		}()
		fmt.Fprintf(a.stderr, "password of %s: ", user)
		in = &oneRead{a.stdin}
	}
	var b []byte
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		b, err = io.ReadAll(in)
	}()
	select {
	case <-done:
	case s := <-signals:
		return "", killed(s)
	}
	if err != nil {
		return "", fmt.Errorf("cannot read the password: %w", err)
	}
	password := strings.TrimRight(string(b), "\r\n")
	if password == "" {
		return "", errors.New("cannot pull with an empty password; it is read from the standard input")
	}
	return password, nil
}

// oneRead ends after one read, which of a terminal is a line.
type oneRead struct{ r io.Reader }

func (o *oneRead) Read(b []byte) (int, error) {
	n, err := o.r.Read(b)
	o.r = strings.NewReader("")
	return n, err
}

// killed is the exit code of a command that a signal ended, as a shell has it.
func killed(s os.Signal) error {
	n, _ := s.(syscall.Signal)
	return exitCode(rundir.CodeSignalOffset + int(n))
}

// pull has the daemon pull, and draws meanwhile what its record says about it.
// The daemon ends the pull when this process goes.
func (a *app) pull(ctx context.Context, address string, req *runtimeapi.PullImageRequest, signals <-chan os.Signal) (string, error) {
	image := req.GetImage().GetImage()
	if err := probe(address); err != nil {
		return "", fmt.Errorf("cannot pull %s: %w", image, err)
	}
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", fmt.Errorf("cannot reach the daemon at %s: %w", address, err)
	}
	defer conn.Close()
	var resp *runtimeapi.PullImageResponse
	done := make(chan struct{})
	go func() {
		defer close(done)
		resp, err = runtimeapi.NewImageServiceClient(conn).PullImage(ctx, req)
	}()
	draw := newBar(a.stderr)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if p, ok := findPull(a.state, image); ok {
				draw.show(p)
			}
		case s := <-signals:
			draw.clear()
			fmt.Fprintf(a.stderr, "holdfastctl: the pull of %s is called off; what has come so far is kept for the next one\n", image)
			return "", killed(s)
		case <-done:
			draw.clear()
			return resp.GetImageRef(), pullError(image, err)
		}
	}
}

// probe says in a person's words why the daemon cannot be reached.
func probe(address string) error {
	c, err := net.Dial("unix", address)
	switch {
	case err == nil:
		return c.Close()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("the daemon does not run, or listens elsewhere: %w", err)
	}
	return err
}

// pullError is what the daemon answered, without what is for the kubelet. A
// registry that is not available is told apart from a daemon that has gone.
func pullError(image string, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	text, registry := strings.CutPrefix(s.Message(), crierrors.ErrRegistryUnavailable.Error()+": ")
	if s.Code() == codes.Unavailable && !registry {
		return fmt.Errorf("cannot pull %s: the daemon has ended meanwhile; pull again once it is back, "+
			"what has come so far is kept: %s", image, printable(text))
	}
	text = strings.TrimPrefix(text, crierrors.ErrSignatureValidationFailed.Error()+": ")
	text = strings.TrimPrefix(text, "image.image: ") // the field of the request
	if !strings.HasPrefix(text, "cannot pull ") {
		text = fmt.Sprintf("cannot pull %s: %s", image, text)
	}
	if s.Code() != codes.Unknown { // that says nothing
		text += fmt.Sprintf(" (%s)", s.Code())
	}
	return errors.New(printable(text))
}
