package guest

import (
	"os"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// busyMetrics are those of the container of usage, at least.
var busyMetrics = map[string]uint64{
	"container_cpu_usage_seconds_total":         2,
	"container_cpu_cfs_throttled_periods_total": 1,
	"container_spec_cpu_quota":                  50000,
	"container_spec_cpu_shares":                 512,
	"container_memory_working_set_bytes":        8 << 20,
	"container_memory_max_usage_bytes":          32 << 20,
	"container_memory_kernel_usage":             1,
	"container_memory_failcnt":                  1,
	"container_oom_events_total":                1,
	"container_spec_memory_limit_bytes":         64 << 20,
	"container_threads":                         1,
	"container_fs_inodes_total":                 1,
}

// usage is what a container with load and its pod use on v2.
func usage(t *testing.T, pod *harness.Pod) {
	c := pod.Run("busy", []string{"sh", "-c",
		"x=$(head -c 8388608 /dev/zero | tr '\\0' x); tail /dev/zero; while :; do :; done"},
		limits, func(c *cri.ContainerConfig) { c.Linux.Resources.MemorySwapLimitInBytes = 64 << 20 })
	ctx, cancel := harness.Deadline()
	defer cancel()
	n := pod.N
	var s *cri.PodSandboxStats
	var busy *cri.ContainerStats
	harness.Eventually(t, patience, "the load shows", func() bool {
		r, err := n.Runtime.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: pod.ID})
		must.Succeed(t, err)
		s = r.Stats
		for _, one := range s.Linux.Containers {
			if one.Attributes.Id == c.ID {
				busy = one
			}
		}
		return busy.GetCpu().GetUsageCoreNanoSeconds().GetValue() > 2e9 && busy.Cpu.UsageNanoCores.GetValue() > 0 &&
			busy.Memory.GetRssBytes().GetValue() > 8<<20 && busy.WritableLayer != nil && s.Linux.Cpu.UsageNanoCores != nil
	})
	m := busy.Memory
	if m.UsageBytes.Value < m.WorkingSetBytes.Value || m.WorkingSetBytes.Value+m.AvailableBytes.GetValue() != 64<<20 ||
		m.PageFaults.Value == 0 || m.MajorPageFaults == nil || busy.Swap == nil {
		t.Errorf("the container uses %v", busy)
	}
	l := s.Linux
	if l.Cpu.UsageCoreNanoSeconds.Value < busy.Cpu.UsageCoreNanoSeconds.Value || l.Memory.UsageBytes.Value < 8<<20 ||
		l.Memory.AvailableBytes.GetValue() >= 512<<20 || l.Process.GetProcessCount().GetValue() < 2 ||
		l.Network.GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("the pod uses %v", l)
	}
	var got map[string]uint64
	defer func() { t.Logf("the metrics are %v", got) }()
	harness.Eventually(t, patience, "the load shows in the metrics", func() bool {
		got = metricsOf(t, n, c.ID, cgroupOf(t, c.Info().PID))
		for name, least := range busyMetrics {
			if got[name] < least {
				return false
			}
		}
		return true
	})
	_, err := os.Stat("/proc/pressure/cpu")
	if b := err == nil; b != (busy.Cpu.Psi != nil) || b != (l.Io.GetPsi() != nil) {
		t.Errorf("the kernel tells of pressure: %t; the container has %v, the pod %v", b, busy.Cpu.Psi, l.Io)
	}
	c.Remove()
}

// metricsOf are those of a container in a cgroup, the last of each name.
func metricsOf(t *testing.T, n *harness.Node, id, path string) map[string]uint64 {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	must.Succeed(t, err)
	all := map[string]uint64{}
	for _, p := range r.PodMetrics {
		for _, one := range p.ContainerMetrics {
			for _, m := range one.Metrics {
				if one.ContainerId != id {
					continue
				}
				if m.LabelValues[1] != path || m.LabelValues[3] != id {
					t.Errorf("%s is of %v, want %s", m.Name, m.LabelValues, path)
				}
				all[m.Name] = m.Value.Value
			}
		}
	}
	if len(all) == 0 {
		t.Errorf("the container has no metrics: %v", r)
	}
	return all
}
