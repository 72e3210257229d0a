package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// errEnded says that there is nothing left to act on.
var errEnded = errors.New("the container has ended")

// withShim finds a container and runs f with a client of its shim. Where the
// container has ended, before or meanwhile, the error is errEnded.
func (a *app) withShim(ctx context.Context, prefix string, f func(*client.Client) error) error {
	dir, err := a.dir(prefix)
	if err != nil {
		return err
	}
	c := client.New(dir)
	defer c.Close()
	quick, cancel := c.Impatient(ctx)
	defer cancel()
	if _, err = c.Hello(quick); err == nil {
		err = f(c)
	}
	if err == nil {
		return nil
	}
	if exit, xerr := dir.ReadExit(); xerr == nil {
		err = fmt.Errorf("%w: exit code %s, %s", errEnded, exitText(&exit), timeText(exit.ExitedAt))
	} else if held, herr := dir.Held(); errors.Is(err, client.ErrUnreachable) && herr == nil && !held {
		err = client.ErrNoRecord
	}
	return about(dir, err)
}

// about says which container an error is about.
func about(dir rundir.Dir, err error) error {
	return fmt.Errorf("container %s: %w", records.ShortID(dir.ID()), err)
}

// act is withShim for commands that print nothing but an empty object.
func (a *app) act(ctx context.Context, prefix string, f func(*client.Client) error) error {
	err := a.withShim(ctx, prefix, f)
	if err == nil && a.json {
		return a.printJSON(struct{}{})
	}
	return err
}

// await waits for the end of a container until ctx is done.
func (a *app) await(ctx context.Context, dir rundir.Dir) (rundir.Exit, error) {
	c := client.New(dir)
	defer c.Close()
	exit, err := c.Await(ctx, func(err error) {
		fmt.Fprintf(a.stderr, "holdfastctl: %v; still waiting\n", about(dir, err))
	})
	if err != nil {
		err = about(dir, err)
	}
	return exit, err
}

// ended is what `wait`, `stop` and `delete` print as JSON.
type ended struct {
	ID   string      `json:"id"`
	Exit rundir.Exit `json:"exit"`
}

func (a *app) printEnded(dir rundir.Dir, exit rundir.Exit) error {
	if a.json {
		return a.printJSON(ended{dir.ID(), exit})
	}
	return a.printf("%s ended: exit code %s\n", records.ShortID(dir.ID()), exitText(&exit))
}

func setupWait(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		exit, err := a.await(ctx, dir)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(ended{dir.ID(), exit})
		}
		return a.printf("%d\n", exit.Code)
	}
}

func setupKill(a *app, fs *flag.FlagSet) runFunc {
	sig := signalFlag(fs, unix.SIGTERM, "send `SIGNAL`, a name or a number (default TERM)")
	all := fs.Bool("all", false, "send it to every process of the container")
	return func(ctx context.Context, args []string) error {
		return a.act(ctx, args[0], func(c *client.Client) error { return c.Kill(ctx, int(*sig), *all) })
	}
}

func setupStop(a *app, fs *flag.FlagSet) runFunc {
	seconds := fs.Uint("t", 10, "send SIGKILL after `SECONDS` (default 10)")
	sig := signalFlag(fs, unix.SIGTERM, "send `SIGNAL` first, a name or a number (default TERM)")
	return func(ctx context.Context, args []string) error {
		const forever = 100 * 365 * 24 * 3600 // and no overflow
		grace := time.Duration(min(*seconds, forever)) * time.Second
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		err = a.withShim(ctx, dir.ID(), func(c *client.Client) error { return c.Stop(ctx, int(*sig), grace) })
		if err != nil && !errors.Is(err, errEnded) {
			return err
		}
		// SIGKILL does not end a process that waits for a broken disk.
		ctx, cancel := context.WithTimeout(ctx, grace+time.Minute)
		defer cancel()
		exit, err := a.await(ctx, dir)
		if err != nil {
			return err
		}
		return a.printEnded(dir, exit)
	}
}

func setupDelete(a *app, fs *flag.FlagSet) runFunc {
	force := fs.Bool("f", false, "kill it if it runs")
	return func(ctx context.Context, args []string) error {
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		var exit rundir.Exit
		err = a.withShim(ctx, dir.ID(), func(c *client.Client) error {
			e, err := c.Delete(ctx, *force)
			if e != nil {
				exit = *e
			}
			return err
		})
		// The record has the last word, also about a container that was gone
		// already, or whose shim ended while it was called.
		if recorded, rerr := dir.ReadExit(); rerr == nil {
			exit, err = recorded, nil
		}
		if err != nil {
			return err
		}
		return a.printEnded(dir, exit)
	}
}

func setupResize(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		width, height, err := size(args[1:])
		if err != nil {
			return err
		}
		return a.act(ctx, args[0], func(c *client.Client) error { return c.Resize(ctx, width, height) })
	}
}

// size reads WIDTHxHEIGHT; the kernel keeps 16 bits of each. Without an argument
// it is that of the terminal that this command is run in.
func size(args []string) (width, height uint16, err error) {
	if len(args) == 0 {
		s, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
		if err != nil {
			return 0, 0, usagef("resize: stdin is no terminal whose size could be taken; give one, such as 120x40")
		}
		return s.Col, s.Row, nil
	}
	w, h, _ := strings.Cut(strings.ToLower(args[0]), "x")
	x, errW := strconv.ParseUint(w, 10, 16)
	y, errH := strconv.ParseUint(h, 10, 16)
	if errW != nil || errH != nil {
		return 0, 0, usagef("resize: %q is no size; want columns and lines, such as 120x40", args[0])
	}
	return uint16(x), uint16(y), nil
}

// signalFlag declares -s, which takes KILL, SIGKILL, kill and 9.
func signalFlag(fs *flag.FlagSet, initial unix.Signal, usage string) *unix.Signal {
	sig := initial
	fs.Func("s", usage, func(text string) error {
		const last = 64 // SIGRTMAX
		if n, err := strconv.Atoi(text); err == nil {
			if n < 1 || n > last {
				return fmt.Errorf("signals are 1 to %d", last)
			}
			sig = unix.Signal(n)
			return nil
		}
		if sig = unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG")); sig == 0 {
			return errors.New("there is no such signal; real-time ones go by number, 34 to 64")
		}
		return nil
	})
	return &sig
}
