package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// What people expect who come from other runtimes.
func TestExpected(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for name, test := range map[string]func(*testing.T, *harness.Node){
		"ports and ping without rights": unprivileged,
		"the image that the user named": userSpecifiedImage,
		"process and spec of a pod":     podInfo,
		"a container that cannot run":   cannotRun,
		"a privileged debugger":         privilegedDebugger,
		"hostname in the host's network": func(t *testing.T, n *harness.Node) {
			pod := n.RunPod("named", hostNetwork)
			c := pod.Run("c", []string{"sleep", "1000"})
			wantOutput(t, c, "named\nnamed\nnamed\n", "sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME")
			wantOutput(t, c, "1\n", "sh", "-c", "grep -c '^127.0.0.1.*\\<named$' /etc/hosts")
			if host, _ := os.Hostname(); host == "named" {
				t.Error("the host has the name of the pod")
			}
		},
		"a mount source that leads nowhere": func(t *testing.T, n *harness.Node) {
			pod, link := n.RunPod("link"), n.Path("link")
			check(t, os.Symlink(n.Path("nowhere"), link))
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
				PodSandboxId:  pod.ID,
				SandboxConfig: pod.Config,
				Config: harness.ContainerConfig("c", []string{"true"}, func(c *cri.ContainerConfig) {
					c.Mounts = []*cri.Mount{{HostPath: link, ContainerPath: "/link"}}
				}),
			})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "which leads nowhere") {
				t.Errorf("the error is %v", err)
			}
			if _, err := os.Lstat(n.Path("nowhere")); err == nil {
				t.Error("what the link leads to was made")
			}
		},
		"cgroup parent of the other driver": func(t *testing.T, n *harness.Node) {
			parent := "/kubepods/burstable"
			if !strings.HasSuffix(n.PodConfig("").Linux.CgroupParent, ".slice") {
				parent = "/kubepods.slice/kubepods-burstable.slice"
			}
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{
				Config: n.PodConfig("parent", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent }),
			})
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "cgroup_parent") {
				t.Errorf("the error is %v, want InvalidArgument and the name of the field", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) { test(t, n.With(t)) })
	}
	n.RemoveAllPods()
	n.CheckClean()
}

func asNobody(c *cri.ContainerConfig) {
	c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 65534}
	c.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
}

func unprivileged(t *testing.T, n *harness.Node) {
	c := n.RunPod("default").Run("c", []string{"httpd", "-f", "-p", "80", "-h", "/tmp"}, asNobody)
	harness.Eventually(t, patience, "the page server listens on port 80", func() bool {
		r, err := c.Exec(10, "grep", ":0050 .* 0A ", "/proc/net/tcp", "/proc/net/tcp6")
		return err == nil && r.ExitCode == 0
	})
	wantOutput(t, c, "0\t2147483647\n", "cat", "/proc/sys/net/ipv4/ping_group_range")
	own := n.RunPod("own", func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "1024",
			"net/ipv4/ping_group_range":           "1 0",
		}
	})
	wantOutput(t, own.Run("c", []string{"sleep", "1000"}), "1024\n1\t0\n", "cat",
		"/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range")
}

// A kubelet creates by id, and compares the name with that of the pod.
func userSpecifiedImage(t *testing.T, n *harness.Node) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	image, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: harness.Image}})
	check(t, err)
	c := n.RunPod("byid").Create("c", []string{"true"}, func(c *cri.ContainerConfig) {
		c.Image = &cri.ImageSpec{Image: image.Image.Id, UserSpecifiedImage: harness.Image}
	})
	s := c.Status()
	if s.Image.Image != harness.Image || s.ImageId != image.Image.Id || !strings.Contains(s.ImageRef, "@sha256:") {
		t.Errorf("the status has the image %v, the id %s and the reference %s", s.Image, s.ImageId, s.ImageRef)
	}
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{Id: c.ID}})
	if err != nil || len(list.Containers) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	if l := list.Containers[0]; l.Image.Image != harness.Image || l.ImageId != s.ImageId || l.ImageRef != s.ImageRef {
		t.Errorf("the list has the image %v, the id %s and the reference %s", l.Image, l.ImageId, l.ImageRef)
	}
}

// kubectl debug --profile=sysadmin adds a privileged container to a pod that was made without
// any. A kubelet sends what the pod is by then.
func privilegedDebugger(t *testing.T, n *harness.Node) {
	pod := n.RunPod("debugged")
	main := pod.Run("main", []string{"sleep", "1000"})
	pod.Config.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{Privileged: true}
	c := pod.Run("debugger", []string{"sleep", "1001"}, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext = &cri.LinuxContainerSecurityContext{
			Privileged: true,
			NamespaceOptions: &cri.NamespaceOption{
				Pid:      cri.NamespaceMode_TARGET,
				TargetId: main.ID,
			},
		}
	})
	wantOutput(t, c, "sleep 1000\n", "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline | sed 's/ $//'; echo")
	wantOutput(t, c, "mounted\n", "sh", "-c", "mount -t tmpfs none /tmp && echo mounted")
}

// podSpec is the part of a pod's verbose status that tools read.
type podSpec struct {
	PID         int    `json:"pid"`
	PIDOf       string `json:"pidOf"`
	RuntimeSpec struct {
		Linux struct {
			Namespaces []struct{ Type, Path string }
		}
	} `json:"runtimeSpec"`
}

func podInfo(t *testing.T, n *harness.Node) {
	info := func(p *harness.Pod) (s podSpec) {
		t.Helper()
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
		check(t, err)
		check(t, json.Unmarshal([]byte(r.Info["info"]), &s))
		return s
	}
	pod := n.RunPod("info")
	if s := info(pod); s.PID != 0 || s.PIDOf == "" {
		t.Errorf("a pod without a process has %d, of %q", s.PID, s.PIDOf)
	}
	c := pod.Run("c", []string{"sleep", "1000"})
	s := info(pod)
	if s.PID != c.Info().PID || !strings.Contains(s.PIDOf, c.ID) {
		t.Errorf("the pod has the process %d, of %q; the container has %d", s.PID, s.PIDOf, c.Info().PID)
	}
	at := map[string]string{}
	for _, ns := range s.RuntimeSpec.Linux.Namespaces {
		at[ns.Type] = ns.Path
	}
	for kind, name := range map[string]string{"network": "net", "ipc": "ipc", "uts": "uts"} {
		pinned, err := os.Stat(at[kind])
		if err != nil {
			t.Errorf("the %s namespace: %v", kind, err)
			continue
		}
		of, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", s.PID, name))
		if err != nil || !os.SameFile(pinned, of) {
			t.Errorf("the %s namespace at %q is not that of process %d (%v)", kind, at[kind], s.PID, err)
		}
	}
	share := func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_POD},
		}
	}
	shared := n.RunPod("withinit", share)
	shared.Run("c", []string{"sleep", "1000"})
	if s := info(shared); s.PID == 0 || !strings.Contains(s.PIDOf, "init") || len(s.RuntimeSpec.Linux.Namespaces) == 0 {
		t.Errorf("a pod with an init has %+v", s)
	}
}

// What the image or the command is at fault for is the container's end, so that a Job
// fails. The same request gets the same container, and a restart changes nothing.
func cannotRun(t *testing.T, n *harness.Node) {
	pod := n.RunPod("cannotrun")
	failed := func(t *testing.T, c *harness.Container, says string) {
		t.Helper()
		s := c.Status()
		if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" ||
			s.FinishedAt == 0 || !strings.Contains(s.Message, says) {
			t.Errorf("the container is %s, %d, %q, at %d, %q", s.State, s.ExitCode, s.Reason, s.FinishedAt, s.Message)
		}
	}
	all := map[*harness.Container]string{}
	for name, c := range map[string]struct {
		command []string
		cwd     string
		says    string
	}{
		"missing":       {command: []string{"/no/such/program"}, says: "no such file or directory"},
		"not-on-path":   {command: []string{"nosuch"}, says: "executable file not found"},
		"directory":     {command: []string{"/tmp"}, says: "is a directory"},
		"no-program":    {command: []string{"/etc/hosts"}, says: "permission denied"},
		"cwd-is-a-file": {command: []string{"true"}, cwd: "/etc/hosts", says: "not a directory"},
	} {
		edit := func(config *cri.ContainerConfig) { config.WorkingDir = c.cwd }
		box := pod.Create(name, c.command, edit)
		if again := pod.Create(name, c.command, edit); again.ID != box.ID {
			t.Errorf("%s: the same request got another container", name)
		}
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: box.ID})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: the start says %v, want the words %q", name, err, c.says)
		}
		failed(t, box, c.says)
		all[box] = c.says
	}
	n.Restart()
	for c, says := range all {
		failed(t, c, says)
		c.Remove()
	}
}
