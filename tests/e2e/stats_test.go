package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// ownCgroup gives a pod a cgroup that is no other pod's.
func ownCgroup(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "" }

func memoryLimit(bytes int64) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: bytes, CpuQuota: 50000, CpuPeriod: 100000}
	}
}

func statsOf(t *testing.T, c *harness.Container) *cri.ContainerStats {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := c.N.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID})
	check(t, err)
	return r.Stats
}

func podStatsOf(t *testing.T, p *harness.Pod) *cri.LinuxPodSandboxStats {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := p.N.Runtime.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: p.ID})
	check(t, err)
	if a := r.Stats.Attributes; a.GetId() != p.ID || !proto.Equal(a.GetMetadata(), p.Config.Metadata) {
		t.Errorf("the stats are of %v", a)
	}
	return r.Stats.Linux
}

// metricsOf are those of a pod and its containers: "NAME EXTRA LABELS" -> value, where
// the owner of the others is one container.
func metricsOf(t *testing.T, c *harness.Container) map[string]uint64 {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := c.N.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	check(t, err)
	all := map[string]uint64{}
	put := func(owner string, list []*cri.Metric) {
		for _, m := range list {
			if m.LabelValues[3] != owner || m.LabelValues[5] != c.Pod.Config.Metadata.Name {
				t.Errorf("%s of %s has the labels %v", m.Name, owner, m.LabelValues)
			}
			all[strings.Join(append([]string{m.Name}, m.LabelValues[6:]...), " ")] = m.Value.Value
		}
	}
	for _, p := range r.PodMetrics {
		if p.PodSandboxId != c.Pod.ID {
			continue
		}
		put(p.PodSandboxId, p.Metrics)
		for _, one := range p.ContainerMetrics {
			if one.ContainerId == c.ID {
				put(c.ID, one.Metrics)
			}
		}
	}
	return all
}

// load is something that a container does, and how it shows.
type load struct {
	name, script string
	shown        func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool
	metrics      map[string]uint64 // at least
}

func v(u *cri.UInt64Value) uint64 { return u.GetValue() }

var loads = []load{
	{
		"cpu", "while :; do :; done",
		func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool {
			used, rate := v(s.Cpu.UsageCoreNanoSeconds), v(s.Cpu.UsageNanoCores)
			return used > 1200e6 && rate > 50e6 && rate < 1e9
		},
		map[string]uint64{
			"container_cpu_usage_seconds_total total":    1,
			"container_cpu_cfs_periods_total":            1,
			"container_cpu_cfs_throttled_periods_total":  1,
			"container_spec_cpu_period":                  100000,
			"container_spec_cpu_quota":                   50000,
			"container_creation_time_seconds":            1e9,
			"container_start_time_seconds":               1e9,
			"container_last_seen":                        1e9,
			"container_processes":                        1,
			"container_threads":                          1,
			"container_file_descriptors":                 1,
			"container_ulimits_soft max_open_files":      1,
			"container_memory_max_usage_bytes":           1,
			"container_memory_working_set_bytes":         1,
			"container_network_receive_bytes_total eth0": 1,
		},
	},
	{
		"memory", "x=$(head -c 33554432 /dev/zero | tr '\\0' x); while sleep 1000; do :; done",
		func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool {
			m := s.Memory
			return v(m.UsageBytes) > 32*mib && v(m.WorkingSetBytes) > 32*mib && v(m.RssBytes) > 32*mib &&
				v(m.PageFaults) > 8000 && m.AvailableBytes != nil && v(m.AvailableBytes) < 224*mib &&
				v(m.AvailableBytes)+v(m.WorkingSetBytes) == 256*mib && s.Swap != nil
		},
		map[string]uint64{
			"container_memory_usage_bytes":                      32 * mib,
			"container_memory_working_set_bytes":                32 * mib,
			"container_memory_rss":                              32 * mib,
			"container_memory_max_usage_bytes":                  32 * mib,
			"container_memory_failures_total pgfault container": 8000,
			"container_spec_memory_limit_bytes":                 256 * mib,
		},
	},
	{
		"disk", "for i in 1 2 3 4; do dd if=/dev/zero of=/file$i bs=1M count=8; done; sleep 1000",
		func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool {
			w := s.WritableLayer
			return v(w.GetUsedBytes()) > 32*mib && v(w.GetInodesUsed()) > 4 && w.GetFsId().GetMountpoint() != "" &&
				v(s.Memory.UsageBytes) > v(s.Memory.WorkingSetBytes)+8*mib
		},
		map[string]uint64{"container_memory_cache": 16 * mib, "container_memory_total_inactive_file_bytes": 8 * mib},
	},
	{
		"processes", "for i in 1 2 3 4 5; do sleep 1000 & done; wait",
		func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool {
			return v(p.GetProcess().GetProcessCount()) >= 6
		},
		map[string]uint64{"container_processes": 6, "container_threads": 6, "container_file_descriptors": 12},
	},
	{
		"oom", "(x=$(head -c 536870912 /dev/zero | tr '\\0' x)); while sleep 1000; do :; done",
		func(s *cri.ContainerStats, p *cri.LinuxPodSandboxStats) bool { return true },
		map[string]uint64{"container_oom_events_total": 1},
	},
}

// Real load of each kind shows in the stats, in the pod's, and in the metrics.
func TestStatsOfLoads(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("loads", ownCgroup)
	for _, l := range loads {
		t.Run(l.name, func(t *testing.T) {
			one := pod.With(t).Run(l.name, []string{"sh", "-c", l.script}, memoryLimit(256*mib))
			harness.Eventually(t, patience, "the load shows in the stats", func() bool {
				return l.shown(statsOf(t, one), podStatsOf(t, pod))
			})
			var got map[string]uint64
			defer func() { t.Logf("the metrics are %v", got) }()
			harness.Eventually(t, patience, "the load shows in the metrics", func() bool {
				got = metricsOf(t, one)
				for name, least := range l.metrics {
					if got[name] < least {
						return false
					}
				}
				return true
			})
			// Only this container is there, so what the pod uses is no less.
			s, p := statsOf(t, one), podStatsOf(t, pod)
			if v(p.Cpu.UsageCoreNanoSeconds) < v(s.Cpu.UsageCoreNanoSeconds) || v(p.Memory.UsageBytes) < mib/16 ||
				len(p.Containers) != 1 || p.Containers[0].Attributes.Id != one.ID {
				t.Errorf("the container uses %v, its pod %v", s, p)
			}
			if at := s.WritableLayer.GetFsId().GetMountpoint(); at != n.Root {
				t.Errorf("its layer is on %q, want %q", at, n.Root)
			}
			some := s.Cpu.Psi != nil && s.Memory.Psi != nil && s.Io.GetPsi() != nil
			if _, err := os.Stat("/proc/pressure/cpu"); err == nil && !some {
				t.Errorf("there is no pressure in %v", s)
			}
			one.Remove()
		})
	}
}

// What goes through the interfaces of a pod is counted, whether anything runs in it.
func TestStatsOfNetwork(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	empty := n.RunPod("empty")
	to, from := n.RunPod("to"), n.RunPod("from")
	to.Run("to", []string{"testbox", "echo", "7777"})
	sender := from.Run("from", []string{"sleep", "1000"})
	target := to.Status().Network.Ip
	harness.Eventually(t, patience, "a mebibyte has been sent", func() bool {
		r, err := sender.Exec(30, "sh", "-c",
			"head -c 1048576 /dev/zero | nc "+target+" 7777 | head -c 1048576 | wc -c")
		return err == nil && strings.TrimSpace(string(r.Stdout)) == "1048576"
	})
	for _, p := range []*harness.Pod{to, from} {
		network := podStatsOf(t, p).Network
		u := network.GetDefaultInterface()
		if others := network.GetInterfaces(); len(others) != 1 || others[0].GetName() != "lo" {
			t.Errorf("pod %s: beside the default interface there are %v", p.Config.Metadata.Name, others)
		}
		if u.GetName() != "eth0" || u.GetRxBytes().GetValue() < mib || u.GetTxBytes().GetValue() < mib ||
			u.RxErrors == nil || u.TxErrors == nil {
			t.Errorf("pod %s: got %v", p.Config.Metadata.Name, u)
		}
	}
	before := podStatsOf(t, empty).Network.GetDefaultInterface()
	conn, err := net.Dial("udp", net.JoinHostPort(empty.Status().Network.Ip, "9"))
	check(t, err)
	defer conn.Close()
	harness.Eventually(t, patience, "what comes to an empty pod is counted", func() bool {
		conn.Write(make([]byte, 1000)) // refused: nobody listens
		u := podStatsOf(t, empty).Network.GetDefaultInterface()
		return u.GetRxBytes().GetValue() > before.GetRxBytes().GetValue()+1000
	})
	host := n.RunPod("host", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
		}
	})
	if u := podStatsOf(t, host).Network; u != nil {
		t.Errorf("the network of the host is counted as the pod's: %v", u)
	}
}

// Every state of a container and pod has an answer, also with the shims stopped, and
// after a restart. Lists give the same as single calls.
func TestStatsOfStates(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod, other := n.RunPod("states", ownCgroup), n.RunPod("other", ownCgroup)
	label := func(c *cri.ContainerConfig) { c.Labels = map[string]string{"is": c.Metadata.Name} }
	created := pod.Create("created", []string{"sleep", "1000"}, label)
	ended := pod.Run("ended", []string{"sh", "-c", "head -c 5000000 /dev/zero >/file"}, label)
	ended.WaitExited(patience)
	second := pod.Run("second", []string{"sleep", "1000"}, label)
	running := other.Run("running", []string{"sleep", "1000"}, label)
	check(t, unix.Kill(running.ShimPID(), unix.SIGSTOP))
	defer unix.Kill(running.ShimPID(), unix.SIGCONT)
	n.Kill()
	n.Start()

	for _, c := range []struct {
		c    *harness.Container
		uses bool
	}{{created, true}, {ended, false}, {second, true}, {running, true}} {
		name := c.c.Config.Metadata.Name
		s := statsOf(t, c.c)
		if a := s.Attributes; a.Id != c.c.ID || a.Metadata.GetName() != name || a.Labels["is"] != name {
			t.Errorf("%s: the stats are of %v", name, a)
		}
		if (s.Cpu != nil) != c.uses || (s.Memory != nil) != c.uses {
			t.Errorf("%s: got %v", name, s)
		}
	}
	harness.Eventually(t, patience, "the layer of an ended container is counted", func() bool {
		return statsOf(t, ended).GetWritableLayer().GetUsedBytes().GetValue() > 5_000_000
	})

	t.Run("filters", func(t *testing.T) { filtersOfStats(t, n, pod, other, created, second, running) })
	t.Run("errors", func(t *testing.T) { errorsOfStats(t, n) })

	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.ID})
	check(t, err)
	if s := podStatsOf(t, pod); s.Network != nil || len(s.Containers) != 3 {
		t.Errorf("a stopped pod uses %v", s)
	}
	m, err := n.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	check(t, err)
	wantIDs(t, "metrics, one pod was stopped", []string{other.ID},
		idsOf(m.PodMetrics, (*cri.PodSandboxMetrics).GetPodSandboxId))
}

func filtersOfStats(t *testing.T, n *harness.Node, pod, other *harness.Pod,
	created, second, running *harness.Container) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	is := func(value string) map[string]string { return map[string]string{"is": value} }
	for name, c := range map[string]struct {
		f    *cri.ContainerStatsFilter
		want []string
	}{
		"nil":           {nil, []string{second.ID, running.ID}},
		"id":            {&cri.ContainerStatsFilter{Id: second.ID}, []string{second.ID}},
		"short id":      {&cri.ContainerStatsFilter{Id: running.ID[:13]}, []string{running.ID}},
		"pod":           {&cri.ContainerStatsFilter{PodSandboxId: pod.ID[:13]}, []string{second.ID}},
		"labels":        {&cri.ContainerStatsFilter{LabelSelector: is("second")}, []string{second.ID}},
		"id and labels": {&cri.ContainerStatsFilter{Id: second.ID, LabelSelector: is("x")}, nil},
		"created":       {&cri.ContainerStatsFilter{Id: created.ID}, nil},
		"ended":         {&cri.ContainerStatsFilter{LabelSelector: is("ended")}, nil},
		"nothing":       {&cri.ContainerStatsFilter{Id: "none"}, nil},
	} {
		r, err := n.Runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{Filter: c.f})
		check(t, err)
		s, err := n.Runtime.StreamContainerStats(ctx, &cri.StreamContainerStatsRequest{Filter: c.f})
		check(t, err)
		id := func(s *cri.ContainerStats) string { return s.Attributes.Id }
		streamed := received(t, s, (*cri.StreamContainerStatsResponse).GetContainerStats)
		wantIDs(t, "containers, "+name, c.want, idsOf(r.Stats, id), idsOf(streamed, id))
	}
	for name, c := range map[string]struct {
		f    *cri.PodSandboxStatsFilter
		want []string
	}{
		"nil":      {nil, []string{pod.ID, other.ID}},
		"short id": {&cri.PodSandboxStatsFilter{Id: pod.ID[:13]}, []string{pod.ID}},
		"labels":   {&cri.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "other"}}, []string{other.ID}},
	} {
		r, err := n.Runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{Filter: c.f})
		check(t, err)
		s, err := n.Runtime.StreamPodSandboxStats(ctx, &cri.StreamPodSandboxStatsRequest{Filter: c.f})
		check(t, err)
		id := func(s *cri.PodSandboxStats) string { return s.Attributes.Id }
		streamed := received(t, s, (*cri.StreamPodSandboxStatsResponse).GetPodSandboxStats)
		wantIDs(t, "pods, "+name, c.want, idsOf(r.Stats, id), idsOf(streamed, id))
	}
	m, err := n.Runtime.StreamPodSandboxMetrics(ctx, &cri.StreamPodSandboxMetricsRequest{})
	check(t, err)
	streamed := received(t, m, (*cri.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)
	wantIDs(t, "metrics", []string{pod.ID, other.ID}, idsOf(streamed, (*cri.PodSandboxMetrics).GetPodSandboxId))
}

// received are the items of a streaming list.
func received[M, T any](t *testing.T, s grpc.ServerStreamingClient[M], items func(*M) []T) (all []T) {
	t.Helper()
	for {
		part, err := s.Recv()
		if err == io.EOF {
			return all
		}
		check(t, err)
		all = append(all, items(part)...)
	}
}

func idsOf[T any](list []T, id func(T) string) (ids []string) {
	for _, one := range list {
		ids = append(ids, id(one))
	}
	return ids
}

func wantIDs(t *testing.T, what string, want []string, lists ...[]string) {
	t.Helper()
	slices.Sort(want)
	for _, got := range lists {
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
}

// The kubelet asks with an empty id whether a runtime has these calls: any error but
// Unimplemented means that it has.
func errorsOfStats(t *testing.T, n *harness.Node) {
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{})
	wantError(t, err, codes.InvalidArgument, "pod_sandbox_id")
	_, err = n.Runtime.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: "none"})
	wantError(t, err, codes.NotFound, "pod_sandbox_id")
	_, err = n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{})
	wantError(t, err, codes.InvalidArgument, "container_id")
	_, err = n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: "none"})
	wantError(t, err, codes.NotFound, "container_id")
}

// The metrics of every pod fit their descriptors, and none comes twice: a kubelet would
// show none of them.
func TestMetricsFitTheirDescriptors(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for i := range 2 {
		pod := n.RunPod(fmt.Sprint("pod", i), ownCgroup)
		pod.Run("one", []string{"sleep", "1000"})
		pod.Run("two", []string{"sleep", "1000"})
		pod.Create("created", []string{"sleep", "1000"})
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	d, err := n.Runtime.ListMetricDescriptors(ctx, &cri.ListMetricDescriptorsRequest{})
	check(t, err)
	keys := map[string]int{}
	for _, one := range d.Descriptors {
		keys[one.Name] = len(one.LabelKeys)
	}
	m, err := n.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	check(t, err)
	seen := map[string]bool{}
	for _, p := range m.PodMetrics {
		all := p.Metrics
		for _, c := range p.ContainerMetrics {
			all = append(all, c.Metrics...)
		}
		if len(p.ContainerMetrics) != 3 || len(all) < 3*40 {
			t.Errorf("a pod with three containers has %d with %d metrics", len(p.ContainerMetrics), len(all))
		}
		for _, one := range all {
			full := fmt.Sprint(one.Name, one.LabelValues)
			if seen[full] || keys[one.Name] != len(one.LabelValues) || one.Value == nil {
				t.Errorf("%s: twice, or with %d labels, want %d", full, len(one.LabelValues), keys[one.Name])
			}
			seen[full] = true
			if at := one.Timestamp; at != 0 && time.Since(time.Unix(0, at)) > time.Hour {
				t.Errorf("%s is of %d", full, at)
			}
		}
	}
}
