package network

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

// inside runs f on a thread in the given namespaces.
func inside(t *testing.T, s Namespaces, f func() error) {
	t.Helper()
	err := netns.OnThread(func() error {
		for _, path := range s.List() {
			if path == "" {
				continue
			}
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, 0); err != nil {
				return err
			}
		}
		return f()
	})
	check(t, err)
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Stat(path, &st))
	return st.Ino
}

func TestNamespacesHoldWhatWasWanted(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	hostname, err := os.Hostname()
	check(t, err)
	sysctls := map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "81",
		"net/ipv4/conf/lo/arp_ignore":         "2",
		"net.core.somaxconn":                  "77",
		"kernel.shmmni":                       "1234",
		"kernel.msgmax":                       "4321",
		"kernel.sem":                          "250\t32000\t100\t128",
		"fs.mqueue.msg_max":                   "12",
		"kernel.shm_rmid_forced":              "1",
		"net.ipv4.conf.default.arp_announce":  "1",
		"net/ipv6/conf/default/accept_ra":     "0",
		"net.ipv4.ping_group_range":           "0\t2147483647",
		"net.ipv4.conf.all.route_localnet":    "1",
		"net.ipv4.tcp_keepalive_time":         "600",
		"net.ipv4.ip_local_port_range":        "20000\t30000",
		"net.ipv4.tcp_syncookies":             "0",
		"net.ipv4.conf.all.accept_redirects":  "0",
		"net.ipv6.conf.all.disable_ipv6":      "0",
		"kernel.domainname":                   "nis.test",
	}
	if !hasIPv6() {
		maps.DeleteFunc(sysctls, func(name, _ string) bool { return strings.Contains(name, "ipv6") })
	}
	outside := map[string]string{}
	for name := range sysctls {
		outside[name] = readSysctl(t, name)
	}

	ns, err := w.CreateNamespaces("p1", Want{Net: true, IPC: true, UTS: true, Hostname: "web-0", Sysctls: sysctls})
	check(t, err)
	defer w.RemoveNamespaces("p1")
	want := w.Paths("p1")
	want.User = "" // not wanted
	if ns != want || w.Pinned("p1") != want {
		t.Fatalf("got %+v, pinned %+v, want %+v", ns, w.Pinned("p1"), want)
	}
	if ns.Net != "/run/netns/holdfast-p1" {
		t.Errorf("network namespace at %s", ns.Net)
	}
	inside(t, ns, func() error {
		if h, err := os.Hostname(); h != "web-0" || err != nil {
			t.Errorf("hostname %q, %v", h, err)
		}
		for name, want := range sysctls {
			if got := readSysctl(t, name); got != want {
				t.Errorf("%s is %q inside, want %q", name, got, want)
			}
		}
		return nil
	})
	for name, want := range outside {
		if got := readSysctl(t, name); got != want {
			t.Errorf("%s is %q outside, was %q", name, got, want)
		}
	}
	if h, _ := os.Hostname(); h != hostname {
		t.Errorf("hostname of the node is %q, was %q", h, hostname)
	}

	serve(t, ns.Net, "127.0.0.1:80", "lo4")
	answers := map[string]string{"localhost:80": "lo4"}
	if hasIPv6() {
		serve(t, ns.Net, "[::1]:81", "lo6")
		answers["localhost:81"], answers["[::1]:81"] = "lo6", "lo6"
	}
	for addr, want := range answers {
		if got, err := w.ask(ns.Net, addr); got != want || err != nil {
			t.Errorf("%s inside: %q, %v, want %q", addr, got, err, want)
		}
	}
	if _, err := w.ask("", "127.0.0.1:80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dialling on the node: %v, want connection refused", err)
	}
	if _, err := w.ask(ns.Net, "example.test:80"); err == nil {
		t.Error("a name was resolved for a pod")
	}
}

// readSysctl reports failures with Errorf, for it runs on goroutines that are
// not the test's.
func readSysctl(t *testing.T, name string) string {
	t.Helper()
	rel, err := sysctlPath(name)
	if err != nil {
		t.Error(err)
		return ""
	}
	b, err := os.ReadFile("/proc/sys/" + rel)
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(b))
}

func TestNamespacesOnlyThoseWanted(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	all := w.Paths("p1")
	for _, c := range []struct {
		want Want
		got  Namespaces
	}{
		{Want{}, Namespaces{}},
		{Want{Net: true}, Namespaces{Net: all.Net}},
		{Want{IPC: true, Hostname: "ignored"}, Namespaces{IPC: all.IPC}},
		{Want{UTS: true}, Namespaces{UTS: all.UTS}},
		{Want{IPC: true, UTS: true}, Namespaces{IPC: all.IPC, UTS: all.UTS}},
	} {
		// Each over the one before.
		got, err := w.CreateNamespaces("p1", c.want)
		if err != nil || got != c.got || w.Pinned("p1") != c.got {
			t.Errorf("%+v: got %+v, pinned %+v, %v", c.want, got, w.Pinned("p1"), err)
		}
	}
	w.removeNamespaces("p1")
	w.removeNamespaces("p1") // idempotent
	w.removeNamespaces("never-made")
	w.unchanged(before)
}

func TestNamespacesOverLeftovers(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	all := Want{Net: true, IPC: true, UTS: true}
	ns, err := w.CreateNamespaces("p1", all)
	check(t, err)
	old := inode(t, ns.Net)
	for range 2 { // stacked, as by a daemon killed between two attempts
		check(t, unix.Mount("/proc/self/ns/net", ns.Net, "", unix.MS_BIND, ""))
	}
	// A file without a mount, as after a reboot.
	stale := w.Paths("p2")
	check(t, os.MkdirAll(filepath.Dir(stale.IPC), 0o755))
	for _, path := range []string{stale.Net, stale.IPC} {
		check(t, os.WriteFile(path, nil, 0o600))
	}
	if got := w.Pinned("p2"); got != (Namespaces{}) {
		t.Errorf("files without mounts are reported as pinned: %+v", got)
	}
	for _, id := range []string{"p1", "p2"} {
		ns, err := w.CreateNamespaces(id, all)
		check(t, err)
		if w.Pinned(id) != ns {
			t.Errorf("%s: pinned %+v, want %+v", id, w.Pinned(id), ns)
		}
		if got := inode(t, ns.Net); got == inode(t, "/proc/self/ns/net") || got == old {
			t.Errorf("%s: not a new namespace", id)
		}
		w.removeNamespaces(id)
	}
	if left, err := filepath.Glob(w.opts.NetnsDir + "/" + netns.PinPrefix + "*"); len(left) > 0 || err != nil {
		t.Errorf("left after removal: %v, %v", left, err)
	}
	w.unchanged(before)
}

func TestNamespacesFailureLeavesNothing(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	for name, want := range map[string]Want{
		"sysctl of the node": {Net: true, IPC: true, Sysctls: map[string]string{"vm.swappiness": "1"}},
		"sysctl not there": {Net: true, IPC: true,
			Sysctls: map[string]string{"net.ipv4.no_such_thing": "1"}},
		"value refused": {Net: true, IPC: true,
			Sysctls: map[string]string{"net.ipv4.ip_forward": "yes"}},
		"hostname longer than allowed": {Net: true, UTS: true, Hostname: strings.Repeat("x", 65)},
	} {
		ns, err := w.CreateNamespaces("p1", want)
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		for s := range want.Sysctls {
			if err != nil && !strings.Contains(err.Error(), s) {
				t.Errorf("%s: error does not name %s: %v", name, s, err)
			}
		}
		if ns != (Namespaces{}) {
			t.Errorf("%s: got %+v", name, ns)
		}
		w.unchanged(before)
	}
	for _, id := range []string{"", "..", "../x", "a/b", ".hidden"} {
		if _, err := w.CreateNamespaces(id, Want{Net: true}); err == nil {
			t.Errorf("id %q was taken", id)
		}
		if err := w.RemoveNamespaces(id); err == nil {
			t.Errorf("id %q was removed", id)
		}
	}
}

func TestSysctlsThatAreAllowed(t *testing.T) {
	all := Want{Net: true, IPC: true, UTS: true}
	ofUserns := map[string]string{"user.max_inotify_watches": "1", "user/max_net_namespaces": "1"}
	if got, err := resolveSysctls(Want{User: someUserns, Sysctls: ofUserns}); len(got) > 0 || err != nil {
		t.Errorf("those of a user namespace are not for the OCI runtime: %v, %v", got, err)
	}
	for _, c := range []struct {
		name string
		w    Want
		path string // "" = refused
	}{
		{"net.ipv4.ip_forward", all, "/proc/sys/net/ipv4/ip_forward"},
		{"net/ipv4/ip_forward", all, "/proc/sys/net/ipv4/ip_forward"},
		{"net.ipv4.conf.eth0/100.forwarding", all, "/proc/sys/net/ipv4/conf/eth0.100/forwarding"},
		{"net/ipv4/conf/eth0.100/forwarding", all, "/proc/sys/net/ipv4/conf/eth0.100/forwarding"},
		{"kernel.shmmax", all, "/proc/sys/kernel/shmmax"},
		{"kernel.msgmnb", all, "/proc/sys/kernel/msgmnb"},
		{"kernel.sem", all, "/proc/sys/kernel/sem"},
		{"fs.mqueue.queues_max", all, "/proc/sys/fs/mqueue/queues_max"},
		{"kernel.domainname", all, "/proc/sys/kernel/domainname"},
		{"kernel.domainname", Want{Net: true, IPC: true}, ""},
		{"net.ipv4.ip_forward", Want{IPC: true, UTS: true}, ""},
		{"kernel.shmmax", Want{Net: true, UTS: true}, ""},
		{"fs.mqueue.queues_max", Want{Net: true}, ""},
		{"kernel.semx", all, ""},
		{"kernel.hostname", all, ""},
		{"kernel.panic", all, ""},
		{"user.max_inotify_watches", all, ""},
		{"vm.swappiness", all, ""},
		{"fs.file-max", all, ""},
		{"net", all, ""},
		{"", all, ""},
		{"net/../kernel/panic", all, ""},
		{"net.//.kernel.panic", all, ""},
		{"net..ipv4", all, ""},
		{"/net/ipv4/ip_forward", all, ""},
		{"../proc/x", all, ""},
	} {
		c.w.Sysctls = map[string]string{c.name: "1"}
		got, err := resolveSysctls(c.w)
		if c.path == "" {
			if !errors.Is(err, ErrSysctl) || !strings.Contains(err.Error(), c.name) {
				t.Errorf("%q with %+v: %v, want ErrSysctl that names it", c.name, c.w, err)
			}
			continue
		}
		if err != nil || len(got) != 1 || got[0].path != c.path {
			t.Errorf("%q: %v, %v, want %s", c.name, got, err, c.path)
		}
	}
}

func TestNetnsDirIsShared(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "netns")
	w := newWorld(t, func(o *Options) { o.NetnsDir = dir })
	var wg sync.WaitGroup
	ids := []string{"a", "b", "c", "d"}
	for _, id := range ids { // all at once: only one may mount
		wg.Go(func() {
			if _, err := w.CreateNamespaces(id, Want{Net: true}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	defer unix.Unmount(dir, unix.MNT_DETACH)
	b, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	mounts := 0
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[4] == dir {
			mounts++
			if !strings.HasPrefix(f[6], "shared:") {
				t.Errorf("not shared: %s", line)
			}
		}
	}
	if mounts != 1 {
		t.Errorf("%s is mounted %d times", dir, mounts)
	}
	for _, id := range ids {
		w.removeNamespaces(id)
	}
}

// A namespace must not stay alive in the main thread, which /proc/self shows.
func TestThreadsDoNotKeepNamespaces(t *testing.T) {
	needRoot(t)
	self := inode(t, "/proc/self/ns/net")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 8 {
				netns.OnThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
			}
		})
	}
	wg.Wait()
	if got := inode(t, "/proc/self/ns/net"); got != self {
		t.Error("the main thread is in another network namespace")
	}
	waitFor(t, "threads in the namespace they began in", func() error {
		tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			var st unix.Stat_t
			if unix.Stat(task, &st) == nil && st.Ino != self {
				return errors.New(task + " is in another namespace")
			}
		}
		return nil
	})
}
