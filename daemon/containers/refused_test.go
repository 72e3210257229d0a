package containers_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// What cannot be had is refused before anything is made: no root is mounted and no shim is
// started for it. The node of this test has nothing that a container could ask for.
func TestRefusedBeforeAnythingIsMade(t *testing.T) {
	b := newBed(t)
	ended := b.run("ended")
	check(t, b.Containers.Stop(t.Context(), ended, 0))
	link, absent := filepath.Join(t.TempDir(), "link"), filepath.Join(t.TempDir(), "absent")
	check(t, os.Symlink("nowhere", link))
	local := func(ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	}
	const context, resources = "config.linux.security_context.", "config.linux.resources."
	security := func(f func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{}
			f(c.Linux.SecurityContext)
		}
	}
	limits := func(r *runtimeapi.LinuxContainerResources) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
	}
	mount := func(m *runtimeapi.Mount) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) {
			m.ContainerPath = "/m"
			c.Mounts = []*runtimeapi.Mount{m}
		}
	}
	target := func(id string) func(*runtimeapi.ContainerConfig) {
		return security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}
		})
	}
	b.Roots.Mounting.Fail(errors.New("something was mounted"))
	b.Shims.Launched = func(rundir.Dir) error { return errors.New("a shim was started") }
	for _, c := range []struct {
		field string
		kind  error
		edit  func(*runtimeapi.ContainerConfig)
	}{
		{context + "apparmor", kind.Unsupported, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Apparmor = local("mine")
		})},
		{context + "seccomp", kind.Unsupported, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{}
		})},
		{context + "seccomp.localhost_ref", kind.Invalid, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = local(link)
		})},
		{context + "capabilities.add_capabilities[0]", kind.Invalid,
			security(func(s *runtimeapi.LinuxContainerSecurityContext) {
				s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
			})},
		{context + "namespace_options.target_id", kind.Invalid, target("nobody")},
		{context + "namespace_options.target_id", kind.State, target(ended)},
		{resources + "unified", kind.Unsupported, limits(&runtimeapi.LinuxContainerResources{
			Unified: map[string]string{"memory.high": "1"},
		})},
		{resources + "cpuset_cpus", kind.Invalid, limits(&runtimeapi.LinuxContainerResources{CpusetCpus: "100000"})},
		{resources + "cpuset_mems", kind.Invalid, limits(&runtimeapi.LinuxContainerResources{CpusetMems: "100000"})},
		{"config.devices[0].host_path", kind.Invalid, func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: link}}
		}},
		{"config.CDI_devices[0].name", kind.Unsupported, func(c *runtimeapi.ContainerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v/c=d"}}
		}},
		{"config.mounts[0].host_path", kind.Invalid, mount(&runtimeapi.Mount{HostPath: "/dev/null/m"})},
		{"config.mounts[0].host_path", kind.Invalid, mount(&runtimeapi.Mount{HostPath: "/proc/self/nothing"})},
		{"config.mounts[0].recursive_read_only", kind.Unsupported,
			mount(&runtimeapi.Mount{HostPath: "/", Readonly: true, RecursiveReadOnly: true})},
		{"config.mounts[0].uidMappings", kind.Unsupported, mount(&runtimeapi.Mount{
			HostPath:    "/",
			UidMappings: []*runtimeapi.IDMapping{{HostId: 1, Length: 1}},
			GidMappings: []*runtimeapi.IDMapping{{HostId: 1, Length: 1}},
		})},
		{"config.mounts[0].image", kind.NotFound,
			mount(&runtimeapi.Mount{Readonly: true, Image: &runtimeapi.ImageSpec{Image: "another"}})},
		{"config.mounts[0].image.runtime_handler", kind.Invalid, mount(&runtimeapi.Mount{
			Readonly: true,
			Image:    &runtimeapi.ImageSpec{Image: "image", RuntimeHandler: "nobody"},
		})},
		{"config.mounts[1].host_path", kind.Invalid, func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{
				{HostPath: absent, ContainerPath: "/a"},
				{HostPath: link, ContainerPath: "/l"},
			}
		}},
		{"config.image.image", kind.NotFound, func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: absent, ContainerPath: "/a"}}
			c.Image.Image = "another"
		}},
	} {
		cfg := fake.ContainerConfig("refused")
		c.edit(cfg)
		_, err := b.Containers.Create(t.Context(), b.pod(), cfg, nil)
		if !errors.Is(err, c.kind) || err != nil && !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("%s: %v", c.field, err)
		}
		if n := b.Images.Held(); n != 0 {
			t.Errorf("%s: images are held %d times", c.field, n)
		}
		if _, err := os.Lstat(absent); err == nil {
			t.Errorf("%s: the directory of a mount was made", c.field)
		}
	}
}

// What is not in the state for a call is refused, with the name of the field.
func TestRefusedByState(t *testing.T) {
	b := newBed(t)
	removing, created := b.create("removing"), b.create("created")
	want := func(call string, err error, says string) {
		t.Helper()
		if !errors.Is(err, kind.State) || !strings.HasPrefix(err.Error(), "container_id: ") ||
			!strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", call, err)
		}
	}
	c, err := b.Containers.Find(removing)
	check(t, err)
	b.remove(removing)
	want("start of one that goes meanwhile", c.Start(t.Context()), "is being removed")
	check(t, b.Pods.Stop(t.Context(), b.podID))
	want("start in a pod that was stopped", b.Containers.Start(t.Context(), created), "is not ready")
}

// With a label of its own a container has its mounts relabelled that ask for it, and what
// it shares with its pod; without one, nothing is.
func TestRelabel(t *testing.T) {
	t.Parallel()
	n := fake.NewNode(t)
	n.SELinux = true
	b := &bed{Node: n, Daemon: n.Open(t), t: t}
	b.podID = b.RunPod(t, "pod")
	dir := t.TempDir()
	config := func(name, source string, o *runtimeapi.SELinuxOption) *runtimeapi.ContainerConfig {
		c := fake.ContainerConfig(name)
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{SelinuxOptions: o}
		c.Mounts = []*runtimeapi.Mount{
			{HostPath: "/", ContainerPath: "/host"},
			{HostPath: source, ContainerPath: "/m", SelinuxRelabel: true},
		}
		return c
	}
	b.Create(t, b.podID, config("plain", dir, nil))
	if got := b.Roots.Relabelled(); len(got) != 0 {
		t.Errorf("without a label: %v", got)
	}
	o := &runtimeapi.SELinuxOption{Level: "s0:c1,c2"}
	_, err := b.Containers.Create(t.Context(), b.pod(), config("refused", "/etc", o), nil)
	if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), "config.mounts[1].selinux_relabel: ") {
		t.Errorf("of /etc: %v", err)
	}
	b.Create(t, b.podID, config("labelled", dir, o))
	got := b.Roots.Relabelled()
	if len(got) != 4 || got[dir] != "system_u:object_r:container_file_t:s0:c1,c2" || got["/"] != "" {
		t.Errorf("with a label: %v", got)
	}
	for path, label := range got {
		if label != got[dir] {
			t.Errorf("%s has the label %q", path, label)
		}
	}
}
