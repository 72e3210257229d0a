package stats

import (
	"slices"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// metrics are those that the kubelet shows under /metrics/cadvisor, by the names and
// labels that they have there.
var metrics = slices.Concat(cpuMetrics, memoryMetrics, pressureMetrics, diskMetrics, networkMetrics, processMetrics,
	settingMetrics)

var cpuMetrics = []metric{
	{
		name:    "container_cpu_usage_seconds_total",
		help:    "Seconds of processor time that were used, on all processors together.",
		keys:    []string{"cpu"},
		figures: []cgroup.Figure{cgroup.CPUUsage},
		points: func(s *subject) []point {
			return s.counted(cgroup.CPUUsage, second, "total")
		},
	},
	count("container_cpu_user_seconds_total", "Seconds of processor time in user space.", cgroup.CPUUser, second),
	count("container_cpu_system_seconds_total", "Seconds of processor time in the kernel.", cgroup.CPUSystem, second),
	count("container_cpu_cfs_periods_total", "Periods of the processor quota that have passed.", cgroup.CPUPeriods, 1),
	count("container_cpu_cfs_throttled_periods_total", "Periods in which the processor quota was used up.",
		cgroup.CPUThrottledPeriods, 1),
	count("container_cpu_cfs_throttled_seconds_total", "Seconds spent waiting for the next period of the quota.",
		cgroup.CPUThrottledTime, second),
	count("container_cpu_cfs_burst_periods_total", "Periods in which more than the quota was used.",
		cgroup.CPUBurstPeriods, 1),
	count("container_cpu_cfs_burst_seconds_total", "Seconds of processor time beyond the quota of their period.",
		cgroup.CPUBurstTime, second),
}

var memoryMetrics = []metric{
	level("container_memory_usage_bytes", "Bytes of memory that are charged.", cgroup.MemoryUsage),
	level("container_memory_max_usage_bytes", "The most bytes of memory that were charged.", cgroup.MemoryPeak),
	{
		name:    "container_memory_working_set_bytes",
		help:    "Bytes of memory that are charged, without inactive page cache.",
		kind:    gauge,
		figures: []cgroup.Figure{cgroup.MemoryUsage, cgroup.MemoryInactiveFile},
		points: func(s *subject) []point {
			n, ok := workingSet(s.figures)
			return some(ok, n)
		},
	},
	level("container_memory_rss", "Bytes of anonymous memory.", cgroup.MemoryAnon),
	level("container_memory_cache", "Bytes of page cache.", cgroup.MemoryCache),
	level("container_memory_mapped_file", "Bytes of files that are mapped.", cgroup.MemoryMapped),
	level("container_memory_kernel_usage", "Bytes of memory of the kernel.", cgroup.MemoryKernel),
	level("container_memory_swap", "Bytes that are swapped out.", cgroup.SwapUsage),
	level("container_memory_total_active_file_bytes", "Bytes of page cache in use.", cgroup.MemoryActiveFile),
	level("container_memory_total_inactive_file_bytes", "Bytes of page cache not in use.", cgroup.MemoryInactiveFile),
	count("container_memory_failcnt", "How often the memory limit was reached.", cgroup.MemoryFailures, 1),
	count("container_memory_events_high_total", "How often the process was slowed down at memory.high.",
		cgroup.MemoryHighEvents, 1),
	count("container_memory_events_max_total", "How often memory.max was reached.", cgroup.MemoryMaxEvents, 1),
	level("container_memory_file_dirty_bytes", "Bytes of page cache that are not on the disk yet.", cgroup.MemoryDirty),
	level("container_memory_file_writeback_bytes", "Bytes of page cache that are being written to the disk.",
		cgroup.MemoryWriteback),
	count("container_memory_pgscan_total", "Pages that were looked at to take them back.",
		cgroup.MemoryPagesScanned, 1),
	count("container_memory_pgsteal_total", "Pages that were taken back.", cgroup.MemoryPagesTaken, 1),
	count("container_memory_workingset_refault_file_total", "Pages of files that were taken back and needed again.",
		cgroup.MemoryRefaultedFile, 1),
	count("container_memory_workingset_refault_anon_total", "Anonymous pages that were taken back and needed again.",
		cgroup.MemoryRefaultedAnon, 1),
	count("container_oom_events_total", "Processes that the OOM killer has killed.", cgroup.MemoryOOMKills, 1),
	{
		name:    "container_memory_failures_total",
		help:    "Page faults, by kind: pgmajfault waited for a disk, pgfault are all.",
		keys:    []string{"failure_type", "scope"},
		figures: []cgroup.Figure{cgroup.MemoryPageFaults, cgroup.MemoryMajorPageFaults},
		points: func(s *subject) (list []point) {
			// The kernel counts for the tree below a cgroup. Both scopes are that.
			for _, scope := range []string{"container", "hierarchy"} {
				list = append(list, s.counted(cgroup.MemoryPageFaults, 1, "pgfault", scope)...)
				list = append(list, s.counted(cgroup.MemoryMajorPageFaults, 1, "pgmajfault", scope)...)
			}
			return list
		},
	},
	{
		name:   "container_hugetlb_usage_bytes",
		help:   "Bytes of huge pages in use.",
		kind:   gauge,
		keys:   []string{"pagesize"},
		points: hugePages(func(h cgroup.HugePages) (uint64, bool) { return h.Usage, true }),
	},
	{
		name:   "container_hugetlb_max_usage_bytes",
		help:   "The most bytes of huge pages that were in use.",
		kind:   gauge,
		keys:   []string{"pagesize"},
		points: hugePages(func(h cgroup.HugePages) (uint64, bool) { return h.Peak, h.Peak > 0 }),
	},
}

var pressureMetrics = []metric{
	stalled("container_pressure_cpu_waiting_seconds_total", "some tasks waited for a processor", "cpu", false),
	stalled("container_pressure_cpu_stalled_seconds_total", "all tasks waited for a processor", "cpu", true),
	stalled("container_pressure_memory_waiting_seconds_total", "some tasks waited for memory", "memory", false),
	stalled("container_pressure_memory_stalled_seconds_total", "all tasks waited for memory", "memory", true),
	stalled("container_pressure_io_waiting_seconds_total", "some tasks waited for a device", "io", false),
	stalled("container_pressure_io_stalled_seconds_total", "all tasks waited for a device", "io", true),
}

var diskMetrics = []metric{
	onDisk("container_fs_usage_bytes", "Bytes of the writable layer.",
		func(s *subject) (uint64, time.Time) { return s.layer.bytes, s.layer.at }),
	onDisk("container_fs_limit_bytes", "Bytes of the file system of the writable layer.",
		func(s *subject) (uint64, time.Time) { return s.disk.bytes, s.disk.at }),
	onDisk("container_fs_inodes_total", "Inodes of the file system of the writable layer.",
		func(s *subject) (uint64, time.Time) { return s.disk.inodes, s.disk.at }),
	onDisk("container_fs_inodes_free", "Free inodes of the file system of the writable layer.",
		func(s *subject) (uint64, time.Time) { return s.disk.freeNodes, s.disk.at }),
	transferred("container_fs_reads_bytes_total", "Bytes read from a device.", "Read",
		func(t cgroup.Transfer) uint64 { return t.Bytes }),
	transferred("container_fs_reads_total", "Reads from a device.", "Read",
		func(t cgroup.Transfer) uint64 { return t.Count }),
	transferred("container_fs_writes_bytes_total", "Bytes written to a device.", "Write",
		func(t cgroup.Transfer) uint64 { return t.Bytes }),
	transferred("container_fs_writes_total", "Writes to a device.", "Write",
		func(t cgroup.Transfer) uint64 { return t.Count }),
	{
		name: "container_blkio_device_usage_total",
		help: "Bytes that went to or from a device, by operation.",
		keys: []string{"device", "major", "minor", "operation"},
		points: func(s *subject) (list []point) {
			for _, t := range s.transfers {
				major, minor, _ := strings.Cut(t.Device, ":")
				list = append(list, point{n: t.Bytes, labels: []string{deviceOf(t.Device), major, minor, t.Operation}})
			}
			return list
		},
	},
}

var networkMetrics = []metric{
	onLink("container_network_receive_bytes_total", "Bytes received.",
		func(l link) uint64 { return l.rx.bytes }),
	onLink("container_network_receive_packets_total", "Packets received.",
		func(l link) uint64 { return l.rx.packets }),
	onLink("container_network_receive_errors_total", "Errors of receiving.",
		func(l link) uint64 { return l.rx.errors }),
	onLink("container_network_receive_packets_dropped_total", "Packets dropped when they were received.",
		func(l link) uint64 { return l.rx.dropped }),
	onLink("container_network_transmit_bytes_total", "Bytes sent.",
		func(l link) uint64 { return l.tx.bytes }),
	onLink("container_network_transmit_packets_total", "Packets sent.",
		func(l link) uint64 { return l.tx.packets }),
	onLink("container_network_transmit_errors_total", "Errors of sending.",
		func(l link) uint64 { return l.tx.errors }),
	onLink("container_network_transmit_packets_dropped_total", "Packets dropped instead of being sent.",
		func(l link) uint64 { return l.tx.dropped }),
}

var processMetrics = []metric{
	{
		name:   "container_processes",
		help:   "Processes.",
		kind:   gauge,
		points: func(s *subject) []point { return s.processes },
	},
	level("container_threads", "Threads.", cgroup.Threads),
	limit("container_threads_max", "The most threads that there can be; 0: no limit.", cgroup.ThreadsMax),
	{
		name:   "container_file_descriptors",
		help:   "Open file descriptors of all processes.",
		kind:   gauge,
		points: func(s *subject) []point { return s.opened },
	},
	{
		name:   "container_sockets",
		help:   "Open sockets of all processes.",
		kind:   gauge,
		points: func(s *subject) []point { return s.sockets },
	},
	{
		name:   "container_ulimits_soft",
		help:   "Soft limits of the first process.",
		kind:   gauge,
		keys:   []string{"ulimit"},
		points: func(s *subject) []point { return s.openFiles },
	},
	{
		name: "container_last_seen",
		help: "When the container was seen last, in seconds of Unix time.",
		kind: gauge,
		points: func(s *subject) []point {
			return some(s.container, uint64(time.Now().Unix()))
		},
	},
	{
		name: "container_creation_time_seconds",
		help: "When the container was created, in seconds of Unix time.",
		kind: gauge,
		points: func(s *subject) []point {
			return some(s.created.Unix() > 0, uint64(s.created.Unix()))
		},
	},
	{
		name: "container_start_time_seconds",
		help: "When the container was started, in seconds of Unix time.",
		kind: gauge,
		points: func(s *subject) []point {
			return some(s.start.Unix() > 0, uint64(s.start.Unix()))
		},
	},
}

var settingMetrics = []metric{
	level("container_spec_cpu_period", "Microseconds of a period of the processor quota.", cgroup.CPUPeriod),
	{
		name:    "container_spec_cpu_quota",
		help:    "Microseconds of processor time in each period; nothing without a quota.",
		kind:    gauge,
		figures: []cgroup.Figure{cgroup.CPUQuota},
		points: func(s *subject) []point {
			n, ok := s.figures[cgroup.CPUQuota]
			return some(ok && n != cgroup.NoLimit, n)
		},
	},
	{
		name:    "container_spec_cpu_shares",
		help:    "The weight among those that want a processor.",
		kind:    gauge,
		figures: []cgroup.Figure{cgroup.CPUShares},
		points: func(s *subject) []point {
			n, ok := s.figures[cgroup.CPUShares]
			if !ok {
				n, ok = s.shares, s.shares > 0
			}
			return some(ok, n)
		},
	},
	limit("container_spec_memory_limit_bytes", "The most bytes of memory; 0: no limit.", cgroup.MemoryLimit),
	limit("container_spec_memory_reservation_limit_bytes", "Bytes of memory that are left alone; 0: none.",
		cgroup.MemoryReservation),
	{
		name:    "container_spec_memory_swap_limit_bytes",
		help:    "The most bytes of swap, on cgroup v1 of memory and swap together; 0: no limit.",
		kind:    gauge,
		figures: []cgroup.Figure{cgroup.MemoryAndSwapLimit, cgroup.SwapLimit},
		points: func(s *subject) []point {
			n, ok := s.figures[cgroup.MemoryAndSwapLimit]
			if !ok {
				n, ok = s.figures[cgroup.SwapLimit]
			}
			return some(ok, unlimited(n))
		},
	},
}

// some is one value, or none.
func some(ok bool, n uint64) []point {
	if !ok {
		return nil
	}
	return []point{{n: n}}
}

// unlimited is a limit as metrics show it.
func unlimited(n uint64) uint64 {
	if n == cgroup.NoLimit {
		return 0
	}
	return n
}

// counted is a figure in another unit.
func (s *subject) counted(f cgroup.Figure, unit uint64, labels ...string) []point {
	n, ok := s.figures[f]
	if !ok {
		return nil
	}
	return []point{{n: n / unit, labels: labels}}
}

func count(name, help string, f cgroup.Figure, unit uint64) metric {
	return metric{
		name:    name,
		help:    help,
		figures: []cgroup.Figure{f},
		points:  func(s *subject) []point { return s.counted(f, unit) },
	}
}

func level(name, help string, f cgroup.Figure) metric {
	m := count(name, help, f, 1)
	m.kind = gauge
	return m
}

func limit(name, help string, f cgroup.Figure) metric {
	m := level(name, help, f)
	m.points = func(s *subject) []point {
		n, ok := s.figures[f]
		return some(ok, unlimited(n))
	}
	return m
}

func stalled(name, what, resource string, full bool) metric {
	return metric{
		name: name,
		help: "Seconds in which " + what + ".",
		points: func(s *subject) []point {
			p := s.pressure[resource]
			switch {
			case p == nil:
				return nil
			case full:
				return some(true, p.Full.Total/second)
			}
			return some(true, p.Some.Total/second)
		},
	}
}

func hugePages(get func(cgroup.HugePages) (uint64, bool)) func(*subject) []point {
	return func(s *subject) (list []point) {
		for _, h := range s.pages {
			if n, ok := get(h); ok {
				list = append(list, point{n: n, labels: []string{h.Size}})
			}
		}
		return list
	}
}

// onDisk is a metric of the writable layer, and as old as its measurement.
func onDisk(name, help string, get func(*subject) (uint64, time.Time)) metric {
	return metric{
		name: name,
		help: help,
		kind: gauge,
		keys: []string{"device"},
		points: func(s *subject) []point {
			if s.layer == nil || s.disk.at.IsZero() {
				return nil
			}
			n, at := get(s)
			return []point{{n: n, labels: []string{s.disk.device}, at: at}}
		},
	}
}

func transferred(name, help, operation string, get func(cgroup.Transfer) uint64) metric {
	return metric{
		name: name,
		help: help,
		keys: []string{"device"},
		points: func(s *subject) (list []point) {
			for _, t := range s.transfers {
				if t.Operation == operation {
					list = append(list, point{n: get(t), labels: []string{deviceOf(t.Device)}})
				}
			}
			return list
		},
	}
}

func onLink(name, help string, get func(link) uint64) metric {
	return metric{
		name: name,
		help: help,
		keys: []string{"interface"},
		points: func(s *subject) (list []point) {
			for _, l := range s.links {
				list = append(list, point{n: get(l), labels: []string{l.name}})
			}
			return list
		},
	}
}
