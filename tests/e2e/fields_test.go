package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A mount has the flags that are asked for, whatever its source has.
func TestMountOptions(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	source := n.Path("source")
	check(t, os.Mkdir(source, 0o755))
	check(t, syscall.Mount("tmpfs", source, "tmpfs", syscall.MS_NOEXEC|syscall.MS_NODEV, ""))
	defer syscall.Unmount(source, syscall.MNT_DETACH)
	check(t, os.WriteFile(source+"/script", []byte("#!/bin/sh\necho ran\n"), 0o755))
	mount := func(at string, options ...string) *cri.Mount {
		return &cri.Mount{HostPath: source, ContainerPath: at, MountOptions: options}
	}
	pod := n.RunPod("pod")
	defer pod.Remove()
	c := pod.Run("c", []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{mount("/added", "noexec", "nosuid", "noatime"), mount("/removed", "exec", "dev")}
	})
	wantOutput(t, c, "ran\n", "/removed/script")
	wantOutput(t, c, "refused\n", "sh", "-c", "/added/script 2>/dev/null || echo refused")
	for at, want := range map[string]struct{ has, lacks string }{
		"/added":   {"noexec,nosuid,noatime", ""},
		"/removed": {"", "noexec,nodev"},
	} {
		flags := "," + strings.Fields(c.Output("grep", " "+at+" ", "/proc/self/mounts"))[3] + ","
		for _, o := range strings.Split(want.has, ",") {
			if o != "" && !strings.Contains(flags, ","+o+",") {
				t.Errorf("%s has %s, without %s", at, flags, o)
			}
		}
		for _, o := range strings.Split(want.lacks, ",") {
			if o != "" && strings.Contains(flags, ","+o+",") {
				t.Errorf("%s has %s, with %s", at, flags, o)
			}
		}
	}
	if got := c.Status().Mounts[0].MountOptions; strings.Join(got, ",") != "noexec,nosuid,noatime" {
		t.Errorf("the status has the options %q", got)
	}
}

// What cannot be had is refused before anything is made, with the name of the field.
func TestRefusedFields(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("pod")
	n.Mark()
	image := func(handler string) *cri.ImageSpec {
		return &cri.ImageSpec{Image: harness.Image, RuntimeHandler: handler}
	}
	limited := func(r *cri.LinuxContainerResources) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
	}
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	v2 := err == nil
	for name, c := range map[string]struct {
		edit  func(*cri.ContainerConfig)
		code  codes.Code
		field string
	}{
		"image of a handler": {func(c *cri.ContainerConfig) { c.Image = image("nobody") },
			codes.InvalidArgument, "config.image.runtime_handler"},
		"volume of a handler": {func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/i", Readonly: true, Image: image("nobody")}}
		}, codes.InvalidArgument, "config.mounts[0].image.runtime_handler"},
		"AppArmor": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{
				ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "no-such-profile"}
		}, codes.Unimplemented, "apparmor"},
		"capability": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"NET_RAV"}}
		}, codes.InvalidArgument, "config.linux.security_context.capabilities.drop_capabilities[0]"},
		"processor": {limited(&cri.LinuxContainerResources{CpusetCpus: "0,100000"}),
			codes.InvalidArgument, "config.linux.resources.cpuset_cpus"},
		"memory node": {limited(&cri.LinuxContainerResources{CpusetMems: "1000"}),
			codes.InvalidArgument, "config.linux.resources.cpuset_mems"},
		"huge pages": {limited(&cri.LinuxContainerResources{
			HugepageLimits: []*cri.HugepageLimit{{PageSize: "3MB", Limit: 3 * mib}},
		}), codes.InvalidArgument, "config.linux.resources.hugepage_limits[0].page_size"},
		"unified": {limited(&cri.LinuxContainerResources{Unified: map[string]string{"memory.nonsense": "1"}}),
			map[bool]codes.Code{false: codes.Unimplemented, true: codes.InvalidArgument}[v2],
			"config.linux.resources.unified"},
		"mount option": {func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/i", HostPath: "/etc", MountOptions: []string{"rshared"}}}
		}, codes.InvalidArgument, "config.mounts[0].mount_options[0]"},
	} {
		for file, field := range map[string]string{
			"/sys/kernel/security/apparmor": "apparmor",
		} {
			_, err := os.Stat(file)
			if err == nil && field == c.field {
				t.Logf("%s: this kernel has it", name)
				c.edit = nil
			}
		}
		if c.edit == nil {
			continue
		}
		err := tryCreate(pod, c.edit)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		wantError(t, err, c.code, c.field)
		n.CheckClean()
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err = n.Images.PullImage(ctx, &cri.PullImageRequest{Image: image("nobody")})
	wantError(t, err, codes.InvalidArgument, "image.runtime_handler")
	_, err = n.Images.PullImage(ctx, &cri.PullImageRequest{Image: image("runc")})
	check(t, err)

	c := pod.Create("volume", []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
		if os.WriteFile("/sys/fs/selinux/context", []byte("system_u:system_r:spc_t:s0"), 0) == nil || !selinux() {
			c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "spc_t"}
		}
		c.Mounts = []*cri.Mount{{ContainerPath: "/i", Readonly: true, Image: image("runc")}}
	})
	s := c.Status()
	if ref := s.Mounts[0].Image.ImageRef; ref != s.ImageId || !strings.HasPrefix(ref, "sha256:") {
		t.Errorf("the volume has the image %q, the container %q", ref, s.ImageId)
	}
}
