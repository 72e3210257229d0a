package spec

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unlimited is how a quota and a limit say that there is none.
const unlimited = -1

// Change is an update of the resources of a container.
type Change struct {
	// Wanted are the resources after it.
	Wanted *runtimeapi.LinuxContainerResources
	// Resources are those that are set after it, Undo those that were set before it:
	// what the change sets for the first time has the kernel's default there.
	Resources, Undo *specs.LinuxResources
	// OOMScoreAdj is that of the container's processes, before and after.
	OOMScoreAdj [2]int
	Warnings    []string
}

// Update makes the change that a request asks for: what it does not set stays as it is.
// Errors name the field at fault.
func Update(h Host, old, request *runtimeapi.LinuxContainerResources) (*Change, error) {
	const field = "linux"
	if request == nil {
		return nil, invalid(field, "is missing")
	}
	wanted := merge(old, request)
	if err := validateUpdate(field, wanted); err != nil {
		return nil, err
	}
	c := &Change{
		Wanted: wanted,
		OOMScoreAdj: [2]int{
			max(int(old.GetOomScoreAdj()), h.MinOOMScoreAdj),
			max(int(wanted.GetOomScoreAdj()), h.MinOOMScoreAdj),
		},
	}
	var err error
	if c.Resources, c.Warnings, err = limits(h, field, wanted); err != nil {
		return nil, err
	}
	if c.Undo, _, err = limits(h, field, old); err != nil {
		return nil, err
	}
	fillDefaults(c.Undo, c.Resources)
	return c, nil
}

// validateUpdate is ValidateResources, but for a memory limit that is taken away.
func validateUpdate(field string, r *runtimeapi.LinuxContainerResources) error {
	if r.GetMemoryLimitInBytes() == unlimited {
		r = proto.Clone(r).(*runtimeapi.LinuxContainerResources)
		r.MemoryLimitInBytes = 0
	}
	return ValidateResources(field, r)
}

// merge gives old with all that the request sets.
func merge(old, request *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	wanted := &runtimeapi.LinuxContainerResources{}
	if old != nil {
		wanted = proto.Clone(old).(*runtimeapi.LinuxContainerResources)
	}
	proto.Merge(wanted, request)
	wanted.HugepageLimits = nil
	for _, l := range slices.Concat(old.GetHugepageLimits(), request.GetHugepageLimits()) {
		i := slices.IndexFunc(wanted.HugepageLimits, func(o *runtimeapi.HugepageLimit) bool {
			return o.GetPageSize() == l.GetPageSize()
		})
		if i < 0 {
			wanted.HugepageLimits = append(wanted.HugepageLimits, l)
		} else {
			wanted.HugepageLimits[i] = l
		}
	}
	// No swap stays no swap.
	if request.GetMemorySwapLimitInBytes() == 0 && old.GetMemorySwapLimitInBytes() == old.GetMemoryLimitInBytes() {
		wanted.MemorySwapLimitInBytes = old.GetMemorySwapLimitInBytes()
		if wanted.MemorySwapLimitInBytes != 0 {
			wanted.MemorySwapLimitInBytes = wanted.GetMemoryLimitInBytes()
		}
	}
	return wanted
}

// fillDefaults sets what now sets and was does not to what the kernel has for a new
// cgroup. A cpuset has no such value.
func fillDefaults(was, now *specs.LinuxResources) {
	const shares, period = 1024, 100000
	if now.CPU != nil {
		if was.CPU == nil {
			was.CPU = &specs.LinuxCPU{}
		}
		byDefault(&was.CPU.Shares, now.CPU.Shares, shares)
		byDefault(&was.CPU.Period, now.CPU.Period, period)
		byDefault(&was.CPU.Quota, now.CPU.Quota, unlimited)
	}
	if now.Memory != nil {
		if was.Memory == nil {
			was.Memory = &specs.LinuxMemory{}
		}
		byDefault(&was.Memory.Limit, now.Memory.Limit, unlimited)
		byDefault(&was.Memory.Swap, now.Memory.Swap, unlimited)
	}
}

func byDefault[T any](was **T, now *T, value T) {
	if *was == nil && now != nil {
		*was = &value
	}
}
