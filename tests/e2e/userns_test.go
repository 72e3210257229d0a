package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// usernsOptions are what the kubelet sends for a pod with hostUsers: false.
func usernsOptions(host uint32) *cri.NamespaceOption {
	m := []*cri.IDMapping{{ContainerId: 0, HostId: host, Length: 65536}}
	return &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER,
		UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: m, Gids: m}}
}

// needUserNamespaces skips a test on a kernel that cannot have pods with them;
// see docs/operations.md.
func needUserNamespaces(t *testing.T) {
	t.Helper()
	if release, older := harness.KernelBefore(6, 3); older {
		t.Skipf("needs Linux 6.3, this is %s", release)
	}
}

func podWith(o *cri.NamespaceOption) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: o}
	}
}

func containerWith(o *cri.NamespaceOption) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = o }
}

func ownerOf(t *testing.T, path string) (uid, gid int) {
	t.Helper()
	st, err := os.Lstat(path)
	check(t, err)
	s := st.Sys().(*syscall.Stat_t)
	return int(s.Uid), int(s.Gid)
}

// layerFiles lists all files of unpacked layers with what a copy or a chown would
// change.
func layerFiles(t *testing.T, n *harness.Node) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(n.Root, "layers"), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		s := st.Sys().(*syscall.Stat_t)
		if strings.Contains(path, "/diff/") { // what is beside comes in the background
			files[path] = fmt.Sprint(s.Ino, s.Uid, s.Gid, s.Mode, s.Ctim)
		}
		return nil
	})
	check(t, err)
	return files
}

func wantOutput(t *testing.T, c *harness.Container, want string, command ...string) {
	t.Helper()
	if got := c.Output(command...); got != want {
		t.Errorf("%v says %q, want %q", command, got, want)
	}
}

// wantHostUser waits until a container runs as a user of the host. What it has in
// /proc is of root until it has become its program.
func wantHostUser(t *testing.T, c *harness.Container, want int) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", c.Info().PID)
	var uid int
	defer func() {
		if uid != want {
			t.Logf("it is %d", uid)
		}
	}()
	harness.Eventually(t, patience, fmt.Sprintf("%s runs as %d on the host", c.Config.Metadata.Name, want),
		func() bool {
			uid, _ = ownerOf(t, proc)
			return uid == want
		})
}

// A pod with a user namespace sees its files as any pod, and is nobody on the
// host. Two of them have other ids and the same layers.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	needUserNamespaces(t)
	n := harness.New(t)
	before := layerFiles(t, n)
	var pods []*harness.Pod
	for i, host := range []uint32{100000, 300000} {
		o := usernsOptions(host)
		pod := n.RunPod(fmt.Sprintf("userns-%d", i), podWith(o))
		pods = append(pods, pod)
		c := pod.Run("c", []string{"sh", "-c", "echo started >/dev/stdout; exec sleep 1000"}, containerWith(o))
		c.WaitLog(patience, "started")
		n.Restart()
		for _, file := range []string{"uid_map", "gid_map"} {
			got := strings.Fields(c.Output("cat", "/proc/self/"+file))
			if fmt.Sprint(got) != fmt.Sprint([]string{"0", fmt.Sprint(host), "65536"}) {
				t.Errorf("%s is %v", file, got)
			}
		}
		wantOutput(t, c, "0:0\n", "stat", "-c", "%u:%g", "/bin/busybox")
		wantOutput(t, c, "0:0\n", "stat", "-c", "%u:%g", "/")
		for _, file := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/dev/pts", "/tmp",
			"/dev"} {
			wantOutput(t, c, "0:0\n", "stat", "-c", "%u:%g", file)
		}
		wantOutput(t, c, fmt.Sprintf("userns-%d\n", i), "hostname")
		c.Output("sh", "-c",
			"echo new >/root/new; echo more >>/etc/passwd; chown 1000:2000 /etc/group; rm /bin/testbox; "+
				"echo x >/dev/shm/x; echo >>/etc/hosts; echo out >/dev/stdout; test -d /sys/class/net/eth0")

		upper := filepath.Join(n.Root, "containers", c.ID, "upper")
		for file, want := range map[string][2]int{"root/new": {0, 0}, "etc/passwd": {0, 0}, "etc/group": {1000, 2000},
			".": {0, 0}} {
			uid, gid := ownerOf(t, filepath.Join(upper, file))
			if uid != int(host)+want[0] || gid != int(host)+want[1] {
				t.Errorf("%s is of %d:%d on the disk, want %v from %d on", file, uid, gid, want, host)
			}
		}
		wantHostUser(t, c, int(host))
		c.Remove()
		c = pod.Run("user", []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUsername = "box" // with the options of the pod
			c.WorkingDir = "/made/for/it"
		})
		wantOutput(t, c, "uid=1000(box) gid=1000(box) groups=1000(box),2000(extra)\n", "id")
		wantOutput(t, c, "/made/for/it\n", "pwd")
		wantOutput(t, c, "out\n", "sh", "-c", "echo out >/dev/stdout")
		wantHostUser(t, c, int(host)+1000)
	}
	after := layerFiles(t, n)
	for path, was := range before {
		if after[path] != was {
			t.Errorf("%s was %q and is %q", path, was, after[path])
		}
	}
	if len(after) != len(before) {
		t.Errorf("there are %d files in layers, and there were %d", len(after), len(before))
	}
	for _, p := range pods {
		p.Remove()
	}
	n.CheckClean()
}

// What a pod may have beside its user namespace.
func TestUserNamespaceAnd(t *testing.T) {
	t.Parallel()
	needUserNamespaces(t)
	n := harness.New(t)
	const host = 200000
	options := func(edit func(o *cri.NamespaceOption)) *cri.NamespaceOption {
		o := usernsOptions(host)
		edit(o)
		return o
	}
	tests := map[string]func(t *testing.T, n *harness.Node){
		"host network": func(t *testing.T, n *harness.Node) {
			n.RunPod("makes-the-bridge")
			o := options(func(o *cri.NamespaceOption) { o.Network = cri.NamespaceMode_NODE })
			pod := n.RunPod("hostnet", podWith(o), func(c *cri.PodSandboxConfig) { c.Hostname = "" })
			c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o))
			if namespace(t, c.Info().PID, "net") != namespace(t, os.Getpid(), "net") {
				t.Error("the network is not the host's")
			}
			c.Output("test", "-d", "/sys/class/net/"+n.Bridge)
			r, err := c.Exec(60, "sh", "-c", "echo 1 >/sys/kernel/profiling || ip link add x type dummy")
			if err != nil || r.ExitCode == 0 {
				t.Errorf("the container may change the host: %v, %v", r, err)
			}
		},
		"shared processes": func(t *testing.T, n *harness.Node) {
			o := options(func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_POD })
			pod := n.RunPod("pids", podWith(o))
			a := pod.Run("a", []string{"sleep", "1111"}, containerWith(o))
			n.Restart()
			b := pod.Run("b", []string{"sleep", "2222"}, containerWith(o))
			wantProcesses(t, b, "pid,user,args", "root     sleep 1111", "root     sleep 2222", "/pause")
			if a, b := namespace(t, a.Info().PID, "user"), namespace(t, b.Info().PID, "user"); a != b {
				t.Errorf("the containers have the user namespaces %s and %s", a, b)
			}
			target := options(func(o *cri.NamespaceOption) { o.Pid, o.TargetId = cri.NamespaceMode_TARGET, a.ID })
			debug := pod.Run("debug", []string{"sleep", "3333"}, containerWith(target))
			debug.Output("sh", "-c", "ps -o args | grep 1111")
		},
		"sysctls": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			pod := n.RunPod("sysctls", podWith(o), func(c *cri.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "81",
					"kernel.shmmni": "1234", "fs.mqueue.msg_max": "12"}
			})
			c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o))
			wantOutput(t, c, "81\n1234\n12\n", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start",
				"/proc/sys/kernel/shmmni", "/proc/sys/fs/mqueue/msg_max")
		},
		"volumes": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			pod := n.RunPod("volumes", podWith(o))
			volume := n.Path("volume")
			check(t, os.MkdirAll(volume, 0o700))
			check(t, os.WriteFile(filepath.Join(volume, "secret"), []byte("s"), 0o400))
			maps := o.UsernsOptions.Uids
			c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o), func(c *cri.ContainerConfig) {
				c.Mounts = []*cri.Mount{
					{ContainerPath: "/mapped", HostPath: volume, UidMappings: maps, GidMappings: maps},
					{ContainerPath: "/plain", HostPath: volume},
					{ContainerPath: "/image", Image: &cri.ImageSpec{Image: harness.Image}, Readonly: true},
					{ContainerPath: "/image2", Image: &cri.ImageSpec{Image: harness.Image}, ImageSubPath: "etc",
						Readonly: true, UidMappings: maps, GidMappings: maps},
				}
			})
			wantOutput(t, c, "s", "cat", "/mapped/secret")
			c.Output("sh", "-c", "echo >/mapped/new; chown 1000:1000 /mapped/new")
			if uid, gid := ownerOf(t, filepath.Join(volume, "new")); uid != 1000 || gid != 1000 {
				t.Errorf("a file in the volume is of %d:%d on the disk, want 1000:1000", uid, gid)
			}
			wantOutput(t, c, "65534:65534\n0:0\n0:0\n0:0\n", "stat", "-c", "%u:%g", "/plain", "/image",
				"/image/bin/busybox", "/image2/passwd")
			if r, err := c.Exec(60, "cat", "/plain/secret"); err != nil || r.ExitCode == 0 {
				t.Errorf("a file of the host's root can be read: %v, %v", r, err)
			}
		},
		"terminal": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			pod := n.RunPod("tty", podWith(o))
			c := pod.Run("c", []string{"sh", "-c",
				"tty && stat -c %u:%g $(tty) && echo again >/dev/tty && exec sleep 1000"}, containerWith(o),
				func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true })
			c.WaitLog(patience, "again")
			lines := c.Log()
			if len(lines) < 3 || !strings.HasPrefix(lines[0].Text, "/dev/pts/0") ||
				!strings.HasPrefix(lines[1].Text, "0:5") {
				t.Errorf("the terminal says %v", lines)
			}
		},
		"privileges": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			pod := n.RunPod("privileged", podWith(o),
				func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
			c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o),
				func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
			c.Output("sh", "-c", "mkdir /m && mount -t tmpfs none /m && ip addr add 10.1.2.3/32 dev lo")
			for _, command := range []string{"mknod /n b 7 0", "echo 1 >/proc/sys/kernel/printk",
				"dd if=/dev/vda of=/dev/null count=1"} {
				if r, err := c.Exec(60, "sh", "-c", command); err != nil || r.ExitCode == 0 {
					t.Errorf("%s has worked: %v, %v", command, r, err)
				}
			}
		},
		"devices": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			pod := n.RunPod("devices", podWith(o))
			c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o), func(c *cri.ContainerConfig) {
				c.Devices = []*cri.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/moved", Permissions: "rw"},
					{HostPath: "/dev/kmsg", Permissions: "r"}}
			})
			wantOutput(t, c, "0000000\n", "sh", "-c", "head -c 4 /dev/moved | od -An -tx4 -v | tr -d ' ' | cut -c1-7")
			c.Output("test", "-c", "/dev/kmsg")
			c.Output("sh", "-c", "echo x >/dev/null && head -c 8 /dev/urandom | wc -c")
		},
		"a read-only root": func(t *testing.T, n *harness.Node) {
			o := options(func(*cri.NamespaceOption) {})
			path, err := exec.LookPath("busybox")
			check(t, err)
			busybox, err := os.ReadFile(path)
			check(t, err)
			layer, err := harness.MakeLayer(map[string]string{"bin/busybox": string(busybox), "data/": ""})
			check(t, err)
			const image = "registry.test/tests/volume:1"
			_, err = n.Registry.Push(image,
				ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}, "/made/here": {}}}, layer)
			check(t, err)
			n.Pull(image)
			pod := n.RunPod("readonly", podWith(o))
			c := pod.Run("c", []string{"/bin/busybox", "sleep", "1000"}, containerWith(o),
				func(c *cri.ContainerConfig) {
					c.Image.Image = image
					c.Linux.SecurityContext.ReadonlyRootfs = true
				})
			wantOutput(t, c, "0:0\n0:0\n0:0\n0:0\n", "/bin/busybox", "sh", "-c",
				"echo >/data/x && echo >/made/here/x && /bin/busybox stat -c %u:%g / /data /made /made/here")
			if r, err := c.Exec(60, "/bin/busybox", "sh", "-c", "echo >/x"); err != nil || r.ExitCode == 0 {
				t.Errorf("the root is writable: %v, %v", r, err)
			}
		},
	}
	for name, f := range tests {
		t.Run(name, func(t *testing.T) { f(t, n.With(t)) })
	}
	n.RemoveAllPods()
	harness.Eventually(t, patience, "no image but the first is left", func() bool {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Images.RemoveImage(ctx,
			&cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "registry.test/tests/volume:1"}})
		return err == nil
	})
	n.CheckClean()
}

// With an init process in every pod it is the same.
func TestUserNamespaceWithPause(t *testing.T) {
	t.Parallel()
	needUserNamespaces(t)
	n := harness.New(t, harness.Options{Config: "[sandbox]\nmode = \"pause\"\n"})
	for _, network := range []cri.NamespaceMode{cri.NamespaceMode_POD, cri.NamespaceMode_NODE} {
		o := usernsOptions(500000)
		o.Network = network
		pod := n.RunPod("pause-"+strings.ToLower(network.String()), podWith(o),
			func(c *cri.PodSandboxConfig) { c.Hostname = "" })
		n.Restart()
		c := pod.Run("c", []string{"sleep", "1000"}, containerWith(o))
		wantOutput(t, c, "0:0\n", "stat", "-c", "%u:%g", "/")
		wantHostUser(t, c, 500000)
		pod.Remove()
	}
	n.CheckClean()
}

// What cannot be is said before anything is done.
func TestUserNamespaceImpossible(t *testing.T) {
	t.Parallel()
	needUserNamespaces(t)
	n := harness.New(t, harness.Options{
		Config: "[runtimes.old]\npath = \"/usr/bin/true\"\n",
	})
	supported := func() map[string]bool {
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := n.Runtime.Status(ctx, &cri.StatusRequest{})
		check(t, err)
		m := map[string]bool{}
		for _, h := range r.RuntimeHandlers {
			m[h.Name] = h.Features.GetUserNamespaces()
		}
		if got := r.Features.GetUserNamespacesHostNetwork(); got != m["runc"] {
			t.Errorf("user namespaces: %v, and together with the host's network: %v", m["runc"], got)
		}
		return m
	}
	if got := fmt.Sprint(supported()); got != "map[:true old:false runc:true]" {
		t.Errorf("handlers with user namespaces: %s", got)
	}
	run := func(handler string, o *cri.NamespaceOption) error {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{RuntimeHandler: handler,
			Config: n.PodConfig("impossible", podWith(o))})
		return err
	}
	const field = "config.linux.security_context.namespace_options.userns_options"
	wantError(t, run("old", usernsOptions(100000)), codes.Unimplemented, field)
	o := usernsOptions(100000)
	o.UsernsOptions.Uids = append(o.UsernsOptions.Uids, &cri.IDMapping{ContainerId: 65536, HostId: 500000, Length: 1})
	wantError(t, run("", o), codes.InvalidArgument, field+".uids")
	o = usernsOptions(100000)
	o.Pid = cri.NamespaceMode_NODE
	wantError(t, run("", o), codes.InvalidArgument, "namespace_options.pid")

	pod := n.RunPod("userns", podWith(usernsOptions(100000)))
	ctx, cancel := harness.Deadline()
	defer cancel()
	for want, edit := range map[string]func(c *cri.ContainerConfig){
		field: containerWith(usernsOptions(200000)),
		field + ".uids": func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 65536}
		},
	} {
		_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
			SandboxConfig: pod.Config,
			Config:        harness.ContainerConfig("c", []string{"sleep", "1"}, edit)})
		wantError(t, err, codes.InvalidArgument, want)
	}
	pod.Remove()

	// Root of the pod could not reach its root file system.
	check(t, os.Chmod(n.Dir, 0o700))
	n.Restart()
	if got := fmt.Sprint(supported()); got != "map[:false old:false runc:false]" {
		t.Errorf("handlers with user namespaces: %s", got)
	}
	wantError(t, run("", usernsOptions(100000)), codes.Unimplemented, "chmod o+x "+n.Dir)
	n.CheckClean()
}
