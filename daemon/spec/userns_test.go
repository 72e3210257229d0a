package spec

import (
	"math"
	"os"
	"reflect"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

func idMap(container, host, length uint32) []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{ContainerId: container, HostId: host, Length: length}}
}

// userns puts the pod and the container into a user namespace, as a kubelet does.
func (in *Input) userns(host, length uint32) {
	o := &runtimeapi.NamespaceOption{Pid: modeContainer,
		UsernsOptions: &runtimeapi.UserNamespace{Mode: modePod, Uids: idMap(0, host, length), Gids: idMap(0, host,
			length)}}
	in.pod().NamespaceOptions = o
	in.security().NamespaceOptions = o
	in.Namespaces.User = "/ns/user"
	in.MappedMounts = true
}

func TestValidateUserns(t *testing.T) {
	ok := idMap(0, 65536, 65536)
	two := append(idMap(0, 1000, 10), idMap(10, 2000, 10)...)
	pod := func(uids, gids []*runtimeapi.IDMapping) *runtimeapi.UserNamespace {
		return &runtimeapi.UserNamespace{Mode: modePod, Uids: uids, Gids: gids}
	}
	const field = fieldUserns + "."
	for name, c := range map[string]struct {
		u     *runtimeapi.UserNamespace
		other func(*runtimeapi.NamespaceOption)
		field string // empty: no error
	}{
		"none":                 {nil, nil, ""},
		"the host's":           {&runtimeapi.UserNamespace{Mode: modeNode}, nil, ""},
		"the host's, with ids": {&runtimeapi.UserNamespace{Mode: modeNode, Gids: ok}, nil, field + "gids"},
		"as the kubelet":       {pod(ok, ok), nil, ""},
		"others for groups":    {pod(ok, idMap(0, 5, 1)), nil, ""},
		"the last id":          {pod(ok, idMap(0, math.MaxUint32-1, 1)), nil, ""},
		"no ids":               {pod(nil, nil), nil, field + "uids"},
		"no gids":              {pod(ok, nil), nil, field + "gids"},
		"two ranges":           {pod(ok, two), nil, field + "gids"},
		"a missing range":      {pod(ok, []*runtimeapi.IDMapping{nil}), nil, field + "gids[0].length"},
		"nothing in the range": {pod(idMap(0, 5, 0), ok), nil, field + "uids[0].length"},
		"beyond the last id":   {pod(idMap(0, math.MaxUint32-1, 2), ok), nil, field + "uids[0].length"},
		"no root":              {pod(idMap(1, 65536, 10), ok), nil, field + "uids[0].container_id"},
		"a container's":        {&runtimeapi.UserNamespace{Mode: modeContainer}, nil, field + "mode"},
		"another container's":  {&runtimeapi.UserNamespace{Mode: modeTarget}, nil, field + "mode"},
		"unknown":              {&runtimeapi.UserNamespace{Mode: 9}, nil, field + "mode"},
		"with the host's net":  {pod(ok, ok), func(o *runtimeapi.NamespaceOption) { o.Network = modeNode }, ""},
		"with the host's pids": {
			pod(ok, ok),
			func(o *runtimeapi.NamespaceOption) { o.Pid = modeNode },
			fieldContext + "namespace_options.pid",
		},
		"with the host's ipc": {
			pod(ok, ok),
			func(o *runtimeapi.NamespaceOption) { o.Ipc = modeNode },
			fieldContext + "namespace_options.ipc",
		},
		"the host's of all":      {nil, func(o *runtimeapi.NamespaceOption) { o.Ipc, o.Pid = modeNode, modeNode }, ""},
		"with the pids of a pod": {pod(ok, ok), func(o *runtimeapi.NamespaceOption) { o.Pid = modePod }, ""},
	} {
		s := sandbox()
		o := s.Linux.SecurityContext.NamespaceOptions
		o.UsernsOptions = c.u
		if c.other != nil {
			c.other(o)
		}
		err := ValidateSandbox(s)
		if c.field == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		t.Run(name, func(t *testing.T) { wantField(t, err, kind.Invalid, c.field) })
	}
}

func TestContainerHasTheUsernsOfItsPod(t *testing.T) {
	pod := func(host uint32) *runtimeapi.UserNamespace {
		return &runtimeapi.UserNamespace{Mode: modePod, Uids: idMap(0, host, 10), Gids: idMap(0, host, 10)}
	}
	node := &runtimeapi.UserNamespace{Mode: modeNode}
	for name, c := range map[string]struct {
		pod, own *runtimeapi.UserNamespace
		ok       bool
	}{
		"the same":          {pod(5), pod(5), true},
		"none is the pod's": {pod(5), nil, true},
		"other ids":         {pod(5), pod(6), false},
		"the host's":        {pod(5), node, false},
		"without the pod":   {nil, pod(5), false},
		"against the pod":   {node, pod(5), false},
		"both the host's":   {nil, node, true},
		"neither":           {node, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, ctr := sandbox(), container()
			s.Linux.SecurityContext.NamespaceOptions.UsernsOptions = c.pod
			ctr.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeContainer,
				UsernsOptions: c.own}
			err := Validate(ctr, s)
			if c.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantField(t, err, kind.Invalid, fieldUserns)
		})
	}
}

func TestMappedMounts(t *testing.T) {
	in := input()
	in.security().SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	in.userns(1000, 10)
	maps := idMap(0, 1000, 10)
	image := &runtimeapi.ImageSpec{Image: "i"}
	in.Container.Mounts = []*runtimeapi.Mount{
		{HostPath: "/volume", ContainerPath: "/a", UidMappings: maps, GidMappings: maps},
		{ContainerPath: "/b", Image: image, Readonly: true, UidMappings: maps, GidMappings: maps},
		{HostPath: "/plain", ContainerPath: "/c"},
	}
	in.ImageMounts = map[int]string{1: "/image"}
	want := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1000, Size: 10}}
	for _, m := range build(t, in).Spec.Mounts {
		mapped := m.Destination == "/a"
		if mapped != (len(m.UIDMappings) > 0) ||
			mapped && (!reflect.DeepEqual(m.UIDMappings, want) || !reflect.DeepEqual(m.GIDMappings, want)) {
			t.Errorf("%s has the owners %v %v", m.Destination, m.UIDMappings, m.GIDMappings)
		}
	}
	in.MappedMounts = false
	_, err := validateAndBuild(in)
	wantField(t, err, kind.Unsupported, "config.mounts[0].uidMappings")

	for field, m := range map[string]*runtimeapi.Mount{
		"uidMappings":           {HostPath: "/v", UidMappings: maps},
		"gidMappings[0].length": {HostPath: "/v", UidMappings: maps, GidMappings: idMap(0, 1, 0)},
		"gidMappings[1].length": {HostPath: "/v", UidMappings: maps, GidMappings: append(idMap(0, 1, 5), idMap(10, 5,
			1)...)},
		"uidMappings[1].length": {HostPath: "/v", UidMappings: append(idMap(5, 1, 5), idMap(0, 50, 6)...),
			GidMappings: maps},
	} {
		m.ContainerPath = "/x"
		in.Container.Mounts = []*runtimeapi.Mount{m}
		t.Run(field, func(t *testing.T) {
			wantField(t, Validate(in.Container, in.Sandbox), kind.Invalid, "config.mounts[0]."+field)
		})
	}
	in.Container.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/b", Image: image, Readonly: true, UidMappings: idMap(0, 7, 10), GidMappings: maps},
	}
	wantField(t, Validate(in.Container, in.Sandbox), kind.Invalid, "config.mounts[0].uidMappings")
}

// What is not mapped is said before the OCI runtime says EINVAL.
func TestUsersOfUserns(t *testing.T) {
	for name, c := range map[string]struct {
		change func(in *Input)
		field  string
	}{
		"root":     {func(in *Input) {}, ""},
		"the last": {func(in *Input) { in.security().RunAsUser = &runtimeapi.Int64Value{Value: 999} }, ""},
		"the next": {
			func(in *Input) { in.security().RunAsUser = &runtimeapi.Int64Value{Value: 1000} },
			fieldUserns + ".uids",
		},
		"of the image": {func(in *Input) { in.Image.User = "app" }, fieldUserns + ".uids"},
		"a group":      {func(in *Input) { in.security().SupplementalGroups = []int64{1000} }, fieldUserns + ".gids"},
		"the primary group": {func(in *Input) {
			in.security().RunAsUser, in.security().RunAsGroup = &runtimeapi.Int64Value{}, &runtimeapi.Int64Value{Value: 5000}
		}, fieldUserns + ".gids"},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			in.userns(100000, 1000)
			c.change(&in)
			_, err := validateAndBuild(in)
			if c.field == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantField(t, err, kind.Invalid, c.field)
		})
	}
}

func TestSmallUserns(t *testing.T) {
	in := input()
	in.security().SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	in.userns(1000, 1)
	for _, m := range build(t, in).Spec.Mounts {
		if slices.Contains(m.Options, "gid=5") {
			t.Errorf("%s has a group that is not mapped", m.Destination)
		}
	}
	init := PodInitInput{Host: in.Host, ID: "id", Sandbox: in.Sandbox, Rootfs: "/init", Namespaces: in.Namespaces}
	s, err := PodInit(init)
	check(t, err)
	if s.Process.User.UID != 0 || !slices.Contains(
		s.Linux.Namespaces,
		specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/ns/user"},
	) {
		t.Errorf("the pod's init is user %d in %v", s.Process.User.UID, s.Linux.Namespaces)
	}
	in.userns(1000, 65536)
	if s, err = PodInit(init); err != nil || s.Process.User.UID != nobody {
		t.Errorf("the pod's init is user %d, %v", s.Process.User.UID, err)
	}
}

// A pod that is to have a user namespace never runs in the host's.
func TestUsernsThatIsNotPinned(t *testing.T) {
	in := input()
	in.security().SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	in.userns(1000, 10)
	in.Namespaces.User = ""
	s := build(t, in).Spec
	if !makesNew(s, specs.UserNamespace) || len(s.Linux.UIDMappings) != 1 || s.Linux.GIDMappings[0].HostID != 1000 {
		t.Errorf("namespaces %v with %v", s.Linux.Namespaces, s.Linux.UIDMappings)
	}
}

func TestDevicesOfUserns(t *testing.T) {
	in := input()
	in.privileged()
	in.userns(1000, 65536)
	device := func(path, source string) Device {
		return Device{specs.LinuxDevice{Path: path, Type: "c", Major: 1, Minor: 3}, "rw", source}
	}
	in.HostDevices = []Device{device("/dev/a", "/dev/a"), device("/dev/moved", "/dev/moved")}
	in.Devices = []Device{device("/dev/b", "/dev/b"), device("/dev/moved", "/dev/c")}
	s := build(t, in).Spec
	var paths []string
	for _, d := range s.Linux.Devices {
		paths = append(paths, d.Path)
	}
	if !slices.Equal(paths, []string{"/dev/a", "/dev/b"}) {
		t.Errorf("the OCI runtime makes %v", paths)
	}
	if !slices.ContainsFunc(
		s.Mounts,
		func(m specs.Mount) bool { return m.Destination == "/dev/moved" && m.Source == "/dev/c" },
	) {
		t.Errorf("no mount of the device with another path: %v", s.Mounts)
	}
}

// Sysctls of the user namespace are set from inside it: the namespace of the pod is none of
// the daemon's.
func TestRuncSysctlsOfUserns(t *testing.T) {
	b := newBundle(t)
	check(t, os.Chown(b.root, 100000, 100000)) // for the mount points
	in := b.input("cd /proc/sys/user; /bin/busybox cat max_inotify_watches max_net_namespaces")
	in.userns(100000, 65536)
	in.Namespaces.User = ""
	in.Sandbox.Linux.Sysctls = map[string]string{"user.max_inotify_watches": "4321",
		"user/max_net_namespaces": "7", "net.ipv4.ip_forward": "1"}
	node, err := os.ReadFile("/proc/sys/user/max_inotify_watches")
	check(t, err)
	if out := b.run(in); out != "4321\n7\n" {
		t.Errorf("inside: %q", out)
	}
	if now, _ := os.ReadFile("/proc/sys/user/max_inotify_watches"); string(now) != string(node) {
		t.Errorf("the node had %q and has %q", node, now)
	}
}
