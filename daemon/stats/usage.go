package stats

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// used are the figures in the messages of the CRI.
var used = []cgroup.Figure{
	cgroup.CPUUsage, cgroup.MemoryUsage, cgroup.MemoryLimit, cgroup.MemoryInactiveFile, cgroup.MemoryAnon,
	cgroup.MemoryPageFaults, cgroup.MemoryMajorPageFaults, cgroup.SwapUsage, cgroup.SwapLimit,
}

// usage is what one cgroup uses. A part that the kernel does not tell is nil.
type usage struct {
	cpu    *runtimeapi.CpuUsage
	memory *runtimeapi.MemoryUsage
	swap   *runtimeapi.SwapUsage
	io     *runtimeapi.IoUsage
}

// usageOf reads a cgroup. start is when its use began, if that is known.
func (c *Collector) usageOf(path string, start time.Time) (u usage) {
	if path == "" {
		return u
	}
	set := cgroup.Everywhere(path) // of what is not there nothing is found
	f := set.Figures(used...)
	now := time.Now()
	if n, ok := f[cgroup.CPUUsage]; ok {
		u.cpu = &runtimeapi.CpuUsage{
			Timestamp:            now.UnixNano(),
			UsageCoreNanoSeconds: number(n),
			UsageNanoCores:       c.cpu.rate(path, now, n, start),
			Psi:                  psi(set.Pressure("cpu")),
		}
	}
	u.memory, u.swap = memoryOf(f, now), swapOf(f, now)
	if u.memory != nil {
		u.memory.Psi = psi(set.Pressure("memory"))
	}
	if p := psi(set.Pressure("io")); p != nil {
		u.io = &runtimeapi.IoUsage{Timestamp: now.UnixNano(), Psi: p}
	}
	return u
}

func memoryOf(f cgroup.Figures, now time.Time) *runtimeapi.MemoryUsage {
	if _, ok := f[cgroup.MemoryUsage]; !ok {
		return nil
	}
	m := &runtimeapi.MemoryUsage{
		Timestamp:       now.UnixNano(),
		UsageBytes:      value(f, cgroup.MemoryUsage),
		RssBytes:        value(f, cgroup.MemoryAnon),
		PageFaults:      value(f, cgroup.MemoryPageFaults),
		MajorPageFaults: value(f, cgroup.MemoryMajorPageFaults),
	}
	if set, ok := workingSet(f); ok {
		m.WorkingSetBytes = number(set)
		m.AvailableBytes = left(f, cgroup.MemoryLimit, set)
	}
	return m
}

func swapOf(f cgroup.Figures, now time.Time) *runtimeapi.SwapUsage {
	n, ok := f[cgroup.SwapUsage]
	if !ok {
		return nil
	}
	return &runtimeapi.SwapUsage{
		Timestamp:          now.UnixNano(),
		SwapUsageBytes:     number(n),
		SwapAvailableBytes: left(f, cgroup.SwapLimit, n),
	}
}

// workingSet is the memory without what the kernel can take back at once.
func workingSet(f cgroup.Figures) (uint64, bool) {
	all, ok := f[cgroup.MemoryUsage]
	idle, known := f[cgroup.MemoryInactiveFile]
	return all - min(all, idle), ok && known
}

// left is what a limit leaves; nil without a limit.
func left(f cgroup.Figures, limit cgroup.Figure, n uint64) *runtimeapi.UInt64Value {
	most, ok := f[limit]
	if !ok || most == cgroup.NoLimit {
		return nil
	}
	return number(most - min(most, n))
}

func value(f cgroup.Figures, of cgroup.Figure) *runtimeapi.UInt64Value {
	n, ok := f[of]
	if !ok {
		return nil
	}
	return number(n)
}

func number(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func psi(p *cgroup.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	data := func(s cgroup.Stall) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: s.Total, Avg10: s.Avg10, Avg60: s.Avg60, Avg300: s.Avg300}
	}
	return &runtimeapi.PsiStats{Some: data(p.Some), Full: data(p.Full)}
}

func (c *Collector) container(one *Container) *runtimeapi.ContainerStats {
	u := c.usageOf(one.Cgroup, one.Start)
	return &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id:          one.ID,
			Metadata:    one.Config.GetMetadata(),
			Labels:      one.Config.GetLabels(),
			Annotations: one.Config.GetAnnotations(),
		},
		Cpu:           u.cpu,
		Memory:        u.memory,
		Swap:          u.swap,
		Io:            u.io,
		WritableLayer: c.writableLayer(one.ID),
	}
}

// writableLayer is what was measured last; nil: nothing yet.
func (c *Collector) writableLayer(id string) *runtimeapi.FilesystemUsage {
	l, ok := c.layers.get(id)
	if !ok {
		return nil
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp:  l.at.UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: c.Root},
		UsedBytes:  number(l.bytes),
		InodesUsed: number(l.inodes),
	}
}

func (c *Collector) pod(p *Pod, links []link) *runtimeapi.PodSandboxStats {
	u := c.usageOf(p.Cgroup, time.Time{})
	linux := &runtimeapi.LinuxPodSandboxStats{
		Cpu:     u.cpu,
		Memory:  u.memory,
		Io:      u.io,
		Network: networkUsage(links),
		Process: processUsage(p.Cgroup),
	}
	for i := range p.Containers {
		linux.Containers = append(linux.Containers, c.container(&p.Containers[i]))
	}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id:          p.ID,
			Metadata:    p.Config.GetMetadata(),
			Labels:      p.Config.GetLabels(),
			Annotations: p.Config.GetAnnotations(),
		},
		Linux: linux,
	}
}

func processUsage(path string) *runtimeapi.ProcessUsage {
	if path == "" {
		return nil
	}
	set := cgroup.At(path)
	pids, err := set.Pids()
	if err != nil || len(set) == 0 {
		return nil
	}
	return &runtimeapi.ProcessUsage{Timestamp: time.Now().UnixNano(), ProcessCount: number(uint64(len(pids)))}
}
