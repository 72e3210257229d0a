// Package harness runs a Holdfast of its own for tests and the demo: a registry
// on loopback, a daemon with all its paths in a scratch directory, CRI clients,
// and a comparison of the machine before and after.
//
// It needs root. Several nodes may run on one machine at a time: each has its
// own bridge, subnet and cgroup parent.
package harness

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const goarch = runtime.GOARCH

// T is the part of *testing.T that this package needs, so that a program that
// is no test can use it too. Fatalf does not return.
type T interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	Failed() bool
}

// CallTimeout bounds each CRI call, StartTimeout the time until a daemon serves.
// They are for the slowest of machines: a disk can stall for many seconds.
const (
	CallTimeout  = 5 * time.Minute
	StartTimeout = 2 * time.Minute
)

// Node is a machine as the kubelet sees it: one daemon and what it keeps.
type Node struct {
	T T
	*shared
}

// shared is what all views of a node have in common (see With).
type shared struct {
	Dir      string // scratch; everything else is below
	Root     string
	State    string
	Socket   string
	LogDir   string // of all pods
	Bin      string
	Bridge   string
	Subnet   string // such as 10.211.17.0/24
	Registry *Registry
	Runtime  cri.RuntimeServiceClient
	Images   cri.ImageServiceClient
	Launcher []string // a program that becomes the daemon, whose command line follows; empty: none

	conn   *grpc.ClientConn
	before machine
	*ids

	service      string // see Options
	failpoints   string // a file; empty: the programs have no failpoints
	mu           sync.Mutex
	cmd          *exec.Cmd     // of the daemon, nil while it is down
	ended        chan struct{} // closed when cmd has ended and was reaped
	cgroupParent string
}

// Options of a node. The zero value is the usual one.
type Options struct {
	Config  string            // more lines for config.toml
	Plugins map[string]string // CNI plugins of the test, as scripts, last in the chain
	RootMiB int               // root is a tmpfs of that size, to be filled up
	Root    string            // that outlives the node; empty: below its scratch directory
	State   string            // the same for state
	Names   string            // ends the names of root and state
	Service string            // an installed systemd unit that runs the daemon, instead of a child of the test
	// Failpoints has programs that Arm can kill, stop, delay or have fail at a step.
	Failpoints bool
}

// New starts a registry and a daemon, with Image pulled. All of it ends with t,
// and the machine is as it was.
func New(t T, opts ...Options) *Node {
	t.Helper()
	if os.Geteuid() != 0 {
		if s, ok := t.(interface{ Skip(...any) }); ok {
			s.Skip("needs root")
		}
		t.Fatalf("cannot run containers: this needs root")
	}
	var o Options
	if len(opts) > 0 {
		o = opts[0]
	}
	binaries := Binaries
	if o.Failpoints {
		binaries = failpointBinaries
	}
	bin, err := binaries()
	if err != nil {
		t.Fatalf("%v", err)
	}
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatalf("cannot make a scratch directory: %v", err)
	}
	// Root of a user namespace has to get through to the root file systems.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatalf("%v", err)
	}
	subnet, err := freeSubnet()
	if err != nil {
		t.Fatalf("cannot find a subnet: %v", err)
	}
	tag := strings.TrimPrefix(filepath.Base(dir), "hf-")
	n := &Node{T: t, shared: &shared{
		Dir:          dir,
		Root:         filepath.Join(dir, "root"+o.Names),
		State:        filepath.Join(dir, "state"+o.Names),
		Socket:       filepath.Join(dir, "cri.sock"),
		LogDir:       filepath.Join(dir, "logs"),
		Bin:          bin,
		Bridge:       "hf" + tag,
		Subnet:       subnet,
		cgroupParent: "/hf-test-" + tag,
		service:      o.Service,
	}}
	n.Root, n.State = cmp.Or(o.Root, n.Root), cmp.Or(o.State, n.State)
	if o.Failpoints {
		n.failpoints = n.Path("failpoints")
		n.Arm()
	}
	t.Cleanup(n.cleanup)
	n.Registry = StartRegistry(t)
	if err := n.configure(o); err != nil {
		t.Fatalf("cannot configure the daemon: %v", err)
	}
	n.conn, err = grpc.NewClient("unix://"+n.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		// A daemon is restarted within milliseconds; the usual pause is a second.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5,
				MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: 10 * time.Second,
		}))
	if err != nil {
		t.Fatalf("cannot make a client: %v", err)
	}
	n.Runtime = cri.NewRuntimeServiceClient(n.conn)
	n.Images = cri.NewImageServiceClient(n.conn)
	if n.ids, err = watchIDs(n.Root, n.State); err != nil {
		t.Fatalf("%v", err)
	}
	n.noteStrangers()
	n.Start()
	n.adoptCgroupDriver()
	n.Pull(Image)
	n.Mark()
	return n
}

// With is the same node, reporting to another test: a subtest.
func (n *Node) With(t T) *Node { return &Node{T: t, shared: n.shared} }

// NRISocket is where NRI plugins connect.
func (n *Node) NRISocket() string { return n.Path("nri/nri.sock") }

// driverVariable picks the cgroup driver of nodes whose Options say nothing of cgroups.
const driverVariable = "HOLDFAST_CGROUP_DRIVER"

func (n *Node) configure(o Options) error {
	if driver := os.Getenv(driverVariable); driver != "" && !strings.Contains(o.Config, "[cgroup]") {
		o.Config += fmt.Sprintf("\n[cgroup]\ndriver = %q\n", driver)
	}
	files := map[string]string{
		"net.d/10-test.conflist": n.conflist(slices.Sorted(maps.Keys(o.Plugins))),
		"certs.d/_default/hosts.toml": fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n",
			"http://"+n.Registry.Host, "http://"+n.Registry.Host),
		"config.toml": fmt.Sprintf(`[cni]
conf_dir = %q
bin_dirs = [%q, %q]
[registry]
config_dir = %q
[nri]
socket_path = %q
plugin_path = %q
%s
`, n.Path("net.d"), filepath.Join(n.Bin, "cni"), n.Path("plugins"), n.Path("certs.d"), n.NRISocket(),
			n.Path("nri/plugins"), o.Config),
	}
	for name, script := range o.Plugins {
		files["plugins/"+name] = script
	}
	for name, content := range files {
		path := n.Path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			return err
		}
	}
	if o.RootMiB > 0 {
		if err := os.Mkdir(n.Root, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", n.Root, "tmpfs", 0, fmt.Sprintf("size=%dm", o.RootMiB)); err != nil {
			return fmt.Errorf("cannot mount a tmpfs on %s: %w", n.Root, err)
		}
	}
	return os.MkdirAll(n.LogDir, 0o755)
}

// conflist is the CNI configuration: bridge and portmap, then more plugins.
func (n *Node) conflist(more []string) string {
	plugins := []string{
		fmt.Sprintf(`{"type": "bridge", "bridge": %q, "isGateway": true,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}`,
			n.Bridge, n.Path("ipam"), n.Subnet),
		`{"type": "portmap", "capabilities": {"portMappings": true}}`,
	}
	for _, name := range more {
		plugins = append(plugins, fmt.Sprintf(`{"type": %q}`, name))
	}
	return fmt.Sprintf("{\"cniVersion\": \"1.0.0\", \"name\": \"test\", \"plugins\": [\n%s\n]}\n", strings.Join(plugins,
		",\n"))
}

// Path is a path in the scratch directory.
func (n *Node) Path(name string) string { return filepath.Join(n.Dir, name) }

// DaemonLog is the file with all that the daemons of this node wrote.
func (n *Node) DaemonLog() string { return n.Path("daemon.log") }

// Start starts the daemon and waits until it serves CRI.
func (n *Node) Start() {
	n.T.Helper()
	if err := n.launch(); err != nil {
		n.T.Fatalf("cannot start the daemon: %v", err)
	}
	if err := n.AwaitReady(); err != nil {
		n.T.Fatalf("%v", err)
	}
}

func (n *Node) launch() error {
	args := []string{filepath.Join(n.Bin, "holdfastd"), "--config", n.Path("config.toml"),
		"--root", n.Root, "--state", n.State, "--address", n.Socket}
	if n.service != "" {
		return n.startService(args)
	}
	log, err := os.OpenFile(n.DaemonLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args = append(slices.Clone(n.Launcher), args...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if n.failpoints != "" {
		cmd.Env = append(os.Environ(), "HOLDFAST_FAILPOINTS="+n.failpoints)
	}
	// A group of its own, as under a service manager: Ctrl-C is not for it.
	// If the test is killed, nobody else ends the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil {
		return errors.New("it runs already")
	}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // for the kernel the parent is the thread
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	n.cmd, n.ended = cmd, ended
	return nil
}

// AwaitReady waits until the daemon answers Version.
func (n *Node) AwaitReady() error {
	n.mu.Lock()
	ended := n.ended
	n.mu.Unlock()
	deadline := time.Now().Add(StartTimeout)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := n.Runtime.Version(ctx, &cri.VersionRequest{})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("the daemon ended before it served: %w\n%s", err, n.tail(30))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon does not serve after %s: %w\n%s", StartTimeout, err, n.tail(30))
		}
	}
}

// signal sends a signal to the daemon and waits until it has ended.
func (n *Node) signal(sig syscall.Signal) error {
	if n.service != "" {
		return n.endService(sig)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.ended:
		n.cmd = nil
		return nil
	case <-time.After(StartTimeout):
		return fmt.Errorf("the daemon still runs %s after %s", StartTimeout, sig)
	}
}

// Kill ends the daemon with SIGKILL, Stop with SIGTERM. Both wait for its end.
func (n *Node) Kill() { n.T.Helper(); n.end(syscall.SIGKILL) }

// Stop ends the daemon with SIGTERM.
func (n *Node) Stop() { n.T.Helper(); n.end(syscall.SIGTERM) }

func (n *Node) end(sig syscall.Signal) {
	n.T.Helper()
	if err := n.signal(sig); err != nil {
		n.T.Fatalf("cannot end the daemon: %v", err)
	}
}

// Restart kills the daemon and starts it again.
func (n *Node) Restart() {
	n.T.Helper()
	if err := n.Bounce(); err != nil {
		n.T.Fatalf("cannot restart the daemon: %v", err)
	}
}

// Bounce is Restart for goroutines that may not fail the test.
func (n *Node) Bounce() error {
	if err := n.signal(syscall.SIGKILL); err != nil {
		return err
	}
	if err := n.launch(); err != nil {
		return err
	}
	return n.AwaitReady()
}

// PID is the daemon's, 0 while it is down.
func (n *Node) PID() int {
	if n.service != "" {
		return n.servicePID()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return 0
	}
	return n.cmd.Process.Pid
}

// tail is the end of the daemon's log.
func (n *Node) tail(lines int) string {
	b, _ := os.ReadFile(n.DaemonLog())
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return "the daemon's log:\n  " + strings.Join(all[max(0, len(all)-lines):], "\n  ")
}

// adoptCgroupDriver gives the cgroup parent the form that the driver wants.
func (n *Node) adoptCgroupDriver() {
	n.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	r, err := n.Runtime.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{})
	if err != nil {
		n.T.Fatalf("RuntimeConfig: %v", err)
	}
	if r.GetLinux().GetCgroupDriver() == cri.CgroupDriver_SYSTEMD {
		n.cgroupParent = strings.ReplaceAll(strings.TrimPrefix(n.cgroupParent, "/"), "-", "") + ".slice"
	}
}

// Deadline is the context of one CRI call.
func Deadline() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), CallTimeout)
}

// Pull pulls an image and gives its id.
func (n *Node) Pull(ref string) string {
	n.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	r, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		n.T.Fatalf("PullImage %s: %v", ref, err)
	}
	return r.ImageRef
}

// cleanup ends all that the node started, politely where the daemon answers.
func (n *Node) cleanup() {
	if n.PID() != 0 {
		n.RemoveAllPods()
		if err := n.signal(syscall.SIGTERM); err != nil {
			n.T.Errorf("%v", err)
			n.signal(syscall.SIGKILL)
		}
	}
	if n.conn != nil {
		n.conn.Close()
	}
	if b, _ := os.ReadFile(n.DaemonLog()); bytes.Contains(b, []byte("DATA RACE")) {
		i := bytes.Index(b, []byte("DATA RACE"))
		n.T.Errorf("the daemon has a data race:\n%s", b[i:min(len(b), i+4000)])
	}
	if n.T.Failed() {
		n.T.Logf("%s", n.tail(60))
	}
	if n.ids != nil {
		n.sweep()
		n.ids.f.Close()
	}
	if os.Getenv("HOLDFAST_KEEP") != "" {
		n.T.Logf("kept %s", n.Dir)
		return
	}
	if err := os.RemoveAll(n.Dir); err != nil {
		n.T.Errorf("cannot remove %s: %v", n.Dir, err)
	}
}

// RemoveAllPods stops and removes every pod through CRI, as a kubelet would that
// has no more of them. What fails is reported and does not keep the rest.
func (n *Node) RemoveAllPods() {
	n.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), CallTimeout)
	defer cancel()
	list, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		n.T.Errorf("ListPodSandbox: %v", err)
		return
	}
	var wg sync.WaitGroup
	limit := make(chan struct{}, 4)
	for _, p := range list.Items {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if err := n.removePod(ctx, p.Id); err != nil {
				n.T.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
}

func (n *Node) removePod(ctx context.Context, id string) error {
	if _, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("StopPodSandbox %s: %w", id, err)
	}
	if _, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("RemovePodSandbox %s: %w", id, err)
	}
	return nil
}

// FreePort is a TCP port of the host that nobody listens on now. It is below
// those that the kernel gives to connections and to listeners that name none, or
// one of them might have it by the time it is used.
func FreePort(t T) int {
	t.Helper()
	var err error
	for range 100 {
		var l net.Listener
		port := 20000 + rand.IntN(10000)
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatalf("cannot find a free port: %v", err)
	return 0
}

// freeSubnet is a subnet that no address and no route of the machine is in: a
// cloud may have its own there. It is by chance, so that nodes of several test
// binaries seldom meet.
func freeSubnet() (string, error) {
	var taken []netip.Prefix
	note := func(n *net.IPNet) {
		if n == nil {
			return
		}
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			if ones, _ := n.Mask.Size(); ones > 0 { // not the default route
				taken = append(taken, netip.PrefixFrom(a.Unmap(), ones))
			}
		}
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // what there is will do
		return "", err
	}
	for _, a := range addrs {
		note(a.IPNet)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return "", err
	}
	for _, r := range routes {
		note(r.Dst)
	}
	var p netip.Prefix
	for range 1000 {
		p = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(128 + rand.IntN(100)), byte(rand.IntN(256)), 0}), 24)
		if !slices.ContainsFunc(taken, p.Overlaps) {
			break
		}
	}
	return p.String(), nil // a part of a large one, where all is taken
}

// KernelBefore says whether the kernel is older than a version of Linux, and
// which one it is.
func KernelBefore(major, minor int) (string, bool) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", false
	}
	var a, b int
	release := unix.ByteSliceToString(u.Release[:])
	fmt.Sscanf(release, "%d.%d", &a, &b)
	return release, a < major || a == major && b < minor
}
