package spec

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const fieldResources = "config.linux.resources"

// resources sets only what the config sets. oom_score_adj is not among them: it
// is no property of a cgroup.
func (b *builder) resources() error {
	set, warnings, err := limits(b.Host, fieldResources, b.Container.GetLinux().GetResources())
	if err != nil {
		return err
	}
	out := b.spec.Linux.Resources
	out.CPU, out.Memory, out.HugepageLimits, out.Unified = set.CPU, set.Memory, set.HugepageLimits, set.Unified
	b.warnings = append(b.warnings, warnings...)
	return nil
}

// limits are the resources r, which the request has under the name field.
func limits(h Host, field string, r *runtimeapi.LinuxContainerResources,
) (out *specs.LinuxResources, warnings []string, err error) {
	for _, set := range []struct{ name, list, all string }{
		{"cpuset_cpus", r.GetCpusetCpus(), h.CPUs},
		{"cpuset_mems", r.GetCpusetMems(), h.Mems},
	} {
		if !within(set.list, set.all) {
			return nil, nil, invalid(field+"."+set.name, "%q is not within %q, which the machine has now",
				set.list, set.all)
		}
	}
	out = &specs.LinuxResources{CPU: cpuOf(r)}
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	var memory specs.LinuxMemory
	if limit != 0 {
		memory.Limit = new(limit)
	}
	if swap == 0 {
		// Both count memory and swap together: equal means no swap, which is
		// what a memory limit in Kubernetes means unless it says otherwise.
		swap = limit
	}
	if swap != 0 && h.SwapSupported {
		memory.Swap = new(swap)
	}
	if memory != (specs.LinuxMemory{}) {
		out.Memory = &memory
	}

	for i, l := range r.GetHugepageLimits() {
		if h.PageSizes != nil && !slices.Contains(h.PageSizes, l.GetPageSize()) {
			return nil, nil, invalid(fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i),
				"the kernel has no huge pages of %.100q, only of %s", l.GetPageSize(), strings.Join(h.PageSizes, ", "))
		}
		if !h.HugetlbSupported {
			if l.GetLimit() != 0 {
				warnings = append(warnings, fmt.Sprintf("%s.hugepage_limits: there is no hugetlb controller: "+
					"the limit of %s pages is not set", field, l.GetPageSize()))
			}
			continue
		}
		limit := specs.LinuxHugepageLimit{Pagesize: l.GetPageSize(), Limit: l.GetLimit()}
		out.HugepageLimits = append(out.HugepageLimits, limit)
	}
	if err := checkUnified(h, field+".unified", r.GetUnified()); err != nil {
		return nil, nil, err
	}
	if len(r.GetUnified()) > 0 {
		out.Unified = maps.Clone(r.GetUnified())
	}
	return out, warnings, nil
}

// checkUnified refuses files of cgroup v2 that this kernel has not, and those that are not
// there to be limits: what is written to them is done once, and to other processes.
func checkUnified(h Host, field string, files map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		controller, _, _ := strings.Cut(name, ".")
		ofIt := func(file string) bool { return strings.HasPrefix(file, controller+".") }
		switch {
		case !h.CgroupV2:
			return unsupported(field, "needs cgroup v2, and this machine has v1")
		case controller == "cgroup" && !strings.HasPrefix(name, "cgroup.max."):
			return invalid(field, "%q limits nothing", name)
		case controller != "cgroup" && h.Controllers != nil && !slices.Contains(h.Controllers, controller):
			return unsupported(field, "%q needs the controller %q, and there are %s", name, controller,
				strings.Join(h.Controllers, ", "))
		case slices.ContainsFunc(h.CgroupFiles, ofIt) && !slices.Contains(h.CgroupFiles, name):
			return invalid(field, "the kernel has no limit %q", name)
		}
	}
	return nil
}

// cpuOf is nil where nothing is limited.
func cpuOf(r *runtimeapi.LinuxContainerResources) *specs.LinuxCPU {
	cpu := specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if n := r.GetCpuShares(); n != 0 {
		cpu.Shares = new(uint64(n))
	}
	if n := r.GetCpuPeriod(); n != 0 {
		cpu.Period = new(uint64(n))
	}
	if n := r.GetCpuQuota(); n != 0 {
		cpu.Quota = new(n)
	}
	if cpu == (specs.LinuxCPU{}) {
		return nil
	}
	return &cpu
}

// The bounds that the kernel puts on the CFS, in microseconds.
const (
	minQuota, minPeriod = 1000, 1000
	maxPeriod           = 1000000
	maxShares           = 262144 // cgroup v1 clamps to it
)

var (
	pageSize   = regexp.MustCompile(`^[1-9][0-9]*[KMG]B$`)
	unifiedKey = regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_]+)+$`)
)

// ValidateResources checks r, which the request has under the name field.
func ValidateResources(field string, r *runtimeapi.LinuxContainerResources) error {
	atLeast := func(name string, v, least int64) error {
		if v < least {
			return invalid(field+"."+name, "%d is less than %d", v, least)
		}
		return nil
	}
	quota, period := r.GetCpuQuota(), r.GetCpuPeriod()
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	err := cmp.Or(
		atLeast("cpu_shares", r.GetCpuShares(), 0),
		atLeast("cpu_period", period, 0),
		atLeast("cpu_quota", quota, -1),                 // -1: no limit
		atLeast("memory_limit_in_bytes", limit, 0),      // the CRI has 0 for none
		atLeast("memory_swap_limit_in_bytes", swap, -1), // -1: no limit
		atLeast("oom_score_adj", r.GetOomScoreAdj(), -1000),
		cpuset(field+".cpuset_cpus", r.GetCpusetCpus()),
		cpuset(field+".cpuset_mems", r.GetCpusetMems()),
	)
	switch {
	case err != nil:
		return err
	case r.GetCpuShares() > maxShares:
		return invalid(field+".cpu_shares", "%d is more than %d, the kernel's most", r.GetCpuShares(), maxShares)
	case quota > 0 && quota < minQuota:
		return invalid(field+".cpu_quota", "%d is less than %d microseconds, the kernel's least", quota, minQuota)
	case period != 0 && (period < minPeriod || period > maxPeriod):
		return invalid(field+".cpu_period", "%d is not within %d..%d microseconds", period, minPeriod, maxPeriod)
	case r.GetOomScoreAdj() > 1000:
		return invalid(field+".oom_score_adj", "%d is more than 1000", r.GetOomScoreAdj())
	case swap > 0 && limit <= 0:
		return invalid(field+".memory_swap_limit_in_bytes", "is set without memory_limit_in_bytes")
	case swap > 0 && swap < limit:
		return invalid(field+".memory_swap_limit_in_bytes",
			"%d is less than memory_limit_in_bytes (%d): it counts both together", swap, limit)
	}
	for i, l := range r.GetHugepageLimits() {
		if !pageSize.MatchString(l.GetPageSize()) {
			field := fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i)
			return invalid(field, "%q is not of the form 2MB", l.GetPageSize())
		}
	}
	for k := range r.GetUnified() {
		// The key is the name of a file.
		if !unifiedKey.MatchString(k) {
			return invalid(field+".unified", "%q is not a file of a cgroup", k)
		}
	}
	return nil
}

// ValidatePodResources checks resources or overhead of a pod. These are noted and set nowhere.
// For a resize the kubelet takes them from the pod's cgroup, less the overhead: no limit is any
// number below 0 then, and a quota can be less than the kernel's least.
func ValidatePodResources(field string, r *runtimeapi.LinuxContainerResources) error {
	if r == nil {
		return nil
	}
	r = proto.Clone(r).(*runtimeapi.LinuxContainerResources)
	r.MemoryLimitInBytes = max(r.MemoryLimitInBytes, 0)
	if r.CpuQuota < minQuota {
		r.CpuQuota = 0
	}
	return ValidateResources(field, r)
}

// cpuset checks a list like "0-3,8".
func cpuset(field, list string) error {
	if list == "" {
		return nil
	}
	if _, err := parseSet(list); err != nil {
		return invalid(field, "%q is not a list like 0-3,8", list)
	}
	return nil
}

// parseSet gives the ranges of a list like "0-3,8", each with its ends.
func parseSet(list string) (ranges [][2]uint64, err error) {
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.ParseUint(from, 10, 31)
		z, err2 := strconv.ParseUint(to, 10, 31)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		if a > z {
			return nil, fmt.Errorf("%s ends before it begins", part)
		}
		ranges = append(ranges, [2]uint64{a, z})
	}
	return ranges, nil
}

// within says whether all of a list is in another one, which is sorted and has no two
// ranges that touch. What cannot be read is for others to refuse.
func within(list, all string) bool {
	want, err := parseSet(list)
	have, herr := parseSet(all)
	if err != nil || herr != nil {
		return true
	}
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h [2]uint64) bool { return h[0] <= w[0] && w[1] <= h[1] }) {
			return false
		}
	}
	return true
}
