// Package guest is tested inside the machine that package vm boots: systemd is
// the init process there, and cgroup v2 is all there is.
package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

const (
	patience = 2 * time.Minute // the machine is emulated
	unit     = "holdfast.service"
	alias    = "holdfastd.service" // for those who think of it by its program's name
)

func needsGuest(t *testing.T) {
	t.Helper()
	if os.Getenv("HOLDFAST_GUEST") == "" {
		t.Skip("runs in the machine of make vm-test only: HOLDFAST_GUEST is not set")
	}
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := harness.Systemctl(args...)
	must.Succeed(t, err)
	return out
}

// property is a property of a unit.
func property(t *testing.T, unit, name string) string {
	t.Helper()
	return systemctl(t, "show", "--property="+name, "--value", unit)
}

// cgroupOf is the path of a process in the one hierarchy.
func cgroupOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	must.Succeed(t, err)
	return strings.TrimPrefix(strings.TrimSpace(string(b)), "0::")
}

// rro says whether the default handler is known for recursive read-only mounts,
// which it is when the OCI runtime could be asked.
func rro(t *testing.T, n *harness.Node) bool {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.Status(ctx, &cri.StatusRequest{})
	if err != nil || len(r.RuntimeHandlers) == 0 {
		t.Fatalf("Status: %v, %v", r, err)
	}
	return r.RuntimeHandlers[0].GetFeatures().GetRecursiveReadOnlyMounts()
}

// The unit as it is installed, with no config at all: systemd is told when it is
// ready, and stops it.
func TestUnit(t *testing.T) {
	needsGuest(t)
	t.Cleanup(func() { harness.Systemctl("stop", unit) })
	systemctl(t, "enable", "--now", unit)
	if s := property(t, alias, "ActiveState"); s != "active" {
		t.Errorf("the service is %s after its start, want active", s)
	}
	if s := property(t, unit, "Type"); s != "notify" {
		t.Errorf("the service is of type %s, want notify", s)
	}
	if st, err := os.Stat("/run/holdfast/holdfast.sock"); err != nil || st.Mode().Type() != os.ModeSocket {
		t.Errorf("the service is ready, and its socket is not there: %v", err)
	}
	systemctl(t, "stop", unit)
	if s := property(t, unit, "Result"); s != "success" {
		t.Errorf("the service has stopped with %s, want success", s)
	}
}

// kubelet is what the kubelet makes for a pod: a parent with limits.
type kubelet struct{ parent, unit string }

func (k kubelet) cgroup(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = k.parent }

func podSlice(t *testing.T, name string) kubelet {
	t.Helper()
	k := kubelet{unit: "kubepods-burstable-pod" + name + ".slice"}
	k.parent = "/kubepods.slice/kubepods-burstable.slice/" + k.unit
	systemctl(t, "start", k.unit)
	systemctl(t, "set-property", "--runtime", k.unit, "MemoryMax=512M", "CPUWeight=50")
	t.Cleanup(func() { harness.Systemctl("stop", k.unit) })
	return k
}

func (k kubelet) remove(t *testing.T) {
	t.Helper()
	if names := below("/sys/fs/cgroup" + k.parent); len(names) > 0 {
		t.Errorf("the slice of a removed pod still holds %v", names)
	}
	systemctl(t, "stop", k.unit)
}

// below are the cgroups in a cgroup.
func below(dir string) []string {
	var names []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// units are those of containers and shims that systemd knows.
func units(t *testing.T) string {
	t.Helper()
	return systemctl(t, "list-units", "--all", "--plain", "--no-legend", "holdfast-*.scope")
}

func wantDriver(t *testing.T, n *harness.Node, want cri.CgroupDriver) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{})
	must.Succeed(t, err)
	if got := r.GetLinux().GetCgroupDriver(); got != want {
		t.Fatalf("the cgroup driver is %s, want %s", got, want)
	}
}

func TestSystemd(t *testing.T) {
	needsGuest(t)
	n := harness.New(t, harness.Options{Service: unit})
	wantDriver(t, n, cri.CgroupDriver_SYSTEMD)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", n.PID())); err != nil ||
		strings.TrimSpace(string(b)) != "-999" {
		t.Errorf("oom_score_adj of the daemon is %q, %v", b, err)
	}
	if !rro(t, n) {
		t.Error("the OCI runtime's features are not known")
	}
	slice := podSlice(t, "1234_5")
	pod := n.RunPod("systemd", slice.cgroup)
	c := pod.Run("print", []string{"testbox", "print"}, limits)

	if got, want := cgroupOf(t, c.Info().PID), slice.parent+"/holdfast-"+c.ID+".scope"; got != want {
		t.Errorf("the container is in %s, want %s", got, want)
	}
	if got, want := cgroupOf(t, n.ShimPIDs()[c.ID]), "/system.slice/holdfast-shim-"+c.ID+".scope"; got != want {
		t.Errorf("the shim is in %s, want %s", got, want)
	}
	if got, want := cgroupOf(t, n.PID()), "/system.slice/"+unit; got != want {
		t.Errorf("the daemon is in %s, want %s", got, want)
	}
	checkLimits(t, c)
	if out := c.Output("sh", "-c", "ulimit -Sn"); out != "1024\n" {
		t.Errorf("the container may open %q files, want 1024 as a login may", out)
	}
	t.Run("basics", func(t *testing.T) { basics(t, pod.With(t), c.With(t)) })
	t.Run("out of memory", func(t *testing.T) { outOfMemory(t, pod.With(t)) })
	t.Run("stats", func(t *testing.T) { usage(t, pod.With(t)) })
	t.Run("daemon-reload", func(t *testing.T) {
		systemctl(t, "daemon-reload")
		checkLimits(t, c.With(t))
	})

	pod.Remove()
	slice.remove(t)
	n.CheckClean()
	if left := units(t); left != "" {
		t.Errorf("systemd still has\n%s", left)
	}
	if s := property(t, unit, "NRestarts"); s != "0" {
		t.Errorf("systemd has restarted the daemon %s times", s)
	}
}

func TestCgroupfs(t *testing.T) {
	needsGuest(t)
	n := harness.New(t, harness.Options{Service: unit, Config: "[cgroup]\ndriver = \"cgroupfs\"\n"})
	wantDriver(t, n, cri.CgroupDriver_CGROUPFS)
	pod := n.RunPod("cgroupfs")
	parent := pod.Config.Linux.CgroupParent
	c := pod.Run("print", []string{"testbox", "print"}, limits)
	if got, want := cgroupOf(t, c.Info().PID), parent+"/"+c.ID; got != want {
		t.Errorf("the container is in %s, want %s", got, want)
	}
	if got, want := cgroupOf(t, n.ShimPIDs()[c.ID]), "/holdfast/shims/"+c.ID; got != want {
		t.Errorf("the shim is in %s, want %s", got, want)
	}
	checkLimits(t, c)
	basics(t, pod, c)
	outOfMemory(t, pod)
	usage(t, pod)

	// A pod without a parent is below one of ours.
	orphan := n.RunPod("orphan", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "" })
	o := orphan.Run("print", []string{"testbox", "print"})
	if got, want := cgroupOf(t, o.Info().PID), "/holdfast/pods/"+orphan.ID+"/"+o.ID; got != want {
		t.Errorf("the container is in %s, want %s", got, want)
	}
	systemctl(t, "restart", unit)
	for _, c := range []*harness.Container{c, o} {
		if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || !harness.IsProcess(c.Info().PID) {
			t.Errorf("%s is %s after a restart of the daemon", c.Config.Metadata.Name, s.State)
		}
	}
	n.RemoveAllPods()
	n.CheckClean()
	os.Remove("/sys/fs/cgroup" + parent) // the kubelet's, had there been one
}

func limits(c *cri.ContainerConfig) {
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000,
		CpuShares: 512, OomScoreAdj: 321}
}

// checkLimits looks at the files, whoever wrote them.
func checkLimits(t *testing.T, c *harness.Container) {
	t.Helper()
	pid := c.Info().PID
	dir := "/sys/fs/cgroup" + cgroupOf(t, pid)
	for path, want := range map[string]string{
		dir + "/memory.max":                        "67108864",
		dir + "/cpu.max":                           "50000 100000",
		fmt.Sprintf("/proc/%d/oom_score_adj", pid): "321",
	} {
		b, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("%s is %q, %v; want %s", path, b, err, want)
		}
	}
}

// basics is what a pod does day by day. c prints lines.
func basics(t *testing.T, pod *harness.Pod, c *harness.Container) {
	if ip := pod.Status().GetNetwork().GetIp(); ip == "" {
		t.Error("the pod has no address")
	}
	c.WaitLog(patience, "line 00000003")
	r, err := c.Exec(120, "sh", "-c", "cat /proc/self/cgroup; cat /sys/fs/cgroup/memory.max; echo oops >&2; exit 7")
	must.Succeed(t, err)
	// A private cgroup namespace: it sees itself, not the host's tree.
	if strings.Contains(string(r.Stdout), c.ID) || !strings.HasPrefix(string(r.Stdout), "0::/") ||
		!strings.HasSuffix(string(r.Stdout), "\n67108864\n") {
		t.Errorf("in the container: %q", r.Stdout)
	}
	if string(r.Stderr) != "oops\n" || r.ExitCode != 7 {
		t.Errorf("exec says %q and ends with %d, want oops and 7", r.Stderr, r.ExitCode)
	}
	if _, err = c.Exec(3, "sh", "-c", "setsid sleep 4321 & sleep 4322"); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("exec with a timeout: %v, want DeadlineExceeded", err)
	}
	harness.Eventually(t, patience, "the whole tree of the command is gone", func() bool {
		return !strings.Contains(c.Output("ps"), "sleep 432")
	})
	dir := "/sys/fs/cgroup" + strings.TrimSuffix(cgroupOf(t, c.Info().PID), "/")
	harness.Eventually(t, patience, "the cgroups of execs are gone", func() bool { return len(below(dir)) == 0 })

	e := pod.Run("exits", []string{"sh", "-c", "echo bye; exit 33"})
	if s := e.WaitExited(patience); s.ExitCode != 33 || s.Reason != "Error" {
		t.Errorf("the container ended with %d, %s; want 33, Error", s.ExitCode, s.Reason)
	}
	if l := e.Log(); len(l) != 1 || l[0].Text != "bye" {
		t.Errorf("its log is %v", l)
	}
	// It is gone with its end, not with its record.
	harness.Eventually(t, patience, "the cgroup of an ended container is gone", func() bool {
		return !strings.Contains(strings.Join(below(filepath.Dir(dir)), " "), e.ID)
	})
	s := pod.Run("stubborn", []string{"sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"})
	s.WaitLog(patience, "deaf")
	s.Stop(1)
	if s := s.Status(); s.ExitCode != 137 || s.Reason != "Error" {
		t.Errorf("a stubborn container ended with %d, %s; want 137, Error", s.ExitCode, s.Reason)
	}
	s.Remove()
	if out := c.Output("echo", "fine"); out != "fine\n" {
		t.Errorf("exec says %q", out)
	}
}

// outOfMemory runs several at once: the cgroup of each vanishes with its process. It goes without inotify, of which
// other programs of root may have taken all.
func outOfMemory(t *testing.T, pod *harness.Pod) {
	defer useUpInotify(t)()
	small := func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
	}
	// What is killed beside it, or long before the end, is not why a container fails.
	beside := pod.Run("beside", []string{"sh", "-c", "until [ -e /go ]; do sleep 1; done; exit 3"})
	late := pod.Run("late", []string{"sh", "-c", "tail /dev/zero; echo child: $?; sleep 25; exit 1"}, small)
	late.WaitLog(patience, "child: 137")
	var hogs []*harness.Container
	for i := range 5 {
		hogs = append(hogs, pod.Create(fmt.Sprint("hog", i), []string{"tail", "/dev/zero"}, small))
	}
	for _, c := range hogs {
		c.Start()
	}
	for _, c := range hogs {
		if s := c.WaitExited(patience); s.ExitCode != 137 || s.Reason != "OOMKilled" {
			t.Errorf("%s ended with %d, %s; want 137, OOMKilled", c.Config.Metadata.Name, s.ExitCode, s.Reason)
		}
	}
	// A child is killed, the container goes on and fails a moment later: for that reason.
	c := pod.Run("parent", []string{"sh", "-c", "tail /dev/zero; echo child: $?; sleep 1; exit 5"}, small)
	if s := c.WaitExited(patience); s.ExitCode != 5 || s.Reason != "OOMKilled" || s.Message == "" {
		t.Errorf("parent ended with %d, %s, %q; want 5, OOMKilled, and which process it was", s.ExitCode, s.Reason,
			s.Message)
	}
	c.WaitLog(patience, "child: 137")
	s := late.WaitExited(patience)
	if s.ExitCode != 1 || s.Reason != "Error" || !strings.Contains(s.Message, "1 in all") {
		t.Errorf("late ended with %d, %s, %q; want 1, Error, and that there was a kill", s.ExitCode, s.Reason,
			s.Message)
	}
	beside.Output("touch", "/go")
	s = beside.WaitExited(patience)
	if s.ExitCode != 3 || s.Reason != "Error" || strings.Contains(s.Message, "OOM") {
		t.Errorf("beside ended with %d, %s, %q; want 3, Error, and nothing of OOM", s.ExitCode, s.Reason, s.Message)
	}
	for _, c := range append(hogs, c, late, beside) {
		c.Remove()
	}
}

// useUpInotify lets root make no inotify instance until restore is called.
func useUpInotify(t *testing.T) (restore func()) {
	t.Helper()
	const file = "/proc/sys/fs/inotify/max_user_instances"
	before, err := os.ReadFile(file)
	must.Succeed(t, err)
	must.Succeed(t, os.WriteFile(file, []byte("1"), 0)) // systemd has more
	if fd, err := unix.InotifyInit1(unix.IN_CLOEXEC); err != unix.EMFILE {
		unix.Close(fd)
		t.Errorf("an inotify instance could still be made: %v", err)
	}
	return func() { must.Succeed(t, os.WriteFile(file, before, 0)) }
}

// Whatever an operator does to the service, containers and shims live on, and
// what ends meanwhile is told of afterwards.
func TestService(t *testing.T) {
	needsGuest(t)
	n := harness.New(t, harness.Options{Service: unit})
	slice := podSlice(t, "cafe")
	pod := n.RunPod("service", slice.cgroup)
	c := pod.Run("print", []string{"testbox", "print"})
	address, started := pod.Status().GetNetwork().GetIp(), c.Status().StartedAt
	pid, shim := c.Info().PID, n.ShimPIDs()[c.ID]
	unharmed := func(t *testing.T) {
		t.Helper()
		if !harness.IsProcess(pid) || !harness.IsProcess(shim) {
			t.Fatalf("container alive: %v, shim alive: %v", harness.IsProcess(pid), harness.IsProcess(shim))
		}
	}
	recovered := func(t *testing.T) {
		t.Helper()
		must.Succeed(t, n.AwaitReady())
		unharmed(t)
		c, pod := c.With(t), pod.With(t)
		s := c.Status()
		if s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt != started || c.Info().PID != pid {
			t.Errorf("the container is %s, started at %d as %d; want running, %d, %d", s.State, s.StartedAt,
				c.Info().PID, started, pid)
		}
		if p := pod.Status(); p.State != cri.PodSandboxState_SANDBOX_READY || p.GetNetwork().GetIp() != address {
			t.Errorf("the pod is %s with address %s, want ready with %s", p.State, p.GetNetwork().GetIp(), address)
		}
		if out := c.Output("echo", "fine"); out != "fine\n" {
			t.Errorf("exec says %q", out)
		}
	}
	// fifo and mark let a container end at a moment of the test's choice.
	shared := n.Path("shared")
	must.Succeed(t, os.Mkdir(shared, 0o755))
	waiter := func(name string) *harness.Container {
		must.Succeed(t, unix.Mkfifo(filepath.Join(shared, name), 0o644))
		command := []string{"testbox", "wait", "/shared/" + name, "/shared/" + name + ".mark"}
		return pod.Run(name, command, func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{HostPath: shared, ContainerPath: "/shared"}}
		})
	}
	release := func(name string, code int) {
		must.Succeed(t, os.WriteFile(filepath.Join(shared, name), fmt.Appendln(nil, code), 0))
	}

	t.Run("kill", func(t *testing.T) {
		const grace = 5
		stubborn := pod.With(t).Run("stubborn", []string{"sh", "-c",
			"trap '' TERM; echo deaf; while :; do sleep 1; done"})
		stubborn.WaitLog(patience, "deaf")
		victim := stubborn.Info().PID
		asked := time.Now()
		go func() {
			ctx, cancel := harness.Deadline()
			defer cancel()
			n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: stubborn.ID,
				Timeout: grace}) // fails: its daemon dies
		}()
		run := rundir.Dir(filepath.Join(n.State, "containers", stubborn.ID))
		harness.Eventually(t, patience, "the shim has the stop on record", func() bool {
			s, err := run.ReadStatus()
			return err == nil && s.Stop != nil
		})
		daemon := n.PID()
		systemctl(t, "kill", "--signal=KILL", alias) // all processes of the unit
		unharmed(t)
		harness.Eventually(t, patience, "the container is killed at its deadline",
			func() bool { return !harness.IsProcess(victim) })
		harness.Eventually(t, patience, "systemd has started another daemon",
			func() bool { p := n.PID(); return p != 0 && p != daemon })
		recovered(t)
		s := stubborn.Status()
		if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
			t.Errorf("the container is %s with code %d, want exited with 137", s.State, s.ExitCode)
		}
		if lived := time.Unix(0, s.FinishedAt).Sub(asked); lived < grace*time.Second {
			t.Errorf("the container was killed after %s, before its grace of %d s was over", lived, grace)
		}
	})
	t.Run("restart", func(t *testing.T) {
		w := waiter("restart")
		systemctl(t, "restart", alias)
		recovered(t)
		release("restart", 42)
		if s := w.WaitExited(patience); s.ExitCode != 42 {
			t.Errorf("the container ended with %d, want 42", s.ExitCode)
		}
	})
	t.Run("stop", func(t *testing.T) {
		w := waiter("stop")
		waiting := w.Info().PID
		systemctl(t, "stop", alias)
		if s := property(t, unit, "ActiveState"); s != "inactive" {
			t.Errorf("the service is %s after its stop, want inactive", s)
		}
		unharmed(t)
		before := len(c.Log())
		release("stop", 43)
		harness.Eventually(t, patience, "a container ends while the service is stopped",
			func() bool { return !harness.IsProcess(waiting) })
		harness.Eventually(t, patience, "the log goes on while the service is stopped",
			func() bool { return len(c.Log()) > before })
		harness.Eventually(t, patience, "the shim of the ended container ends too",
			func() bool { return !strings.Contains(units(t), w.ID) })
		systemctl(t, "start", unit)
		recovered(t)
		if s := w.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 43 || s.Reason != "Error" {
			t.Errorf("the container is %s with %d, %s; want exited with 43, Error", s.State, s.ExitCode, s.Reason)
		}
	})
	// A shim that was killed by force, while nobody was there to see it.
	t.Run("killed shim", func(t *testing.T) {
		v := pod.With(t).Run("victim", []string{"sh", "-c", "sleep 1000 & sleep 1001"})
		victim := v.Info().PID
		systemctl(t, "stop", unit)
		systemctl(t, "kill", "--signal=KILL", "holdfast-shim-"+v.ID+".scope")
		systemctl(t, "start", unit)
		if s := v.WaitExited(patience); s.Reason != "ShimDied" || s.ExitCode == 0 {
			t.Errorf("the container ended with %d, %s; want ShimDied", s.ExitCode, s.Reason)
		}
		harness.Eventually(t, patience, "the container's process is gone",
			func() bool { return !harness.IsProcess(victim) })
		harness.Eventually(t, patience, "its scope is gone", func() bool { return !strings.Contains(units(t), v.ID) })
		v.Remove()
	})
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 4 {
		t.Errorf("%d containers are listed, %v; want 4", len(list.GetContainers()), err)
	}
	if count, err := harness.Numbered("line", c.Log()); err != nil {
		t.Errorf("the log after %d good lines: %v", count, err)
	}
	c.Stop(30)
	if s := c.Status(); s.ExitCode != 0 {
		t.Errorf("the container ends with %d on SIGTERM, want 0", s.ExitCode)
	}
	pod.Remove()
	slice.remove(t)
	n.CheckClean()
	if left := units(t); left != "" {
		t.Errorf("systemd still has\n%s", left)
	}
}
