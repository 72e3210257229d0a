package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

const mib = 1 << 20

// update asks for other resources of a container.
func update(c *harness.Container, r *cri.LinuxContainerResources) error {
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := c.N.Runtime.UpdateContainerResources(ctx,
		&cri.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: r})
	return err
}

// checkResources compares what the kernel has with what the status shows and what is wanted.
func checkResources(t *testing.T, c *harness.Container, pid int, memory, shares int64) {
	t.Helper()
	r := c.Status().GetResources().GetLinux()
	if r.GetMemoryLimitInBytes() != memory || r.GetCpuShares() != shares {
		t.Errorf("the status shows %v", r)
	}
	shown := c.Info().RuntimeSpec.Linux.Resources
	if shown.Memory.Limit != memory || shown.CPU.Shares != shares || len(shown.Devices) == 0 {
		t.Errorf("the verbose status shows a spec with %+v; want a limit of %d, shares of %d, and devices", shown,
			memory, shares)
	}
	limit, err := harness.CgroupFile(pid, "memory", "memory.limit_in_bytes", "memory.max")
	if err != nil || limit != fmt.Sprint(memory) {
		t.Errorf("the kernel has a memory limit of %s, %v; want %d", limit, err, memory)
	}
	weights := map[int64]string{256: "35", 512: "59"} // of v2, as the OCI runtimes convert shares
	got, err := harness.CgroupFile(pid, "cpu", "cpu.shares", "cpu.weight")
	if err != nil || got != fmt.Sprint(shares) && got != weights[shares] {
		t.Errorf("the kernel has cpu shares of %s, %v; want %d", got, err, shares)
	}
}

// A container that is created or runs gets other limits: all of them or none. Its status
// shows them, also to the next daemon, and to one that has lost its records.
func TestUpdateContainerResources(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("update")
	script := "while ! [ -e /go ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/shm/f bs=1M count=20; echo full; sleep 1000"
	c := pod.Create("box", []string{"sh", "-c", script}, func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{CpuShares: 256, MemoryLimitInBytes: 64 * mib}
	})
	var pid int
	harness.Eventually(t, patience, "the first process is known", func() bool {
		pid = c.Info().PID
		return pid != 0
	})
	checkResources(t, c, pid, 64*mib, 256)
	check(t, update(c, &cri.LinuxContainerResources{MemoryLimitInBytes: 128 * mib})) // created
	checkResources(t, c, pid, 128*mib, 256)
	c.Start()
	check(t, update(c, &cri.LinuxContainerResources{CpuShares: 512, CpuPeriod: 50000, CpuQuota: 25000}))
	checkResources(t, c, pid, 128*mib, 512)
	c.Output("touch", "/go")
	c.WaitLog(patience, "full")

	for name, refused := range map[string]struct {
		r    *cri.LinuxContainerResources
		code codes.Code
		says string
	}{
		"below what is used": {
			&cri.LinuxContainerResources{CpuShares: 1024,
				MemoryLimitInBytes: 10 * mib}, codes.FailedPrecondition, "uses",
		},
		"invalid": {&cri.LinuxContainerResources{CpuShares: 1024, CpuPeriod: 1}, codes.InvalidArgument,
			"linux.cpu_period: "},
		"a cpu that is not there": {
			&cri.LinuxContainerResources{CpuShares: 1024, MemoryLimitInBytes: 200 * mib, CpusetCpus: "4000"},
			codes.InvalidArgument, "linux.cpuset_cpus: ",
		},
	} {
		err := update(c, refused.r)
		if status.Code(err) != refused.code || !strings.Contains(err.Error(), refused.says) {
			t.Errorf("%s: %v", name, err)
		}
		checkResources(t, c, pid, 128*mib, 512)
	}

	n.Kill()
	n.Start()
	checkResources(t, c, pid, 128*mib, 512)
	n.Kill()
	check(t, os.RemoveAll(filepath.Join(n.Root, "containers", c.ID, "record.json")))
	n.Start()
	checkResources(t, c, pid, 128*mib, 512)
	check(t, update(c, &cri.LinuxContainerResources{MemoryLimitInBytes: 96 * mib}))
	checkResources(t, c, pid, 96*mib, 512)
	c.Stop(0)
	if err := update(c, &cri.LinuxContainerResources{CpuShares: 2}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("of a container that has ended: %v", err)
	}
}

// Files of cgroup v2 are set by name, cleared by their defaults, and left alone where one of
// them is refused. What is set stays when systemd reads its units anew.
func TestUpdateUnified(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("unified")
	c := pod.Run("box", []string{"sleep", "1000"})
	pid := c.Info().PID
	first := &cri.LinuxContainerResources{
		MemoryLimitInBytes: 128 * mib,
		Unified: map[string]string{"memory.min": "4194304", "memory.low": "8388608",
			"memory.high": "67108864"},
	}
	err := update(c, first)
	if _, serr := os.Stat("/sys/fs/cgroup/cgroup.controllers"); serr != nil { // cgroup v1
		wantError(t, err, codes.Unimplemented, "linux.unified")
		return
	}
	check(t, err)
	has := func(when, min, low, high string) {
		t.Helper()
		for file, want := range map[string]string{"memory.min": min, "memory.low": low, "memory.high": high} {
			if got, err := harness.CgroupFile(pid, "memory", "", file); err != nil || got != want {
				t.Errorf("%s: %s is %s, %v; want %s", when, file, got, err, want)
			}
		}
	}
	has("set", "4194304", "8388608", "67108864")
	harness.Systemctl("daemon-reload") // fails where there is no systemd
	has("read anew", "4194304", "8388608", "67108864")
	err = update(c, &cri.LinuxContainerResources{
		CpuShares: 512,
		Unified:   map[string]string{"memory.high": "1048576000", "memory.nonsense": "1"},
	})
	if err == nil {
		t.Error("a file that does not exist is set")
	}
	has("refused", "4194304", "8388608", "67108864")
	if got := c.Status().Resources.Linux; got.CpuShares != 0 || got.Unified["memory.high"] != "67108864" {
		t.Errorf("the status shows %v", got)
	}
	check(t, update(c, &cri.LinuxContainerResources{Unified: map[string]string{"memory.min": "0",
		"memory.high": "max"}}))
	has("cleared", "0", "8388608", "max")
	harness.Systemctl("daemon-reload")
	has("cleared, read anew", "0", "8388608", "max")
}

// What the cgroup of the pod does not leave is the fault of the field that asks for it. On
// cgroup v2 a container may ask for more than it gets.
func TestMoreThanThePodHas(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	parent := "/hf-more-" + filepath.Base(n.Dir)
	for file, value := range map[string]string{
		"cpu/cpu.cfs_quota_us": "10000",
		"cpuset/cpuset.cpus":   "0",
	} {
		dir := filepath.Join("/sys/fs/cgroup", filepath.Dir(file), parent)
		if _, err := os.Stat(filepath.Dir(dir)); err != nil {
			t.Skip("cgroup v2")
		}
		check(t, os.MkdirAll(dir, 0o755))
		defer os.Remove(dir)
		check(t, os.WriteFile(filepath.Join(dir, filepath.Base(file)), []byte(value), 0))
	}
	pod := n.RunPod("pod", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	defer pod.Remove()
	c := pod.Run("c", []string{"sleep", "1000"})
	for field, r := range map[string]*cri.LinuxContainerResources{
		"cpu_quota":   {CpuQuota: 100000, CpuPeriod: 100000},
		"cpuset_cpus": {CpusetCpus: "1"},
	} {
		if _, err := os.Stat("/sys/devices/system/cpu/cpu1"); err != nil && field == "cpuset_cpus" {
			continue
		}
		err := tryCreate(pod, func(c *cri.ContainerConfig) { c.Linux.Resources = r })
		wantError(t, err, codes.InvalidArgument, "config.linux.resources."+field+": ")
		wantError(t, update(c, r), codes.InvalidArgument, "linux."+field+": ")
	}
}
