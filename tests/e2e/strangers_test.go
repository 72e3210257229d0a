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
	"syscall"
	"testing"

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
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// kindsOfPods are pods of which each has something of its own on the host.
func kindsOfPods(n *harness.Node) map[string]struct {
	options *cri.NamespaceOption
	edit    func(c *cri.ContainerConfig)
} {
	type kind = struct {
		options *cri.NamespaceOption
		edit    func(c *cri.ContainerConfig)
	}
	with := func(edit func(o *cri.NamespaceOption)) *cri.NamespaceOption {
		o := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
		edit(o)
		return o
	}
	readOnly := func(c *cri.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true }
	images := func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{
			{ContainerPath: "/image", Image: &cri.ImageSpec{Image: harness.Image}, Readonly: true},
			{ContainerPath: "/sub", Image: &cri.ImageSpec{Image: harness.Image}, ImageSubPath: "bin", Readonly: true},
		}
	}
	kinds := map[string]kind{
		"plain":        {with(func(*cri.NamespaceOption) {}), nil},
		"shared":       {with(func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_POD }), nil},
		"host-network": {with(func(o *cri.NamespaceOption) { o.Network = cri.NamespaceMode_NODE }), nil},
		"host-ipc":     {with(func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE }), nil},
		"host-pid":     {with(func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE }), nil},
		"readonly":     {with(func(*cri.NamespaceOption) {}), readOnly},
		"images":       {with(func(*cri.NamespaceOption) {}), images},
		"terminal": {with(func(*cri.NamespaceOption) {}), func(c *cri.ContainerConfig) {
			c.Tty, c.Stdin = true, true
		}},
		"user": {with(func(*cri.NamespaceOption) {}), func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
		}},
	}
	if _, older := harness.KernelBefore(6, 3); !older {
		shared := usernsOptions(300000)
		shared.Pid = cri.NamespaceMode_POD
		kinds["userns"] = kind{usernsOptions(100000), nil}
		kinds["userns-readonly"] = kind{usernsOptions(200000), readOnly}
		kinds["userns-shared"] = kind{shared, nil}
		kinds["userns-images"] = kind{usernsOptions(400000), images}
	}
	return kinds
}

// A user of the host finds nothing of the node and of its pods, whatever root of a
// container has left there for him. So it is too after an earlier version, or
// somebody, had opened the directories, with pods that go on.
func TestStrangers(t *testing.T) {
	n := harness.New(t)
	var containers []*harness.Container
	var programs []string
	for name, k := range kindsOfPods(n) {
		pod := n.RunPod(name, podWith(k.options), func(c *cri.PodSandboxConfig) {
			if k.options.Network == cri.NamespaceMode_NODE {
				c.Hostname = ""
			}
		})
		edits := []func(*cri.ContainerConfig){containerWith(k.options)}
		if k.edit != nil {
			edits = append(edits, k.edit)
		}
		c := pod.Run("c", []string{"sleep", "1000"}, edits...)
		containers = append(containers, c)
		c.Exec(60, "sh", "-c", "cp /bin/busybox /planted; chmod 4755 /planted; mkdir -m 777 /open; echo >/dev/shm/x")
		roots := []string{
			filepath.Join(n.State, "containers", c.ID, "rootfs"),
			filepath.Join(n.Root, "containers", c.ID, "upper"),
		}
		if k.options.UsernsOptions != nil {
			roots = append(roots, filepath.Join(n.State+"-userns", c.ID, "root"))
		}
		for _, root := range roots {
			programs = append(programs, root+"/planted", root+"/bin/busybox")
		}
	}
	wantClosed(t, n, programs)

	for _, dir := range []string{n.Root, n.State, n.Root + "/containers", n.State + "/containers", n.State + "/pods"} {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	n.Restart()
	wantClosed(t, n, programs)
	for _, c := range containers {
		c.Output("true")
		c.Pod.Run("later", []string{"sleep", "1000"},
			containerWith(c.Pod.Config.Linux.SecurityContext.NamespaceOptions))
	}
	n.RemoveAllPods()
	n.CheckClean()
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
		if err != nil {
			t.Fatal(err)
		}
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
	if err != nil {
		t.Fatal(err)
	}
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
			if err := errors.Join(unix.Statfs(at, &own), unix.Statfs(n.State, &state)); err != nil {
				t.Fatal(err)
			}
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
	n := harness.New(t)
	pod := n.RunPod("old")
	pod.Run("c", []string{"sleep", "1000"})
	n.Stop()
	dir := filepath.Join(n.State, "pods", pod.ID)
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("old "+name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	etc := filepath.Join(dir, "etc")
	if err := errors.Join(unix.Unmount(etc, unix.MNT_DETACH), os.Remove(etc)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.Root, "pods", pod.ID, "record.json")
	var rec records.Pod
	if err := record.Read(path, &rec); err != nil {
		t.Fatal(err)
	}
	rec.FilesDir = ""
	if err := record.Write(path, &rec, false); err != nil {
		t.Fatal(err)
	}
	n.Start()
	c := pod.Run("new", []string{"sleep", "1000"})
	wantOutput(t, c, "old hosts\nold hostname\nold resolv.conf\n",
		"cat", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
	pod.Remove()
	n.CheckClean()
}
