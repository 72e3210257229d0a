package taskapi

import (
	"context"
	"math"
	"strconv"
	"strings"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// place is where fields of a Metrics message are: in the message that is its first
// field, in the one that is the second field of that (0: not in another one), from the
// third field on. Messages that are there twice are merged by whoever reads them.
type place [3]number

// counters says where the counters of a file go.
type counters struct {
	to   place
	file string
	keys string // for one field after the other; - is none. "": the file is one number
}

// The metrics of cgroup v1. The name of a file begins with that of its controller.
var metricsV1 = []counters{
	{place{2, 0, 1}, "pids.current", ""},
	{place{2, 0, 2}, "pids.max", ""},
	{place{3, 1, 1}, "cpuacct.usage", ""},
	{place{3, 1, 2}, "cpuacct.usage_sys", ""},
	{place{3, 1, 3}, "cpuacct.usage_user", ""},
	{place{3, 2, 1}, "cpu.stat", "nr_periods nr_throttled throttled_time"},
	{place{4, 0, 1}, "memory.stat", "cache rss rss_huge mapped_file dirty writeback pgpgin pgpgout pgfault " +
		"pgmajfault inactive_anon active_anon inactive_file active_file unevictable hierarchical_memory_limit " +
		"hierarchical_memsw_limit total_cache total_rss total_rss_huge total_mapped_file total_dirty " +
		"total_writeback total_pgpgin total_pgpgout total_pgfault total_pgmajfault total_inactive_anon " +
		"total_active_anon total_inactive_file total_active_file total_unevictable"},
	{place{4, 33, 1}, "memory.limit_in_bytes", ""},
	{place{4, 33, 2}, "memory.usage_in_bytes", ""},
	{place{4, 33, 3}, "memory.max_usage_in_bytes", ""},
	{place{4, 33, 4}, "memory.failcnt", ""},
	{place{4, 34, 1}, "memory.memsw.limit_in_bytes", ""},
	{place{4, 34, 2}, "memory.memsw.usage_in_bytes", ""},
	{place{4, 34, 3}, "memory.memsw.max_usage_in_bytes", ""},
	{place{4, 34, 4}, "memory.memsw.failcnt", ""},
	{place{9, 0, 1}, "memory.oom_control", "oom_kill_disable under_oom oom_kill"},
}

// The metrics of cgroup v2.
var metricsV2 = []counters{
	{place{1, 0, 1}, "pids.current", ""},
	{place{1, 0, 2}, "pids.max", ""},
	{place{2, 0, 1}, "cpu.stat", "usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec - " +
		"nr_bursts burst_usec"},
	{place{4, 0, 1}, "memory.stat", "anon file kernel_stack slab sock shmem file_mapped file_dirty " +
		"file_writeback anon_thp inactive_anon active_anon inactive_file active_file unevictable " +
		"slab_reclaimable slab_unreclaimable pgfault pgmajfault workingset_refault workingset_activate " +
		"workingset_nodereclaim pgrefill pgscan pgsteal pgactivate pgdeactivate pglazyfree pglazyfreed " +
		"thp_fault_alloc thp_collapse_alloc"},
	{place{4, 0, 32}, "memory.current", ""},
	{place{4, 0, 33}, "memory.max", ""},
	{place{4, 0, 34}, "memory.swap.current", ""},
	{place{4, 0, 35}, "memory.swap.max", ""},
	{place{4, 0, 36}, "memory.peak", ""},
	{place{4, 0, 37}, "memory.swap.peak", ""},
	{place{8, 0, 1}, "memory.events", "low high max oom oom_kill oom_group_kill"},
}

// put adds what a file has to the metrics.
func (c *counters) put(metrics message, words [][]string) message {
	var fields message
	if c.keys == "" {
		if len(words) == 1 {
			fields = fields.putUint(c.to[2], value(words[0][0]))
		}
	} else {
		values := map[string]uint64{}
		for _, w := range words {
			values[w[0]] = value(w[len(w)-1])
		}
		for i, key := range strings.Fields(c.keys) {
			fields = fields.putUint(c.to[2]+number(i), values[key])
		}
	}
	if c.to[1] > 0 {
		fields = message(nil).putMessage(c.to[1], fields)
	}
	return metrics.putMessage(c.to[0], fields)
}

// value reads a number of the kernel. No limit is the largest number there is.
func value(word string) uint64 {
	if word == "max" {
		return math.MaxUint64
	}
	v, _ := strconv.ParseUint(word, 10, 64)
	return v
}

// reading gives the words of each line of a file in the cgroup of a controller.
type reading func(controller, file string) ([][]string, error)

// metricsOf gives a Metrics message of cgroup v1 or v2.
func metricsOf(read reading, v1 bool) (metrics message, err error) {
	table, transfers := metricsV2, transfersV2
	if v1 {
		table, transfers = metricsV1, transfersV1
	}
	for i := range table {
		controller := ""
		if v1 {
			controller, _, _ = strings.Cut(table[i].file, ".")
		}
		words, err := read(controller, table[i].file)
		if err != nil {
			return nil, err
		}
		metrics = table[i].put(metrics, words)
	}
	return transfers(metrics, read)
}

// transfersV1 adds the bytes and the operations of block devices. A line is
// "8:0 Read 1", or has a total.
func transfersV1(metrics message, read reading) (message, error) {
	for i, file := range []string{"blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_serviced_recursive"} {
		words, err := read("blkio", file)
		if err != nil {
			return nil, err
		}
		for _, w := range words {
			if len(w) == 3 {
				entry := putDevice(message(nil).putText(1, w[1]), w[0], 3).putUint(5, value(w[2]))
				metrics = metrics.putMessage(5, message(nil).putMessage(number(1+i), entry))
			}
		}
	}
	return metrics, nil
}

// transfersV2 is the same of v2. A line is "8:0 rbytes=1 wbytes=2 rios=3 wios=4", and
// more.
func transfersV2(metrics message, read reading) (message, error) {
	words, err := read("", "io.stat")
	for _, w := range words {
		entry := putDevice(nil, w[0], 1)
		for i, key := range []string{"rbytes", "wbytes", "rios", "wios"} {
			for _, pair := range w[1:] {
				if n, ok := strings.CutPrefix(pair, key+"="); ok {
					entry = entry.putUint(number(3+i), value(n))
				}
			}
		}
		metrics = metrics.putMessage(6, message(nil).putMessage(1, entry))
	}
	return metrics, err
}

// putDevice adds the two numbers of a block device.
func putDevice(entry message, device string, first number) message {
	major, minor, _ := strings.Cut(device, ":")
	return entry.putUint(first, value(major)).putUint(first+1, value(minor))
}

func (s *service) stats(ctx context.Context, m message) (message, error) {
	if err := s.check(m); err != nil {
		return nil, err
	}
	st, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	if st.Phase != pb.Phase_PHASE_CREATED && st.Phase != pb.Phase_PHASE_RUNNING {
		return nil, kind.Errorf(kind.State, "the container has no counters: it is not created yet, or has ended")
	}
	name := "io.containerd.cgroups.v2.Metrics"
	_, v1 := st.Cgroups["memory"]
	if v1 {
		name = "io.containerd.cgroups.v1.Metrics"
	}
	metrics, err := metricsOf(cgroup.Set(st.Cgroups).Words, v1)
	if err != nil {
		return nil, err
	}
	return message(nil).putMessage(1, anyOf(name, metrics)), nil
}
