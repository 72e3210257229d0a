package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
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

// withShim runs f with a client of the shim of a container. Where the container
// has ended, before or meanwhile, the error is errEnded.
func withShim(ctx context.Context, dir rundir.Dir, f func(*client.Client) error) error {
	c := client.New(dir)
	defer c.Close()
	quick, cancel := c.Impatient(ctx)
	defer cancel()
	_, err := c.Hello(quick)
	if err == nil {
		err = f(c)
	}
	if err == nil {
		return nil
	}
	if exit, xerr := dir.ReadExit(); xerr == nil {
		err = fmt.Errorf("%w: exit code %s, %s", errEnded, exitText(&exit), timeText(exit.ExitedAt))
	} else if errors.Is(err, client.ErrUnreachable) {
		err = unreachable(dir, err)
	}
	return about(dir, err)
}

// unreachable says what has become of a shim that was called in vain.
func unreachable(dir rundir.Dir, err error) error {
	if alive, herr := dir.Alive(); herr == nil && !alive {
		return client.ErrNoRecord
	}
	shim, serr := dir.FindShim()
	if errors.Is(err, fs.ErrNotExist) && serr == nil {
		err = fmt.Errorf("%w; it lives, and puts its socket back on kill -HUP %d", err, shim.PID)
	}
	return err
}

// about says which container an error is about.
func about(dir rundir.Dir, err error) error {
	return fmt.Errorf("container %s: %w", records.ShortID(dir.ID()), err)
}

// act is withShim for commands that print nothing but an empty object.
func (a *app) act(ctx context.Context, dir rundir.Dir, f func(*client.Client) error) error {
	err := withShim(ctx, dir, f)
	if err == nil {
		err = a.print(struct{}{}, "")
	}
	return err
}

// ended is what `wait`, `stop` and `delete` print as JSON.
type ended struct {
	ID   string      `json:"id"`
	Exit rundir.Exit `json:"exit"`
}

func (e ended) text() string {
	return fmt.Sprintf("%s ended: exit code %s\n", records.ShortID(e.ID), exitText(&e.Exit))
}

// await waits for the end of a container until ctx is done.
func (a *app) await(ctx context.Context, dir rundir.Dir) (ended, error) {
	c := client.New(dir)
	defer c.Close()
	exit, err := c.Await(ctx, func(err error) {
		fmt.Fprintf(a.stderr, "holdfastctl: %s; still waiting\n", lines(about(dir, err).Error()))
	})
	if err != nil {
		err = about(dir, err)
	}
	return ended{dir.ID(), exit}, err
}

func setupWait(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		e, err := a.await(ctx, dir)
		if err != nil {
			return err
		}
		return a.print(e, fmt.Sprintln(e.Exit.Code))
	}
}

func setupKill(a *app, fs *flag.FlagSet) runFunc {
	sig := signalFlag(fs, "send `SIGNAL`, a name or a number (default TERM)")
	all := fs.Bool("all", false, "send it to every process of the container")
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		return a.act(ctx, dir, func(c *client.Client) error { return c.Kill(ctx, int(*sig), *all) })
	}
}

func setupStop(a *app, fs *flag.FlagSet) runFunc {
	seconds := fs.Uint("t", 10, "send SIGKILL after `SECONDS` (default 10)")
	sig := signalFlag(fs, "send `SIGNAL` first, a name or a number (default TERM)")
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		const forever = 100 * 365 * 24 * 3600 // and no overflow
		grace := time.Duration(min(*seconds, forever)) * time.Second
		err := withShim(ctx, dir, func(c *client.Client) error { return c.Stop(ctx, int(*sig), grace) })
		if err != nil && !errors.Is(err, errEnded) {
			return err
		}
		// SIGKILL does not end a process that waits for a broken disk.
		ctx, cancel := context.WithTimeout(ctx, grace+time.Minute)
		defer cancel()
		e, err := a.await(ctx, dir)
		if err != nil {
			return err
		}
		return a.print(e, e.text())
	}
}

func setupDelete(a *app, fs *flag.FlagSet) runFunc {
	force := fs.Bool("f", false, "kill it if it runs")
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		e := ended{ID: dir.ID()}
		err := withShim(ctx, dir, func(c *client.Client) error {
			exit, err := c.Delete(ctx, *force)
			if exit != nil {
				e.Exit = *exit
			}
			return err
		})
		// The record has the last word, also about a container that was gone
		// already, or whose shim ended while it was called.
		if recorded, rerr := dir.ReadExit(); rerr == nil {
			e.Exit, err = recorded, nil
		}
		if err != nil {
			return err
		}
		return a.print(e, e.text())
	}
}

func setupResize(a *app, fs *flag.FlagSet) runFunc {
	exec := fs.String("exec", "", "set that of the exec `EXEC`, such as exec-3")
	return func(ctx context.Context, dir rundir.Dir, args []string) error {
		size, err := size(args)
		if err != nil {
			return err
		}
		return a.act(ctx, dir, func(c *client.Client) error { return c.Resize(ctx, *exec, size) })
	}
}

// size reads WIDTHxHEIGHT; the kernel keeps 16 bits of each. Without an argument
// it is that of the terminal that this command is run in.
func size(args []string) (client.Size, error) {
	if len(args) == 0 {
		s, err := sizeOf(os.Stdin)
		if err != nil {
			err = usagef("resize: stdin is no terminal whose size could be taken; give one, such as 120x40")
		}
		return s, err
	}
	w, h, _ := strings.Cut(strings.ToLower(args[0]), "x")
	x, errW := strconv.ParseUint(w, 10, 16)
	y, errH := strconv.ParseUint(h, 10, 16)
	if errW != nil || errH != nil {
		return client.Size{}, usagef("resize: %q is no size; want columns and lines, such as 120x40", args[0])
	}
	return client.Size{Width: uint16(x), Height: uint16(y)}, nil
}

// signalFlag declares -s, which takes KILL, SIGKILL, kill and 9.
func signalFlag(fs *flag.FlagSet, usage string) *unix.Signal {
	sig := unix.SIGTERM
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
