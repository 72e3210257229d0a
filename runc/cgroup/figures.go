package cgroup

import (
	"math"
	"slices"
	"strconv"
	"strings"
)

// Figure is a number that the kernel has of a cgroup: what it has counted, or a setting.
// Times are in nanoseconds, amounts of memory in bytes. Counters include what is, and
// was, below the cgroup.
type Figure int

// The figures, under one name for both versions of cgroups.
const (
	CPUUsage Figure = iota
	CPUUser
	CPUSystem
	CPUPeriods          // periods of the quota that have passed
	CPUThrottledPeriods // those in which the quota was used up
	CPUThrottledTime
	CPUBurstPeriods // those in which more than the quota was used, saved up before
	CPUBurstTime
	CPUShares // v1 alone
	CPUQuota  // microseconds in each period
	CPUPeriod // microseconds
	MemoryUsage
	MemoryPeak
	MemoryLimit
	MemoryReservation // v1: the soft limit; v2: memory.low
	MemoryAndSwapLimit
	MemoryFailures   // how often the limit was reached
	MemoryHighEvents // how often memory.high was reached; v2 alone, as the next
	MemoryMaxEvents  // how often memory.max was
	MemoryOOMKills
	MemoryAnon
	MemoryCache
	MemoryMapped
	MemoryKernel
	MemoryActiveFile
	MemoryInactiveFile
	MemoryPageFaults // major ones included
	MemoryMajorPageFaults
	MemoryDirty         // page cache that is not on the disk yet
	MemoryWriteback     // page cache that is being written
	MemoryPagesScanned  // v2 alone, as the next
	MemoryPagesTaken    // pages that were taken back
	MemoryRefaultedFile // pages that were taken back and needed again
	MemoryRefaultedAnon
	SwapUsage
	SwapLimit
	Threads
	ThreadsMax
)

// NoLimit is a limit that is none.
const NoLimit = math.MaxUint64

// source is where the kernel shows a figure.
type source struct {
	figure Figure
	file   string // of v1, its name begins with that of its controller
	key    string // the first word of the line; "": the first line
	word   int    // of the line, from 0 on
	unit   uint64
}

var sourcesV1 = []source{
	{CPUUsage, "cpuacct.usage", "", 0, 1},
	{CPUUser, "cpuacct.usage_user", "", 0, 1},
	{CPUSystem, "cpuacct.usage_sys", "", 0, 1},
	{CPUPeriods, "cpu.stat", "nr_periods", 1, 1},
	{CPUThrottledPeriods, "cpu.stat", "nr_throttled", 1, 1},
	{CPUThrottledTime, "cpu.stat", "throttled_time", 1, 1},
	{CPUBurstPeriods, "cpu.stat", "nr_bursts", 1, 1},
	{CPUBurstTime, "cpu.stat", "burst_time", 1, 1},
	{CPUShares, "cpu.shares", "", 0, 1},
	{CPUQuota, "cpu.cfs_quota_us", "", 0, 1},
	{CPUPeriod, "cpu.cfs_period_us", "", 0, 1},
	{MemoryUsage, "memory.usage_in_bytes", "", 0, 1},
	{MemoryPeak, "memory.max_usage_in_bytes", "", 0, 1},
	{MemoryLimit, "memory.limit_in_bytes", "", 0, 1},
	{MemoryReservation, "memory.soft_limit_in_bytes", "", 0, 1},
	{MemoryAndSwapLimit, "memory.memsw.limit_in_bytes", "", 0, 1},
	{MemoryFailures, "memory.failcnt", "", 0, 1},
	{MemoryOOMKills, "memory.oom_control", "oom_kill", 1, 1},
	{MemoryAnon, "memory.stat", "total_rss", 1, 1},
	{MemoryCache, "memory.stat", "total_cache", 1, 1},
	{MemoryMapped, "memory.stat", "total_mapped_file", 1, 1},
	{MemoryKernel, "memory.kmem.usage_in_bytes", "", 0, 1},
	{MemoryActiveFile, "memory.stat", "total_active_file", 1, 1},
	{MemoryInactiveFile, "memory.stat", "total_inactive_file", 1, 1},
	{MemoryPageFaults, "memory.stat", "total_pgfault", 1, 1},
	{MemoryMajorPageFaults, "memory.stat", "total_pgmajfault", 1, 1},
	{MemoryDirty, "memory.stat", "total_dirty", 1, 1},
	{MemoryWriteback, "memory.stat", "total_writeback", 1, 1},
	{MemoryRefaultedFile, "memory.stat", "total_workingset_refault_file", 1, 1},
	{MemoryRefaultedAnon, "memory.stat", "total_workingset_refault_anon", 1, 1},
	{SwapUsage, "memory.stat", "total_swap", 1, 1},
	{Threads, "pids.current", "", 0, 1},
	{ThreadsMax, "pids.max", "", 0, 1},
}

var sourcesV2 = []source{
	{CPUUsage, "cpu.stat", "usage_usec", 1, 1000},
	{CPUUser, "cpu.stat", "user_usec", 1, 1000},
	{CPUSystem, "cpu.stat", "system_usec", 1, 1000},
	{CPUPeriods, "cpu.stat", "nr_periods", 1, 1},
	{CPUThrottledPeriods, "cpu.stat", "nr_throttled", 1, 1},
	{CPUThrottledTime, "cpu.stat", "throttled_usec", 1, 1000},
	{CPUBurstPeriods, "cpu.stat", "nr_bursts", 1, 1},
	{CPUBurstTime, "cpu.stat", "burst_usec", 1, 1000},
	{CPUQuota, "cpu.max", "", 0, 1},
	{CPUPeriod, "cpu.max", "", 1, 1},
	{MemoryUsage, "memory.current", "", 0, 1},
	{MemoryPeak, "memory.peak", "", 0, 1},
	{MemoryLimit, "memory.max", "", 0, 1},
	{MemoryReservation, "memory.low", "", 0, 1},
	{MemoryFailures, "memory.events", "max", 1, 1},
	{MemoryHighEvents, "memory.events", "high", 1, 1},
	{MemoryMaxEvents, "memory.events", "max", 1, 1},
	{MemoryOOMKills, "memory.events", "oom_kill", 1, 1},
	{MemoryAnon, "memory.stat", "anon", 1, 1},
	{MemoryCache, "memory.stat", "file", 1, 1},
	{MemoryMapped, "memory.stat", "file_mapped", 1, 1},
	{MemoryKernel, "memory.stat", "kernel", 1, 1},
	{MemoryActiveFile, "memory.stat", "active_file", 1, 1},
	{MemoryInactiveFile, "memory.stat", "inactive_file", 1, 1},
	{MemoryPageFaults, "memory.stat", "pgfault", 1, 1},
	{MemoryMajorPageFaults, "memory.stat", "pgmajfault", 1, 1},
	{MemoryDirty, "memory.stat", "file_dirty", 1, 1},
	{MemoryWriteback, "memory.stat", "file_writeback", 1, 1},
	{MemoryPagesScanned, "memory.stat", "pgscan", 1, 1},
	{MemoryPagesTaken, "memory.stat", "pgsteal", 1, 1},
	{MemoryRefaultedFile, "memory.stat", "workingset_refault_file", 1, 1},
	{MemoryRefaultedAnon, "memory.stat", "workingset_refault_anon", 1, 1},
	{SwapUsage, "memory.swap.current", "", 0, 1},
	{SwapLimit, "memory.swap.max", "", 0, 1},
	{Threads, "pids.current", "", 0, 1},
	{ThreadsMax, "pids.max", "", 0, 1},
}

// Figures are those that the kernel has.
type Figures map[Figure]uint64

// Figures reads what is wanted, each file once. What cannot be read is left out: a
// controller may be missing, and the cgroup may have gone.
func (c Set) Figures(want ...Figure) Figures {
	found := Figures{}
	if slices.Contains(want, SwapLimit) && c["memory"] != "" {
		want = append(slices.Clone(want), MemoryLimit, MemoryAndSwapLimit)
	}
	c.figures(sourcesV1, func(file string) string { controller, _, _ := strings.Cut(file, "."); return controller },
		want, found)
	c.figures(sourcesV2, func(string) string { return "" }, want, found)
	// v1 limits memory and swap together.
	if both, ok := found[MemoryAndSwapLimit]; ok && both >= found[MemoryLimit] {
		found[SwapLimit] = both - found[MemoryLimit]
		if both == NoLimit {
			found[SwapLimit] = NoLimit
		}
	}
	return found
}

// figures adds those of a table that are wanted and not found yet.
func (c Set) figures(table []source, controllerOf func(file string) string, want []Figure, found Figures) {
	files := map[string][][]string{}
	for _, s := range table {
		controller := controllerOf(s.file)
		if _, have := found[s.figure]; have || c[controller] == "" || !slices.Contains(want, s.figure) {
			continue
		}
		lines, read := files[s.file]
		if !read {
			lines, _ = c.Words(controller, s.file)
			files[s.file] = lines
		}
		for _, words := range lines {
			if s.key != "" && words[0] != s.key || s.word >= len(words) {
				continue
			}
			if n, ok := Number(words[s.word]); ok {
				found[s.figure] = scaled(n, s.unit)
			}
			break
		}
	}
}

func scaled(n, unit uint64) uint64 {
	if n == NoLimit {
		return n
	}
	return n * unit
}

// Number reads a number of the kernel. Its ways to say that there is no limit are
// NoLimit: "max", -1, and the largest number of pages that v1 can count.
func Number(word string) (uint64, bool) {
	if word == "max" || word == "-1" {
		return NoLimit, true
	}
	n, err := strconv.ParseUint(word, 10, 64)
	if n >= math.MaxInt64&^(1<<16-1) { // pages are no larger
		n = NoLimit
	}
	return n, err == nil
}
