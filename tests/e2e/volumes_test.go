package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// What an image declares as a volume is writable, on a read-only root too, and
// never a way to a directory of the host: the pod's own volume has a link with
// the name of one. What the kernel or the pod mounts is not covered by one.
func TestImageVolumes(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{})
	path, err := exec.LookPath("busybox")
	check(t, err)
	busybox, err := os.ReadFile(path)
	check(t, err)
	layer, err := harness.MakeLayer(map[string]string{
		"bin/busybox": string(busybox),
		"data/":       "",
		"seeded/seed": "of the image",
	})
	check(t, err)
	const image = "registry.test/tests/volumes:1"
	volumes := map[string]struct{}{
		"/data/sub": {}, "/seeded": {}, "new/../absent/dir": {}, "/": {}, "/ro/below": {}, "/data/new": {},
		"/proc/sys": {}, "/sys/fs/cgroup": {}, "/dev": {}, "/dev/shm": {},
	}
	if _, err := n.Registry.Push(image, ocispec.ImageConfig{Volumes: volumes}, layer); err != nil {
		t.Fatal(err)
	}
	n.Pull(image)

	secret, volume := n.Path("secret"), n.Path("volume")
	for _, dir := range []string{secret, volume} {
		check(t, os.Mkdir(dir, 0o755))
	}
	check(t, os.WriteFile(filepath.Join(secret, "of-the-host"), nil, 0o644))
	check(t, os.Symlink(secret, filepath.Join(volume, "sub")))
	for name, readOnly := range map[string]bool{"writable": false, "readonly": true} {
		t.Run(name, func(t *testing.T) {
			pod := n.With(t).RunPod(name)
			defer pod.Remove()
			c := pod.Run("c", []string{"/bin/busybox", "sleep", "1000"}, func(c *cri.ContainerConfig) {
				c.Image.Image = image
				c.Mounts = []*cri.Mount{
					{ContainerPath: "/data", HostPath: volume},
					{ContainerPath: "/ro", HostPath: volume, Readonly: true},
				}
				c.Linux.SecurityContext.ReadonlyRootfs = readOnly
				c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys"}
			})
			wantOutput(t, c, "of the image", "/bin/busybox", "cat", "/seeded/seed")
			for script, want := range map[string]bool{
				"echo >/seeded/x":                                            true,
				"echo >/absent/dir/x":                                        true,
				"echo >/data/x":                                              true,
				"echo >/ro/x":                                                false,
				"test -e /data/sub/of-the-host":                              false,
				"test -c /dev/null":                                          true,
				"test -e /proc/sys/kernel/version":                           true,
				"/bin/busybox touch -c /proc/sys/kernel/version":             false,
				`test -n "$(/bin/busybox ls /sys/fs/cgroup)"`:                true,
				"/bin/busybox grep -q '^[^ ]* /dev/shm tmpfs ' /proc/mounts": true,
			} {
				r, err := c.Exec(60, "/bin/busybox", "sh", "-c", script)
				if err != nil || (r.ExitCode == 0) != want {
					t.Errorf("%s: %v, %v", script, r, err)
				}
			}
			r, err := c.Exec(60, "/bin/busybox", "sh", "-c", "echo >/x")
			if err != nil || (r.ExitCode != 0) != readOnly {
				t.Errorf("writing to the root: %v, %v", r, err)
			}
		})
	}
	if entries, err := os.ReadDir(filepath.Join(volume, "new")); err != nil || len(entries) != 0 {
		t.Errorf("what was written to a volume of the image lies in the pod's: %v, %v", entries, err)
	}
	if entries, err := os.ReadDir(secret); err != nil || len(entries) != 1 {
		t.Errorf("a directory of the host has %v, %v", entries, err)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}}); err != nil {
		t.Error(err)
	}
	n.CheckClean()
}
