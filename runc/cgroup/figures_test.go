package cgroup

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"testing"
)

// fixture has the cgroup at /c of a machine with these files, by controller and name; ""
// is v2.
func fixture(t *testing.T, files map[string]map[string]string) Set {
	t.Helper()
	dir := t.TempDir()
	var mounted []hierarchy
	for controller, files := range files {
		h := hierarchy{dir: filepath.Join(dir, "h-"+controller), root: "/", names: []string{controller}}
		mounted = append(mounted, h)
		check(t, os.MkdirAll(h.dir+"/c", 0o755))
		for name, text := range files {
			check(t, os.WriteFile(filepath.Join(h.dir, "c", name), []byte(text), 0o600))
		}
	}
	was := hierarchies
	hierarchies = func() []hierarchy { return mounted }
	t.Cleanup(func() { hierarchies = was })
	return At("/c")
}

const unlimitedV1 = "9223372036854771712\n"

var filesV1 = map[string]map[string]string{
	"cpu": {
		"cpu.stat":          "nr_periods 1\nnr_throttled 2\nthrottled_time 3\nnr_bursts 36\nburst_time 37\n",
		"cpu.shares":        "1024\n",
		"cpu.cfs_quota_us":  "-1\n",
		"cpu.cfs_period_us": "100000\n",
	},
	"cpuacct": {"cpuacct.usage": "4\n", "cpuacct.usage_user": "5\n", "cpuacct.usage_sys": "6\n"},
	"memory": {
		"memory.usage_in_bytes":       "7\n",
		"memory.limit_in_bytes":       "100\n",
		"memory.memsw.limit_in_bytes": "150\n",
		"memory.soft_limit_in_bytes":  unlimitedV1,
		"memory.oom_control":          "oom_kill_disable 0\nunder_oom 0\noom_kill 8\n",
		"memory.stat": "cache 1\nrss 2\ntotal_cache 9\ntotal_rss 10\ntotal_swap 11\ntotal_inactive_file 12\n" +
			"dirty 1\ntotal_dirty 38\ntotal_writeback 39\ntotal_workingset_refault_anon 42\ntotal_workingset_refault_file 43\n",
	},
	"pids": {"pids.current": "13\n", "pids.max": "max\n"},
	"blkio": {
		"blkio.throttle.io_service_bytes_recursive": "8:16 Read 14\n8:16 Write 15\n8:16 Sync 1\n8:16 Total 9\nTotal 9\n",
		"blkio.throttle.io_serviced_recursive":      "8:16 Read 16\n8:16 Write 17\n8:16 Total 9\nTotal 9\n",
	},
	"hugetlb": {"hugetlb.2MB.usage_in_bytes": "18\n", "hugetlb.2MB.max_usage_in_bytes": "19\n"},
	// A hybrid has a v2 tree without controllers.
	"": {
		"cpu.stat":     "usage_usec 99\n",
		"cpu.pressure": "some avg10=1.50 avg60=2.00 avg300=3.00 total=20\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=21\n",
	},
}

var filesV2 = map[string]map[string]string{
	"": {
		"cpu.stat": "usage_usec 4\nuser_usec 5\nsystem_usec 6\nnr_periods 1\nnr_throttled 2\n" +
			"throttled_usec 3\nnr_bursts 36\nburst_usec 37\n",
		"cpu.max":             "20000 100000\n",
		"memory.current":      "7\n",
		"memory.max":          "max\n",
		"memory.low":          "0\n",
		"memory.swap.current": "11\n",
		"memory.swap.max":     "50\n",
		"memory.events":       "low 0\nhigh 29\nmax 30\noom 31\noom_kill 8\n",
		"memory.stat": "anon 10\nfile 9\nkernel 32\nfile_dirty 38\nfile_writeback 39\ninactive_file 12\nactive_file 33\n" +
			"workingset_refault_anon 42\nworkingset_refault_file 43\npgscan 40\npgsteal 41\npgfault 34\npgmajfault 35\n",
		"io.stat":             "8:16 rbytes=14 wbytes=15 rios=16 wios=17 dbytes=0 dios=0\n259:1 \n7:0\n",
		"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=22\n",
		"hugetlb.2MB.current": "18\n",
	},
}

var everyFigure = func() (all []Figure) {
	for f := range ThreadsMax + 1 {
		all = append(all, f)
	}
	return all
}()

func TestFigures(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]map[string]string
		want  Figures
	}{
		{"v1", filesV1, Figures{
			CPUUsage: 4, CPUUser: 5, CPUSystem: 6, CPUPeriods: 1, CPUThrottledPeriods: 2, CPUThrottledTime: 3,
			CPUShares: 1024, CPUQuota: NoLimit, CPUPeriod: 100000,
			MemoryUsage: 7, MemoryLimit: 100, MemoryAndSwapLimit: 150, MemoryReservation: NoLimit, MemoryOOMKills: 8,
			MemoryCache: 9, MemoryAnon: 10, MemoryInactiveFile: 12, SwapUsage: 11, SwapLimit: 50,
			CPUBurstPeriods: 36, CPUBurstTime: 37, MemoryDirty: 38, MemoryWriteback: 39,
			MemoryRefaultedAnon: 42, MemoryRefaultedFile: 43,
			Threads: 13, ThreadsMax: NoLimit,
		}},
		{"v2", filesV2, Figures{
			CPUUsage: 4000, CPUUser: 5000, CPUSystem: 6000, CPUPeriods: 1, CPUThrottledPeriods: 2, CPUThrottledTime: 3000,
			CPUQuota: 20000, CPUPeriod: 100000,
			MemoryUsage: 7, MemoryLimit: NoLimit, MemoryReservation: 0, MemoryFailures: 30, MemoryOOMKills: 8,
			MemoryCache: 9, MemoryAnon: 10, MemoryInactiveFile: 12, MemoryActiveFile: 33, MemoryKernel: 32,
			MemoryPageFaults: 34, MemoryMajorPageFaults: 35, SwapUsage: 11, SwapLimit: 50,
			CPUBurstPeriods: 36, CPUBurstTime: 37000, MemoryDirty: 38, MemoryWriteback: 39,
			MemoryHighEvents: 29, MemoryMaxEvents: 30, MemoryPagesScanned: 40, MemoryPagesTaken: 41,
			MemoryRefaultedAnon: 42, MemoryRefaultedFile: 43,
		}},
		{"nothing", nil, Figures{}},
		{"damaged", map[string]map[string]string{"": {"cpu.stat": "usage_usec\n\nuser_usec x\n", "memory.current": ""}},
			Figures{}},
	} {
		if got := fixture(t, c.files).Figures(everyFigure...); !maps.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

// Only the files of what is wanted are read, which counts where the kernel has to add up.
func TestFiguresThatAreWanted(t *testing.T) {
	for name, files := range map[string]map[string]map[string]string{"v1": filesV1, "v2": filesV2} {
		c := fixture(t, files)
		if got := c.Figures(SwapLimit)[SwapLimit]; got != 50 {
			t.Errorf("%s: the limit of swap is %d, want 50", name, got)
		}
		if got := c.Figures(CPUUsage); len(got) != 1 {
			t.Errorf("%s: got %v, want one figure", name, got)
		}
	}
	// Without swap accounting v1 has no limit of it.
	if got, ok := fixture(t, map[string]map[string]string{"memory": {"memory.limit_in_bytes": "1"}}).
		Figures(SwapLimit)[SwapLimit]; ok {
		t.Errorf("the limit of swap is %d, want none", got)
	}
}

func TestPressure(t *testing.T) {
	for _, c := range []struct {
		name, resource string
		files          map[string]map[string]string
		want           *Pressure
	}{
		{"v1 and v2", "cpu", filesV1, &Pressure{Some: Stall{1.5, 2, 3, 20000}, Full: Stall{Avg300: 0.25,
			Total: 21000}}},
		{"v2", "memory", filesV2, &Pressure{Some: Stall{Total: 22000}}},
		{"no file", "io", filesV2, nil},
		{"no v2", "cpu", map[string]map[string]string{"cpu": filesV1["cpu"]}, nil},
	} {
		if got := fixture(t, c.files).Pressure(c.resource); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestTransfers(t *testing.T) {
	readWrite := []Transfer{{"8:16", "Read", 14, 16}, {"8:16", "Write", 15, 17}}
	for _, c := range []struct {
		name  string
		files map[string]map[string]string
		want  []Transfer
	}{
		{"v1", filesV1, readWrite},
		{"v2", filesV2, append(readWrite[:2:2], Transfer{"8:16", "Discard", 0, 0})},
		{"nothing", nil, nil},
	} {
		if got := fixture(t, c.files).Transfers(); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestHugePages(t *testing.T) {
	was := hugePageSizes
	defer func() { hugePageSizes = was }()
	hugePageSizes = func() []string { return []string{"2MB", "1GB"} }
	for _, c := range []struct {
		name  string
		files map[string]map[string]string
		want  []HugePages
	}{
		{"v1", filesV1, []HugePages{{"2MB", 18, 19}}},
		{"v2", filesV2, []HugePages{{"2MB", 18, 0}}},
		{"nothing", nil, nil},
	} {
		if got := fixture(t, c.files).HugePages(); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

// What a process has used is seen, on whatever version this machine has.
func TestFiguresOfProcesses(t *testing.T) {
	path := newCgroup(t)["memory"]
	if path == "" {
		path = "/holdfast-runc-test-" + strconv.Itoa(os.Getpid())
	}
	c := At(path)
	c.join(t, "dd if=/dev/zero of=/dev/null bs=16M count=8 2>/dev/null; exec sleep 1000")
	until(t, "memory was used", func() bool { return c.Figures(MemoryPeak)[MemoryPeak] > 8<<20 })
	got := c.Figures(MemoryUsage, MemoryAnon, MemoryLimit, MemoryPageFaults, Threads)
	if got[MemoryUsage] == 0 || got[MemoryLimit] != NoLimit || got[MemoryPageFaults] == 0 || got[Threads] == 0 {
		t.Errorf("got %v", got)
	}
}
