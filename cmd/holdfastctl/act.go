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

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// errEnded says that there is nothing left to act on.
var errEnded = errors.New("the container has ended")

// withShim finds a container and runs f with a connection to its shim. Where the
// container has ended, before or meanwhile, the error is errEnded.
func (a *app) withShim(ctx context.Context, prefix string, f func(*shim) error) error {
	dir, err := a.dir(prefix)
	if err != nil {
		return err
	}
	return a.withShimOf(ctx, dir, f)
}

func (a *app) withShimOf(ctx context.Context, dir rundir.Dir, f func(*shim) error) error {
	s, err := connect(ctx, dir)
	if err == nil {
		err = f(s)
		s.Close()
	}
	if err == nil {
		return nil
	}
	if exit, xerr := dir.ReadExit(); xerr == nil {
		return fmt.Errorf("container %s: %w: exit code %s, %s", short(dir.ID()), errEnded, exitText(&exit), timeText(exit.ExitedAt))
	}
	if errors.Is(err, errGone) {
		return noRecord(dir)
	}
	return fmt.Errorf("container %s: %w", short(dir.ID()), err)
}

// noRecord is the error about a container whose shim died.
func noRecord(dir rundir.Dir) error {
	return fmt.Errorf("container %s: %w and there is no exit record: the daemon writes one when it starts", short(dir.ID()), errGone)
}

// waitPoll is how long one Wait call lasts: it bounds how late the end of a shim
// that was stopped and then killed shows.
const waitPoll = 20 * time.Second

// waitExit waits for the end of a container until ctx is done. A shim that does
// not answer is asked again, since it may be stopped and go on later.
func (a *app) waitExit(ctx context.Context, dir rundir.Dir) (rundir.Exit, error) {
	told := false
	for {
		if ctx.Err() != nil {
			return rundir.Exit{}, fmt.Errorf("container %s has not ended: %w", short(dir.ID()), ctx.Err())
		}
		// The lock first: a shim that lets go has written the record.
		held, err := dir.Held()
		if err != nil {
			return rundir.Exit{}, err
		}
		exit, err := dir.ReadExit()
		if err == nil && !held {
			return exit, nil
		}
		if !held {
			return rundir.Exit{}, noRecord(dir)
		}
		exit, done, err := waitOnce(ctx, dir)
		if done {
			return exit, nil
		}
		switch {
		case err == nil: // not yet
			continue
		case errors.Is(err, errSilent):
			// Only the last of its output may be missing in the log.
			if exit, err := dir.ReadExit(); err == nil {
				return exit, nil
			}
			if !told {
				told = true
				fmt.Fprintf(a.stderr, "holdfastctl: container %s: %v; still waiting\n", short(dir.ID()), err)
			}
		case !errors.Is(err, errGone):
			return rundir.Exit{}, fmt.Errorf("container %s: %w", short(dir.ID()), err)
		}
		pause(ctx, 100*time.Millisecond)
	}
}

func waitOnce(ctx context.Context, dir rundir.Dir) (exit rundir.Exit, done bool, err error) {
	s, err := connect(ctx, dir)
	if err != nil {
		return exit, false, err
	}
	defer s.Close()
	resp, err := call(ctx, s, waitPoll+quick, proto.ShimService.Wait,
		&proto.WaitRequest{Id: dir.ID(), TimeoutMs: uint32(waitPoll.Milliseconds())})
	if err != nil || !resp.GetExited() {
		return exit, false, err
	}
	var started time.Time
	if st, err := dir.ReadStatus(); err == nil {
		started = st.StartedAt
	}
	return exitRecord(resp.GetExit(), started), true, nil
}

// pause waits between two looks; false means that ctx is done.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// ended is what `wait`, `stop` and `delete` print as JSON.
type ended struct {
	ID   string      `json:"id"`
	Exit rundir.Exit `json:"exit"`
}

func setupWait(a *app, _ *flag.FlagSet) runFunc {
	return func(ctx context.Context, args []string) error {
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		exit, err := a.waitExit(ctx, dir)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(ended{dir.ID(), exit})
		}
		return writeString(a.stdout, fmt.Sprintln(exit.Code))
	}
}

func setupKill(a *app, fs *flag.FlagSet) runFunc {
	sig := signalFlag(fs, "TERM", "send `SIGNAL`, a name or a number (default TERM)")
	all := fs.Bool("all", false, "send it to every process of the container")
	return func(ctx context.Context, args []string) error {
		err := a.withShim(ctx, args[0], func(s *shim) error {
			_, err := call(ctx, s, quick, proto.ShimService.Kill,
				&proto.KillRequest{Id: s.dir.ID(), Signal: uint32(*sig), All: *all})
			return err
		})
		if err == nil && a.json {
			return a.printJSON(struct{}{})
		}
		return err
	}
}

func setupStop(a *app, fs *flag.FlagSet) runFunc {
	seconds := fs.Uint("t", 10, "send SIGKILL after `SECONDS` (default 10)")
	sig := signalFlag(fs, "TERM", "send `SIGNAL` first, a name or a number (default TERM)")
	return func(ctx context.Context, args []string) error {
		const forever = 100 * 365 * 24 * 3600 // and no overflow
		grace := time.Duration(min(*seconds, forever)) * time.Second
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		err = a.withShimOf(ctx, dir, func(s *shim) error {
			_, err := call(ctx, s, quick, proto.ShimService.Stop,
				&proto.StopRequest{Id: dir.ID(), Signal: uint32(*sig), GraceMs: uint64(grace.Milliseconds())})
			return err
		})
		if err != nil && !errors.Is(err, errEnded) {
			return err
		}
		// SIGKILL does not end a process that waits for a broken disk.
		ctx, cancel := context.WithTimeout(ctx, grace+time.Minute)
		defer cancel()
		exit, err := a.waitExit(ctx, dir)
		if err != nil {
			return err
		}
		return a.printEnded(dir, exit)
	}
}

func (a *app) printEnded(dir rundir.Dir, exit rundir.Exit) error {
	if a.json {
		return a.printJSON(ended{dir.ID(), exit})
	}
	return writeString(a.stdout, fmt.Sprintf("%s ended: exit code %s\n", short(dir.ID()), exitText(&exit)))
}

func setupDelete(a *app, fs *flag.FlagSet) runFunc {
	force := fs.Bool("f", false, "kill it if it runs")
	return func(ctx context.Context, args []string) error {
		dir, err := a.dir(args[0])
		if err != nil {
			return err
		}
		var exit rundir.Exit
		err = a.withShimOf(ctx, dir, func(s *shim) error {
			resp, err := call(ctx, s, slow, proto.ShimService.Delete, &proto.DeleteRequest{Id: dir.ID(), Force: *force})
			if err == nil && resp.GetExit() != nil {
				exit = exitRecord(resp.GetExit(), time.Time{})
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
		width, height, err := terminalSize()
		if len(args) == 2 {
			width, height, err = parseSize(args[1])
		}
		if err != nil {
			return err
		}
		err = a.withShim(ctx, args[0], func(s *shim) error {
			_, err := call(ctx, s, quick, proto.ShimService.ResizePty,
				&proto.ResizePtyRequest{Id: s.dir.ID(), Width: width, Height: height})
			return err
		})
		if err == nil && a.json {
			return a.printJSON(struct{}{})
		}
		return err
	}
}

// terminalSize is the size of the terminal that this command is run in.
func terminalSize() (width, height uint32, err error) {
	c, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return 0, 0, usagef("resize: stdin is no terminal whose size could be taken; give one, such as 120x40")
	}
	size, err := c.Size()
	if err != nil {
		return 0, 0, fmt.Errorf("cannot read the size of the terminal: %w", err)
	}
	return uint32(size.Width), uint32(size.Height), nil
}

// parseSize reads WIDTHxHEIGHT; the kernel keeps 16 bits of each.
func parseSize(s string) (width, height uint32, err error) {
	w, h, _ := strings.Cut(strings.ToLower(s), "x")
	x, errW := strconv.ParseUint(w, 10, 16)
	y, errH := strconv.ParseUint(h, 10, 16)
	if errW != nil || errH != nil {
		return 0, 0, usagef("resize: %q is no size; want columns and lines, such as 120x40", s)
	}
	return uint32(x), uint32(y), nil
}

// signalValue is a flag that takes KILL, SIGKILL, kill and 9.
type signalValue int

func signalFlag(fs *flag.FlagSet, initial, usage string) *signalValue {
	s := new(signalValue)
	if err := s.Set(initial); err != nil {
		panic(err) // a constant of ours
	}
	fs.Var(s, "s", usage)
	return s
}

func (s *signalValue) String() string { return strconv.Itoa(int(*s)) }

// Set parses the flag.
func (s *signalValue) Set(text string) error {
	const last = 64 // SIGRTMAX
	if n, err := strconv.Atoi(text); err == nil {
		if n < 1 || n > last {
			return fmt.Errorf("signals are 1 to %d", last)
		}
		*s = signalValue(n)
		return nil
	}
	n := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG"))
	if n == 0 {
		return errors.New("there is no such signal; real-time ones go by number, 34 to 64")
	}
	*s = signalValue(n)
	return nil
}
