package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// In a life of pods of each mode holdfastctl doctor knows an owner of everything, with the
// daemon alive and killed.
func TestDoctorKnowsAllOwners(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	look := func(when string) {
		t.Helper()
		for _, state := range []string{"alive", "killed", "alive again"} {
			if state == "killed" {
				n.Kill()
			} else if state == "alive again" {
				n.Start()
			}
			if found := n.Doctor(); len(found) > 0 {
				t.Errorf("%s, with the daemon %s:\n  %s", when, state, strings.Join(found, "\n  "))
			}
		}
	}
	look("without a pod")

	plain := n.RunPod("plain")
	look("a pod without containers")
	created := plain.Create("created", []string{"sleep", "100000"})
	running := plain.Run("running", []string{"sleep", "100000"})
	plain.Run("ended", []string{"sh", "-c", "exit 3"}).WaitExited(patience)
	look("containers created, running, ended")

	runEachMode(n)
	look("pods of each mode")

	stubborn := plain.Run("stubborn", []string{"sh", "-c", "trap '' TERM; while :; do sleep 1; done"})
	var calls sync.WaitGroup // each ends with the daemon, or with its container
	calls.Go(func() { running.Exec(0, "sleep", "100000") })
	calls.Go(func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: stubborn.ID, Timeout: 1000})
	})
	look("an exec under way, a container terminating")
	calls.Wait()
	created.Start()
	running.Stop(0)
	created.Remove()
	plain.Remove()
	look("a pod removed")
	n.RemoveAllPods()
	n.CheckClean()
}

// runEachMode runs a pod of each kind that holds something else.
func runEachMode(n *harness.Node) {
	host := n.RunPod("host", podWith(&cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}))
	host.Run("c", []string{"sleep", "100000"}, containerWith(&cri.NamespaceOption{
		Network: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE,
	}))
	share := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	shared := n.RunPod("shared", podWith(share))
	shared.Run("c", []string{"sleep", "100000"}, containerWith(share))
	if _, older := harness.KernelBefore(6, 3); !older {
		o := usernsOptions(1 << 20)
		n.RunPod("mapped", podWith(o))
	}
	n.RunPod("volume").Run("c", []string{"sleep", "100000"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{
			ContainerPath: "/image",
			Image:         &cri.ImageSpec{Image: harness.Image},
			Readonly:      true,
		}}
	})
}

// What a pull has brought so far belongs to it, also after it was cut short.
func TestDoctorKnowsPulls(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"file": strings.Repeat("x", 1<<16)})
	check(t, err)
	ref := n.Registry.Host + "/slow:1"
	_, err = n.Registry.Push(ref, ocispec.ImageConfig{}, layer)
	check(t, err)
	reached, release := make(chan struct{}, 100), make(chan struct{})
	served := 0 // guarded by the lock of the registry
	n.Registry.Break(func(r *http.Request) bool {
		if blobs := strings.Contains(r.URL.Path, "/blobs/"); r.Method == http.MethodGet && blobs {
			if served++; served > 1 { // a layer, or the config
				reached <- struct{}{}
				<-release
			}
		}
		return false
	})
	pulled := beginPull(n, ref)
	<-reached
	for _, kill := range []bool{false, true} {
		if kill {
			n.Kill()
		}
		if found := n.Doctor(); len(found) > 0 {
			t.Errorf("during a pull, killed %v:\n  %s", kill, strings.Join(found, "\n  "))
		}
	}
	close(release)
	<-pulled
	n.Start()
	n.Pull(ref)
	n.CheckOwners()
}

// planted is something without an owner. offline says that it is only taken away when no
// daemon runs.
type planted struct {
	kind, name string
	offline    bool
}

// What has no owner is named, of every kind, and taken away, and nothing else is.
func TestDoctorFindsWhatHasNoOwner(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	c := n.RunPod("owned").Run("c", []string{"sleep", "100000"})
	before := n.Diagnose()
	wantCode(t, before, 0)
	all := plant(t, n)

	found := n.Diagnose()
	wantCode(t, found, 3)
	checkFound(t, found, all)
	if asked := n.Diagnose("--fix"); asked.Code != 2 {
		t.Errorf("without a terminal nobody can be asked, and the exit code is %d", asked.Code)
	}
	checkFound(t, n.Diagnose(), all)
	for _, running := range []bool{true, false} {
		if !running {
			n.Kill()
		}
		fixed := n.Diagnose("--fix", "--yes")
		t.Logf("fixing, the daemon runs %v:\n%s", running, fixed.Said)
		left := slices.DeleteFunc(slices.Clone(all), func(p planted) bool { return !running || !p.offline })
		after := n.Diagnose()
		checkFound(t, after, left)
		want := map[bool]int{true: 3, false: 0}[running]
		wantCode(t, fixed, want)
		wantCode(t, after, want)
	}
	n.Start()
	wantOutput(t, c, "lives", "echo", "-n", "lives")
	n.RemoveAllPods()
	n.CheckClean()
}

// wantCode compares an exit code. What another test's daemon has may be in doubt while it comes and goes.
func wantCode(t *testing.T, d harness.Diagnosis, want int) {
	t.Helper()
	for _, thing := range d.Things {
		if thing.Doubt && strings.Contains(thing.Why, "another daemon's") && want == 0 && d.Code == 4 {
			return
		}
	}
	if d.Code != want {
		t.Errorf("the exit code is %d, want %d; not known: %v", d.Code, want, d.Unknown)
	}
}

// checkFound compares what has no owner with what was planted.
func checkFound(t *testing.T, d harness.Diagnosis, want []planted) {
	t.Helper()
	var got, names []string
	for _, p := range want {
		names = append(names, p.kind+" "+p.name)
	}
	for _, thing := range d.Things {
		if thing.Ownerless() {
			got = append(got, thing.Kind+" "+thing.Name)
		}
	}
	match := func(a, b string) bool { return strings.HasPrefix(a, b) } // of a process only the pid is known
	for _, w := range names {
		if !slices.ContainsFunc(got, func(g string) bool { return match(g, w) }) {
			t.Errorf("not found: %s", w)
		}
	}
	for _, g := range got {
		if !slices.ContainsFunc(names, func(w string) bool { return match(g, w) }) {
			t.Errorf("found, and not planted: %s", g)
		}
	}
	if len(d.Unknown) > 0 {
		t.Errorf("not known: %v", d.Unknown)
	}
}

// plant leaves one thing of every kind without an owner.
func plant(t *testing.T, n *harness.Node) []planted {
	t.Helper()
	id := strings.Repeat("ab", 32)
	return append(plantInKernel(t, n, id), plantFiles(t, n, id)...)
}

func plantInKernel(t *testing.T, n *harness.Node, id string) (all []planted) {
	t.Helper()
	add := func(kind, name string, offline bool) { all = append(all, planted{kind, name, offline}) }
	run := filepath.Join(n.State, "containers", id)
	check(t, os.MkdirAll(filepath.Join(run, "rootfs"), 0o700))
	add("directory", run, true)
	add("shim", fmt.Sprint(strayShim(t, n, run), " "), false)
	add("mount", filepath.Join(run, "rootfs"), false)
	check(t, unix.Mount("tmpfs", filepath.Join(run, "rootfs"), "tmpfs", 0, "size=4k"))

	stray := exec.Command("sleep", "100000")
	check(t, stray.Start())
	go stray.Wait()
	t.Cleanup(func() { stray.Process.Kill() })
	add("process", fmt.Sprint(stray.Process.Pid, " "), false)
	add("cgroup", "/holdfast/shims/"+id, false)
	enterCgroup(t, id, stray.Process.Pid)

	pin := "/run/netns/holdfast-" + id
	check(t, os.WriteFile(pin, nil, 0o600))
	t.Cleanup(func() {
		unix.Unmount(pin, unix.MNT_DETACH)
		os.Remove(pin)
	})
	check(t, exec.Command("unshare", "--net="+pin, "true").Run())
	add("namespace", pin, false)
	bridge, err := netlink.LinkByName(n.Bridge)
	check(t, err)
	veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "hfy" + number()}
	veth.Name, veth.MasterIndex = "hfx"+number(), bridge.Attrs().Index
	ns, err := os.Open(pin)
	check(t, err)
	defer ns.Close()
	veth.PeerNamespace = netlink.NsFd(ns.Fd())
	check(t, netlink.LinkAdd(veth))
	t.Cleanup(func() { netlink.LinkDel(veth) })
	add("veth", veth.Name, false)
	return all
}

func plantFiles(t *testing.T, n *harness.Node, id string) (all []planted) {
	t.Helper()
	add := func(kind, name string, offline bool) { all = append(all, planted{kind, name, offline}) }
	file := func(kind, path, content string, offline bool) {
		check(t, os.MkdirAll(filepath.Dir(path), 0o700))
		check(t, os.WriteFile(path, []byte(content), 0o600))
		add(kind, path, offline)
	}
	subnet, _, _ := strings.Cut(n.Subnet, ".0/24")
	file("lease", n.Path("ipam/test/"+subnet+".250"), id+"\neth0", false)

	layer := filepath.Join(n.Root, "layers/sha256", id)
	check(t, os.Mkdir(layer, 0o700))
	add("layer", layer, true)
	file("blob", filepath.Join(n.Root, "images/blobs/sha256", id), "no blob", true)
	file("download", filepath.Join(n.Root, "images/ingest/sha256-"+id+"-abc-10"), "half", true)
	file("token", filepath.Join(n.State, "stream/tokens", strings.Repeat("0", 44)), "", false)
	pod := filepath.Join(n.Root, "pods", strings.Repeat("cd", 32))
	check(t, os.Mkdir(pod, 0o700))
	add("directory", pod, true)
	file("file", filepath.Join(n.Root, "cni/results/test-"+id+"-eth0"), "{}", false)
	file("file", filepath.Join(n.State, "strange"), "", false)
	socket := filepath.Join(n.State, "strange.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	check(t, err)
	l.SetUnlinkOnClose(false)
	check(t, l.Close())
	add("socket", socket, false)
	fifo := filepath.Join(n.State, "strange.fifo")
	check(t, unix.Mkfifo(fifo, 0o600))
	add("fifo", fifo, false)
	return all
}

// strayShim starts a shim that no daemon knows. It has no container.
func strayShim(t *testing.T, n *harness.Node, dir string) int {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	defer ours.Close()
	cmd := exec.Command(filepath.Join(n.Bin, "holdfast-shim"), "--dir", dir, "--log-level", "info")
	cmd.ExtraFiles = []*os.File{theirs}
	check(t, cmd.Start())
	go cmd.Wait()
	t.Cleanup(func() { cmd.Process.Kill() })
	_, err = ours.Write([]byte{1})
	check(t, err)
	_, err = ours.Read(make([]byte, 1)) // it listens
	check(t, err)
	return cmd.Process.Pid
}

// enterCgroup moves a process into the cgroup of a shim, in each hierarchy that takes it.
func enterCgroup(t *testing.T, id string, pid int) {
	t.Helper()
	tops, err := filepath.Glob("/sys/fs/cgroup/*/holdfast/shims")
	check(t, err)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil { // v2 alone
		tops = []string{"/sys/fs/cgroup/holdfast/shims"}
	}
	for _, top := range tops {
		if strings.Contains(top, "/cpuset/") { // an empty one takes nobody
			continue
		}
		dir := filepath.Join(top, id)
		check(t, os.MkdirAll(dir, 0o755))
		t.Cleanup(func() { os.Remove(dir) })
		check(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, pid), 0))
	}
}

// holdfastctl explain tells how each container ended and by whom, also when it is gone, and
// what happened while no daemon ran.
func TestExplain(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("told")
	stubborn := []string{"sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"}
	obedient := []string{"sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"}
	killed, stopped := pod.Run("killed", stubborn), pod.Run("stopped", obedient)
	for _, c := range []*harness.Container{killed, stopped} {
		c.WaitLog(patience, "ready")
	}
	pod.Run("over", []string{"sh", "-c", "exit 3"}).WaitExited(patience)
	orphan := pod.Run("orphan", []string{"sleep", "100000"})
	shot := pod.Run("shot", []string{"sh", "-c", "echo ready; exec sleep 100000"})
	pod.Run("last", []string{"sleep", "100000"})
	killed.Stop(1)
	stopped.Stop(100)
	check(t, unix.Kill(orphan.ShimPID(), unix.SIGKILL))
	orphan.WaitExited(patience)
	pid := shot.Info().PID
	n.Kill()
	check(t, unix.Kill(pid, unix.SIGKILL)) // while no daemon runs
	n.Start()
	shot.WaitExited(patience)

	wants := map[string][]string{
		"killed":  {"asked to stop, by StopContainer: signal 15, and SIGKILL after 1s", "when the time to stop was over"},
		"stopped": {"StopContainer: signal 15, and SIGKILL after 1m40s", "by itself, ", "(exit code 7)"},
		"over":    {"asked for, by CreateContainer", "created", "started", "ended: by itself, with exit code 3"},
		"orphan":  {"ended: how is not known (ShimDied: "},
		"shot":    {"signal 9 (killed) ended it, which came from elsewhere"},
	}
	for _, when := range []string{"not removed", "removed", "removed, and the daemon killed"} {
		switch when {
		case "removed":
			pod.Remove()
			wants["last"] = []string{"by the stop of its pod: SIGKILL at once", "(SIGKILL, exit code 137)", "removed"}
			wants["default/told"] = []string{"RunPodSandbox", "by StopPodSandbox", "stopped", "removed",
				"container over"}
		case "removed, and the daemon killed":
			n.Kill()
		}
		for name, texts := range wants {
			said := n.Explain(name)
			for _, text := range texts {
				if !strings.Contains(said, text) {
					t.Errorf("%s: of %s it is not said %q:\n%s", when, name, text, said)
				}
			}
		}
	}
	n.Start()
}
