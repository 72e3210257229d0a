package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// gcNetwork writes a network with a plugin that notes what it is called with.
// Its GC opens the FIFO gate, if that is there, and so waits for a writer.
func (w *world) gcNetwork(version string) (notes, gate string) {
	w.t.Helper()
	notes, gate = filepath.Join(w.dir, "notes"), filepath.Join(w.dir, "gate")
	w.script("noting", fmt.Sprintf(`
echo "$CNI_COMMAND $CNI_CONTAINERID" >>%[1]q
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.230.29.2/24"}]}' ;;
GC) cat >%[1]q.gc; [ ! -p %[2]q ] || { read x <%[2]q; echo "GC ends" >>%[1]q; } ;;
esac`, notes, gate))
	w.write("10.conflist", `{"cniVersion": "`+version+`", "name": "noted", "plugins": [{"type": "noting"}]}`)
	return notes, gate
}

// What libcni remembers of a pod that is not named is detached; the plugins are
// told of those that are, where they are of CNI 1.1 or later.
func TestGC(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		version string
		collect bool
		want    string
	}{
		"collect":     {"1.1.0", true, "ADD known\nADD forgotten\nDEL forgotten\nGC \n"},
		"old network": {"1.0.0", true, "ADD known\nADD forgotten\nDEL forgotten\n"},
		"not wanted":  {"1.1.0", false, "ADD known\nADD forgotten\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			notes, _ := w.gcNetwork(c.version)
			known, forgotten := w.pod("known"), w.pod("forgotten")
			w.add(known)
			w.add(forgotten)
			check(t, w.HoldForGC()(t.Context(), []string{"known", "debtor"}, c.collect))
			if b, err := os.ReadFile(notes); string(b) != c.want || err != nil {
				t.Errorf("the plugin was called with %q, %v, want %q", b, err, c.want)
			}
			told, _ := os.ReadFile(notes + ".gc")
			const valid = `"cni.dev/valid-attachments":[{"containerID":"known","ifname":"eth0"},` +
				`{"containerID":"debtor","ifname":"eth0"}]`
			if gc := strings.Contains(c.want, "GC"); gc != strings.Contains(string(told), valid) {
				t.Errorf("the plugin was told %s, want %s: %t", told, valid, gc)
			}
			w.del(known)
			w.del(forgotten)
		})
	}
}

// No pod is attached while plugins collect, also for a daemon that was killed:
// they know nothing of it.
func TestGCKeepsADDsWaiting(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	notes, gate := w.gcNetwork("1.1.0")
	check(t, unix.Mkfifo(gate, 0o600))
	daemon := w.startDaemon(helper{GC: true})
	waitFor(t, "GC to begin", func() error { _, err := os.Stat(notes + ".gc"); return err })
	daemon.Process.Kill()
	daemon.Wait()

	w.grace = time.Minute
	finish := w.HoldForGC()
	a := w.pod("a")
	added := make(chan error, 1)
	go func() { _, err := w.Add(t.Context(), a); added <- err }()
	finished := make(chan error, 1)
	go func() { finished <- finish(t.Context(), nil, false) }()
	f, err := os.OpenFile(gate, os.O_WRONLY, 0) // opens once the plugin reads
	check(t, err)
	fmt.Fprintln(f, "end")
	f.Close()
	for _, c := range []chan error{finished, added} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
	if b, err := os.ReadFile(notes); string(b) != "GC \nGC ends\nADD a\n" || err != nil {
		t.Errorf("the plugin was called with %q, %v", b, err)
	}
	w.del(a)
	if _, err := os.Stat(w.lockFile(gcLock)); err == nil {
		t.Error("the lock is left")
	}
}

// Before there is a network nothing can be collected, and pods wait for nothing.
func TestGCWithoutANetwork(t *testing.T) {
	w := newWorld(t)
	if err := w.HoldForGC()(t.Context(), nil, true); err == nil {
		t.Error("no error")
	}
	if len(w.runs) != 0 {
		t.Errorf("%d turns are still taken", len(w.runs))
	}
}
