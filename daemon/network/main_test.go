package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/tests/must"
	"github.com/holdfast-cri/holdfast/tests/refusals"
)

const (
	insideEnv = "HOLDFAST_NETWORK_TEST_INSIDE" // the tests run in namespaces of their own
	addEnv    = "HOLDFAST_NETWORK_TEST_ADD"    // this process is a daemon that adds a pod
	keepEnv   = "HOLDFAST_NETWORK_TEST_KEEP"   // this process is a daemon that makes a user namespace
)

// TestMain runs the tests in a network and a mount namespace of their own, so
// that a test that dies leaves no bridge, rule or mount on the machine, and
// other tests cannot disturb the comparison of before and after.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(addEnv) != "":
		os.Exit(addInHelper(os.Getenv(addEnv)))
	case os.Getenv(keepEnv) != "":
		os.Exit(keepInHelper())
	case os.Geteuid() != 0:
		os.Exit(m.Run())
	case os.Getenv(insideEnv) != "":
		if err := prepareMachine(); err != nil {
			fmt.Fprintln(os.Stderr, "cannot prepare namespaces for the tests:", err)
			os.Exit(1)
		}
		os.Exit(refusals.Tests{}.Main(m.Run))
	}
	runtime.LockOSThread() // Pdeathsig means this thread
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), insideEnv+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "cannot run the tests in namespaces of their own:", err)
		os.Exit(1)
	}
}

// prepareMachine makes the new namespaces usable: a /run of their own (xtables
// lock, netns) and a loopback that is up. Copies of mounts that come and go on
// the machine are dropped: they would keep other pods' namespaces alive.
func prepareMachine() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, "/run/") || strings.HasPrefix(at, "/tmp/") {
			unix.Unmount(at, unix.MNT_DETACH) // fails for one below another
		}
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	return loopbackUp()
}

// hasIPv6 says whether the kernel has it: it may be off as a whole.
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

var needRoot = must.BeRoot

// world is a Network in directories of its own, with the state of the machine
// from before it, which has to be the state after it.
type world struct {
	*Network
	t       *testing.T
	dir     string
	scripts string // searched for plugins before the real ones
	log     *logBuffer
}

func newWorld(t *testing.T, change ...func(*Options)) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, dir: dir, scripts: filepath.Join(dir, "scripts"), log: &logBuffer{}}
	o := Options{
		ConfDir:  filepath.Join(dir, "net.d"),
		BinDirs:  []string{w.scripts, realPlugins(t)},
		CacheDir: filepath.Join(dir, "cni"),
		PinDir:   filepath.Join(dir, "pods"),
		Log:      slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&o)
	}
	for _, d := range []string{o.ConfDir, w.scripts} {
		check(t, os.MkdirAll(d, 0o755))
	}
	n, err := New(o)
	check(t, err)
	w.Network = n
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("log of the network:\n" + w.log.String())
		}
	})
	return w
}

func realPlugins(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../bin/cni")
	check(t, err)
	if _, err := os.Stat(filepath.Join(dir, "bridge")); err != nil {
		t.Fatalf("no CNI plugins, run make first: %v", err)
	}
	return dir
}

// conf writes a config with a bridge and the plugins after it.
func (w *world) conf(bridge, subnet string, after ...string) {
	w.t.Helper()
	plugins := append([]string{fmt.Sprintf(`{
		"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": true, "hairpinMode": true,
		"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
	}`, bridge, filepath.Join(w.dir, "leases"), subnet)}, after...)
	w.write("10.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [%s]}`, "net-"+bridge,
		strings.Join(plugins, ",")))
	w.t.Cleanup(func() { ipLinkDel(w.t, bridge) })
}

// ipLinkDel removes a bridge that plugins made, if they came that far.
func ipLinkDel(t *testing.T, name string) {
	t.Helper()
	out, err := exec.Command("ip", "link", "del", name).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "Cannot find device") {
		t.Errorf("cannot remove bridge %s: %v: %s", name, err, out)
	}
}

const portmap = `{"type": "portmap", "capabilities": {"portMappings": true}}`

func (w *world) write(file, content string) {
	w.t.Helper()
	check(w.t, os.WriteFile(filepath.Join(w.opts.ConfDir, file), []byte(content), 0o644))
}

// script installs a plugin written in shell.
func (w *world) script(name, body string) {
	w.t.Helper()
	// No child may come into being that has it open: nobody can run it then.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(w.t, os.WriteFile(filepath.Join(w.scripts, name), []byte("#!/bin/sh\n"+body), 0o755))
}

// pod makes namespaces and returns what Add needs.
func (w *world) pod(id string) Attachment {
	w.t.Helper()
	ns, err := w.CreateNamespaces(id, Want{Net: true, IPC: true, UTS: true, Hostname: id})
	check(w.t, err)
	w.t.Cleanup(func() { w.RemoveNamespaces(id) })
	a := Attachment{ID: id, Netns: ns.Net, Name: id, Namespace: "default", UID: "uid-" + id}
	if b, err := w.Config(); err == nil {
		a.Config = b
	}
	return a
}

func (w *world) add(a Attachment) Result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	r, err := w.Add(ctx, a)
	check(w.t, err)
	w.t.Cleanup(func() { // for a test that ends early
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		w.Del(ctx, a)
	})
	return r
}

func (w *world) del(a Attachment) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	check(w.t, w.Del(ctx, a))
}

func (w *world) removeNamespaces(id string) {
	w.t.Helper()
	check(w.t, w.RemoveNamespaces(id))
}

// traces lists what pods leave: interfaces, pins, mounts, leases, cached
// results, locks of running plugins, and packet rules for addresses of tests.
func (w *world) traces() []string {
	w.t.Helper()
	var out []string
	links, err := net.Interfaces()
	check(w.t, err)
	for _, l := range links {
		if !strings.HasPrefix(l.Name, "hf-") && l.Name != netns.BuiltinBridge {
			out = append(out, "link "+l.Name)
		}
	}
	for _, glob := range []string{
		w.opts.NetnsDir + "/*", w.opts.PinDir + "/*/ns",
		w.dir + "/leases/*/10.*", w.opts.CacheDir + "/networks/*/10.*",
		w.opts.CacheDir + "/results/*", w.opts.CacheDir + "/running/*",
	} {
		found, err := filepath.Glob(glob)
		check(w.t, err)
		out = append(out, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(w.t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], w.opts.NetnsDir+"/") || strings.HasPrefix(f[4], w.dir) {
			out = append(out, "mount "+f[4])
		}
	}
	for _, table := range []string{"nat", "filter"} {
		rules, err := exec.Command("iptables", "-w", "-t", table, "-S").CombinedOutput()
		if err != nil {
			w.t.Fatalf("iptables: %v: %s", err, rules)
		}
		for line := range strings.Lines(string(rules)) {
			// Chains for host ports in general stay, those of a pod do not.
			podChain := strings.HasPrefix(line, "-N CNI-") && !strings.HasPrefix(line, "-N CNI-HOSTPORT-")
			if podChain || strings.Contains(line, "10.230.") {
				out = append(out, "rule "+strings.TrimSpace(line))
			}
		}
	}
	slices.Sort(out)
	return out
}

// unchanged fails if anything is there that was not, or the other way round.
func (w *world) unchanged(before []string) {
	w.t.Helper()
	// A veth goes with its namespace, which the kernel takes apart later.
	waitFor(w.t, "the machine as it was", func() error {
		if after := w.traces(); !slices.Equal(before, after) {
			return fmt.Errorf("before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
		return nil
	})
}

// waitFor polls until f returns nil.
func waitFor(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// serve answers each connection at addr in a namespace with its own name.
func serve(t *testing.T, path, addr, answer string) {
	t.Helper()
	var l net.Listener
	err := netns.OnThread(func() error {
		if err := netns.Enter(path); err != nil {
			return err
		}
		var err error
		l, err = net.Listen("tcp", addr)
		return err
	})
	check(t, err)
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte(answer))
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); served.Wait() })
}

// ask connects from a namespace and returns what it hears.
func (w *world) ask(path, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	c, err := netns.Dial(ctx, path, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	var b bytes.Buffer
	_, err = b.ReadFrom(c)
	return b.String(), err
}

// helper is a daemon of its own, to be killed while its plugins run.
type helper struct {
	Options    Options
	Attachment Attachment
	GC         bool // it collects instead
}

// startDaemon runs one with the options of w. The test kills it.
func (w *world) startDaemon(h helper) *exec.Cmd {
	w.t.Helper()
	h.Options = w.opts
	h.Options.Log = nil
	spec, err := json.Marshal(h)
	check(w.t, err)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), addEnv+"="+string(spec))
	check(w.t, c.Start())
	return c
}

func addInHelper(spec string) int {
	var h helper
	if err := json.Unmarshal([]byte(spec), &h); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	n, err := New(h.Options)
	switch {
	case err != nil:
	case h.GC:
		err = n.HoldForGC()(context.Background(), nil, true)
	default:
		_, err = n.Add(context.Background(), h.Attachment)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var check = must.Succeed
