package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// selinux says whether labels mean something on this node.
func selinux() bool {
	own, _ := os.ReadFile("/proc/self/attr/current")
	_, err := os.Stat("/sys/fs/selinux/enforce")
	return err == nil && strings.Contains(string(own), ":")
}

// A container with SELinux options, its files, and the volumes that ask for it have their
// label, on a node with SELinux.
func TestSELinux(t *testing.T) {
	t.Parallel()
	const process, files = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
	if !selinux() {
		ignored(t)
		t.Skip("not possible here: this kernel has no SELinux, or no policy")
	}
	for _, label := range []string{process, files} {
		if err := os.WriteFile("/sys/fs/selinux/context", []byte(label), 0); err != nil {
			t.Skipf("not possible here: the policy has no label %s", label)
		}
	}
	n := harness.New(t)
	volume, other := n.Path("volume"), n.Path("other")
	check(t, os.MkdirAll(filepath.Join(volume, "below"), 0o755))
	check(t, os.Mkdir(other, 0o755))
	labelOf := func(path string) string {
		t.Helper()
		b := make([]byte, 256)
		size, err := unix.Lgetxattr(path, "security.selinux", b)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			return ""
		}
		return strings.TrimRight(string(b[:size]), "\x00")
	}
	before := labelOf(other)
	pod := n.RunPod("pod", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{SelinuxOptions: &cri.SELinuxOption{Level: "s0:c1,c2"}}
	})
	c := pod.Run("c", []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{
			{HostPath: volume, ContainerPath: "/volume", SelinuxRelabel: true},
			{HostPath: other, ContainerPath: "/other"},
		}
	})
	if got := strings.TrimRight(c.Output("cat", "/proc/self/attr/current"), "\x00\n"); got != process {
		t.Errorf("an exec has the label %q", got)
	}
	root := fmt.Sprintf("/proc/%d/root", c.Info().PID)
	for _, path := range []string{"/", "/bin", "/dev/shm", "/dev/mqueue", "/dev/pts", "/volume", "/volume/below",
		"/etc/hosts", "/etc/resolv.conf"} {
		if got := labelOf(root + path); got != files {
			t.Errorf("%s has the label %q", path, got)
		}
	}
	if got := labelOf(other); got != before {
		t.Errorf("a volume that does not ask for it has the label %q, before it was %q", got, before)
	}
	c.Output("sh", "-c", "echo written >/file && echo written >/volume/file && echo written >/dev/shm/file")
	err := tryCreate(pod, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: "/etc/../usr", ContainerPath: "/usr2", SelinuxRelabel: true}}
	})
	wantError(t, err, codes.InvalidArgument, "config.mounts[0].selinux_relabel")
	err = tryCreate(pod, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "nothing_t"}
	})
	wantError(t, err, codes.InvalidArgument, "config.linux.security_context.selinux_options")
}

// A container has the default AppArmor profile unless it says otherwise, on a node with
// AppArmor: it cannot change settings of the kernel, though it is root there.
func TestAppArmor(t *testing.T) {
	t.Parallel()
	enabled, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil || !strings.HasPrefix(string(enabled), "Y") {
		t.Skip("not possible here: this kernel has no AppArmor")
	}
	n := harness.New(t)
	pod := n.RunPod("pod", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{Privileged: true}
	})
	profile := func(p *cri.SecurityProfile) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Apparmor = p
			c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		}
	}
	const confined, unconfined = "holdfast-default (enforce)", "unconfined"
	for name, c := range map[string]struct {
		edit func(*cri.ContainerConfig)
		want string
	}{
		"none":       {profile(nil), confined},
		"default":    {profile(&cri.SecurityProfile{}), confined},
		"unconfined": {profile(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}), unconfined},
		"named": {profile(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost,
			LocalhostRef: "holdfast-default"}), confined},
		"privileged": {func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }, unconfined},
	} {
		one := pod.Run(name, []string{"sleep", "1000"}, c.edit)
		if got := strings.TrimSpace(one.Output("cat", "/proc/self/attr/current")); got != c.want {
			t.Errorf("%s: an exec has the profile %q, want %q", name, got, c.want)
		}
		r, err := one.Exec(120, "mount", "-t", "tmpfs", "tmpfs", "/tmp")
		check(t, err)
		if mounted := r.ExitCode == 0; mounted != (c.want == unconfined) {
			t.Errorf("%s: mount(8) ends with %d, %s", name, r.ExitCode, r.Stderr)
		}
		one.Output("sh", "-c", "echo written >/file && sleep 100 & kill $!")
		one.Stop(0)
	}
	err := tryCreate(pod, profile(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost,
		LocalhostRef: "nothing"}))
	wantError(t, err, codes.InvalidArgument, "config.linux.security_context.apparmor.localhost_ref")
}

// ignored checks that a node without SELinux runs containers with options, and says that they
// mean nothing there: once in its log, and in its status.
func ignored(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("labelled", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{SelinuxOptions: &cri.SELinuxOption{Level: "s0"}}
	})
	for i := range 2 {
		pod.Run(fmt.Sprint(i), []string{"sleep", "1000"}, func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "container_logreader_t"}
		})
	}
	log, err := os.ReadFile(n.DaemonLog())
	check(t, err)
	if said := strings.Count(string(log), `level=WARN msg="config.linux.security_context.selinux_options`); said != 1 {
		t.Errorf("the log says %d times that options are ignored", said)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.Status(ctx, &cri.StatusRequest{Verbose: true})
	check(t, err)
	if !strings.Contains(r.Info["security"], `"selinuxOptionsIgnored":true`) {
		t.Errorf("the status says %q", r.Info["security"])
	}
}
