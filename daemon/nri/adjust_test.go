package nri

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// What a plugin wants of a container is in its spec.
func TestAdjust(t *testing.T) {
	for _, c := range []struct {
		name string
		want func(*api.ContainerAdjustment)
		is   func(*specs.Spec) bool
	}{
		{"environment", func(a *api.ContainerAdjustment) {
			a.AddEnv("A", "9")
			a.RemoveEnv("B")
			a.AddEnv("C", "3")
		}, func(s *specs.Spec) bool { return slices.Equal(s.Process.Env, []string{"A=9", "C=3"}) }},
		{"args", func(a *api.ContainerAdjustment) { a.SetArgs([]string{"true"}) },
			func(s *specs.Spec) bool { return slices.Equal(s.Process.Args, []string{"true"}) }},
		{"annotation", func(a *api.ContainerAdjustment) { a.AddAnnotation("k", "v") },
			func(s *specs.Spec) bool { return s.Annotations["k"] == "v" }},
		{"mounts", func(a *api.ContainerAdjustment) {
			a.AddMount(&api.Mount{Destination: "/data", Source: "/new", Type: "bind"})
			a.RemoveMount("/proc")
		}, func(s *specs.Spec) bool { return len(s.Mounts) == 1 && s.Mounts[0].Source == "/new" }},
		{"device", func(a *api.ContainerAdjustment) {
			a.AddDevice(&api.LinuxDevice{Path: "/dev/x", Type: "c", Major: 1, Minor: 3})
		}, func(s *specs.Spec) bool {
			rules := s.Linux.Resources.Devices
			return s.Linux.Devices[0].Path == "/dev/x" && len(rules) == 1 && rules[0].Allow && *rules[0].Minor == 3
		}},
		{"cpu", func(a *api.ContainerAdjustment) {
			a.SetLinuxCPUShares(7)
			a.SetLinuxCPUSetCPUs("1")
			a.SetLinuxCPUQuota(-1)
		}, func(s *specs.Spec) bool {
			cpu := s.Linux.Resources.CPU
			return *cpu.Shares == 7 && cpu.Cpus == "1" && *cpu.Quota == -1
		}},
		{"memory, without swap", func(a *api.ContainerAdjustment) { a.SetLinuxMemoryLimit(1 << 20) },
			func(s *specs.Spec) bool { m := s.Linux.Resources.Memory; return *m.Limit == 1<<20 && m.Swap == nil }},
		{"no hugepages", func(a *api.ContainerAdjustment) { a.AddLinuxHugepageLimit("2MB", 1<<21) },
			func(s *specs.Spec) bool { return s.Linux.Resources.HugepageLimits == nil }},
		{"unified, pids, score", func(a *api.ContainerAdjustment) {
			a.AddLinuxUnified("memory.high", "1")
			a.SetLinuxPidLimits(9)
			score := 5
			a.SetLinuxOomScoreAdj(&score)
		}, func(s *specs.Spec) bool {
			r := s.Linux.Resources
			return r.Unified["memory.high"] == "1" && *r.Pids.Limit == 9 && *s.Process.OOMScoreAdj == 5
		}},
		{"one limit of a type", func(a *api.ContainerAdjustment) { a.AddRlimit("RLIMIT_NOFILE", 9, 8) },
			func(s *specs.Spec) bool { return len(s.Process.Rlimits) == 1 && s.Process.Rlimits[0].Hard == 9 }},
		{"hooks", func(a *api.ContainerAdjustment) {
			h := []*api.Hook{{Path: "/h"}}
			a.AddHooks(&api.Hooks{Prestart: h, Poststart: h, Poststop: h, CreateRuntime: h})
		}, func(s *specs.Spec) bool {
			h := s.Hooks
			return len(h.Prestart)+len(h.Poststart)+len(h.Poststop)+len(h.CreateRuntime) == 4
		}},
		{"namespace and sysctl", func(a *api.ContainerAdjustment) {
			a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "network", Path: "/n"})
			a.SetLinuxSysctl("net.x", "1")
		}, func(s *specs.Spec) bool { return s.Linux.Namespaces[0].Path == "/n" && s.Linux.Sysctl["net.x"] == "1" }},
		{"cgroup of its own", func(a *api.ContainerAdjustment) { a.SetLinuxCgroupsPath("/other/c") },
			func(s *specs.Spec) bool { return s.Linux.CgroupsPath == "/other/c" }},
		{"CDI", func(a *api.ContainerAdjustment) { a.AddCDIDevice(&api.CDIDevice{Name: "v/c=d"}) },
			func(s *specs.Spec) bool { return s.Hostname == "v/c=d" }},
	} {
		n := &Plugins[*pod, *container]{o: Options{InjectDevices: func(s *specs.Spec, names []string) error {
			s.Hostname = strings.Join(names, ",")
			return nil
		}}}
		a, s := &api.ContainerAdjustment{}, newSpec()
		c.want(a)
		if err := n.adjust(s, "c", a); err != nil || !c.is(s) {
			t.Errorf("%s: %v, %+v", c.name, err, s)
		}
	}
}

func TestCannotAdjust(t *testing.T) {
	class := "fast"
	for name, want := range map[string]func(*api.ContainerAdjustment){
		"not named after the container": func(a *api.ContainerAdjustment) { a.SetLinuxCgroupsPath("/other") },
		"no CDI devices":                func(a *api.ContainerAdjustment) { a.AddCDIDevice(&api.CDIDevice{Name: "v/c=d"}) },
		"class of block I/O":            func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass(class) },
	} {
		a := &api.ContainerAdjustment{}
		want(a)
		err := (&Plugins[*pod, *container]{}).adjust(newSpec(), "c", a)
		if !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Over the socket: the plugin sees the container, what it changes is in the spec, and
// what a request for it would have is told.
func TestCreate(t *testing.T) {
	n := open(t, nil, nil)
	p := n.connect(t, &plugin{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		a.AddEnv("NEW", "1")
		a.SetLinuxCPUShares(7)
		score := 5
		a.SetLinuxOomScoreAdj(&score)
		return a, nil
	}})
	s := newSpec()
	now, err := n.CreateContainer(t.Context(), newContainer("c"), s)
	if err != nil || now.GetCpuShares() != 7 || now.GetOomScoreAdj() != 5 {
		t.Errorf("the resources are %v, %v", now, err)
	}
	if !slices.Contains(s.Process.Env, "NEW=1") || *s.Linux.Resources.CPU.Shares != 7 {
		t.Errorf("the spec is %+v", s)
	}
	m := p.last
	if m.Name != "name-c" || m.PodSandboxId != "pod" || m.State != api.ContainerState_CONTAINER_CREATED ||
		m.Image.Name != "image:1" || m.Image.Digest != "sha256:manifest" || m.Linux.CgroupsPath != "/pods/c" ||
		len(m.Mounts) != 2 || m.Rlimits[0].Type != "RLIMIT_NOFILE" {
		t.Errorf("the plugin was told %v", m)
	}
}

func TestMessages(t *testing.T) {
	p := podMessage(newPod("pod"))
	if p.Name != "name-pod" || p.Namespace != "ns" || p.Uid != "uid" || p.Pid != 7 || p.Ips[0] != "10.0.0.7" ||
		p.RuntimeHandler != "runc" || p.Labels["l"] != "v" || p.Linux.Namespaces[0].Path != "/net" {
		t.Errorf("of a pod: %v", p)
	}
	c := containerMessage(running(newContainer("c")), nil)
	if c.State != api.ContainerState_CONTAINER_RUNNING || c.Pid != 42 || c.Env[0] != "A=1" {
		t.Errorf("of a container that runs: %v", c)
	}
	c = containerMessage(exited(newContainer("c")), nil)
	if c.State != api.ContainerState_CONTAINER_STOPPED || c.ExitCode != 3 || c.FinishedAt == 0 || c.Pid != 0 {
		t.Errorf("of one that has ended: %v", c)
	}
}
