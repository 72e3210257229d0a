package network

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

func withKeeper(t *testing.T) func(*Options) {
	t.Helper()
	path, err := filepath.Abs("../../bin/holdfast-pause")
	check(t, err)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("run make first: %v", err)
	}
	return func(o *Options) { o.Keeper = path }
}

var someUserns = &Userns{UIDs: IDMap{HostID: 100000, Length: 65536}, GIDs: IDMap{HostID: 300000, Length: 1000}}

// children are the processes that this one, or a thread of it, has started.
func children(t *testing.T) []string {
	t.Helper()
	var all []string
	lists, err := filepath.Glob("/proc/self/task/*/children")
	check(t, err)
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		all = append(all, strings.Fields(string(b))...)
	}
	return all
}

// in is what a shell that is root of a pod's user namespace says.
func in(t *testing.T, s Namespaces, script string) string {
	t.Helper()
	args := []string{"--user=" + s.User}
	for flag, path := range threads(s) {
		if path != "" {
			args = append(args, "--"+flag+"="+path)
		}
	}
	out, err := exec.Command("nsenter", append(args, "sh", "-c", script)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

func TestUserNamespace(t *testing.T) {
	needRoot(t)
	w := newWorld(t, withKeeper(t))
	before := w.traces()
	sysctls := map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.ip_unprivileged_port_start": "81",
		"kernel.shmmni": "1234",
		"kernel.msgmax": "4321", "kernel.sem": "250\t32000\t100\t128", "fs.mqueue.msg_max": "12",
		"kernel.domainname": "nis.test"}
	outside := map[string]string{}
	for name := range sysctls {
		outside[name] = readSysctl(t, name)
	}
	ns, err := w.CreateNamespaces("p1", Want{Net: true, IPC: true, UTS: true, User: someUserns, Hostname: "web-0",
		Sysctls: sysctls})
	check(t, err)
	if want := w.Paths("p1"); ns != want || w.Pinned("p1") != want {
		t.Fatalf("got %+v, pinned %+v, want %+v", ns, w.Pinned("p1"), want)
	}
	if c := children(t); len(c) > 0 {
		t.Errorf("processes are left: %v", c)
	}
	if got := strings.Fields(in(t, ns,
		"cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; hostname")); fmt.Sprint(got) !=
		"[0 100000 65536 0 300000 1000 allow web-0]" {
		t.Errorf("inside: %v", got)
	}
	// Who owns them decides who may mount their file systems and change them.
	for kind, path := range threads(ns) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		check(t, err)
		owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
		unix.Close(fd)
		check(t, err)
		if inode(t, fmt.Sprintf("/proc/self/fd/%d", owner)) != inode(t, ns.User) {
			t.Errorf("the %s namespace belongs to another user namespace", kind)
		}
		unix.Close(owner)
	}
	for name, want := range sysctls {
		path, err := sysctlPath(name)
		check(t, err)
		if got := strings.TrimSpace(in(t, ns, "cat /proc/sys/"+path)); got != want {
			t.Errorf("%s is %q inside, want %q", name, got, want)
		}
		if got := readSysctl(t, name); got != outside[name] {
			t.Errorf("%s is %q outside, was %q", name, got, outside[name])
		}
	}
	serve(t, ns.Net, "127.0.0.1:80", "lo")
	if got, err := w.ask(ns.Net, "localhost:80"); got != "lo" || err != nil {
		t.Errorf("loopback inside: %q, %v", got, err)
	}
	w.removeNamespaces("p1")

	// In the node's network, over what is left.
	ns, err = w.CreateNamespaces("p1", Want{IPC: true, User: someUserns})
	check(t, err)
	if want := (Namespaces{IPC: w.Paths("p1").IPC, User: w.Paths("p1").User}); ns != want || w.Pinned("p1") != want {
		t.Errorf("got %+v, pinned %+v, want %+v", ns, w.Pinned("p1"), want)
	}
	w.removeNamespaces("p1")
	w.unchanged(before)
}

func TestUserNamespaceFailureLeavesNothing(t *testing.T) {
	needRoot(t)
	w := newWorld(t, withKeeper(t))
	before := w.traces()
	for name, want := range map[string]Want{
		"a sysctl that is not there": {Net: true, IPC: true, User: someUserns,
			Sysctls: map[string]string{"net.ipv4.no_such_thing": "1"}},
		"a value that is refused": {Net: true, IPC: true, User: someUserns,
			Sysctls: map[string]string{"kernel.shmmni": "many"}},
		"no ids": {Net: true, User: &Userns{}},
	} {
		if ns, err := w.CreateNamespaces("p1", want); err == nil || ns != (Namespaces{}) {
			t.Errorf("%s: %+v, %v", name, ns, err)
		}
		if c := children(t); len(c) > 0 {
			t.Errorf("%s: processes are left: %v", name, c)
		}
		w.unchanged(before)
	}
	w = newWorld(t, func(o *Options) { o.Keeper = "/no/such/program" })
	if _, err := w.CreateNamespaces("p1", Want{Net: true, User: someUserns}); err == nil ||
		!strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("without its program: %v", err)
	}
	w.unchanged(before)
}

func TestOpenUserns(t *testing.T) {
	needRoot(t)
	w := newWorld(t, withKeeper(t))
	f, err := w.OpenUserns(*someUserns)
	check(t, err)
	defer f.Close()
	if c := children(t); len(c) > 0 {
		t.Errorf("processes are left: %v", c)
	}
	if inode(t, fmt.Sprintf("/proc/self/fd/%d", f.Fd())) == inode(t, "/proc/self/ns/user") {
		t.Error("it is the one of this process")
	}
}

// keepInHelper is a daemon that is killed while its keeper runs.
func keepInHelper() int {
	n := &Network{opts: Options{Keeper: os.Getenv(keepEnv)}}
	err := netns.OnThread(func() error {
		k, err := n.startKeeper("/", unix.CLONE_NEWUSER|unix.CLONE_NEWNET, *someUserns)
		if err != nil {
			return err
		}
		fmt.Println(k.cmd.Process.Pid)
		for {
			unix.Pause()
		}
	})
	fmt.Println(err)
	return 1
}

func TestKeeperEndsWithTheDaemon(t *testing.T) {
	needRoot(t)
	var o Options
	withKeeper(t)(&o)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), keepEnv+"="+o.Keeper)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := c.StdoutPipe()
	check(t, err)
	check(t, c.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	check(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(line)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	check(t, err)
	defer unix.Close(pidfd)
	ended := func(timeout int) bool {
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, timeout)
		for errors.Is(err, unix.EINTR) { // a signal of Go's own
			n, err = unix.Poll(p, timeout)
		}
		check(t, err)
		return n == 1
	}
	if ended(0) {
		t.Fatal("the keeper has ended by itself")
	}
	c.Process.Kill()
	c.Wait()
	if !ended(60000) {
		t.Error("the keeper outlives the daemon")
		unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
}
