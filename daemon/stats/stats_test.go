package stats

import (
	"fmt"
	"maps"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// A rate needs two readings, and nothing waits for the second one.
func TestRate(t *testing.T) {
	const none = -1
	begin := time.Unix(1000, 0)
	type reading struct {
		after time.Duration // begin
		used  time.Duration
		want  int // millionths of a processor
	}
	for _, c := range []struct {
		name     string
		start    time.Time
		readings []reading
	}{
		{"two readings", time.Time{}, []reading{{0, time.Second, none}, {10 * time.Second, 6 * time.Second, 500_000}}},
		{"started not long ago", begin.Add(-4 * time.Second), []reading{{0, time.Second, 250_000}}},
		{"started just now", begin.Add(-time.Millisecond),
			[]reading{{0, time.Millisecond, none}, {time.Second - time.Millisecond, time.Second, 1_000_000}}},
		{"started long ago", begin.Add(-time.Hour), []reading{{0, time.Second, none}}},
		{"started in the future", begin.Add(time.Hour), []reading{{0, time.Second, none}}},
		{"asked too often", time.Time{}, []reading{
			{0, 0, none},
			{time.Second, time.Second, 1_000_000},
			{1500 * time.Millisecond, 5 * time.Second, 1_000_000},
			{3 * time.Second, 2 * time.Second, 500_000},
		}},
		{"asked long ago", time.Time{}, []reading{{0, 0, none}, {time.Hour, time.Second, none}}},
		{"another cgroup of the same name", time.Time{}, []reading{{0, time.Hour, none}, {time.Minute, time.Second,
			none}}},
		{"a thousand processors for two minutes", time.Time{},
			[]reading{{0, 0, none}, {2 * time.Minute, 2000 * time.Minute, 1_000_000_000}}},
	} {
		var s samples
		for i, r := range c.readings {
			got := none
			if v := s.rate("/c", begin.Add(r.after), uint64(r.used), c.start); v != nil {
				got = int(v.Value / 1000)
			}
			if got != r.want {
				t.Errorf("%s, reading %d: got %d, want %d", c.name, i, got, r.want)
			}
		}
	}
}

// What nobody asks for any more is forgotten.
func TestSamplesAreDropped(t *testing.T) {
	var s samples
	for i := range 10_000 {
		s.rate(fmt.Sprint("/c", i), time.Unix(int64(i), 0), 0, time.Time{})
	}
	if n := len(s.last); n > 300 {
		t.Errorf("%d are left", n)
	}
}

func TestUsage(t *testing.T) {
	v := func(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }
	now := time.Unix(1, 0)
	for _, c := range []struct {
		name   string
		f      cgroup.Figures
		memory *runtimeapi.MemoryUsage
		swap   *runtimeapi.SwapUsage
	}{
		{"nothing", cgroup.Figures{}, nil, nil},
		{
			"limits",
			cgroup.Figures{
				cgroup.MemoryUsage: 100, cgroup.MemoryInactiveFile: 30, cgroup.MemoryLimit: 500, cgroup.MemoryAnon: 5,
				cgroup.MemoryPageFaults: 6, cgroup.MemoryMajorPageFaults: 7, cgroup.SwapUsage: 1, cgroup.SwapLimit: 4,
			},
			&runtimeapi.MemoryUsage{
				Timestamp: 1e9, UsageBytes: v(100), WorkingSetBytes: v(70), AvailableBytes: v(430), RssBytes: v(5),
				PageFaults: v(6), MajorPageFaults: v(7),
			},
			&runtimeapi.SwapUsage{Timestamp: 1e9, SwapUsageBytes: v(1), SwapAvailableBytes: v(3)},
		},
		{
			"no limits, and figures of two moments",
			cgroup.Figures{
				cgroup.MemoryUsage: 10, cgroup.MemoryInactiveFile: 30, cgroup.MemoryLimit: cgroup.NoLimit,
				cgroup.SwapUsage: 0, cgroup.SwapLimit: cgroup.NoLimit,
			},
			&runtimeapi.MemoryUsage{Timestamp: 1e9, UsageBytes: v(10), WorkingSetBytes: v(0)},
			&runtimeapi.SwapUsage{Timestamp: 1e9, SwapUsageBytes: v(0)},
		},
		{
			"above the limit, as it was lowered",
			cgroup.Figures{cgroup.MemoryUsage: 100, cgroup.MemoryInactiveFile: 0, cgroup.MemoryLimit: 50},
			&runtimeapi.MemoryUsage{Timestamp: 1e9, UsageBytes: v(100), WorkingSetBytes: v(100), AvailableBytes: v(0)},
			nil,
		},
		{"no statistics", cgroup.Figures{cgroup.MemoryUsage: 10},
			&runtimeapi.MemoryUsage{Timestamp: 1e9, UsageBytes: v(10)}, nil},
	} {
		if got := memoryOf(c.f, now); !reflect.DeepEqual(got, c.memory) {
			t.Errorf("%s: memory %v, want %v", c.name, got, c.memory)
		}
		if got := swapOf(c.f, now); !reflect.DeepEqual(got, c.swap) {
			t.Errorf("%s: swap %v, want %v", c.name, got, c.swap)
		}
	}
}

const netDev = `Inter-|   Receive                    |  Transmit
 face |bytes    packets errs drop fifo|bytes    packets errs drop fifo
    lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0
 net:1: 11 12 13 14 0 0 0 0 15 16 17 18 0 0 0 0
  eth0:18446744073709551615 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0
short: 1 2
`

func TestLinks(t *testing.T) {
	want := []link{
		{"lo", traffic{9, 9, 9, 9}, traffic{9, 9, 9, 9}},
		{"net:1", traffic{11, 12, 13, 14}, traffic{15, 16, 17, 18}},
		{"eth0", traffic{1<<64 - 1, 2, 3, 4}, traffic{5, 6, 7, 8}},
	}
	links := parseLinks(netDev)
	if !slices.Equal(links, want) {
		t.Errorf("got %v, want %v", links, want)
	}
	u := networkUsage(links)
	if u.DefaultInterface.Name != "eth0" || len(u.Interfaces) != 2 || u.Interfaces[0].Name != "lo" ||
		u.Interfaces[1].TxErrors.Value != 17 {
		t.Errorf("got %v", u)
	}
	if u := networkUsage(links[:1]); u != nil {
		t.Errorf("of the loopback alone: %v", u)
	}
	if u := networkUsage(links[:2]); u.DefaultInterface.Name != "net:1" || len(u.Interfaces) != 1 {
		t.Errorf("without eth0: %v", u)
	}
	if u := networkUsage(readLinks(strings.NewReader(""))); u != nil {
		t.Errorf("without an interface: %v", u)
	}
	// A pod that names its interfaces as it likes, and makes any number, is answered.
	line := " \xff\xfe: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"
	u = networkUsage(readLinks(strings.NewReader(strings.Repeat(line, 1<<20))))
	if b, err := proto.Marshal(u); err != nil || len(b) > maxTable {
		t.Errorf("of hostile interfaces: %d bytes, %v", len(b), err)
	}
	if one := u.DefaultInterface; one.TxErrors.Value != 7 || !proto.Equal(one, u.Interfaces[len(u.Interfaces)-1]) {
		t.Errorf("one of them is %v", one)
	}
	// A namespace that is gone has none, and holds up nobody.
	if got := interfaces([]Pod{{ID: "gone", Netns: t.TempDir() + "/none"}, {ID: "host"}}); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}

func TestDescriptors(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	must.Succeed(t, err)
	defer l.Close()
	budget := maxDescriptors
	open, sockets, ok := descriptors([]int{os.Getpid(), 1 << 22}, &budget)
	if !ok || sockets < 1 || open <= sockets || budget != maxDescriptors-int(open) {
		t.Errorf("got %d, %d, %v, %d left", open, sockets, ok, budget)
	}
	budget = 2
	if _, _, ok := descriptors([]int{os.Getpid()}, &budget); ok || budget != 0 {
		t.Errorf("got %v, %d left", ok, budget)
	}
	if n, ok := openFilesLimit(os.Getpid()); !ok || n == 0 {
		t.Errorf("the limit is %d, %v", n, ok)
	}
	if _, ok := openFilesLimit(1 << 22); ok {
		t.Error("a process that there is not has a limit")
	}
}

// everything is a subject of which all is known.
func everything() *subject {
	s := &subject{
		labels:    labels("c", "/c", "image", "id", &Pod{}),
		figures:   cgroup.Figures{},
		pressure:  map[string]*cgroup.Pressure{},
		transfers: []cgroup.Transfer{{Device: "0:99", Operation: "Read"}, {Device: "0:99", Operation: "Write"}},
		pages:     []cgroup.HugePages{{Size: "2MB", Usage: 1, Peak: 2}, {Size: "1GB", Usage: 1, Peak: 2}},
		links:     parseLinks(netDev),
		processes: []point{{n: 1}},
		opened:    []point{{n: 1}},
		sockets:   []point{{n: 1}},
		openFiles: []point{{n: 1, labels: []string{"max_open_files"}}},
		layer:     &layer{at: time.Unix(5, 0), bytes: 7},
		disk:      disk{at: time.Unix(5, 0), device: "/dev/x"},
		container: true,
		created:   time.Unix(4, 0),
		start:     time.Unix(6, 0),
	}
	for _, f := range neededFigures {
		s.figures[f] = 5_500_000_000
	}
	for _, r := range []string{"cpu", "memory", "io"} {
		s.pressure[r] = &cgroup.Pressure{
			Some: cgroup.Stall{Total: 3_900_000_000},
			Full: cgroup.Stall{Total: 2_000_000_000},
		}
	}
	return s
}

// The names are those that a kubelet 1.37 shows under /metrics/cadvisor.
func TestDescriptorsOfMetrics(t *testing.T) {
	keys := map[string][]string{}
	if all, some := descriptorsOf(true), descriptorsOf(false); len(all) != len(some)+len(ofUnified) {
		t.Errorf("%d descriptors on cgroup v2, %d on v1", len(all), len(some))
	}
	for _, d := range descriptorsOf(true) {
		if keys[d.Name] != nil || d.Help == "" {
			t.Errorf("%s: twice, or without help", d.Name)
		}
		keys[d.Name] = d.LabelKeys
	}
	for name, extra := range kubeletMetrics {
		if want := slices.Concat(commonKeys, extra); !slices.Equal(keys[name], want) {
			t.Errorf("%s has the labels %v, want %v", name, keys[name], want)
		}
	}
	// Two that it does not show on every machine.
	delete(keys, "container_memory_total_active_file_bytes")
	delete(keys, "container_memory_total_inactive_file_bytes")
	maps.DeleteFunc(keys, func(name string, _ []string) bool { _, ok := kubeletMetrics[name]; return ok })
	if len(keys) > 0 {
		t.Errorf("the kubelet has no %v", keys)
	}
}

// A kubelet drops all metrics if one comes twice, and one whose labels do not fit.
func TestPoints(t *testing.T) {
	keys := map[string]int{}
	for _, d := range descriptorsOf(true) {
		keys[d.Name] = len(d.LabelKeys)
	}
	seen := map[string]bool{}
	got := map[string]*runtimeapi.Metric{}
	for _, m := range pointsOf(everything()) {
		full := fmt.Sprint(m.Name, m.LabelValues)
		if seen[full] || len(m.LabelValues) != keys[m.Name] {
			t.Errorf("%s: twice, or with %d labels", full, len(m.LabelValues))
		}
		seen[full] = true
		got[m.Name] = m
	}
	for name := range keys {
		if got[name] == nil {
			t.Errorf("%s has no value", name)
		}
	}
	for name, want := range map[string]uint64{
		"container_cpu_usage_seconds_total":            5,
		"container_memory_usage_bytes":                 5_500_000_000,
		"container_memory_working_set_bytes":           0,
		"container_pressure_cpu_waiting_seconds_total": 3,
		"container_pressure_io_stalled_seconds_total":  2,
		"container_fs_usage_bytes":                     7,
		"container_creation_time_seconds":              4,
		"container_start_time_seconds":                 6,
	} {
		if got[name].Value.Value != want {
			t.Errorf("%s is %d, want %d", name, got[name].Value.Value, want)
		}
	}
	if at := got["container_fs_usage_bytes"].Timestamp; at != 5e9 {
		t.Errorf("what was measured in the background is of %d, want 5e9", at)
	}
	if at := got["container_memory_usage_bytes"].Timestamp; at != 0 {
		t.Errorf("what was read now is of %d, want 0", at)
	}
	if list := pointsOf(&subject{}); len(list) > 0 {
		t.Errorf("a subject of which nothing is known has %v", list)
	}
}

// No limit is shown as cAdvisor shows it.
func TestPointsWithoutLimits(t *testing.T) {
	s := &subject{figures: cgroup.Figures{}, shares: 512}
	for _, f := range neededFigures {
		s.figures[f] = cgroup.NoLimit
	}
	delete(s.figures, cgroup.CPUShares)
	got := map[string]int{}
	for _, m := range pointsOf(s) {
		got[m.Name] = int(m.Value.Value)
	}
	for name, want := range map[string]int{
		"container_spec_memory_limit_bytes":      0,
		"container_spec_memory_swap_limit_bytes": 0,
		"container_threads_max":                  0,
		"container_spec_cpu_shares":              512,
	} {
		if n, ok := got[name]; !ok || n != want {
			t.Errorf("%s is %d, %v, want %d", name, n, ok, want)
		}
	}
	if n, ok := got["container_spec_cpu_quota"]; ok {
		t.Errorf("there is no quota, and it is %d", n)
	}
}

var kubeletMetrics = map[string][]string{
	"container_blkio_device_usage_total":               {"device", "major", "minor", "operation"},
	"container_cpu_cfs_burst_periods_total":            nil,
	"container_cpu_cfs_burst_seconds_total":            nil,
	"container_cpu_cfs_periods_total":                  nil,
	"container_cpu_cfs_throttled_periods_total":        nil,
	"container_cpu_cfs_throttled_seconds_total":        nil,
	"container_cpu_system_seconds_total":               nil,
	"container_cpu_usage_seconds_total":                {"cpu"},
	"container_cpu_user_seconds_total":                 nil,
	"container_creation_time_seconds":                  nil,
	"container_file_descriptors":                       nil,
	"container_fs_inodes_free":                         {"device"},
	"container_fs_inodes_total":                        {"device"},
	"container_fs_limit_bytes":                         {"device"},
	"container_fs_reads_bytes_total":                   {"device"},
	"container_fs_reads_total":                         {"device"},
	"container_fs_usage_bytes":                         {"device"},
	"container_fs_writes_bytes_total":                  {"device"},
	"container_fs_writes_total":                        {"device"},
	"container_hugetlb_max_usage_bytes":                {"pagesize"},
	"container_hugetlb_usage_bytes":                    {"pagesize"},
	"container_last_seen":                              nil,
	"container_memory_cache":                           nil,
	"container_memory_events_high_total":               nil,
	"container_memory_events_max_total":                nil,
	"container_memory_failcnt":                         nil,
	"container_memory_failures_total":                  {"failure_type", "scope"},
	"container_memory_file_dirty_bytes":                nil,
	"container_memory_file_writeback_bytes":            nil,
	"container_memory_kernel_usage":                    nil,
	"container_memory_mapped_file":                     nil,
	"container_memory_max_usage_bytes":                 nil,
	"container_memory_pgscan_total":                    nil,
	"container_memory_pgsteal_total":                   nil,
	"container_memory_rss":                             nil,
	"container_memory_swap":                            nil,
	"container_memory_usage_bytes":                     nil,
	"container_memory_working_set_bytes":               nil,
	"container_memory_workingset_refault_anon_total":   nil,
	"container_memory_workingset_refault_file_total":   nil,
	"container_network_receive_bytes_total":            {"interface"},
	"container_network_receive_errors_total":           {"interface"},
	"container_network_receive_packets_dropped_total":  {"interface"},
	"container_network_receive_packets_total":          {"interface"},
	"container_network_transmit_bytes_total":           {"interface"},
	"container_network_transmit_errors_total":          {"interface"},
	"container_network_transmit_packets_dropped_total": {"interface"},
	"container_network_transmit_packets_total":         {"interface"},
	"container_oom_events_total":                       nil,
	"container_pressure_cpu_stalled_seconds_total":     nil,
	"container_pressure_cpu_waiting_seconds_total":     nil,
	"container_pressure_io_stalled_seconds_total":      nil,
	"container_pressure_io_waiting_seconds_total":      nil,
	"container_pressure_memory_stalled_seconds_total":  nil,
	"container_pressure_memory_waiting_seconds_total":  nil,
	"container_processes":                              nil,
	"container_sockets":                                nil,
	"container_spec_cpu_period":                        nil,
	"container_spec_cpu_quota":                         nil,
	"container_spec_cpu_shares":                        nil,
	"container_spec_memory_limit_bytes":                nil,
	"container_spec_memory_reservation_limit_bytes":    nil,
	"container_spec_memory_swap_limit_bytes":           nil,
	"container_start_time_seconds":                     nil,
	"container_threads":                                nil,
	"container_threads_max":                            nil,
	"container_ulimits_soft":                           {"ulimit"},
}
