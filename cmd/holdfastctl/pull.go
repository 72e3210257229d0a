package main

import (
	"bufio"
	"cmp"
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

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupPull(a *app, fs *flag.FlagSet) runFunc {
	address := fs.String("address", "",
		"the daemon's `SOCKET` (default: as its config says, or holdfast.sock in the state directory)")
	creds := fs.String("creds", "", "pull as `USER`, with the password from the standard input")
	return func(ctx context.Context, _ rundir.Dir, args []string) error {
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
		req := &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: args[0]}}
		if *creds != "" {
			password, err := a.password(*creds, signals)
			if err != nil {
				return err
			}
			req.Auth = &runtimeapi.AuthConfig{Username: *creds, Password: password}
		}
		id, err := a.pull(ctx, cmp.Or(*address, a.address), req, signals)
		if err != nil {
			return err
		}
		return a.print(map[string]string{"image": args[0], "id": id}, id+"\n")
	}
}

// password reads one line from the standard input, which a terminal does not show.
func (a *app) password(user string, signals <-chan os.Signal) (string, error) {
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
	}
	var line string
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		line, err = bufio.NewReader(io.LimitReader(a.stdin, 64<<10)).ReadString('\n')
	}()
	select {
	case <-done:
	case s := <-signals:
		return "", killed(s)
	}
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("cannot read the password: %w", err)
	}
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return "", errors.New("cannot pull with an empty password; it is read from the standard input")
	}
	return line, nil
}

// killed is the exit code of a command that a signal ended, as a shell has it.
func killed(s os.Signal) error {
	n, _ := s.(syscall.Signal)
	return exitCode(rundir.CodeSignalOffset + int(n))
}

// pull has the daemon pull, and draws meanwhile what its record says about it.
// The daemon ends the pull when this process goes.
func (a *app) pull(ctx context.Context, address string, req *runtimeapi.PullImageRequest,
	signals <-chan os.Signal) (string, error) {
	image := req.GetImage().GetImage()
	// gRPC would try for long, and then say it in its own words.
	if probe, err := net.Dial("unix", address); err != nil {
		return "", fmt.Errorf("cannot pull %s: the daemon does not run, or listens elsewhere: %w", image, err)
	} else {
		probe.Close()
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
			if p, ok := records.FindPull(a.state, image); ok {
				draw.show(p)
			}
		case s := <-signals:
			draw.clear()
			const text = "holdfastctl: the pull of %s is called off; what has come so far is kept for the next one\n"
			fmt.Fprintf(a.stderr, text, image)
			return "", killed(s)
		case <-done:
			draw.clear()
			return resp.GetImageRef(), pullError(image, err)
		}
	}
}

// pullError is what the daemon answered, without what is for the kubelet. A
// registry that is not available is told apart from a daemon that has gone.
func pullError(image string, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	registry := strings.HasPrefix(s.Message(), crierrors.ErrRegistryUnavailable.Error())
	if s.Code() == codes.Unavailable && !registry {
		return fmt.Errorf("cannot pull %s: the daemon has ended meanwhile; pull again once it is back, "+
			"what has come so far is kept: %s", image, printable(s.Message()))
	}
	const begin = "cannot pull "
	_, text, ok := strings.Cut(s.Message(), begin)
	if !ok {
		text = image + ": " + s.Message()
	}
	if s.Code() != codes.Unknown { // that says nothing
		text += fmt.Sprintf(" (%s)", s.Code())
	}
	return errors.New(begin + printable(text))
}

// bar draws how far a pull is: over itself on a terminal, else a line every ten
// seconds.
type bar struct {
	w     io.Writer
	width func() int // of the terminal, now; nil: it is none
	drawn bool
	known bool // the last line knew what there is to do
	last  time.Time
}

// barWidth is the most of it; below the least there is none. The text comes
// first, so that the bar does not change with it.
const (
	barWidth  = 30
	barLeast  = 8
	textWidth = 66
)

func newBar(w io.Writer) *bar {
	b := &bar{w: w}
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return b
	}
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
		b.width = func() int {
			size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
			if err != nil || size.Col == 0 { // it does not tell
				return 80
			}
			return int(size.Col)
		}
	}
	return b
}

func (b *bar) show(p records.Pull) {
	if b.width != nil {
		fmt.Fprintf(b.w, "\r\x1b[K%s", barText(p, b.width()))
		b.drawn = true
	} else if known := p.TotalLayers > 0; time.Since(b.last) >= 10*time.Second || known && !b.known {
		fmt.Fprintln(b.w, printable(p.Text()))
		b.known, b.last = known, time.Now()
	}
}

func (b *bar) clear() {
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// barText fits into a line: what is longer would wrap, and could not be drawn
// over. The last column stays free, as some terminals wrap there.
func barText(p records.Pull, width int) string {
	text := printable(p.Text())
	if n := min(barWidth, width-textWidth); p.TotalBytes > 0 && n >= barLeast {
		full := min(n, int(float64(n)*float64(p.Bytes)/float64(p.TotalBytes)))
		text = fmt.Sprintf("[%s%s] %s", strings.Repeat("#", full), strings.Repeat(".", n-full), text)
	}
	runes := []rune(text)
	return string(runes[:max(0, min(len(runes), width-1))])
}

func setupPulls(a *app, _ *flag.FlagSet) runFunc {
	return func(context.Context, rundir.Dir, []string) error {
		list, err := records.Pulls(a.state)
		if errors.Is(err, fs.ErrNotExist) {
			err = a.missing("pulls") // nil: a daemon that has not come that far
		}
		if err != nil {
			return err
		}
		// For scripts: fields are added, not renamed.
		type view struct {
			records.Pull
			Alive bool `json:"alive"` // the daemon that pulls
		}
		views := []view{}
		rows := [][]string{{"IMAGE", "POD", "PHASE", "DONE", "OF", "RATE", "LAYERS", "AGE", "NOTE"}}
		for _, p := range list {
			v := view{p, p.Daemon.Alive()}
			views = append(views, v)
			phase, note := string(v.Phase), v.Trouble
			if !v.Alive {
				phase, note = "("+phase+")", "the daemon that pulled it has died; the next pull goes on from here"
			}
			var done, of, rate, layers string
			if v.TotalLayers > 0 {
				done, of = fmt.Sprintf("%d%%", v.Percent()), records.Size(v.TotalBytes)
				rate, layers = records.Size(v.Rate)+"/s", fmt.Sprintf("%d/%d", v.Layers, v.TotalLayers)
			}
			rows = append(rows, []string{v.Ref, v.Pod, phase, done, of, rate, layers, age(v.Since), note})
		}
		return a.print(views, table(rows))
	}
}
