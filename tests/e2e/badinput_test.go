package e2e

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Each request has one thing wrong with it. The answer names it, and nothing
// changes on the machine.
func TestBadInput(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("good")
	n.Mark()

	type (
		podEdit       = func(*cri.PodSandboxConfig)
		containerEdit = func(*cri.ContainerConfig)
	)
	t.Run("RunPodSandbox", func(t *testing.T) {
		for _, c := range []struct {
			name  string
			edit  podEdit
			code  codes.Code
			field string
		}{
			{"no metadata", func(c *cri.PodSandboxConfig) { c.Metadata = nil }, codes.InvalidArgument, "metadata"},
			{"no name", func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, "metadata.name"},
			{"huge name", func(c *cri.PodSandboxConfig) { c.Metadata.Name = strings.Repeat("n", 100_000) },
				codes.InvalidArgument, "metadata.name"},
			{"huge config", func(c *cri.PodSandboxConfig) {
				c.Annotations = map[string]string{"a": strings.Repeat("a",
					2<<20)}
			}, codes.InvalidArgument, "config"},
			{"taken name", func(c *cri.PodSandboxConfig) {
				c.Metadata = proto.CloneOf(pod.Config.Metadata)
				c.Hostname = "another"
			}, codes.AlreadyExists, "metadata"},
			{"relative log directory", func(c *cri.PodSandboxConfig) { c.LogDirectory = "logs/here" },
				codes.InvalidArgument, "log_directory"},
			{"escaping log directory", func(c *cri.PodSandboxConfig) { c.LogDirectory = "/var/log/../../etc" },
				codes.InvalidArgument, "log_directory"},
			{"huge hostname", func(c *cri.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 65) },
				codes.InvalidArgument, "hostname"},
			{"hostname with a slash", func(c *cri.PodSandboxConfig) { c.Hostname = "../etc" }, codes.InvalidArgument,
				"hostname"},
			{"escaping cgroup parent", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/a/../../b" },
				codes.InvalidArgument, "cgroup_parent"},
			{"host port out of range", func(c *cri.PodSandboxConfig) {
				c.PortMappings = []*cri.PortMapping{{HostPort: 70000, ContainerPort: 80}}
			}, codes.InvalidArgument, "host_port"},
			{"negative container port", func(c *cri.PodSandboxConfig) {
				c.PortMappings = []*cri.PortMapping{{HostPort: 8080, ContainerPort: -1}}
			}, codes.InvalidArgument, "container_port"},
			{"bad host ip", func(c *cri.PodSandboxConfig) {
				c.PortMappings = []*cri.PortMapping{{HostPort: 8080, ContainerPort: 80, HostIp: "nowhere"}}
			}, codes.InvalidArgument, "host_ip"},
			{"sysctl of the whole machine", func(c *cri.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"vm.swappiness": "1"}
			}, codes.InvalidArgument, "sysctls"},
			{"sysctl that there is none", func(c *cri.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.ipv4.nothing": "1"}
			}, codes.InvalidArgument, "config.linux.sysctls: "},
			{"sysctl with a wrong value", func(c *cri.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "many"}
			}, codes.InvalidArgument, "config.linux.sysctls: "},
			{"escaping sysctl", func(c *cri.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.../../kernel/panic": "1"}
			}, codes.InvalidArgument, "sysctls"},
			{"network of a target", func(c *cri.PodSandboxConfig) {
				c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
					NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_TARGET}}
			}, codes.InvalidArgument, "network"},
			{"dns server that is no address", func(c *cri.PodSandboxConfig) {
				c.DnsConfig = &cri.DNSConfig{Servers: []string{"10.0.0.1\nsearch evil"}}
			}, codes.InvalidArgument, "dns_config"},
		} {
			t.Run(c.name, func(t *testing.T) {
				n := n.With(t)
				ctx, cancel := harness.Deadline()
				defer cancel()
				r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("bad", c.edit)})
				if wantError(t, err, c.code, c.field); err == nil {
					(&harness.Pod{N: n, ID: r.PodSandboxId}).Remove()
				}
				n.CheckClean()
			})
		}
		t.Run("no config", func(t *testing.T) {
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{})
			wantError(t, err, codes.InvalidArgument, "config")
		})
		t.Run("unknown handler", func(t *testing.T) {
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("bad"),
				RuntimeHandler: "nobody"})
			wantError(t, err, codes.InvalidArgument, "runtime_handler")
		})
		n.With(t).CheckClean()
	})

	good := pod.Create("good", []string{"sleep", "1000"})
	n.Mark()
	t.Run("CreateContainer", func(t *testing.T) {
		dir := t.TempDir()
		security := func(f func(*cri.LinuxContainerSecurityContext)) containerEdit {
			return func(c *cri.ContainerConfig) { f(c.Linux.SecurityContext) }
		}
		resources := func(r *cri.LinuxContainerResources) containerEdit {
			return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
		}
		mount := func(m *cri.Mount) containerEdit {
			return func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{m} }
		}
		for _, c := range []struct {
			name  string
			edit  containerEdit
			code  codes.Code
			field string
		}{
			{"no metadata", func(c *cri.ContainerConfig) { c.Metadata = nil }, codes.InvalidArgument, "metadata"},
			{"no name", func(c *cri.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, "metadata.name"},
			{"taken name", func(c *cri.ContainerConfig) { c.Metadata.Name = "good"; c.WorkingDir = "/tmp" },
				codes.AlreadyExists, "metadata"},
			{"no image", func(c *cri.ContainerConfig) { c.Image = nil }, codes.InvalidArgument, "image"},
			{"unknown image", func(c *cri.ContainerConfig) { c.Image.Image = "registry.test/nothing:1" },
				codes.NotFound, "image"},
			{"escaping log path", func(c *cri.ContainerConfig) { c.LogPath = "../../evil.log" }, codes.InvalidArgument,
				"log_path"},
			{"absolute log path", func(c *cri.ContainerConfig) { c.LogPath = "/etc/evil.log" }, codes.InvalidArgument,
				"log_path"},
			{"relative working directory", func(c *cri.ContainerConfig) { c.WorkingDir = "home" },
				codes.InvalidArgument, "working_dir"},
			{"environment without a name",
				func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Value: []byte("v")}} },
				codes.InvalidArgument, "envs"},
			{"environment name with =", func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "a=b"}} },
				codes.InvalidArgument, "envs"},
			{"mount without a target", mount(&cri.Mount{HostPath: dir}), codes.InvalidArgument, "container_path"},
			{"mount without a source", mount(&cri.Mount{ContainerPath: "/m"}), codes.InvalidArgument, "host_path"},
			{"mount of a relative source", mount(&cri.Mount{HostPath: "m", ContainerPath: "/m"}), codes.InvalidArgument,
				"host_path"},
			{"mount of two sources", mount(&cri.Mount{HostPath: dir, ContainerPath: "/m",
				Image: &cri.ImageSpec{Image: harness.Image}}), codes.InvalidArgument, "image"},
			{"recursive without readonly", mount(&cri.Mount{HostPath: dir, ContainerPath: "/m",
				RecursiveReadOnly: true}), codes.InvalidArgument, "recursive_read_only"},
			{"device that is not there", func(c *cri.ContainerConfig) {
				c.Devices = []*cri.Device{{HostPath: "/dev/nothing", ContainerPath: "/dev/x", Permissions: "rwm"}}
			}, codes.InvalidArgument, "devices"},
			{"device permissions", func(c *cri.ContainerConfig) {
				c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rx"}}
			}, codes.InvalidArgument, "permissions"},
			{"negative memory", resources(&cri.LinuxContainerResources{MemoryLimitInBytes: -1}), codes.InvalidArgument,
				"memory_limit_in_bytes"},
			{"negative cpu shares", resources(&cri.LinuxContainerResources{CpuShares: -1}), codes.InvalidArgument,
				"cpu_shares"},
			{"negative cpu period", resources(&cri.LinuxContainerResources{CpuPeriod: -1}), codes.InvalidArgument,
				"cpu_period"},
			{"oom score", resources(&cri.LinuxContainerResources{OomScoreAdj: 1001}), codes.InvalidArgument,
				"oom_score_adj"},
			{"group without user",
				security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsGroup = &cri.Int64Value{Value: 7} }),
				codes.InvalidArgument, "run_as_group"},
			{"negative user",
				security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: -7} }),
				codes.InvalidArgument, "run_as_user"},
			{"unknown user", security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUsername = "stranger" }),
				codes.InvalidArgument, "run_as_username"},
			{"seccomp profile that is not there", security(func(s *cri.LinuxContainerSecurityContext) {
				s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost,
					LocalhostRef: "/nothing.json"}
			}), codes.InvalidArgument, "seccomp"},
			{"target that is not there", security(func(s *cri.LinuxContainerSecurityContext) {
				s.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "nobody"}
			}), codes.InvalidArgument, "target_id"},
		} {
			t.Run(c.name, func(t *testing.T) {
				n := n.With(t)
				ctx, cancel := harness.Deadline()
				defer cancel()
				config := harness.ContainerConfig("bad", []string{"sleep", "1000"}, c.edit)
				r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
					Config: config, SandboxConfig: pod.Config})
				if wantError(t, err, c.code, c.field); err == nil {
					(&harness.Container{N: n, ID: r.ContainerId, Config: config}).Remove()
				}
				n.CheckClean()
			})
		}
		for _, c := range []struct {
			name, id string
			code     codes.Code
		}{
			{"no pod", "", codes.InvalidArgument},
			{"unknown pod", strings.Repeat("0", 64), codes.NotFound},
			{"escaping pod", "../" + pod.ID, codes.NotFound},
		} {
			t.Run(c.name, func(t *testing.T) {
				ctx, cancel := harness.Deadline()
				defer cancel()
				_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: c.id,
					Config: harness.ContainerConfig("bad", nil), SandboxConfig: pod.Config})
				wantError(t, err, c.code, "pod_sandbox_id")
			})
		}
	})

	t.Run("the other calls", func(t *testing.T) {
		rt, im := n.Runtime, n.Images
		handled := &cri.ImageSpec{Image: harness.Image, RuntimeHandler: "nobody"}
		for _, c := range []struct {
			name  string
			call  func(context.Context) (any, error)
			code  codes.Code
			field string
		}{
			{"start unknown", func(x context.Context) (any, error) {
				return rt.StartContainer(x, &cri.StartContainerRequest{ContainerId: "nobody"})
			}, codes.NotFound, "container_id"},
			{"start escaping", func(x context.Context) (any, error) {
				return rt.StartContainer(x, &cri.StartContainerRequest{ContainerId: "../../etc"})
			}, codes.NotFound, "container_id"},
			{"stop without id", func(x context.Context) (any, error) {
				return rt.StopContainer(x, &cri.StopContainerRequest{})
			}, codes.InvalidArgument, "container_id"},
			{"stop with a negative timeout", func(x context.Context) (any, error) {
				return rt.StopContainer(x, &cri.StopContainerRequest{ContainerId: good.ID, Timeout: -1})
			}, codes.InvalidArgument, "timeout"},
			{"remove without id", func(x context.Context) (any, error) {
				return rt.RemoveContainer(x, &cri.RemoveContainerRequest{})
			}, codes.InvalidArgument, "container_id"},
			{"status of unknown", func(x context.Context) (any, error) {
				return rt.ContainerStatus(x, &cri.ContainerStatusRequest{ContainerId: "nobody"})
			}, codes.NotFound, "container_id"},
			{"pod status of unknown", func(x context.Context) (any, error) {
				return rt.PodSandboxStatus(x, &cri.PodSandboxStatusRequest{PodSandboxId: "nobody"})
			}, codes.NotFound, "pod_sandbox_id"},
			{"exec in unknown", func(x context.Context) (any, error) {
				return rt.ExecSync(x, &cri.ExecSyncRequest{ContainerId: "nobody", Cmd: []string{"ls"}})
			}, codes.NotFound, "container_id"},
			{"exec of nothing", func(x context.Context) (any, error) {
				return rt.ExecSync(x, &cri.ExecSyncRequest{ContainerId: good.ID})
			}, codes.InvalidArgument, "cmd"},
			{"exec with a negative timeout", func(x context.Context) (any, error) {
				return rt.ExecSync(x, &cri.ExecSyncRequest{ContainerId: good.ID, Cmd: []string{"ls"}, Timeout: -1})
			}, codes.InvalidArgument, "timeout"},
			{"reopen the log of unknown", func(x context.Context) (any, error) {
				return rt.ReopenContainerLog(x, &cri.ReopenContainerLogRequest{ContainerId: "nobody"})
			}, codes.NotFound, "container_id"},
			{"pull nothing", func(x context.Context) (any, error) {
				return im.PullImage(x, &cri.PullImageRequest{})
			}, codes.InvalidArgument, "image"},
			{"pull nonsense", func(x context.Context) (any, error) {
				return im.PullImage(x, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "Not//An:::Image"}})
			}, codes.InvalidArgument, "image"},
			{"pull unknown", func(x context.Context) (any, error) {
				return im.PullImage(x, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "registry.test/nothing:1"}})
			}, codes.NotFound, "image"},
			{"status of no image", func(x context.Context) (any, error) {
				return im.ImageStatus(x, &cri.ImageStatusRequest{})
			}, codes.InvalidArgument, "image"},
			{"remove no image", func(x context.Context) (any, error) {
				return im.RemoveImage(x, &cri.RemoveImageRequest{})
			}, codes.InvalidArgument, "image"},

			{"images of a handler", func(x context.Context) (any, error) {
				return im.ListImages(x, &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: handled}})
			}, codes.InvalidArgument, "filter.image.runtime_handler"},
			{"status of an image of a handler", func(x context.Context) (any, error) {
				return im.ImageStatus(x, &cri.ImageStatusRequest{Image: handled})
			}, codes.InvalidArgument, "image.runtime_handler"},
			{"remove an image of a handler", func(x context.Context) (any, error) {
				return im.RemoveImage(x, &cri.RemoveImageRequest{Image: handled})
			}, codes.InvalidArgument, "image.runtime_handler"},
			{"reopen the log of one that does not run", func(x context.Context) (any, error) {
				return rt.ReopenContainerLog(x, &cri.ReopenContainerLogRequest{ContainerId: good.ID})
			}, codes.FailedPrecondition, "container_id"},
			{"stats of unknown", func(x context.Context) (any, error) {
				return rt.ContainerStats(x, &cri.ContainerStatsRequest{ContainerId: "nobody"})
			}, codes.NotFound, "container_id"},
			{"stats of an unknown pod", func(x context.Context) (any, error) {
				return rt.PodSandboxStats(x, &cri.PodSandboxStatsRequest{PodSandboxId: "nobody"})
			}, codes.NotFound, "pod_sandbox_id"},
			{"resources of an unknown pod", func(x context.Context) (any, error) {
				return rt.UpdatePodSandboxResources(x, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: "nobody"})
			}, codes.NotFound, "pod_sandbox_id"},
			{"resources of unknown", func(x context.Context) (any, error) {
				return rt.UpdateContainerResources(x, &cri.UpdateContainerResourcesRequest{ContainerId: "nobody",
					Linux: &cri.LinuxContainerResources{CpuShares: 2}})
			}, codes.NotFound, "container_id"},

			{"a session of nothing", func(x context.Context) (any, error) {
				return rt.Exec(x, &cri.ExecRequest{ContainerId: good.ID, Stdout: true})
			}, codes.InvalidArgument, "cmd"},
			{"a session without streams", func(x context.Context) (any, error) {
				return rt.Exec(x, &cri.ExecRequest{ContainerId: good.ID, Cmd: []string{"ls"}})
			}, codes.InvalidArgument, "stdout"},
			{"a session in a container that does not run", func(x context.Context) (any, error) {
				return rt.Exec(x, &cri.ExecRequest{ContainerId: good.ID, Cmd: []string{"ls"}, Stdout: true})
			}, codes.FailedPrecondition, "container_id"},
			{"attach to a terminal that is none", func(x context.Context) (any, error) {
				return rt.Attach(x, &cri.AttachRequest{ContainerId: good.ID, Stdout: true, Tty: true})
			}, codes.InvalidArgument, "tty"},
			{"attach with an input that is none", func(x context.Context) (any, error) {
				return rt.Attach(x, &cri.AttachRequest{ContainerId: good.ID, Stdin: true})
			}, codes.InvalidArgument, "stdin"},
			{"forward port 0", func(x context.Context) (any, error) {
				return rt.PortForward(x, &cri.PortForwardRequest{PodSandboxId: pod.ID, Port: []int32{0}})
			}, codes.InvalidArgument, "port[0]"},
			{"forward a port of unknown", func(x context.Context) (any, error) {
				return rt.PortForward(x, &cri.PortForwardRequest{PodSandboxId: "nobody"})
			}, codes.NotFound, "pod_sandbox_id"},
			{"UpdateContainerResources", func(x context.Context) (any, error) {
				return rt.UpdateContainerResources(x, &cri.UpdateContainerResourcesRequest{ContainerId: good.ID})
			}, codes.InvalidArgument, "linux"},
			{"an update for Windows", func(x context.Context) (any, error) {
				return rt.UpdateContainerResources(x, &cri.UpdateContainerResourcesRequest{ContainerId: good.ID,
					Linux: &cri.LinuxContainerResources{CpuShares: 2}, Windows: &cri.WindowsContainerResources{}})
			}, codes.Unimplemented, "windows"},
			{"an update with options", func(x context.Context) (any, error) {
				return rt.UpdateContainerResources(x, &cri.UpdateContainerResourcesRequest{ContainerId: good.ID,
					Linux: &cri.LinuxContainerResources{CpuShares: 2}, Annotations: map[string]string{"a": "b"}})
			}, codes.Unimplemented, "annotations"},
			{"a range of pods that is none", func(x context.Context) (any, error) {
				return rt.UpdateRuntimeConfig(x, &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{
					NetworkConfig: &cri.NetworkConfig{PodCidr: "10.0.0.0"}}})
			}, codes.InvalidArgument, "runtime_config.network_config.pod_cidr"},
			{"resources of a pod", func(x context.Context) (any, error) {
				return rt.UpdatePodSandboxResources(x, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: pod.ID,
					Resources: &cri.LinuxContainerResources{CpuShares: -1}})
			}, codes.InvalidArgument, "resources.cpu_shares"},
			{"overhead of a pod", func(x context.Context) (any, error) {
				return rt.UpdatePodSandboxResources(x, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: pod.ID,
					Overhead: &cri.LinuxContainerResources{CpuPeriod: 1}})
			}, codes.InvalidArgument, "overhead.cpu_period"},
			{"CheckpointContainer", func(x context.Context) (any, error) {
				return rt.CheckpointContainer(x, &cri.CheckpointContainerRequest{ContainerId: good.ID})
			}, codes.InvalidArgument, "location"},
		} {
			t.Run(c.name, func(t *testing.T) {
				ctx, cancel := harness.Deadline()
				defer cancel()
				_, err := c.call(ctx)
				wantError(t, err, c.code, c.field)
			})
		}
		n.With(t).CheckClean()
	})

	// These are no errors: the kubelet repeats them until all is gone.
	t.Run("idempotent", func(t *testing.T) {
		gone := strings.Repeat("0", 64)
		for name, call := range map[string]func(context.Context) (any, error){
			"StopContainer": func(x context.Context) (any, error) {
				return n.Runtime.StopContainer(x, &cri.StopContainerRequest{ContainerId: gone})
			},
			"RemoveContainer": func(x context.Context) (any, error) {
				return n.Runtime.RemoveContainer(x, &cri.RemoveContainerRequest{ContainerId: gone})
			},
			"StopPodSandbox": func(x context.Context) (any, error) {
				return n.Runtime.StopPodSandbox(x, &cri.StopPodSandboxRequest{PodSandboxId: gone})
			},
			"RemovePodSandbox": func(x context.Context) (any, error) {
				return n.Runtime.RemovePodSandbox(x, &cri.RemovePodSandboxRequest{PodSandboxId: gone})
			},
			"RemoveImage": func(x context.Context) (any, error) {
				return n.Images.RemoveImage(x,
					&cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "registry.test/nothing:1"}})
			},
		} {
			ctx, cancel := harness.Deadline()
			if _, err := call(ctx); err != nil {
				t.Errorf("%s of what is not there: %v", name, err)
			}
			cancel()
		}
	})
}

// A client that connects and says nothing holds the daemon's end up for seconds, and
// not for the two minutes that gRPC would give it.
func TestSilentClient(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	c, err := net.Dial("unix", n.Socket)
	check(t, err)
	defer c.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.Stop()
	}()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the daemon has not ended")
		<-ended
	}
}
