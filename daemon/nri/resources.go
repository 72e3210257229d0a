package nri

import (
	"maps"
	"slices"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// In the CRI 0 says that a limit is not set, or stays as it is; plugins are not told
// of those, and say nothing of what they do not care for.

// toPlugin gives plugins the limits of a request; nil for none.
func toPlugin(r *runtimeapi.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{
		Cpu:     &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()},
		Memory:  &api.LinuxMemory{},
		Unified: maps.Clone(r.GetUnified()),
	}
	if v := r.GetCpuShares(); v > 0 {
		out.Cpu.Shares = api.UInt64(v)
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuPeriod(); v > 0 {
		out.Cpu.Period = api.UInt64(v)
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: l.GetPageSize(),
			Limit: l.GetLimit()})
	}
	return out
}

// fromPlugin gives the limits of a request, which may be nil, as a plugin has changed
// them.
func fromPlugin(r *api.LinuxResources, asked *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if asked != nil {
		out = proto.Clone(asked).(*runtimeapi.LinuxContainerResources)
	}
	cpu, memory := r.GetCpu(), r.GetMemory()
	if v := cpu.GetShares(); v != nil {
		out.CpuShares = int64(v.GetValue())
	}
	if v := cpu.GetQuota(); v != nil {
		out.CpuQuota = v.GetValue()
	}
	if v := cpu.GetPeriod(); v != nil {
		out.CpuPeriod = int64(v.GetValue())
	}
	if v := cpu.GetCpus(); v != "" {
		out.CpusetCpus = v
	}
	if v := cpu.GetMems(); v != "" {
		out.CpusetMems = v
	}
	if v := memory.GetSwap(); v != nil {
		out.MemorySwapLimitInBytes = v.GetValue()
	}
	if v := memory.GetLimit(); v != nil {
		// The swap of the request belongs to its limit: it counts both together.
		if asked != nil && v.GetValue() != asked.GetMemoryLimitInBytes() &&
			out.MemorySwapLimitInBytes == asked.GetMemorySwapLimitInBytes() {
			out.MemorySwapLimitInBytes = 0
		}
		out.MemoryLimitInBytes = v.GetValue()
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = slices.DeleteFunc(out.HugepageLimits, func(o *runtimeapi.HugepageLimit) bool {
			return o.GetPageSize() == l.GetPageSize()
		})
		limit := &runtimeapi.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()}
		out.HugepageLimits = append(out.HugepageLimits, limit)
	}
	if len(r.GetUnified()) > 0 && out.Unified == nil {
		out.Unified = map[string]string{}
	}
	maps.Copy(out.Unified, r.GetUnified())
	return out
}
