package kubelet

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

const (
	figuresPod = "figures"
	written    = 2 << 20 // bytes that its container busy has in its writable layer
)

// The pod has a limit of everything, and traffic by its probe.
const figuresSpec = `
  containers:
  - name: busy
    image: IMAGE
    command:
    - sh
    - -c
    - |
      dd if=/dev/zero of=/file bs=1M count=2 2>/dev/null
      echo begins
      httpd -p 8001 -h /etc
      while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.2; done
    readinessProbe: {httpGet: {path: /passwd, port: 8001}, periodSeconds: 1, timeoutSeconds: 10}
    resources: {limits: {memory: 64Mi, cpu: 500m}}
  - name: idle
    image: IMAGE
    command: [sleep, "1000"]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
`

// figuresContainers are its containers.
var figuresContainers = []string{"busy", "idle"}

// checkFigures looks at the figures of one pod, in all places where the kubelet has some.
func (k *kubelet) checkFigures() {
	k.t.Helper()
	k.checkSummary()
	k.checkMetrics()
	k.checkResourceMetrics()
}

// checkSummary waits until /stats/summary has all figures of the pod: two looks at it
// have to be different where something goes on.
func (k *kubelet) checkSummary() {
	k.t.Helper()
	var first *stats.PodStats
	var missing []string
	harness.Eventually(k.t, patience, "the summary has all figures", func() bool {
		p := k.summaryOf(figuresPod)
		if p == nil || first == nil || len(p.Containers) != len(figuresContainers) {
			missing, first = []string{"the pod"}, p
			return false
		}
		if missing = missingOf(p, first); len(missing) > 0 {
			k.t.Logf("the summary lacks %v", missing)
		}
		return len(missing) == 0
	})
}

func (k *kubelet) summaryOf(pod string) *stats.PodStats {
	k.t.Helper()
	b, err := k.get("/stats/summary")
	if err != nil {
		return nil
	}
	var s stats.Summary
	if err := json.Unmarshal(b, &s); err != nil {
		k.t.Fatalf("cannot read the summary: %v", err)
	}
	i := slices.IndexFunc(s.Pods, func(p stats.PodStats) bool { return p.PodRef.Name == podName(pod) })
	if i < 0 {
		return nil
	}
	return &s.Pods[i]
}

// missingOf is what is not as it has to be in the summary of the pod, of which there was
// an earlier one.
func missingOf(p, earlier *stats.PodStats) (names []string) {
	want := func(what string, ok bool) {
		if !ok {
			names = append(names, what)
		}
	}
	names = append(unset("cpu", p.CPU), unset("memory", p.Memory)...)
	names = append(names, unset("io", p.IO)...)
	want("cpu that grows", n(p.CPU).of("UsageCoreNanoSeconds") > n(earlier.CPU).of("UsageCoreNanoSeconds"))
	want("process_stats", p.ProcessStats != nil && p.ProcessStats.ProcessCount != nil &&
		*p.ProcessStats.ProcessCount >= 4) // two shells' and httpd's, and one that sleeps
	want("ephemeral-storage", n(p.EphemeralStorage).of("UsedBytes") >= written)
	want("network", p.Network != nil)
	if p.Network != nil { // the CRI has the other interfaces beside the first: the loopback
		first, others := p.Network.InterfaceStats, p.Network.Interfaces
		want("network of eth0 and the loopback", first.Name == "eth0" && len(others) == 1 && others[0].Name == "lo")
		for _, i := range append(others, first) {
			names = append(names, unset("network", &i)...)
		}
		want("network with traffic", n(&first).of("RxBytes") > 0 && n(&first).of("TxBytes") > 0)
	}
	for _, c := range p.Containers {
		for what, part := range map[string]any{"cpu": c.CPU, "memory": c.Memory, "io": c.IO, "swap": c.Swap,
			"rootfs": c.Rootfs, "logs": c.Logs} {
			names = append(names, unset(c.Name+"'s "+what, part)...)
		}
		want(c.Name+"'s memory", n(c.Memory).of("WorkingSetBytes") > 0 && n(c.Memory).of("AvailableBytes") < 64<<20)
		want(c.Name+"'s rootfs", n(c.Rootfs).of("InodesUsed") > 0 && n(c.Rootfs).of("CapacityBytes") >= written &&
			(c.Name != "busy" || n(c.Rootfs).of("UsedBytes") >= written))
	}
	return names
}

// unset are the fields of a part of the summary that have no value.
func unset(what string, part any) (names []string) {
	v := reflect.ValueOf(part)
	if v.IsNil() {
		return []string{what}
	}
	for i := range v.Elem().NumField() {
		f, name := v.Elem().Field(i), v.Elem().Type().Field(i).Name
		switch {
		case f.Kind() != reflect.Pointer || !f.IsNil():
		case name == "PSI" && !hasPressure:
		default:
			names = append(names, what+" without "+name)
		}
	}
	return names
}

// hasPressure says whether the kernel tells the pressure of cgroups; v2 whether the
// machine has no cgroups v1.
var (
	hasPressure = exists("/sys/fs/cgroup/cpu.pressure") || exists("/sys/fs/cgroup/unified/cpu.pressure")
	v2          = exists("/sys/fs/cgroup/cgroup.controllers")
)

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// numbers are the fields of a part of the summary.
type numbers struct{ reflect.Value }

func n(part any) numbers { return numbers{reflect.ValueOf(part)} }

// of is the number in a field; 0: there is none.
func (n numbers) of(field string) uint64 {
	if n.IsNil() {
		return 0
	}
	p, _ := n.Elem().FieldByName(field).Interface().(*uint64)
	if p == nil {
		return 0
	}
	return *p
}

// metric is a metric under /metrics/cadvisor, as the kubelet's own cAdvisor has it.
type metric struct {
	name    string
	keys    []string // of its labels, beyond those that all have
	of      string   // c: containers have it, p: pods, 1, 2: on this version of cgroups
	counter bool
}

// commonKeys are the labels that all have.
var commonKeys = []string{"container", "id", "image", "name", "namespace", "pod"}

var wantedMetrics = []metric{
	{"container_cpu_usage_seconds_total", []string{"cpu"}, "cp", true},
	{"container_cpu_user_seconds_total", nil, "cp", true},
	{"container_cpu_system_seconds_total", nil, "cp", true},
	{"container_cpu_cfs_periods_total", nil, "cp", true},
	{"container_cpu_cfs_throttled_periods_total", nil, "cp", true},
	{"container_cpu_cfs_throttled_seconds_total", nil, "cp", true},
	{"container_cpu_cfs_burst_periods_total", nil, "cp", true},
	{"container_cpu_cfs_burst_seconds_total", nil, "cp", true},
	{"container_memory_usage_bytes", nil, "cp", false},
	{"container_memory_max_usage_bytes", nil, "cp", false},
	{"container_memory_working_set_bytes", nil, "cp", false},
	{"container_memory_rss", nil, "cp", false},
	{"container_memory_cache", nil, "cp", false},
	{"container_memory_mapped_file", nil, "cp", false},
	{"container_memory_kernel_usage", nil, "cp", false},
	{"container_memory_swap", nil, "cp", false},
	{"container_memory_total_active_file_bytes", nil, "cp", false},
	{"container_memory_total_inactive_file_bytes", nil, "cp", false},
	{"container_memory_failcnt", nil, "cp", true},
	{"container_memory_failures_total", []string{"failure_type", "scope"}, "cp", true},
	{"container_memory_events_high_total", nil, "cp2", true},
	{"container_memory_events_max_total", nil, "cp2", true},
	{"container_memory_file_dirty_bytes", nil, "cp", false},
	{"container_memory_file_writeback_bytes", nil, "cp", false},
	{"container_memory_pgscan_total", nil, "cp2", true},
	{"container_memory_pgsteal_total", nil, "cp2", true},
	{"container_memory_workingset_refault_file_total", nil, "cp", true},
	{"container_memory_workingset_refault_anon_total", nil, "cp", true},
	{"container_oom_events_total", nil, "cp", true},
	{"container_pressure_cpu_waiting_seconds_total", nil, "cpP", true},
	{"container_pressure_cpu_stalled_seconds_total", nil, "cpP", true},
	{"container_pressure_memory_waiting_seconds_total", nil, "cpP", true},
	{"container_pressure_memory_stalled_seconds_total", nil, "cpP", true},
	{"container_pressure_io_waiting_seconds_total", nil, "cpP", true},
	{"container_pressure_io_stalled_seconds_total", nil, "cpP", true},
	{"container_fs_usage_bytes", []string{"device"}, "c", false},
	{"container_fs_limit_bytes", []string{"device"}, "c", false},
	{"container_fs_inodes_total", []string{"device"}, "c", false},
	{"container_fs_inodes_free", []string{"device"}, "c", false},
	{"container_fs_reads_bytes_total", []string{"device"}, "", true}, // "": only where a device was used
	{"container_fs_reads_total", []string{"device"}, "", true},
	{"container_fs_writes_bytes_total", []string{"device"}, "", true},
	{"container_fs_writes_total", []string{"device"}, "", true},
	{"container_blkio_device_usage_total", []string{"device", "major", "minor", "operation"}, "", true},
	{"container_hugetlb_usage_bytes", []string{"pagesize"}, "", false}, // where the controller is
	{"container_hugetlb_max_usage_bytes", []string{"pagesize"}, "", false},
	{"container_network_receive_bytes_total", []string{"interface"}, "p", true},
	{"container_network_receive_packets_total", []string{"interface"}, "p", true},
	{"container_network_receive_errors_total", []string{"interface"}, "p", true},
	{"container_network_receive_packets_dropped_total", []string{"interface"}, "p", true},
	{"container_network_transmit_bytes_total", []string{"interface"}, "p", true},
	{"container_network_transmit_packets_total", []string{"interface"}, "p", true},
	{"container_network_transmit_errors_total", []string{"interface"}, "p", true},
	{"container_network_transmit_packets_dropped_total", []string{"interface"}, "p", true},
	{"container_processes", nil, "cp", false},
	{"container_threads", nil, "cp", false},
	{"container_threads_max", nil, "cp", false},
	{"container_file_descriptors", nil, "c", false},
	{"container_sockets", nil, "c", false},
	{"container_ulimits_soft", []string{"ulimit"}, "c", false},
	{"container_last_seen", nil, "c", false},
	{"container_creation_time_seconds", nil, "cp", false},
	{"container_start_time_seconds", nil, "c", false},
	{"container_spec_cpu_period", nil, "cp", false},
	{"container_spec_cpu_quota", nil, "cp", false},
	{"container_spec_cpu_shares", nil, "c", false},
	{"container_spec_memory_limit_bytes", nil, "cp", false},
	{"container_spec_memory_reservation_limit_bytes", nil, "cp", false},
	{"container_spec_memory_swap_limit_bytes", nil, "cp", false},
}

// wants says whether containers ('c') or pods ('p') have the metric on this machine.
func (m metric) wants(kind string) bool {
	other := map[bool]string{true: "1", false: "2"}[v2]
	return strings.Contains(m.of, kind) && !strings.Contains(m.of, other) &&
		(hasPressure || !strings.Contains(m.of, "P"))
}

// sample is one line of metrics.
type sample struct {
	labels map[string]string
	value  float64
}

var (
	sampleLine = regexp.MustCompile(`^(\w+)(?:\{(.*)\})? (\S+)(?: \d+)?$`)
	labelText  = regexp.MustCompile(`(\w+)="((?:[^"\\]|\\.)*)"`)
	typeLine   = regexp.MustCompile(`^# TYPE (\w+) (\w+)$`)
)

// metricsAt reads metrics as Prometheus does: samples and kinds by name.
func (k *kubelet) metricsAt(path string) (samples map[string][]sample, kinds map[string]string) {
	k.t.Helper()
	b, err := k.get(path)
	if err != nil {
		k.t.Fatalf("cannot get %s: %v", path, err)
	}
	samples, kinds = map[string][]sample{}, map[string]string{}
	for line := range strings.SplitSeq(strings.TrimSpace(string(b)), "\n") {
		if m := typeLine.FindStringSubmatch(line); m != nil {
			kinds[m[1]] = m[2]
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			k.t.Errorf("%s has the line %q: %v", path, line, err)
		}
		s := sample{labels: map[string]string{}, value: value}
		for _, l := range labelText.FindAllStringSubmatch(m[2], -1) {
			s.labels[l[1]] = l[2]
		}
		samples[m[1]] = append(samples[m[1]], s)
	}
	return samples, kinds
}

// checkMetrics compares /metrics/cadvisor with what a kubelet shows there that has the
// figures from its own cAdvisor.
func (k *kubelet) checkMetrics() {
	k.t.Helper()
	samples, kinds := k.metricsAt("/metrics/cadvisor")
	for _, m := range wantedMetrics {
		all := samples[m.name]
		delete(samples, m.name)
		for _, s := range all {
			keys := slices.Sorted(maps.Keys(s.labels))
			want := slices.Sorted(slices.Values(append(slices.Clone(commonKeys), m.keys...)))
			if !slices.Equal(keys, want) {
				k.t.Errorf("%s has the labels %v, want %v", m.name, keys, want)
				break
			}
		}
		if kind := map[bool]string{true: "counter", false: "gauge"}[m.counter]; len(all) > 0 && kinds[m.name] != kind {
			k.t.Errorf("%s is a %s, want a %s", m.name, kinds[m.name], kind)
		}
		if m.wants("p") {
			k.checkSample(m, all, "")
		}
		for _, name := range figuresContainers {
			if m.wants("c") {
				k.checkSample(m, all, name)
			}
		}
	}
	for name := range samples {
		if strings.HasPrefix(name, "container_") {
			k.t.Errorf("cAdvisor has no %s", name)
		}
	}
}

// sane are bounds of values of the pod's containers, or of the pod.
var sane = map[string]func(float64) bool{
	"container_memory_working_set_bytes":    func(v float64) bool { return v > 0 && v < 64<<20 },
	"container_processes":                   func(v float64) bool { return v >= 1 && v < 20 },
	"container_threads":                     func(v float64) bool { return v >= 1 && v < 20 },
	"container_spec_cpu_quota":              func(v float64) bool { return v == 50000 || v == 100000 },
	"container_spec_memory_limit_bytes":     func(v float64) bool { return v == 64<<20 || v == 128<<20 },
	"container_network_receive_bytes_total": func(v float64) bool { return v > 0 },
	"container_fs_limit_bytes":              func(v float64) bool { return v > written },
	"container_start_time_seconds":          func(v float64) bool { return v > 1e9 },
}

// checkSample fails unless a container, or "": the pod, has the metric, with all labels.
func (k *kubelet) checkSample(m metric, all []sample, container string) {
	k.t.Helper()
	i := slices.IndexFunc(all, func(s sample) bool {
		return s.labels["pod"] == podName(figuresPod) && s.labels["container"] == container
	})
	if i < 0 {
		k.t.Errorf("there is no %s of %q", m.name, container)
		return
	}
	s := all[i]
	image := map[bool]string{true: "", false: harness.Image}[container == ""]
	if l := s.labels; l["namespace"] != namespace || l["image"] != image || l["name"] == "" ||
		!strings.HasPrefix(l["id"], "/"+strings.Trim(machine.Cgroup(k.n), "/")+"/") {
		k.t.Errorf("%s of %q has the labels %v", m.name, container, l)
	}
	for _, key := range m.keys {
		if s.labels[key] == "" {
			k.t.Errorf("%s of %q has no %s", m.name, container, key)
		}
	}
	if ok := sane[m.name]; ok != nil && !ok(s.value) {
		k.t.Errorf("%s of %q is %v", m.name, container, s.value)
	}
}

// checkResourceMetrics looks at what the metrics server gets.
func (k *kubelet) checkResourceMetrics() {
	k.t.Helper()
	samples, _ := k.metricsAt("/metrics/resource")
	want := map[string]bool{}
	for _, name := range []string{"cpu_usage_seconds_total", "memory_working_set_bytes"} {
		want[fmt.Sprintf("pod_%s %s ", name, podName(figuresPod))] = true
	}
	for _, name := range []string{"cpu_usage_seconds_total", "memory_working_set_bytes", "swap_usage_bytes",
		"start_time_seconds"} {
		for _, c := range figuresContainers {
			want[fmt.Sprintf("container_%s %s %s", name, podName(figuresPod), c)] = true
		}
	}
	for name, all := range samples {
		for _, s := range all {
			delete(want, fmt.Sprintf("%s %s %s", name, s.labels["pod"], s.labels["container"]))
		}
	}
	if len(want) > 0 {
		k.t.Errorf("/metrics/resource lacks %v", slices.Sorted(maps.Keys(want)))
	}
	if e := samples["resource_scrape_error"]; len(e) != 1 || e[0].value != 0 {
		k.t.Errorf("/metrics/resource says that it has had an error: %v", e)
	}
}
