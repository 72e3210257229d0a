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
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupPull(a *app, fs *flag.FlagSet) runFunc {
	address := fs.String("address", "", "the daemon's `SOCKET` (default: as its config says, or holdfast.sock in the state directory)")
	creds := fs.String("creds", "", "pull as `USER`, with the password from the standard input")
	return func(ctx context.Context, args []string) (err error) {
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
			b, err := io.ReadAll(io.LimitReader(a.stdin, 64<<10))
			if err != nil {
				return fmt.Errorf("cannot read the password: %w", err)
			}
			request.Auth = &auth{*creds, strings.TrimRight(string(b), "\r\n")}
		}
		id, err := a.pull(ctx, *address, args[0], request)
		if err != nil {
			return fmt.Errorf("cannot pull %s: %w", args[0], err)
		}
		if a.json {
			return a.printJSON(map[string]string{"image": args[0], "id": id})
		}
		fmt.Fprintln(a.stdout, id)
		return nil
	}
}

// pull lets holdfastd speak to the daemon, and draws meanwhile what the daemon's
// record says about it.
func (a *app) pull(ctx context.Context, address, image string, request any) (string, error) {
	program, err := findDaemon()
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(request)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, program, "pull", "--address", address)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(b), &stdout, &stderr
	// It goes with this process, and the pull with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	since := time.Now()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal is for the end of the thread that started it
		done <- cmd.Run()
	}()
	f, _ := a.stderr.(*os.File)
	draw := bar{w: a.stderr, terminal: f != nil && isTerminal(f)}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if p, ok := findPull(filepath.Join(a.state, rundir.PullsName), image, since); ok {
				draw.show(p)
			}
			continue
		case err = <-done:
		}
		break
	}
	draw.clear()
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		err = errors.New(strings.TrimPrefix(said, "holdfastd: "))
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
	return exec.LookPath("holdfastd")
}

// findPull finds the record of the youngest pull under that name.
func findPull(dir, image string, since time.Time) (found rundir.Pull, ok bool) {
	files, _ := os.ReadDir(dir) // none: no pull runs
	for _, f := range files {
		var p rundir.Pull
		err := rundir.ReadRecord(filepath.Join(dir, f.Name()), &p)
		if err == nil && p.Asked == image && !p.Since.Before(since) && (!ok || p.Since.After(found.Since)) {
			found, ok = p, true
		}
	}
	return found, ok
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// bar draws: over itself on a terminal, else a line every ten seconds.
type bar struct {
	w        io.Writer
	terminal bool
	drawn    bool
	last     time.Time
}

const barWidth = 30

func (b *bar) show(p rundir.Pull) {
	if b.terminal {
		fmt.Fprintf(b.w, "\r\x1b[K%s", pullText(p, true))
		b.drawn = true
	} else if time.Since(b.last) >= 10*time.Second {
		fmt.Fprintln(b.w, pullText(p, false))
		b.last = time.Now()
	}
}

func (b *bar) clear() {
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

func pullText(p rundir.Pull, bar bool) string {
	text := fmt.Sprintf("%s of %s, %d of %d layers, %s/s", sizeText(p.Bytes), sizeText(p.TotalBytes), p.Layers, p.TotalLayers, sizeText(p.Rate))
	if !bar {
		return text
	}
	n := barWidth
	if p.TotalBytes > 0 {
		n = int(float64(barWidth) * min(1, float64(p.Bytes)/float64(p.TotalBytes)))
	}
	return fmt.Sprintf("[%s%s] %s", strings.Repeat("#", n), strings.Repeat(".", barWidth-n), text)
}

// sizeText says a number of bytes with three digits.
func sizeText(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for f >= 1000 && len(units) > 1 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.3g %s", f, units[0])
}
