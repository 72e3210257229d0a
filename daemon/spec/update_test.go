package spec

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

type res = cri.LinuxContainerResources

var wholeHost = Host{
	CgroupV2:         true,
	SwapSupported:    true,
	HugetlbSupported: true,
	MinOOMScoreAdj:   -10,
	CPUs:             "0-3",
	Mems:             "0",
}

// What a request does not set stays. Everything that is set the first time has the
// kernel's default in what takes it back.
func TestUpdate(t *testing.T) {
	pages := func(size string, n uint64) *cri.HugepageLimit { return &cri.HugepageLimit{PageSize: size, Limit: n} }
	for name, c := range map[string]struct {
		old, request, wanted *res
		resources, undo      string
		adj                  [2]int
	}{
		"the first limits": {
			request:   &res{CpuShares: 512, CpuQuota: 5000, CpuPeriod: 10000, MemoryLimitInBytes: 9000},
			wanted:    &res{CpuShares: 512, CpuQuota: 5000, CpuPeriod: 10000, MemoryLimitInBytes: 9000},
			resources: `{"memory":{"limit":9000,"swap":9000},"cpu":{"shares":512,"quota":5000,"period":10000}}`,
			undo:      `{"memory":{"limit":-1,"swap":-1},"cpu":{"shares":1024,"quota":-1,"period":100000}}`,
		},
		"some of them": {
			old:     &res{CpuShares: 512, CpuQuota: 5000, MemoryLimitInBytes: 9000},
			request: &res{CpuQuota: -1, CpusetCpus: "0-1", CpusetMems: "0"},
			wanted: &res{
				CpuShares:          512,
				CpuQuota:           -1,
				MemoryLimitInBytes: 9000,
				CpusetCpus:         "0-1",
				CpusetMems:         "0",
			},
			resources: `{"memory":{"limit":9000,"swap":9000},"cpu":{"shares":512,"quota":-1,"cpus":"0-1","mems":"0"}}`,
			undo:      `{"memory":{"limit":9000,"swap":9000},"cpu":{"shares":512,"quota":5000}}`,
		},
		"more memory, and no swap still": {
			old:       &res{MemoryLimitInBytes: 9000, MemorySwapLimitInBytes: 9000},
			request:   &res{MemoryLimitInBytes: 10000},
			wanted:    &res{MemoryLimitInBytes: 10000, MemorySwapLimitInBytes: 10000},
			resources: `{"memory":{"limit":10000,"swap":10000}}`,
			undo:      `{"memory":{"limit":9000,"swap":9000}}`,
		},
		"swap alone": {
			old:       &res{MemoryLimitInBytes: 9000},
			request:   &res{MemorySwapLimitInBytes: 12000},
			wanted:    &res{MemoryLimitInBytes: 9000, MemorySwapLimitInBytes: 12000},
			resources: `{"memory":{"limit":9000,"swap":12000}}`,
			undo:      `{"memory":{"limit":9000,"swap":9000}}`,
		},
		"no memory limit any more": {
			old:       &res{MemoryLimitInBytes: 9000},
			request:   &res{MemoryLimitInBytes: -1},
			wanted:    &res{MemoryLimitInBytes: -1},
			resources: `{"memory":{"limit":-1,"swap":-1}}`,
			undo:      `{"memory":{"limit":9000,"swap":9000}}`,
		},
		"huge pages, oom_score_adj": {
			old: &res{OomScoreAdj: -999, HugepageLimits: []*cri.HugepageLimit{pages("2MB", 1), pages("1GB", 0)}},
			request: &res{OomScoreAdj: 500, HugepageLimits: []*cri.HugepageLimit{pages("2MB", 2),
				pages("64KB", 3)}},
			wanted: &res{OomScoreAdj: 500, HugepageLimits: []*cri.HugepageLimit{pages("2MB", 2),
				pages("1GB", 0), pages("64KB", 3)}},
			resources: `{"hugepageLimits":[{"pageSize":"2MB","limit":2},{"pageSize":"1GB","limit":0},` +
				`{"pageSize":"64KB","limit":3}]}`,
			undo: `{"hugepageLimits":[{"pageSize":"2MB","limit":1},{"pageSize":"1GB","limit":0}]}`,
			adj:  [2]int{-10, 500},
		},
		"unified, set and cleared": {
			old:       &res{Unified: map[string]string{"memory.min": "4096", "memory.high": "8192"}},
			request:   &res{Unified: map[string]string{"memory.min": "0", "memory.low": "1"}},
			wanted:    &res{Unified: map[string]string{"memory.min": "0", "memory.low": "1", "memory.high": "8192"}},
			resources: `{"unified":{"memory.high":"8192","memory.low":"1","memory.min":"0"}}`,
			undo:      `{"unified":{"memory.high":"8192","memory.min":"4096"}}`,
		},
		"nothing": {
			old:       &res{CpuShares: 2},
			request:   &res{},
			wanted:    &res{CpuShares: 2},
			resources: `{"cpu":{"shares":2}}`,
			undo:      `{"cpu":{"shares":2}}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := proto.Clone(c.old)
			got, err := Update(wholeHost, c.old, c.request)
			check(t, err)
			resources, _ := json.Marshal(got.Resources)
			undo, _ := json.Marshal(got.Undo)
			if string(resources) != c.resources || string(undo) != c.undo {
				t.Errorf("got\n%s, taken back by\n%s; want\n%s\n%s", resources, undo, c.resources, c.undo)
			}
			if !proto.Equal(got.Wanted, c.wanted) || got.OOMScoreAdj != c.adj {
				t.Errorf("got %v, %v", got.Wanted, got.OOMScoreAdj)
			}
			if !proto.Equal(before, c.old) {
				t.Errorf("what was before is %v now", c.old)
			}
		})
	}
}

// A request is checked together with what the container has.
func TestUpdateRefuses(t *testing.T) {
	old := &res{MemoryLimitInBytes: 9000, MemorySwapLimitInBytes: 12000}
	for name, c := range map[string]struct {
		request *res
		host    Host
		field   string
		kind    error
	}{
		"nothing":          {nil, wholeHost, "linux", kind.Invalid},
		"a small quota":    {&res{CpuQuota: 10}, wholeHost, "linux.cpu_quota", kind.Invalid},
		"a negative limit": {&res{MemoryLimitInBytes: -2}, wholeHost, "linux.memory_limit_in_bytes", kind.Invalid},
		"a limit above what is said of swap": {
			&res{MemoryLimitInBytes: 20000}, wholeHost, "linux.memory_swap_limit_in_bytes", kind.Invalid,
		},
		"swap without a limit": {
			&res{MemoryLimitInBytes: -1}, wholeHost, "linux.memory_swap_limit_in_bytes", kind.Invalid,
		},
		"a cpuset": {&res{CpusetCpus: "3-1"}, wholeHost, "linux.cpuset_cpus", kind.Invalid},
		"a cpu that the machine does not have": {
			&res{CpusetCpus: "0,2-4"}, wholeHost, "linux.cpuset_cpus", kind.Invalid,
		},
		"a node that the machine does not have": {&res{CpusetMems: "1"}, wholeHost, "linux.cpuset_mems", kind.Invalid},
		"oom score": {&res{OomScoreAdj: 1001}, wholeHost, "linux.oom_score_adj",
			kind.Invalid},
		"a page": {
			&res{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2M"}}}, wholeHost,
			"linux.hugepage_limits[0].page_size", kind.Invalid,
		},
		"a file": {
			&res{Unified: map[string]string{"../memory.max": "1"}}, wholeHost, "linux.unified", kind.Invalid,
		},
		"unified on v1": {
			&res{Unified: map[string]string{"memory.max": "1"}}, Host{}, "linux.unified", kind.Unsupported,
		},
	} {
		_, err := Update(c.host, old, c.request)
		if !errors.Is(err, c.kind) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("%s: %v, want one about %s", name, err, c.field)
		}
	}
}
