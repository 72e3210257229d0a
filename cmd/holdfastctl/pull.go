package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/console"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupPull(a *app, fs *flag.FlagSet) runFunc {
	address := fs.String("address", "", "the daemon's `SOCKET` (default: as its config says, or holdfast.sock in the state directory)")
	creds := fs.String("creds", "", "pull as `USER`, with the password from the standard input")
	return func(ctx context.Context, args []string) (err error) {
		if args[0] == "" {
			return usagef("pull: the name of the image is empty")
		}
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		defer signal.Stop(signals)
		if *address == "" {
			if *address, err = addressFrom(a.config, a.state); err != nil {
				return err
			}
		}
		// The CRI's PullImageRequest, as JSON.
		type image struct {
			Image string `json:"image"`
		}
		type auth struct {
			Username string `json:"username"`
			Password string `json:"password"`
		}
		request := struct {
			Image image `json:"image"`
			Auth  *auth `json:"auth,omitempty"`
		}{Image: image{args[0]}}
		if *creds != "" {
			if strings.Contains(*creds, ":") {
				return usagef("pull: --creds takes the user alone: everybody can read a command line, so the password comes from the standard input")
			}
			password, err := a.password(*creds, signals)
			if err != nil {
				return err
			}
			request.Auth = &auth{*creds, password}
		}
		id, err := a.pull(ctx, *address, args[0], request, signals)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(map[string]string{"image": args[0], "id": id})
		}
		fmt.Fprintln(a.stdout, id)
		return nil
	}
}

// password reads one from the standard input: of a terminal a line that it does
// not show, else all that there is.
func (a *app) password(user string, signals <-chan os.Signal) (string, error) {
	read := func() ([]byte, error) { return io.ReadAll(io.LimitReader(a.stdin, 64<<10)) }
	if c, err := console.ConsoleFromFile(a.stdin); err == nil {
		if err := c.DisableEcho(); err != nil {
			return "", fmt.Errorf("cannot hide the password: %w; use a pipe or a file", err)
		}
		defer func() {
			c.Reset()
			fmt.Fprintln(a.stderr)
		}()
		fmt.Fprintf(a.stderr, "password of %s: ", user)
		read = func() ([]byte, error) {
			b := make([]byte, 4096) // the longest line that a terminal gives
			n, err := a.stdin.Read(b)
			if err == io.EOF {
				err = nil
			}
			return b[:n], err
		}
	}
	type answer struct {
		b   []byte
		err error
	}
	done := make(chan answer, 1)
	go func() {
		b, err := read()
		done <- answer{b, err}
	}()
	var got answer
	select {
	case got = <-done:
	case s := <-signals:
		return "", killed(s)
	}
	if got.err != nil {
		return "", fmt.Errorf("cannot read the password: %w", got.err)
	}
	password := strings.TrimRight(string(got.b), "\r\n")
	if password == "" {
		return "", errors.New("cannot pull with an empty password; it is read from the standard input")
	}
	return password, nil
}

// killed is the exit code of a command that a signal ended, as a shell has it.
func killed(s os.Signal) error {
	n, _ := s.(syscall.Signal)
	return exitCode(rundir.CodeSignalOffset + int(n))
}

// pull lets holdfastd speak to the daemon, and draws meanwhile what the daemon's
// record says about it.
func (a *app) pull(ctx context.Context, address, image string, request any, signals <-chan os.Signal) (string, error) {
	program, err := findDaemon()
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(request)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "pull", "--address", address)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(b), &stdout, &stderr
	// It goes with this process, and the pull with it; a terminal tells this
	// process alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal is for the end of the thread that started it
		done <- cmd.Run()
	}()
	draw := newBar(a.stderr)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if p, ok := findPull(a.pullsDir(), image); ok {
				draw.show(p)
			}
			continue
		case s := <-signals:
			cancel()
			<-done
			draw.clear()
			fmt.Fprintf(a.stderr, "holdfastctl: the pull of %s is called off; what has come so far is kept for the next one\n", image)
			return "", killed(s)
		case err = <-done:
		}
		break
	}
	draw.clear()
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		err = errors.New(printable(strings.TrimPrefix(said, "holdfastd: ")))
	} else if err != nil {
		err = fmt.Errorf("cannot pull %s: %s: %w", image, program, err)
	}
	return strings.TrimSpace(stdout.String()), err
}

// findDaemon finds holdfastd beside this program, or on the PATH.
func findDaemon() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "holdfastd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("holdfastd")
	if err != nil {
		return "", errors.New("cannot find holdfastd beside holdfastctl or on the PATH: it speaks to the daemon")
	}
	return path, nil
}

// findPull finds the record of the youngest pull under that name. It may be
// somebody else's until ours is there; both wait for the same bytes.
func findPull(dir, image string) (found rundir.Pull, ok bool) {
	list, _ := readPulls(dir) // none: no pull runs
	for _, p := range list {
		if p.Asked == image && p.Daemon.Alive() && (!ok || p.Since.After(found.Since)) {
			found, ok = p, true
		}
	}
	return found, ok
}
