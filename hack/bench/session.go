package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sessionTimeout bounds one session.
const sessionTimeout = 5 * time.Minute

// goalBytes is what a byte of a session may take, in time and in processor time, of
// what it takes in containerd.
const goalBytes = 0.5

// benchSessions measures sessions of exec in one container of each daemon, over each
// protocol that both have: how long a short one takes, and what a byte takes.
func benchSessions(o options, logf func(string, ...any)) (t table, err error) {
	targets, stop, err := startTargets(o)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return t, err
	}
	for _, x := range targets {
		t.names = append(t.names, x.name)
	}
	for _, w := range wires {
		for _, at := range []int{1, 16} {
			r, err := shortRow(targets, fmt.Sprintf("%s, %d at a time", w.name, at), o, w.make, at)
			if err != nil {
				return t, err
			}
			t.rows = append(t.rows, r)
		}
		for _, from := range []string{"stdout", "stdin"} {
			for _, at := range []int{1, 16} {
				l := load{fmt.Sprintf("%s, %d %s", w.name, at, from), w.make, from == "stdout", at}
				rows, err := l.rows(targets, o, logf)
				if err != nil {
					return t, err
				}
				t.rows = append(t.rows, rows...)
			}
		}
	}
	return t, nil
}

func shortRow(targets []*target, name string, o options, protocol func() wire, at int) (row, error) {
	r := newRow(name, 0)
	err := inTurns(targets, 2+max(1, o.sessions/at), func(round int, x *target) error {
		took, err := x.shortSessions(protocol, at)
		if round >= 2 { // the first ones find nothing in caches
			r.values[x.name] = append(r.values[x.name], took...)
		}
		return err
	})
	return r, err
}

// load is bytes through sessions.
type load struct {
	name     string
	protocol func() wire
	out      bool // to the client
	at       int  // sessions at a time
}

// rows has what a GiB takes: time, and processor time of the runtime.
func (l load) rows(targets []*target, o options, logf func(string, ...any)) ([]row, error) {
	wall, cpu := newRow(l.name, goalBytes), newRow("- processor time", goalBytes)
	err := inTurns(targets, o.rounds, func(_ int, x *target) error {
		b, err := x.bulkSessions(l, o.bytes)
		if err != nil {
			return err
		}
		logf("%s: %-10s %s", l.name, x.name, b)
		wall.values[x.name] = append(wall.values[x.name], b.wall.Seconds()*1000/b.gib)
		cpu.values[x.name] = append(cpu.values[x.name], b.cpu.Seconds()*1000/b.gib)
		return nil
	})
	return []row{wall, cpu}, err
}

// bulk is what it took to move bytes.
type bulk struct {
	gib       float64
	wall, cpu time.Duration
	client    time.Duration
}

func (b bulk) String() string {
	return fmt.Sprintf("%6.2f GiB/s, cpu %5.2f s/GiB (client %.2f)",
		b.gib/b.wall.Seconds(), b.cpu.Seconds()/b.gib, b.client.Seconds()/b.gib)
}

// address asks for a session.
func (x *target) address(stdin, stderr bool, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), execTimeout)
	defer cancel()
	r, err := x.runtime.Exec(ctx, &cri.ExecRequest{
		ContainerId: x.container,
		Cmd:         command,
		Stdin:       stdin,
		Stdout:      true,
		Stderr:      stderr,
	})
	return r.GetUrl(), err
}

// shortSessions runs so many at a time, from the call of the CRI to the exit code, and
// says how long each took, in ms.
func (x *target) shortSessions(protocol func() wire, n int) ([]float64, error) {
	took := make([]float64, n)
	var g errgroup.Group
	for i := range took {
		g.Go(func() error {
			began := time.Now()
			address, err := x.address(false, true, execCommand...)
			if err != nil {
				return err
			}
			c, err := connect(protocol(), address, stdout, stderr)
			if err != nil {
				return err
			}
			defer c.Close()
			err = c.finish()
			took[i] = float64(time.Since(began)) / float64(time.Millisecond)
			if err == nil && c.received != int64(len(execOutput)) {
				err = fmt.Errorf("a session has sent %d bytes, not %q", c.received, execOutput)
			}
			return err
		})
	}
	return took, g.Wait()
}

// bulkSessions moves so many bytes. The starts of the processes are not measured.
func (x *target) bulkSessions(l load, total int64) (b bulk, err error) {
	each := max(1, total/int64(l.at)/pieceSize) * pieceSize
	b.gib = float64(each) * float64(l.at) / (1 << 30)
	command, send, receive := "pour", int64(1), each
	if !l.out {
		command, send, receive = "drain", each, 0
	}
	clients, err := x.openSessions(l, command, each)
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	if err != nil {
		return b, err
	}
	cpu, err := x.cpuOfAll()
	if err != nil {
		return b, err
	}
	began, self := time.Now(), ownCPU()
	var g errgroup.Group
	for _, c := range clients {
		g.Go(func() error { return c.exchange(send, receive) })
	}
	err = g.Wait()
	b.wall, b.client = time.Since(began), ownCPU()-self
	after, err2 := x.cpuOfAll()
	b.cpu = after - cpu
	return b, errors.Join(err, err2)
}

// openSessions opens sessions with a command, and waits until all of them run it. Close
// the clients, after an error too.
func (x *target) openSessions(l load, command string, bytes int64) (clients []*client, err error) {
	opened := make([]*client, l.at)
	var g errgroup.Group
	for i := range opened {
		g.Go(func() error {
			address, err := x.address(true, false, "/program", command, strconv.FormatInt(bytes, 10))
			if err == nil {
				opened[i], err = connect(l.protocol(), address, stdin, stdout)
			}
			if err == nil {
				err = opened[i].await()
			}
			return err
		})
	}
	err = g.Wait()
	return slices.DeleteFunc(opened, func(c *client) bool { return c == nil }), err
}

// cpuOfAll is the processor time of all processes of the runtime that live. That of
// their children is not in it, as it is that of the commands that were run.
func (x *target) cpuOfAll() (sum time.Duration, err error) {
	pids, err := x.processes()
	for _, pid := range pids {
		if own, _, err := cpuOf(pid); err == nil {
			sum += own
		}
	}
	if err == nil && sum == 0 {
		err = fmt.Errorf("no process has %s in its command line", x.dir)
	}
	return sum, err
}

// processes are those whose command line names the folder of the runtime.
func (x *target) processes() (pids []int, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(b, []byte(x.dir+"/")) {
			continue // it has ended, or it is another one
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// endRest ends what a daemon leaves behind that has stopped: what serves sessions.
func (x *target) endRest() error {
	pids, err := x.processes()
	for _, pid := range pids {
		if kerr := syscall.Kill(pid, syscall.SIGTERM); kerr != syscall.ESRCH {
			err = errors.Join(err, kerr)
		}
	}
	return err
}

func ownCPU() time.Duration {
	own, _, _ := cpuOf(os.Getpid())
	return own
}

// inTurns has targets take turns, so that whatever else the machine does meets all of them.
func inTurns(targets []*target, rounds int, f func(round int, x *target) error) error {
	turns := slices.Clone(targets)
	for i := range rounds {
		for _, x := range turns {
			if err := f(i, x); err != nil {
				return fmt.Errorf("%s: %w", x.name, err)
			}
		}
		slices.Reverse(turns) // who goes first may matter
	}
	return nil
}

func newRow(name string, goal float64) row {
	return row{name, goal, "ms", map[string][]float64{}}
}
