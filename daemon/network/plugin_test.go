package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hang writes the pids of everything it is made of, one of them out of the
// plugin's process group, and waits for what does not come.
const hang = `
pids=%q
[ "$CNI_COMMAND" = ADD ] || exit 0
echo $$ >>$pids
sleep 1000 & echo $! >>$pids
setsid sleep 1000 & echo $! >>$pids
echo ready >>$pids
wait
`

// hanging returns the pids, once all are there.
func hanging(t *testing.T, file string) []int {
	t.Helper()
	var pids []int
	waitFor(t, "a plugin that hangs", func() error {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		pids = nil
		for _, f := range strings.Fields(string(b)) {
			if f == "ready" {
				return nil
			}
			pid, err := strconv.Atoi(f)
			if err != nil {
				return err
			}
			pids = append(pids, pid)
		}
		return errors.New("not ready")
	})
	return pids
}

// ended fails if one of the processes is alive; init may not have reaped it. A
// killed one gives its lock back before it is a zombie.
func ended(t *testing.T, pids []int) {
	t.Helper()
	if len(pids) == 0 {
		t.Error("no processes to look at")
	}
	for _, pid := range pids {
		waitFor(t, "the end of a plugin", func() error {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return nil
			}
			if i := strings.LastIndex(string(b), ") "); !strings.HasPrefix(string(b[i+2:]), "Z") {
				return fmt.Errorf("process %d is alive: %s", pid, b)
			}
			return nil
		})
	}
}

func TestPluginThatHangsIsKilled(t *testing.T) {
	needRoot(t)
	for name, install := range map[string]func(w *world, script string){
		"in the chain": func(w *world, script string) {
			w.script("stuck", script)
			w.conf("hf-hang", "10.230.20.0/24", portmap, `{"type": "stuck"}`)
		},
		"started by a plugin": func(w *world, script string) {
			w.script("stuck", script)
			w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "hang", "plugins": [
				{"type": "bridge", "bridge": "hf-hang", "ipam": {"type": "stuck"}}]}`)
			w.t.Cleanup(func() { ipLinkDel(w.t, "hf-hang") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			before := w.traces()
			pids := filepath.Join(w.dir, "pids")
			install(w, fmt.Sprintf(hang, pids))
			a := w.pod("a")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { _, err := w.Add(ctx, a); done <- err }()
			procs := hanging(t, pids)
			cancel() // stands for the deadline
			err := <-done
			if !errors.Is(err, context.Canceled) || errors.Is(err, ErrNotReleased) {
				t.Errorf("error %v, want canceled and undone", err)
			}
			ended(t, procs)
			w.removeNamespaces("a")
			w.unchanged(before)
		})
	}
}

func TestPluginIsKilledAtTheDeadline(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	begun := filepath.Join(w.dir, "begun")
	w.script("stuck", fmt.Sprintf("echo >%q; sleep 1000", begun))
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "hang", "plugins": [{"type": "stuck"}]}`)
	a := w.pod("a")
	var err error
	// As long as it takes for the plugin to begin.
	for limit := 50 * time.Millisecond; limit < time.Minute; limit *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		// Del alone: Add would go on with a DEL that hangs as well.
		err = w.Del(ctx, a)
		cancel()
		if _, serr := os.Stat(begun); serr == nil {
			break
		}
	}
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrNotReleased) ||
		!strings.Contains(err.Error(), "stuck") {
		t.Errorf("error %v, want deadline exceeded by stuck, not released", err)
	}
	w.script("stuck", "exit 0")
	w.del(a)
	w.removeNamespaces("a")
	w.unchanged(before)
}

// A daemon is killed while a plugin runs. The plugin must not take anything
// after the DEL that recovery does.
func TestDelEndsPluginsOfAKilledDaemon(t *testing.T) {
	needRoot(t)
	for name, stuck := range map[string]string{
		"after the bridge": `{"type": "bridge", "bridge": "hf-kill", "ipam": {"type": "host-local", "dataDir": %q,
			"ranges": [[{"subnet": "10.230.21.0/24"}]]}}, {"type": "stuck"}`,
		"within the bridge": `{"type": "bridge", "bridge": "hf-kill", "ipam": {"type": "stuck", "dataDir": %q}}`,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			before := w.traces()
			w.write("10.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "kill", "plugins": [`+stuck+`]}`,
				filepath.Join(w.dir, "leases")))
			defer ipLinkDel(t, "hf-kill")
			pids := filepath.Join(w.dir, "pids")
			w.script("stuck", fmt.Sprintf(hang, pids))
			a := w.pod("a")
			w.grace = 50 * time.Millisecond // they do not end by themselves

			daemon := w.startDaemon(helper{Attachment: a})
			procs := hanging(t, pids)
			daemon.Process.Kill()
			daemon.Wait()
			for _, pid := range procs {
				if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
					t.Fatalf("the plugin went with its daemon, nothing is tested: %v", err)
				}
			}

			w.del(a)
			ended(t, procs)
			if !strings.Contains(w.log.String(), "left by an earlier daemon") {
				t.Error("nothing in the log")
			}
			w.removeNamespaces("a")
			w.unchanged(before)
		})
	}
}

// One that does not hang may finish first, and what it made is then undone.
func TestDelWaitsForPluginsOfAKilledDaemon(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	notes, gate := filepath.Join(w.dir, "notes"), filepath.Join(w.dir, "gate")
	check(t, unix.Mkfifo(gate, 0o600))
	w.script("slow", fmt.Sprintf(`
echo "$CNI_COMMAND begins" >>%[1]q
[ "$CNI_COMMAND" = DEL ] || read x <%[2]q
echo "$CNI_COMMAND ends" >>%[1]q
`, notes, gate))
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "slow", "plugins": [{"type": "slow"}]}`)
	a := w.pod("a")
	w.grace = time.Minute // it ends by itself, however slowly
	daemon := w.startDaemon(helper{Attachment: a})
	waitFor(t, "ADD to begin", func() error { _, err := os.Stat(notes); return err })
	daemon.Process.Kill()
	daemon.Wait()

	done := make(chan error, 1)
	go func() { done <- w.Del(t.Context(), a) }()
	f, err := os.OpenFile(gate, os.O_WRONLY, 0) // opens once the plugin reads
	check(t, err)
	if _, err := f.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	check(t, <-done)
	b, err := os.ReadFile(notes)
	if want := "ADD begins\nADD ends\nDEL begins\nDEL ends\n"; string(b) != want || err != nil {
		t.Errorf("%q, %v, want %q", b, err, want)
	}
	w.removeNamespaces("a")
	w.unchanged(before)
}

// The lock can be held for a moment by a process that does not show it, here by
// this one.
func TestDelWaitsForALockWithoutAHolder(t *testing.T) {
	w := newWorld(t)
	path := w.lockFile("a")
	check(t, os.MkdirAll(filepath.Dir(path), 0o700))
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	check(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Del(ctx, Attachment{ID: "a"}) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.Is(err, ErrNotReleased) {
		t.Errorf("error %v, want canceled, not released", err)
	}
	go func() { done <- w.Del(t.Context(), Attachment{ID: "a"}) }()
	check(t, unix.Flock(int(f.Fd()), unix.LOCK_UN))
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A plugin is killed, as for want of memory, and what it runs goes on: as an IPAM plugin that
// takes an address. DEL comes after that; what hangs is killed.
func TestDelWaitsForWhatAKilledPluginLeft(t *testing.T) {
	needRoot(t)
	for name, rest := range map[string]struct {
		script string
		grace  time.Duration
		want   string
	}{
		"ends":  {"sleep 0.3; echo taken", time.Minute, "taken\nDEL\n"},
		"hangs": {"sleep 1000; echo taken", 50 * time.Millisecond, "DEL\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.grace = rest.grace
			notes := filepath.Join(w.dir, "notes")
			w.script("killed", fmt.Sprintf(`
[ "$CNI_COMMAND" = DEL ] && { echo DEL >>%[1]q; exit; }
(%[2]s) >>%[1]q 2>/dev/null &
kill -9 $$
`, notes, rest.script))
			w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "killed", "plugins": [{"type": "killed"}]}`)
			if _, err := w.Add(t.Context(), w.pod("a")); err == nil || errors.Is(err, ErrNotReleased) {
				t.Errorf("error %v, want one of the plugin, undone", err)
			}
			b, err := os.ReadFile(notes)
			if string(b) != rest.want || err != nil {
				t.Errorf("%q, %v, want %q", b, err, rest.want)
			}
			w.removeNamespaces("a")
		})
	}
}

// What a plugin has left that gives up by itself may be meant to stay.
func TestPluginThatFailsMayLeaveAProcess(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	w.grace = 50 * time.Millisecond
	pidFile := filepath.Join(w.dir, "pid")
	w.script("leaver", fmt.Sprintf(`
[ "$CNI_COMMAND" = ADD ] || exit 0
sleep 1000 >/dev/null 2>&1 & echo $! >%q
exit 11
`, pidFile))
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "leave", "plugins": [{"type": "leaver"}]}`)
	if _, err := w.Add(t.Context(), w.pod("a")); err == nil || errors.Is(err, ErrNotReleased) {
		t.Errorf("error %v, want one of the plugin, undone", err)
	}
	b, err := os.ReadFile(pidFile)
	check(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	check(t, err)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Errorf("process %d was ended: %v", pid, err)
	}
	w.removeNamespaces("a")
}

// What a plugin leaves running on purpose is nobody's to kill, and does not
// hold up the pod.
func TestPluginMayLeaveAProcess(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	pidFile := filepath.Join(w.dir, "pid")
	w.script("leaver", fmt.Sprintf(`
if [ "$CNI_COMMAND" = ADD ]; then
	setsid sleep 1000 >/dev/null 2>&1 & echo $! >%q
	echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.230.22.2/24"}]}'
fi
`, pidFile))
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "leave", "plugins": [{"type": "leaver"}]}`)
	a := w.pod("a")
	w.add(a)
	b, err := os.ReadFile(pidFile)
	check(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	check(t, err)
	p, err := os.FindProcess(pid)
	check(t, err)
	defer p.Release()
	w.del(a)
	if err := p.Kill(); err != nil {
		t.Errorf("process %d was ended: %v", pid, err)
	}
	w.removeNamespaces("a")
}
