package e2e

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// root and state may have names that mean something to shells, patterns, mount
// options and mountinfo.
func TestNamesOfDirectories(t *testing.T) {
	for _, names := range []string{" a:b", `[x\y`} {
		t.Run(names, func(t *testing.T) {
			t.Parallel()
			n := harness.New(t, harness.Options{Names: names})
			pod := n.RunPod("names")
			use := func(name string) *harness.Container {
				c := pod.Run(name, []string{"sleep", "100000"}, func(c *cri.ContainerConfig) {
					c.Mounts = []*cri.Mount{{ContainerPath: "/image", Readonly: true,
						Image: &cri.ImageSpec{Image: harness.Image}}}
				})
				got, want := c.Output("cat", "/image/etc/group"), c.Output("cat", "/etc/group")
				if got != want || got == "" {
					t.Errorf("the volume has %q, the root %q", got, want)
				}
				table := c.Output("cat", "/proc/self/mountinfo")
				// An older kernel cannot be given such names in another way.
				if _, older := harness.KernelBefore(6, 13); !older && strings.Contains(table, "/proc/self/fd") {
					t.Errorf("the mount table names descriptors:\n%s", table)
				}
				return c
			}
			first := use("first")
			n.Kill()
			n.Start()
			if st := first.Status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("after a restart it is %s", st.State)
			}
			first.Remove()
			use("second").Remove()
			n.RemoveAllPods()
			n.CheckClean()
		})
	}
}
