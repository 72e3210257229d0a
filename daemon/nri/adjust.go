package nri

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// adjust changes the spec of a container as plugins want. After an error the spec is
// good for nothing.
func (n *Plugins[P, C]) adjust(s *specs.Spec, id string, a *api.ContainerAdjustment) error {
	if a == nil {
		return nil
	}
	cgroupsPath := s.Linux.CgroupsPath
	err := generate.SpecGenerator(newEditor(s),
		generate.WithResourceChecker(n.fitResources),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			return nil, fmt.Errorf("there is no class of block I/O %q: this runtime knows none", class)
		}),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}),
		generate.WithCDIDeviceInjector(n.injectDevices),
	).Adjust(a)
	if err == nil && s.Linux.CgroupsPath != cgroupsPath && !namedAfter(s.Linux.CgroupsPath, id) {
		err = fmt.Errorf("the cgroup %q is not named after the container: what runs there could be somebody else's",
			s.Linux.CgroupsPath)
	}
	if err != nil {
		return kind.Errorf(kind.Unsupported, "cannot change the container as an NRI plugin wants: %w", err)
	}
	s.Process.Rlimits = lastOfEach(s.Process.Rlimits)
	return nil
}

// namedAfter says whether a cgroup that a plugin chose is the container's alone, by the
// form that either driver has for it. It is what is killed at the end.
func namedAfter(cgroupsPath, id string) bool {
	return path.Base(cgroupsPath) == id || strings.HasSuffix(cgroupsPath, ":"+id)
}

// fitResources leaves out limits that this kernel does not have, as it is done with
// those of requests.
func (n *Plugins[P, C]) fitResources(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	if !n.o.SwapSupported && r.Memory != nil {
		r.Memory.Swap = nil
	}
	if !n.o.HugetlbSupported {
		r.HugepageLimits = nil
	}
	return nil
}

func (n *Plugins[P, C]) injectDevices(s *specs.Spec, names []string) error {
	if n.o.InjectDevices == nil {
		return errors.New("this runtime has no CDI devices")
	}
	return n.o.InjectDevices(s, names)
}

// lastOfEach is one limit of each type: an OCI runtime takes no two.
func lastOfEach(limits []specs.POSIXRlimit) []specs.POSIXRlimit {
	last := map[string]int{}
	for i, l := range limits {
		last[l.Type] = i
	}
	var kept []specs.POSIXRlimit
	for i, l := range limits {
		if last[l.Type] == i {
			kept = append(kept, l)
		}
	}
	return kept
}

// editor is the part of a spec's generator that the library asks for. What it edits is
// there: each container has a process, its Linux part and resources.
type editor struct {
	s         *specs.Spec
	resources *specs.LinuxResources
}

var _ generate.UnderlyingGenerator = (*editor)(nil)

func newEditor(s *specs.Spec) *editor {
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	return &editor{s: s, resources: s.Linux.Resources}
}

func (e *editor) Spec() *specs.Spec { return e.s }

// put replaces the first element that is alike, or adds one.
func put[T any](list []T, v T, alike func(T) bool) []T {
	if i := slices.IndexFunc(list, alike); i >= 0 {
		list[i] = v
		return list
	}
	return append(list, v)
}

// set sets a key in a map that may not be there.
func set(m *map[string]string, key, value string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
}

func (e *editor) AddAnnotation(key, value string) { set(&e.s.Annotations, key, value) }

func (e *editor) RemoveAnnotation(key string) { delete(e.s.Annotations, key) }

func (e *editor) AddLinuxSysctl(key, value string) { set(&e.s.Linux.Sysctl, key, value) }

func (e *editor) RemoveLinuxSysctl(key string) { delete(e.s.Linux.Sysctl, key) }

func (e *editor) AddProcessEnv(name, value string) {
	e.s.Process.Env = put(e.s.Process.Env, name+"="+value, func(v string) bool {
		return strings.HasPrefix(v, name+"=")
	})
}

func (e *editor) ClearProcessEnv() { e.s.Process.Env = nil }

func (e *editor) SetProcessArgs(args []string) { e.s.Process.Args = args }

func (e *editor) SetProcessOOMScoreAdj(adj int) { e.s.Process.OOMScoreAdj = &adj }

func (e *editor) AddDevice(d specs.LinuxDevice) {
	e.s.Linux.Devices = put(e.s.Linux.Devices, d, func(o specs.LinuxDevice) bool { return o.Path == d.Path })
}

func (e *editor) RemoveDevice(path string) {
	e.s.Linux.Devices = slices.DeleteFunc(e.s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

func (e *editor) Mounts() []specs.Mount { return e.s.Mounts }

func (e *editor) AddMount(m specs.Mount) { e.s.Mounts = append(e.s.Mounts, m) }

func (e *editor) ClearMounts() { e.s.Mounts = nil }

func (e *editor) RemoveMount(destination string) {
	e.s.Mounts = slices.DeleteFunc(e.s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
}

func (e *editor) SetLinuxRootPropagation(propagation string) error {
	e.s.Linux.RootfsPropagation = propagation
	return nil
}

func (e *editor) SetLinuxCgroupsPath(path string) { e.s.Linux.CgroupsPath = path }

// Plugins name namespaces as the spec does.
func (e *editor) AddOrReplaceLinuxNamespace(name, path string) error {
	ns := specs.LinuxNamespace{Type: specs.LinuxNamespaceType(name), Path: path}
	e.s.Linux.Namespaces = put(e.s.Linux.Namespaces, ns, func(o specs.LinuxNamespace) bool { return o.Type == ns.Type })
	return nil
}

func (e *editor) RemoveLinuxNamespace(name string) error {
	e.s.Linux.Namespaces = slices.DeleteFunc(e.s.Linux.Namespaces, func(o specs.LinuxNamespace) bool {
		return string(o.Type) == name
	})
	return nil
}

func (e *editor) hooks() *specs.Hooks {
	if e.s.Hooks == nil {
		e.s.Hooks = &specs.Hooks{}
	}
	return e.s.Hooks
}

func (e *editor) AddPreStartHook(h specs.Hook) {
	e.hooks().Prestart = append(e.hooks().Prestart, h) //nolint:staticcheck // plugins ask for it still
}

func (e *editor) AddPostStartHook(h specs.Hook) { e.hooks().Poststart = append(e.hooks().Poststart, h) }

func (e *editor) AddPostStopHook(h specs.Hook) { e.hooks().Poststop = append(e.hooks().Poststop, h) }

func (e *editor) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	e.resources.Devices = append(e.resources.Devices, specs.LinuxDeviceCgroup{
		Allow:  allow,
		Type:   kind,
		Major:  major,
		Minor:  minor,
		Access: access,
	})
}

func (e *editor) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	l := specs.LinuxHugepageLimit{Pagesize: size, Limit: limit}
	e.resources.HugepageLimits = put(e.resources.HugepageLimits, l, func(o specs.LinuxHugepageLimit) bool {
		return o.Pagesize == size
	})
}

func (e *editor) AddLinuxResourcesUnified(key, value string) { set(&e.resources.Unified, key, value) }

func (e *editor) cpu() *specs.LinuxCPU {
	if e.resources.CPU == nil {
		e.resources.CPU = &specs.LinuxCPU{}
	}
	return e.resources.CPU
}

func (e *editor) SetLinuxResourcesCPUShares(v uint64) { e.cpu().Shares = &v }

func (e *editor) SetLinuxResourcesCPUQuota(v int64) { e.cpu().Quota = &v }

func (e *editor) SetLinuxResourcesCPUPeriod(v uint64) { e.cpu().Period = &v }

func (e *editor) SetLinuxResourcesCPURealtimeRuntime(v int64) { e.cpu().RealtimeRuntime = &v }

func (e *editor) SetLinuxResourcesCPURealtimePeriod(v uint64) { e.cpu().RealtimePeriod = &v }

func (e *editor) SetLinuxResourcesCPUCpus(v string) { e.cpu().Cpus = v }

func (e *editor) SetLinuxResourcesCPUMems(v string) { e.cpu().Mems = v }

func (e *editor) memory() *specs.LinuxMemory {
	if e.resources.Memory == nil {
		e.resources.Memory = &specs.LinuxMemory{}
	}
	return e.resources.Memory
}

func (e *editor) SetLinuxResourcesMemoryLimit(v int64) { e.memory().Limit = &v }

func (e *editor) SetLinuxResourcesMemorySwap(v int64) { e.memory().Swap = &v }
