package spec

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// bundle is a busybox root file system and an OCI runtime to run it with.
type bundle struct {
	t             *testing.T
	runc          string
	dir, root, id string
}

func newBundle(t *testing.T) *bundle {
	t.Helper()
	must.BeRoot(t)
	runc, err := filepath.Abs("../../bin/runc")
	check(t, err)
	if _, err := os.Stat(runc); err != nil {
		if runc, err = exec.LookPath("runc"); err != nil {
			t.Skip("there is no runc: make build makes it")
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("needs a static busybox: %v", err)
	}
	dir, err := os.MkdirTemp("", "spec") // short: it holds a socket
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bundle{t: t, runc: runc, dir: dir, root: filepath.Join(dir, "rootfs"), id: filepath.Base(dir)}
	for _, d := range []string{"bin", "etc"} {
		check(t, os.MkdirAll(filepath.Join(b.root, d), 0o755))
	}
	if err := os.Chmod(dir, 0o755); err != nil { // the container's user looks at its root
		t.Fatal(err)
	}
	check(t, os.WriteFile(filepath.Join(b.root, "bin/busybox"), busybox, 0o755))
	check(t, os.Symlink("busybox", filepath.Join(b.root, "bin/sh")))
	return b
}

// input asks for a shell with the script, on this very machine.
func (b *bundle) input(script string) Input {
	h, err := ProbeHost()
	check(b.t, err)
	in := input()
	in.Host = h
	in.Rootfs = b.root
	in.CgroupsPath = "/holdfast-test/" + b.id
	in.Namespaces = Namespaces{}
	in.Shm, in.Hosts, in.ResolvConf, in.Hostname = "", "", "", ""
	in.Container.Command = []string{"/bin/sh", "-c", script}
	return in
}

// cmd is runc with a deadline; a container that it leaves behind is deleted.
func (b *bundle) cmd(s *specs.Spec, args ...string) *exec.Cmd {
	b.t.Helper()
	if s != nil {
		config, err := json.Marshal(s)
		if err == nil {
			err = os.WriteFile(filepath.Join(b.dir, "config.json"), config, 0o600)
		}
		check(b.t, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	b.t.Cleanup(cancel)
	return exec.CommandContext(ctx, b.runc, append([]string{"--root", filepath.Join(b.dir, "state")}, args...)...)
}

func (b *bundle) delete() {
	if out, err := b.cmd(nil, "delete", "--force", b.id).CombinedOutput(); err != nil {
		b.t.Errorf("cannot delete the container: %v: %s", err, out)
	}
	// The parent that was made for the test goes with its last child.
	parents, _ := filepath.Glob("/sys/fs/cgroup/*/holdfast-test")
	for _, p := range append(parents, "/sys/fs/cgroup/holdfast-test") {
		unix.Rmdir(p)
	}
}

func (b *bundle) run(in Input) string {
	b.t.Helper()
	r, err := validateAndBuild(in)
	check(b.t, err)
	defer b.delete()
	cmd := b.cmd(r.Spec, "run", "--bundle", b.dir, b.id)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		b.t.Fatalf("runc run: %v: %s%s", err, &stdout, &stderr)
	}
	return stdout.String()
}

// wantLines fails for each line that out lacks.
func wantLines(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains("\n"+out, "\n"+w+"\n") {
			t.Errorf("the output lacks %q:\n%s", w, out)
		}
	}
}

func TestRuncDefault(t *testing.T) {
	b := newBundle(t)
	hosts := filepath.Join(b.dir, "hosts")
	data := filepath.Join(b.dir, "data")
	check(t, os.WriteFile(hosts, []byte("127.0.0.1 me\n"), 0o644))
	check(t, os.Mkdir(data, 0o777))
	check(t, os.Chmod(data, 0o777))
	in := b.input(`alias b=/bin/busybox
echo uid=$(b id -u) gid=$(b id -g) groups=$(b id -G)
b grep -E '^(Seccomp|NoNewPrivs|CapBnd|CapAmb):' /proc/self/status | b tr '\t' ' '
b cat /etc/hosts
echo oom=$(b cat /proc/self/oom_score_adj) cwd=$PWD host=$HOSTNAME-$(b hostname) A=$A
b touch /x 2>/dev/null || echo root is read-only
b touch /data/x && echo data is writable
b head -c 1 /proc/kcore | b wc -c
b mount | b grep -c ' /sys .*ro,'
b ls /dev/shm /dev/pts/ptmx /dev/null
echo pid $$
b unshare -m b true 2>/dev/null || echo no new namespaces`)
	in.Hosts = hosts
	in.Container.Mounts = []*runtimeapi.Mount{{HostPath: data, ContainerPath: "/data",
		MountOptions: []string{"noexec"}}}
	in.Container.WorkingDir = "/made/here"
	in.Container.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("ä b")}}
	in.Container.Linux.Resources = &runtimeapi.LinuxContainerResources{
		CpuShares: 100, CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}},
	}
	sc := in.security()
	sc.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	sc.SupplementalGroups = []int64{1234}
	sc.ReadonlyRootfs = true
	sc.NoNewPrivs = true
	sc.Seccomp = &runtimeapi.SecurityProfile{}
	sc.MaskedPaths, sc.ReadonlyPaths = maskedPaths, readonlyPaths
	sc.Capabilities = &runtimeapi.Capability{
		DropCapabilities:       []string{"ALL"},
		AddAmbientCapabilities: []string{"NET_BIND_SERVICE"},
	}
	out := b.run(in)
	wantLines(t, out,
		"uid=1000 gid=1000 groups=1000 10 1234 50000",
		"Seccomp: 2", "NoNewPrivs: 1", "CapBnd: 0000000000000400", "CapAmb: 0000000000000400",
		"127.0.0.1 me", "oom=900 cwd=/made/here host=pod-1-pod-1 A=ä b",
		"root is read-only", "data is writable", "0", "1", "pid 1", "no new namespaces")
}

func TestRuncPrivileged(t *testing.T) {
	b := newBundle(t)
	in := b.input(`alias b=/bin/busybox
b grep -E '^(Seccomp|CapBnd):' /proc/self/status | b tr '\t' ' '
b mount | b grep -c ' /sys .*rw,'
b mount -t tmpfs none /mnt && echo mounted
b ls /dev/mine /dev/null
b test -d /sys/fs/cgroup && echo cgroups`)
	check(t, os.Mkdir(filepath.Join(b.root, "mnt"), 0o755))
	in.privileged()
	in.security().Seccomp = &runtimeapi.SecurityProfile{}
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/mine"}}
	var err error
	if in.Devices, err = ResolveDevices(in.Container); err != nil {
		t.Fatal(err)
	}
	if in.HostDevices, err = HostDevices(); err != nil {
		t.Fatal(err)
	}
	var mask uint64
	for i, c := range allCaps {
		if strings.Contains(" "+strings.Join(in.KnownCaps, " ")+" ", " "+c+" ") {
			mask |= 1 << i
		}
	}
	out := b.run(in)
	wantLines(
		t,
		out,
		"Seccomp: 0",
		fmt.Sprintf("CapBnd: %016x", mask),
		"1",
		"mounted",
		"/dev/mine",
		"/dev/null",
		"cgroups",
	)
}

func TestRuncTerminal(t *testing.T) {
	b := newBundle(t)
	in := b.input(`test -t 0 && test -t 1 && echo term=$TERM $(/bin/busybox tty)`)
	in.Container.Tty = true
	r, err := validateAndBuild(in)
	check(t, err)
	socket := filepath.Join(b.dir, "console")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	check(t, err)
	defer l.Close()
	l.SetDeadline(time.Now().Add(5 * time.Minute))
	defer b.delete()
	cmd := b.cmd(r.Spec, "run", "--detach", "--console-socket", socket, "--bundle", b.dir, b.id)
	// A file: the container inherits the descriptor, and a pipe would keep Wait.
	stderr, err := os.Create(filepath.Join(b.dir, "stderr"))
	check(t, err)
	defer stderr.Close()
	cmd.Stderr = stderr
	check(t, cmd.Start())
	terminal, err := receiveFile(l)
	if waitErr := cmd.Wait(); err != nil || waitErr != nil {
		text, _ := os.ReadFile(stderr.Name())
		t.Fatalf("runc run: %v, %v: %s", err, waitErr, text)
	}
	defer terminal.Close()
	out, _ := io.ReadAll(terminal) // ends in EIO when the container does
	wantLines(t, strings.ReplaceAll(string(out), "\r", ""), "term=xterm /dev/pts/0")
}

func receiveFile(l *net.UnixListener) (*os.File, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	data, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(data, control)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

func TestRuncPodInit(t *testing.T) {
	b, c := newBundle(t), newBundle(t)
	in := c.input(`/bin/busybox tr '\0' ' ' </proc/1/cmdline; echo; echo $(/bin/busybox id -u)`)
	in.pod().NamespaceOptions.Pid = modePod
	s, err := PodInit(PodInitInput{Host: in.Host, ID: b.id, Sandbox: in.Sandbox, Rootfs: b.root,
		CgroupsPath: "/holdfast-test/" + b.id})
	check(t, err)
	s.Process.Args = []string{"/bin/busybox", "sleep", "600"}
	defer b.delete()
	pidFile := filepath.Join(b.dir, "pid")
	stderr, err := os.Create(filepath.Join(b.dir, "stderr"))
	check(t, err)
	defer stderr.Close()
	cmd := b.cmd(s, "run", "--detach", "--pid-file", pidFile, "--bundle", b.dir, b.id)
	cmd.Stderr = stderr
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(stderr.Name())
		t.Fatalf("runc run: %v: %s", err, text)
	}
	pid, err := os.ReadFile(pidFile)
	check(t, err)
	// runc does not wait until its init has become the program, and sets the
	// filter last of all.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		cmdline, err := os.ReadFile("/proc/" + string(pid) + "/cmdline")
		check(t, err)
		if strings.HasPrefix(string(cmdline), "/bin/busybox\x00") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the init is still %q", cmdline)
		}
	}
	status, err := os.ReadFile("/proc/" + string(pid) + "/status")
	check(t, err)
	wantLines(t, strings.ReplaceAll(string(status), "\t", " "), "CapBnd: 0000000000000000", "CapEff: 0000000000000000",
		"NoNewPrivs: 1", "Seccomp: 2", "Uid: 65535 65535 65535 65535")

	in.Namespaces.PID = "/proc/" + string(pid) + "/ns/pid"
	wantLines(t, c.run(in), "/bin/busybox sleep 600 ", "0")
}
