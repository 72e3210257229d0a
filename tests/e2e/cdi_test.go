package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// device makes a container ask for devices in the field of the CRI.
func device(names ...string) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) {
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &cri.CDIDevice{Name: n})
		}
	}
}

// A vendor's file gives a container a variable, a mount, a device, a group and a hook. It
// is read when a container asks for it, and one that is broken spoils nothing else.
func TestCDI(t *testing.T) {
	t.Parallel()
	specs := t.TempDir()
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[cdi]\nspec_dirs = [%q, %q]\n", specs+"/missing", specs)})
	pod := n.RunPod("pod")
	n.Mark()
	shared, mark := n.Path("shared"), n.Path("mark")
	check(t, os.Mkdir(shared, 0o755))
	check(t, os.WriteFile(shared+"/library", []byte("of the vendor"), 0o644))
	check(t, os.WriteFile(specs+"/bad.json", []byte("{"), 0o644))

	err := tryCreate(pod, device("vendor.test/gpu=0"))
	wantError(t, err, codes.FailedPrecondition, "config.CDI_devices[0].name")
	for _, words := range []string{`"vendor.test/gpu=0"`, specs + "/bad.json"} {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("the error does not say %s: %v", words, err)
		}
	}
	err = tryCreate(pod, device("vendor.test/gpu"))
	wantError(t, err, codes.InvalidArgument, "config.CDI_devices[0].name")
	n.CheckClean()

	check(t, os.WriteFile(specs+"/vendor.yaml", fmt.Appendf(nil, `
cdiVersion: 1.0.0
kind: vendor.test/gpu
containerEdits:
  env: [VENDOR=yes]
  mounts: [{hostPath: %s, containerPath: /opt/vendor, options: [ro, rbind]}]
devices:
- name: "0"
  containerEdits:
    env: [GPU0=on]
    deviceNodes: [{path: /dev/gpu0, hostPath: /dev/kmsg, permissions: w}]
    additionalGids: [4242]
    hooks: [{hookName: createRuntime, path: /bin/sh, args: [sh, -c, "cat > %s"]}]
- name: "1"
  containerEdits:
    env: [GPU1=on]
`, shared, mark), 0o644))
	c := pod.Run("both", []string{"sleep", "1000"}, device("vendor.test/gpu=0"), func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"cdi.k8s.io/plugin": "vendor.test/gpu=1,vendor.test/gpu=0"}
	})
	wantOutput(t, c, "yes on on\n", "sh", "-c", "echo $VENDOR $GPU0 $GPU1")
	wantOutput(t, c, "of the vendor", "cat", "/opt/vendor/library")
	wantOutput(t, c, "read-only\n", "sh", "-c", "touch /opt/vendor/new 2>/dev/null || echo read-only")
	wantOutput(t, c, "open\n", "sh", "-c", ": > /dev/gpu0 && echo open")
	wantOutput(t, c, "closed\n", "sh", "-c", "(: < /dev/gpu0) 2>/dev/null || echo closed")
	if groups := c.Status().User.Linux.SupplementalGroups; !strings.Contains(fmt.Sprint(groups), "4242") ||
		!strings.Contains(c.Output("id", "-G"), "4242") {
		t.Errorf("the groups are %v", groups)
	}
	if b, err := os.ReadFile(mark); err != nil || !strings.Contains(string(b), c.ID) {
		t.Errorf("the hook was given %q, %v", b, err)
	}
	one := pod.Run("one", []string{"sleep", "1000"}, device("vendor.test/gpu=1"))
	wantOutput(t, one, "absent\n", "sh", "-c", "[ -e /dev/gpu0 ] || echo absent")

	check(t, os.Remove(specs+"/vendor.yaml"))
	err = tryCreate(pod, func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"cdi.k8s.io/plugin": "vendor.test/gpu=1"}
	})
	wantError(t, err, codes.FailedPrecondition, "config.annotations[cdi.k8s.io/plugin]")
	n.Restart()
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a restart without the file the container is %s", s.State)
	}
	c.Remove()
	one.Remove()
	n.CheckClean()
}

// A hook that fails fails the request and leaves nothing, as it is the machine's fault.
func TestCDIHookFails(t *testing.T) {
	t.Parallel()
	specs := t.TempDir()
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[cdi]\nspec_dirs = [%q]\n", specs)})
	pod := n.RunPod("pod")
	n.Mark()
	check(t, os.WriteFile(specs+"/vendor.json", []byte(`{"cdiVersion": "0.3.0", "kind": "vendor.test/gpu", "devices": [
		{"name": "a", "containerEdits": {"hooks": [{"hookName": "createRuntime", "path": "/bin/false"}]}}]}`), 0o644))
	err := tryCreate(pod, device("vendor.test/gpu=a"))
	wantError(t, err, codes.Unknown, "hook")
	n.CheckClean()
}

// Where they are turned off, no container runs without the device that it was promised.
func TestCDIDisabled(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{Config: "[cdi]\nenabled = false\n"})
	pod := n.RunPod("pod")
	n.Mark()
	err := tryCreate(pod, device("vendor.test/gpu=0"))
	wantError(t, err, codes.Unimplemented, "config.CDI_devices[0].name")
	n.CheckClean()
}

// tryCreate asks for a container that may be refused.
func tryCreate(pod *harness.Pod, edit ...func(*cri.ContainerConfig)) error {
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := pod.N.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  pod.ID,
		Config:        harness.ContainerConfig("refused", []string{"sleep", "1000"}, edit...),
		SandboxConfig: pod.Config,
	})
	return err
}
