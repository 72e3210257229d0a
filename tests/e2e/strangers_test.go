package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
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

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// asStranger runs f on a thread that is a user of the host without any rights. A
// program that it starts is one too.
func asStranger(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		const id = 65534
		for _, call := range []struct{ number, a, b, c uintptr }{
			{number: unix.SYS_SETGROUPS},
			{unix.SYS_SETRESGID, id, id, id},
			{unix.SYS_SETRESUID, id, id, id},
		} {
			if _, _, errno := unix.RawSyscall(call.number, call.a, call.b, call.c); errno != 0 {
				done <- errno
				return
			}
		}
		f()
		done <- nil
	}()
	check(t, <-done)
}

// A kind is a pod that has something of its own on the host.
type kind struct {
	options *cri.NamespaceOption
	pod     func(*cri.PodSandboxConfig)
	edit    func(*cri.ContainerConfig)
	end     func(*testing.T, *harness.Container) // what is done to a created container, instead of its start
	beside  bool                                 // another one runs beside it
}

// plants is what a container leaves for users of the host, in files of any kind that
// it has from its pod too.
const plants = "cp /bin/busybox /planted; chmod 4755 /planted; mkdir -m 777 /open; cp -p /planted /open/sleep; " +
	"echo >/dev/shm/x; chmod 666 /etc/hosts"

// kindsOfPods are all of them.
func kindsOfPods(t *testing.T, n *harness.Node) map[string]kind {
	t.Helper()
	kinds := map[string]kind{}
	for _, table := range []map[string]kind{
		kindsOfNamespaces(), kindsOfPodConfigs(t), kindsOfMounts(t, n), kindsOfProcesses(), kindsOfEnds(),
	} {
		for name, k := range table {
			if k.options == nil {
				k.options = &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
			}
			kinds[name] = k
		}
	}
	if len(kinds) < 20 {
		t.Errorf("there are only %d kinds", len(kinds))
	}
	return kinds
}

func kindsOfNamespaces() map[string]kind {
	const own, shared, host = cri.NamespaceMode_CONTAINER, cri.NamespaceMode_POD, cri.NamespaceMode_NODE
	kinds := map[string]kind{
		"plain":        {},
		"shared":       {options: &cri.NamespaceOption{Pid: shared}},
		"host-network": {options: &cri.NamespaceOption{Pid: own, Network: host}},
		"host-ipc":     {options: &cri.NamespaceOption{Pid: own, Ipc: host}},
		"host-pid":     {options: &cri.NamespaceOption{Pid: host}},
		"host-all": {
			options: &cri.NamespaceOption{Pid: host, Network: host, Ipc: host},
			pod:     privilegedPod,
			edit:    privileged,
		},
	}
	if _, older := harness.KernelBefore(6, 3); !older {
		shared := usernsOptions(300000)
		shared.Pid = cri.NamespaceMode_POD
		kinds["userns"] = kind{options: usernsOptions(100000)}
		kinds["userns-readonly"] = kind{options: usernsOptions(200000), edit: readOnly}
		kinds["userns-shared"] = kind{options: shared}
		kinds["userns-images"] = kind{options: usernsOptions(400000), edit: withImages}
	}
	return kinds
}

func readOnly(c *cri.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true }

func privileged(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }

func privilegedPod(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func withImages(c *cri.ContainerConfig) {
	c.Mounts = []*cri.Mount{
		{ContainerPath: "/image", Image: &cri.ImageSpec{Image: harness.Image}, Readonly: true},
		{ContainerPath: "/sub", Image: &cri.ImageSpec{Image: harness.Image}, ImageSubPath: "bin", Readonly: true},
	}
}

func kindsOfPodConfigs(t *testing.T) map[string]kind {
	port := harness.FreePort(t)
	return map[string]kind{
		"several":    {beside: true},
		"privileged": {pod: privilegedPod, edit: privileged},
		"host-port": {pod: func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{HostPort: int32(port), ContainerPort: 80}}
		}},
		"dns": {pod: func(c *cri.PodSandboxConfig) {
			c.DnsConfig = &cri.DNSConfig{Servers: []string{"10.9.8.7"}}
		}},
		"sysctls": {pod: func(c *cri.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
		}},
	}
}

// volumesImage has volumes.
const volumesImage = "registry.test/tests/strangers:1"

// kindsOfMounts have what a kubelet mounts for a pod, and volumes of their image.
func kindsOfMounts(t *testing.T, n *harness.Node) map[string]kind {
	volume := n.Path("volume")
	check(t, errors.Join(os.MkdirAll(volume+"/sub", 0o755), os.WriteFile(volume+"/end", nil, 0o666)))
	layer, err := harness.BoxLayer()
	if err == nil {
		volumes := map[string]struct{}{"/etc": {}, "/absent": {}}
		_, err = n.Registry.Push(volumesImage, ocispec.ImageConfig{Volumes: volumes}, layer)
	}
	check(t, err)
	n.Pull(volumesImage)
	mount := func(at, source string) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{ContainerPath: at, HostPath: source}} }
	}
	return map[string]kind{
		"readonly":    {edit: readOnly},
		"images":      {edit: withImages},
		"sub-path":    {edit: mount("/volume", volume+"/sub")},
		"termination": {edit: mount("/dev/termination-log", volume+"/end")},
		"volumes": {edit: func(c *cri.ContainerConfig) {
			readOnly(c)
			c.Image.Image = volumesImage
		}},
	}
}

func kindsOfProcesses() map[string]kind {
	return map[string]kind{
		"terminal": {edit: func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true }},
		"stdin":    {edit: func(c *cri.ContainerConfig) { c.Stdin, c.StdinOnce = true, true }},
		"user": {edit: func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
		}},
		"limits": {edit: func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{
				CpuShares:          512,
				CpuQuota:           50000,
				CpuPeriod:          100000,
				MemoryLimitInBytes: 256 << 20,
				HugepageLimits:     []*cri.HugepageLimit{{PageSize: "2MB", Limit: 2 << 20}},
			}
		}},
		"device": {edit: func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/given", Permissions: "rw"}}
		}},
	}
}

// kindsOfEnds are containers of which none runs.
func kindsOfEnds() map[string]kind {
	command := func(words ...string) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Command = words }
	}
	return map[string]kind{
		"created": {end: func(*testing.T, *harness.Container) {}},
		"ended": {edit: command("sh", "-c", plants), end: func(_ *testing.T, c *harness.Container) {
			c.Start()
			c.WaitExited(patience)
		}},
		"unrunnable": {edit: command("/missing"), end: func(t *testing.T, c *harness.Container) {
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := c.N.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID})
			if err == nil {
				t.Error("a container without its program was started")
			}
		}},
		"stopped": {end: func(t *testing.T, c *harness.Container) {
			c.Start()
			c.Output("sh", "-c", plants)
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := c.N.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: c.Pod.ID})
			if err != nil {
				t.Error(err)
			}
		}},
	}
}

// strangersNode is a node with pods, of which a user of the host must not have anything.
type strangersNode struct {
	*harness.Node
	mu       sync.Mutex
	running  map[string]*harness.Container
	programs []string // what containers have left to be run
}

// add makes a pod and has its container leave something.
func (n *strangersNode) add(t *testing.T, name string, k kind) {
	t.Helper()
	pod := n.With(t).RunPod(name, podWith(k.options), func(c *cri.PodSandboxConfig) {
		if k.options.Network == cri.NamespaceMode_NODE {
			c.Hostname = ""
		}
		if k.pod != nil {
			k.pod(c)
		}
	})
	c := pod.Create("c", []string{"sleep", "1000"}, containerWith(k.options), func(c *cri.ContainerConfig) {
		if k.edit != nil {
			k.edit(c)
		}
	})
	if k.end != nil {
		k.end(t, c)
	} else {
		c.Start()
		c.Exec(60, "sh", "-c", plants)
	}
	if k.beside {
		pod.Run("beside", []string{"sleep", "1000"}, containerWith(k.options))
	}
	roots := []string{
		filepath.Join(n.State, "containers", c.ID, "rootfs"),
		filepath.Join(n.Root, "containers", c.ID, "upper"),
	}
	if k.options.UsernsOptions != nil {
		roots = append(roots, filepath.Join(n.State+"-userns", c.ID, "root"))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, root := range roots {
		n.programs = append(n.programs, root+"/planted", root+"/bin/busybox")
	}
	if k.end == nil {
		n.running[name] = c
	}
}

// A user of the host finds nothing of the node and of its pods, whatever root of a
// container has left there for him. So it is too after an earlier version, or
// somebody, had opened the directories, with pods that go on.
func TestStrangers(t *testing.T) {
	n := &strangersNode{Node: harness.New(t), running: map[string]*harness.Container{}}
	t.Run("pods", func(t *testing.T) {
		for name, k := range kindsOfPods(t, n.Node) {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				n.add(t, name, k)
			})
		}
	})
	// A program with another user's rights runs while the node is tried.
	busy := n.running["plain"]
	ended := make(chan error, 1)
	go func() {
		_, err := busy.Exec(0, "sh", "-c", "echo >/busy; exec /open/sleep 1000")
		ended <- err
	}()
	harness.Eventually(t, patience, "a command runs", func() bool {
		r, err := busy.Exec(60, "test", "-e", "/busy")
		return err == nil && r.ExitCode == 0
	})
	wantClosed(t, n.Node, n.programs)

	for _, dir := range []string{n.Root, n.State, n.Root + "/containers", n.State + "/containers", n.State + "/pods"} {
		check(t, os.Chmod(dir, 0o711))
	}
	n.restartWithPause(t)
	if err := <-ended; err == nil {
		t.Error("the command has ended by itself")
	}
	n.add(t, "pause", kind{options: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}})
	wantClosed(t, n.Node, n.programs)
	t.Run("later", func(t *testing.T) {
		for name, c := range n.running {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				c := c.With(t)
				c.Output("true")
				c.Pod.Run("later", []string{"sleep", "1000"},
					containerWith(c.Pod.Config.Linux.SecurityContext.NamespaceOptions))
			})
		}
	})
	n.RemoveAllPods()
	ctx, cancel := harness.Deadline()
	defer cancel()
	image := &cri.ImageSpec{Image: volumesImage}
	if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: image}); err != nil {
		t.Error(err)
	}
	n.CheckClean()
}

// restartWithPause has pods get an init each from now on.
func (n *strangersNode) restartWithPause(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile(n.Path("config.toml"), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString("[sandbox]\nmode = \"pause\"\n")
		err = errors.Join(err, f.Close())
	}
	check(t, err)
	n.Restart()
}

// wantClosed tries all that there is of a node, and some programs.
func wantClosed(t *testing.T, n *harness.Node, programs []string) {
	t.Helper()
	ways := n.State + "-userns"
	var tried int
	for _, tree := range []string{n.Root, n.State, ways, n.Socket, n.Socket + ".lock"} {
		paths := map[string]fs.FileMode{}
		err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			if err == nil {
				paths[path] = d.Type()
			}
			return nil // what has gone meanwhile is of no interest
		})
		check(t, err)
		tried += len(paths)
		asStranger(t, func() {
			for path, kind := range paths {
				if found := tryPath(path, kind); found != "" && path != ways {
					t.Errorf("a user of the host %s %s", found, path)
				}
			}
			if _, err := os.ReadDir(ways); !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a user of the host lists %s: %v", ways, err)
			}
		})
	}
	asStranger(t, func() {
		for _, program := range programs {
			if out, err := exec.Command(program, "id").CombinedOutput(); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("a user of the host runs %s: %s, %v", program, out, err)
			}
		}
	})
	if tried < 100 {
		t.Errorf("only %d paths were tried", tried)
	}
	wantDisarmed(t, n)
}

// tryPath says what somebody can do to a path; empty: nothing.
func tryPath(path string, kind fs.FileMode) string {
	switch kind {
	case fs.ModeSymlink:
		if _, err := os.Readlink(path); err == nil {
			return "reads the link"
		}
		return ""
	case fs.ModeSocket:
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return "connects to"
		}
	case fs.ModeDir:
		if err := os.WriteFile(path+"/stranger", nil, 0o600); err == nil {
			return "makes a file in"
		}
		if _, err := os.Lstat(path + "/."); err == nil {
			return "enters"
		}
	}
	for flag, does := range map[int]string{os.O_RDONLY: "reads", os.O_WRONLY: "writes"} {
		if f, err := os.OpenFile(path, flag|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
			return does
		}
	}
	return ""
}

// wantDisarmed looks at the mounts of a node: also to somebody who gets to them, a
// setuid bit or a device means nothing.
func wantDisarmed(t *testing.T, n *harness.Node) {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	check(t, err)
	defer f.Close()
	seen := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		at, flags := fields[4], strings.Split(fields[5], ",")
		if !strings.HasPrefix(at, n.Dir+"/") || slices.Contains(fields, "nsfs") {
			continue
		}
		seen++
		if !slices.Contains(flags, "nosuid") || !slices.Contains(flags, "nodev") {
			t.Errorf("the flags of %s are %s", at, flags)
		}
	}
	if seen == 0 {
		t.Error("there are no mounts")
	}
}

// What a container writes into the files that it has from its pod fills a file
// system of the pod, which goes with it.
func TestFillFilesOfPod(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	options := []*cri.NamespaceOption{{Pid: cri.NamespaceMode_CONTAINER}}
	if _, older := harness.KernelBefore(6, 3); !older {
		options = append(options, usernsOptions(100000))
	}
	for i, o := range options {
		pod := n.RunPod(fmt.Sprintf("greedy-%d", i), podWith(o))
		c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o))
		for name, limit := range map[string]uint64{
			"/etc/hosts":       4 << 20,
			"/etc/hostname":    4 << 20,
			"/etc/resolv.conf": 4 << 20,
			"/dev/shm/x":       64 << 20,
		} {
			r, err := c.Exec(60, "dd", "if=/dev/zero", "of="+name, "bs=1M", "count=100")
			if err != nil || r.ExitCode == 0 || !strings.Contains(string(r.Stderr), "No space left") {
				t.Errorf("%s takes all: %v, %v", name, r, err)
			}
			at := filepath.Join(n.State, "pods", pod.ID, "etc")
			if strings.HasPrefix(name, "/dev/shm") {
				at = filepath.Join(n.State, "pods", pod.ID, "shm")
			}
			var own, state unix.Statfs_t
			check(t, errors.Join(unix.Statfs(at, &own), unix.Statfs(n.State, &state)))
			if size := own.Blocks * uint64(own.Bsize); size > limit || own.Fsid == state.Fsid || own.Files > 1<<16 {
				t.Errorf("%s has %d bytes and %d inodes", name, size, own.Files)
			}
			c.Output("sh", "-c", ": >"+name)
		}
		c.Output("sh", "-c", "echo found >/etc/hosts")
		n.Restart()
		later := pod.Run("later", []string{"sleep", "1000"}, containerWith(o), func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.ReadonlyRootfs = true
		})
		wantOutput(t, later, "found\n", "cat", "/etc/hosts")
		pod.Remove()
	}
	n.CheckClean()
}

// A pod of a version that kept these files in the pod's own directory, and mounted
// nothing for them, takes containers and can be removed.
func TestFilesOfAnEarlierVersion(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("old")
	pod.Run("c", []string{"sleep", "1000"})
	n.Stop()
	dir := filepath.Join(n.State, "pods", pod.ID)
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte("old "+name+"\n"), 0o644))
	}
	etc := filepath.Join(dir, "etc")
	check(t, errors.Join(unix.Unmount(etc, unix.MNT_DETACH), os.Remove(etc)))
	path := filepath.Join(n.Root, "pods", pod.ID, "record.json")
	var rec records.Pod
	check(t, record.Read(path, &rec))
	rec.FilesDir = ""
	check(t, record.Write(path, &rec, false))
	n.Start()
	c := pod.Run("new", []string{"sleep", "1000"})
	wantOutput(t, c, "old hosts\nold hostname\nold resolv.conf\n",
		"cat", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
	pod.Remove()
	n.CheckClean()
}
