package spec

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var update = flag.Bool("update", false, "write the golden files")

const passwd = `root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/:/sbin/nologin
app:x:1000:1000::/home/app:/bin/sh
1234:x:77:78::/:/bin/sh
`

const group = `root:x:0:root
wheel:x:10:root,app
app:x:1000:
media:x:50000:app
`

func container() *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Image:    &runtimeapi.ImageSpec{Image: "busybox"},
		Command:  []string{"/bin/app"},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{},
		},
	}
}

func sandbox() *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"},
		Hostname: "pod-1",
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: modeContainer},
			},
		},
	}
}

// input is an ordinary container of an ordinary pod, on a v2 machine that can
// do everything.
func input() Input {
	return Input{
		Host: Host{
			CgroupV2: true, SwapSupported: true, HugetlbSupported: true, MinOOMScoreAdj: -1000,
			SeccompSupported: true, RecursiveReadOnly: true, NodeName: "node",
		},
		ID:          "id",
		Container:   container(),
		Sandbox:     sandbox(),
		Rootfs:      "/rootfs",
		Namespaces:  Namespaces{Net: "/ns/net", IPC: "/ns/ipc", UTS: "/ns/uts"},
		CgroupsPath: "/pod/id",
		Shm:         "/pod/shm",
		Hosts:       "/pod/hosts",
		ResolvConf:  "/pod/resolv.conf",
		Hostname:    "/pod/hostname",
	}
}

func (in *Input) security() *runtimeapi.LinuxContainerSecurityContext {
	return in.Container.Linux.SecurityContext
}

func (in *Input) pod() *runtimeapi.LinuxSandboxSecurityContext {
	return in.Sandbox.Linux.SecurityContext
}

func (in *Input) privileged() {
	in.security().Privileged = true
	in.pod().Privileged = true
}

// validateAndBuild is what a request for a container passes.
func validateAndBuild(in Input) (*Result, error) { return buildFor(in, passwd, group) }

func buildFor(in Input, passwd, group string) (*Result, error) {
	err := Validate(in.Container, in.Sandbox)
	if err != nil {
		return nil, err
	}
	sc := in.Container.GetLinux().GetSecurityContext()
	if in.User, err = findUser(strings.NewReader(passwd), strings.NewReader(group), sc, in.Image.User); err != nil {
		return nil, err
	}
	return Build(in)
}

func build(t *testing.T, in Input) *Result {
	t.Helper()
	r, err := validateAndBuild(in)
	check(t, err)
	return r
}

// wantField fails unless err is of the kind and names the field.
func wantField(t *testing.T, err, kind error, field string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v is not of the kind %v", err, kind)
	}
	if !strings.HasPrefix(err.Error(), field+": ") {
		t.Fatalf("error %q does not name %s", err, field)
	}
}

func TestGolden(t *testing.T) {
	device := Device{specs.LinuxDevice{Path: "/dev/x", Type: "c", Major: 10, Minor: 200}, "rw", "/dev/x"}
	tests := map[string]func(*Input){
		"default": func(in *Input) {},
		"default-v1": func(in *Input) {
			in.CgroupV2 = false
		},
		"full": func(in *Input) {
			in.Container.Args = []string{"--flag"}
			in.Container.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
			in.Container.WorkingDir = "/work"
			in.Container.Tty = true
			in.Container.Annotations = map[string]string{"io.kubernetes.container.hash": "1"}
			in.Container.Mounts = []*runtimeapi.Mount{
				{HostPath: "/h/data/sub", ContainerPath: "/data/sub", Readonly: true, RecursiveReadOnly: true},
				{HostPath: "/h/data", ContainerPath: "/data/",
					Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
				{
					HostPath:      "/h/slave",
					ContainerPath: "/slave",
					Propagation:   runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
					MountOptions:  []string{"noexec"},
				},
				{HostPath: "/h/hosts", ContainerPath: "/etc/hosts"},
				{Image: &runtimeapi.ImageSpec{Image: "vol"}, ContainerPath: "/image", Readonly: true},
			}
			in.ImageMounts = map[int]string{4: "/images/vol"}
			in.ImageVolumes = map[string]string{"/vol": "/volumes/1", "/data": "/volumes/2"}
			in.Devices = []Device{device}
			sc := in.security()
			sc.RunAsUsername = "app"
			sc.SupplementalGroups = []int64{1234}
			sc.ReadonlyRootfs = true
			sc.NoNewPrivs = true
			sc.MaskedPaths = []string{"/proc/kcore"}
			sc.ReadonlyPaths = []string{"/proc/sys"}
			sc.Capabilities = &runtimeapi.Capability{
				DropCapabilities: []string{"ALL"},
				AddCapabilities:  []string{"NET_BIND_SERVICE"},
			}
			in.Container.Linux.Resources = &runtimeapi.LinuxContainerResources{
				CpuShares: 512, CpuPeriod: 100000, CpuQuota: 50000, CpusetCpus: "0-1", MemoryLimitInBytes: 1 << 26,
				OomScoreAdj: 900, Unified: map[string]string{"memory.high": "60000000"},
				HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
			}
		},
		"privileged": func(in *Input) {
			in.privileged()
			in.security().MaskedPaths = []string{"/proc/kcore"}
			in.security().ReadonlyPaths = []string{"/proc/sys"}
			in.security().Seccomp = &runtimeapi.SecurityProfile{}
			in.HostDevices = []Device{device, {specs.LinuxDevice{Path: "/dev/y", Type: "b", Major: 7}, "rwm", "/dev/y"}}
			in.Devices = []Device{{specs.LinuxDevice{Path: "/dev/x", Type: "c", Major: 1, Minor: 3}, "rwm", "/dev/x"}}
		},
		"privileged-v1": func(in *Input) {
			in.CgroupV2 = false
			in.privileged()
		},
		"node-namespaces": func(in *Input) {
			o := &runtimeapi.NamespaceOption{Network: modeNode, Ipc: modeNode, Pid: modeNode}
			in.pod().NamespaceOptions = o
			in.security().NamespaceOptions = o
			in.Namespaces = Namespaces{}
			in.Shm = ""
			in.Sandbox.Hostname = ""
		},
		"userns": func(in *Input) {
			in.userns(65536, 65536)
		},
		"userns-node-network": func(in *Input) {
			in.userns(65536, 65536)
			in.pod().NamespaceOptions.Network = modeNode
			in.Namespaces.Net, in.Namespaces.UTS, in.Sandbox.Hostname = "", "", ""
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			in := input()
			change(&in)
			golden(t, name, build(t, in).Spec)
		})
	}
	t.Run("pod-init", func(t *testing.T) {
		in := input()
		in.pod().NamespaceOptions.Pid = modePod
		s, err := PodInit(
			PodInitInput{
				Host:        in.Host,
				ID:          "id",
				Sandbox:     in.Sandbox,
				Rootfs:      "/init",
				Namespaces:  in.Namespaces,
				CgroupsPath: "/pod/init",
			},
		)
		check(t, err)
		if s.Linux.Seccomp == nil {
			t.Error("the pod's init is not confined by seccomp")
		}
		s.Linux.Seccomp = nil // a long list of the library's, tested apart
		golden(t, "pod-init", s)
	})
}

func golden(t *testing.T, name string, s *specs.Spec) {
	t.Helper()
	got, err := json.MarshalIndent(s, "", "\t")
	check(t, err)
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		check(t, os.WriteFile(file, got, 0o644))
	}
	want, err := os.ReadFile(file)
	check(t, err)
	if string(got) != string(want) {
		t.Errorf("the spec differs from %s (go test -update writes it):\n%s", file, diff(string(want), string(got)))
	}
}

// diff lists the lines that only one side has.
func diff(want, got string) string {
	var out strings.Builder
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for _, l := range w {
		if !slices.Contains(g, l) {
			out.WriteString("- " + l + "\n")
		}
	}
	for _, l := range g {
		if !slices.Contains(w, l) {
			out.WriteString("+ " + l + "\n")
		}
	}
	return out.String()
}

func TestBuildLeavesInputAlone(t *testing.T) {
	in := input()
	in.Container.Annotations = map[string]string{"a": "b"}
	in.Image = ocispec.ImageConfig{Entrypoint: make([]string, 1, 8), Cmd: []string{"x"}, Env: []string{"PATH=/x"}}
	in.Image.Entrypoint[0] = "/e"
	in.Container.Command = nil
	in.KnownCaps = slices.Clone(allCaps)
	before, _ := json.Marshal(in)
	a, b := build(t, in), build(t, in)
	after, _ := json.Marshal(in)
	if string(before) != string(after) {
		t.Errorf("Build changed its input:\n%s\n%s", before, after)
	}
	if !reflect.DeepEqual(a, b) {
		t.Error("two builds of one input differ")
	}
	a.Spec.Annotations["a"] = "changed"
	a.Spec.Process.Args[0] = "changed"
	if in.Container.Annotations["a"] != "b" || in.Image.Entrypoint[0] != "/e" {
		t.Error("the spec shares memory with the input")
	}
}

func TestArgs(t *testing.T) {
	for _, tt := range []struct {
		name                           string
		entrypoint, cmd, command, args []string
		want                           []string
	}{
		{name: "image", entrypoint: []string{"e"}, cmd: []string{"c"}, want: []string{"e", "c"}},
		{name: "cmd only", cmd: []string{"c", "d"}, want: []string{"c", "d"}},
		{
			name:       "command drops both",
			entrypoint: []string{"e"},
			cmd:        []string{"c"},
			command:    []string{"x"},
			want:       []string{"x"},
		},
		{
			name:       "args keep the entrypoint",
			entrypoint: []string{"e"},
			cmd:        []string{"c"},
			args:       []string{"a"},
			want:       []string{"e", "a"},
		},
		{
			name:       "command and args",
			entrypoint: []string{"e"},
			cmd:        []string{"c"},
			command:    []string{"x"},
			args:       []string{"a"},
			want:       []string{"x", "a"},
		},
		{name: "args alone", args: []string{"a"}, want: []string{"a"}},
		{name: "removed entrypoint", entrypoint: []string{""}, cmd: []string{"c"}, want: []string{"c"}},
		{name: "nothing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.Container.Command, in.Container.Args = tt.command, tt.args
			in.Image.Entrypoint, in.Image.Cmd = tt.entrypoint, tt.cmd
			if tt.want == nil {
				_, err := validateAndBuild(in)
				wantField(t, err, kind.Invalid, "config.command")
				return
			}
			if got := build(t, in).Spec.Process.Args; !slices.Equal(got, tt.want) {
				t.Errorf("args %q, want %q", got, tt.want)
			}
		})
	}
}

func TestEnv(t *testing.T) {
	in := input()
	in.Image.Env = []string{"PATH=/image", "A=1", "B=2", "EMPTY="}
	in.Container.Envs = []*runtimeapi.KeyValue{{Key: "B", Value: []byte("3=3")}, {Key: "C", Value: []byte("a\nb")}}
	want := []string{"PATH=/image", "HOSTNAME=pod-1", "A=1", "B=3=3", "EMPTY=", "C=a\nb"}
	if got := build(t, in).Spec.Process.Env; !slices.Equal(got, want) {
		t.Errorf("env %q, want %q", got, want)
	}
	in = input()
	in.Container.Tty = true
	in.Sandbox.Hostname = ""
	want = []string{"PATH=" + defaultPath, "TERM=xterm", "HOSTNAME=node"}
	if got := build(t, in).Spec.Process.Env; !slices.Equal(got, want) {
		t.Errorf("env %q, want %q", got, want)
	}
}

func TestWorkingDir(t *testing.T) {
	for _, tt := range []struct{ image, cri, want string }{
		{"", "", "/"}, {"/i", "", "/i"}, {"i", "", "/i"}, {"/i", "/c/", "/c"},
	} {
		in := input()
		in.Image.WorkingDir, in.Container.WorkingDir = tt.image, tt.cri
		if got := build(t, in).Spec.Process.Cwd; got != tt.want {
			t.Errorf("image %q, config %q: cwd %q, want %q", tt.image, tt.cri, got, tt.want)
		}
	}
}

func TestOOMScoreAdj(t *testing.T) {
	in := input()
	in.MinOOMScoreAdj = -5
	for _, tt := range []struct {
		adj  int64
		want int
	}{{0, 0}, {-5, -5}, {-998, -5}, {1000, 1000}} {
		in.Container.Linux.Resources.OomScoreAdj = tt.adj
		r := build(t, in)
		if got := *r.Spec.Process.OOMScoreAdj; got != tt.want {
			t.Errorf("oom_score_adj %d became %d, want %d", tt.adj, got, tt.want)
		}
		if warned := len(r.Warnings) > 0; warned != (int64(tt.want) != tt.adj) {
			t.Errorf("oom_score_adj %d: warnings %q", tt.adj, r.Warnings)
		}
	}
}

func TestUser(t *testing.T) {
	id := func(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }
	type sc = runtimeapi.LinuxContainerSecurityContext
	const merge, strict = runtimeapi.SupplementalGroupsPolicy_Merge, runtimeapi.SupplementalGroupsPolicy_Strict
	for _, tt := range []struct {
		name   string
		image  string
		sc     *sc
		want   []int64 // uid, gid, groups...
		field  string
		nobody bool // an image without /etc/passwd and /etc/group
	}{
		{name: "nothing", want: []int64{0, 0, 0, 10}},
		{name: "empty image", nobody: true, want: []int64{0, 0, 0}},
		{name: "image uid", image: "1000", want: []int64{1000, 1000, 10, 1000, 50000}},
		{name: "image name", image: "app", want: []int64{1000, 1000, 10, 1000, 50000}},
		{name: "image uid and gid", image: "1000:5", want: []int64{1000, 5, 5, 10, 50000}},
		{name: "image name and group", image: "app:media", want: []int64{1000, 50000, 10, 50000}},
		{name: "image group alone", image: ":media", want: []int64{0, 50000, 0, 10, 50000}},
		{name: "image unknown uid", image: "4242", want: []int64{4242, 0, 0}},
		{name: "image unknown name", image: "ghost", field: fieldImage},
		{name: "image unknown group", image: "app:ghosts", field: fieldImage},
		{name: "image uid out of range", image: "4294967295", field: fieldImage},
		{name: "image negative uid", image: "-1", field: fieldImage},
		{name: "name in an empty image", nobody: true, image: "root", field: fieldImage},
		{name: "user", image: "app:media", sc: &sc{RunAsUser: id(65534)}, want: []int64{65534, 65534, 65534}},
		{name: "user zero", image: "app", sc: &sc{RunAsUser: id(0)}, want: []int64{0, 0, 0, 10}},
		{name: "user and group", sc: &sc{RunAsUser: id(1001), RunAsGroup: id(1002)}, want: []int64{1001, 1002, 1002}},
		{
			name: "user keeps memberships with a group",
			sc:   &sc{RunAsUser: id(1000), RunAsGroup: id(7)},
			want: []int64{1000, 7, 7, 10, 50000},
		},
		{name: "username", sc: &sc{RunAsUsername: "nobody"}, want: []int64{65534, 65534, 65534}},
		{name: "username that is a number", sc: &sc{RunAsUsername: "1234"}, want: []int64{77, 78, 78}},
		{name: "number that is no username", sc: &sc{RunAsUsername: "1000"}, field: fieldUsername},
		{name: "unknown username", sc: &sc{RunAsUsername: "ghost"}, field: fieldUsername},
		{name: "username and group", sc: &sc{RunAsUsername: "app", RunAsGroup: id(3)}, want: []int64{1000, 3, 3, 10,
			50000}},
		{name: "both", sc: &sc{RunAsUsername: "app", RunAsUser: id(1)}, field: fieldUsername},
		{name: "group alone", sc: &sc{RunAsGroup: id(3)}, field: fieldContext + "run_as_group"},
		{
			name: "merge",
			sc:   &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234, 10}, SupplementalGroupsPolicy: merge},
			want: []int64{1000, 1000, 10, 1000, 1234, 50000},
		},
		{
			name: "strict",
			sc:   &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234}, SupplementalGroupsPolicy: strict},
			want: []int64{1000, 1000, 1000, 1234},
		},
		{
			name:  "strict with image user",
			image: "app",
			sc:    &sc{SupplementalGroupsPolicy: strict},
			want:  []int64{1000, 1000, 1000},
		},
		{name: "negative user", sc: &sc{RunAsUser: id(-1)}, field: fieldContext + "run_as_user"},
		{name: "large group", sc: &sc{RunAsUser: id(1), RunAsGroup: id(1 << 31)}, field: fieldContext + "run_as_group"},
		{
			name:  "negative supplemental group",
			sc:    &sc{SupplementalGroups: []int64{1, -2}},
			field: fieldContext + "supplemental_groups[1]",
		},
		{name: "unknown policy", sc: &sc{SupplementalGroupsPolicy: 9},
			field: fieldContext + "supplemental_groups_policy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.Image.User = tt.image
			if tt.sc != nil {
				in.Container.Linux.SecurityContext = tt.sc
			}
			passwd, group := passwd, group
			if tt.nobody {
				passwd, group = "", ""
			}
			r, err := buildFor(in, passwd, group)
			if tt.field != "" {
				wantField(t, err, kind.Invalid, tt.field)
				return
			}
			check(t, err)
			got := append([]int64{r.User.Uid, r.User.Gid}, r.User.SupplementalGroups...)
			if !slices.Equal(got, tt.want) {
				t.Errorf("uid, gid, groups %v, want %v", got, tt.want)
			}
			u := r.Spec.Process.User
			if int64(u.UID) != r.User.Uid || int64(u.GID) != r.User.Gid ||
				len(u.AdditionalGids) != len(r.User.SupplementalGroups) {
				t.Errorf("spec has %v, the result says %v", u, r.User)
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	without := func(list []string, drop ...string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(c string) bool { return slices.Contains(drop, c) })
	}
	few := []string{"CAP_CHOWN", "CAP_NET_ADMIN", "CAP_KILL"}
	for _, tt := range []struct {
		name       string
		caps       *runtimeapi.Capability
		known      []string
		privileged bool
		want       []string
		ambient    []string
		kind       error
		field      string
	}{
		{name: "default", want: defaultCaps},
		{
			name: "add",
			caps: &runtimeapi.Capability{AddCapabilities: []string{"net_admin", "CAP_SYS_TIME"}},
			want: append(slices.Clone(defaultCaps), "CAP_NET_ADMIN", "CAP_SYS_TIME"),
		},
		{
			name: "drop",
			caps: &runtimeapi.Capability{DropCapabilities: []string{"NET_RAW"}},
			want: without(defaultCaps, "CAP_NET_RAW"),
		},
		{name: "add all", caps: &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}, want: allCaps},
		{
			name: "add all but one",
			caps: &runtimeapi.Capability{AddCapabilities: []string{"all"}, DropCapabilities: []string{"chown"}},
			want: without(allCaps, "CAP_CHOWN"),
		},
		{name: "drop all", caps: &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}},
		{
			name: "drop all add one",
			caps: &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"KILL"}},
			want: []string{"CAP_KILL"},
		},
		{
			name: "add and drop the same",
			caps: &runtimeapi.Capability{AddCapabilities: []string{"BPF"}, DropCapabilities: []string{"BPF"}},
			want: defaultCaps,
		},
		{
			name:    "ambient",
			caps:    &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE", "SYS_NICE"}},
			want:    append(slices.Clone(defaultCaps), "CAP_SYS_NICE"),
			ambient: []string{"CAP_NET_BIND_SERVICE", "CAP_SYS_NICE"},
		},
		{
			name: "ambient dropped",
			caps: &runtimeapi.Capability{AddAmbientCapabilities: []string{"KILL"}, DropCapabilities: []string{"KILL"}},
			want: without(defaultCaps, "CAP_KILL"),
		},
		{name: "weak machine", known: few, want: []string{"CAP_CHOWN", "CAP_KILL"}},
		{name: "weak machine, all", known: few, caps: &runtimeapi.Capability{AddCapabilities: []string{"ALL"}},
			want: few},
		{
			name:  "weak machine, too much",
			known: few,
			caps:  &runtimeapi.Capability{AddCapabilities: []string{"BPF"}},
			kind:  kind.Unsupported,
			field: fieldAdd,
		},
		{
			name:       "privileged",
			privileged: true,
			caps:       &runtimeapi.Capability{DropCapabilities: []string{"ALL"}},
			want:       allCaps,
		},
		{name: "privileged on a weak machine", privileged: true, known: few, want: few},
		{
			name:  "unknown add",
			caps:  &runtimeapi.Capability{AddCapabilities: []string{"SYS_NICE", "FLY"}},
			kind:  kind.Invalid,
			field: fieldAdd + "[1]",
		},
		{
			name:  "unknown drop",
			caps:  &runtimeapi.Capability{DropCapabilities: []string{""}},
			kind:  kind.Invalid,
			field: fieldDrop + "[0]",
		},
		{
			name:  "unknown ambient",
			caps:  &runtimeapi.Capability{AddAmbientCapabilities: []string{"CAP_CAP_KILL"}},
			kind:  kind.Invalid,
			field: fieldAmbient + "[0]",
		},
		{
			name:  "drop what this kernel does not know",
			known: few,
			caps:  &runtimeapi.Capability{DropCapabilities: []string{"BPF"}},
			want:  []string{"CAP_CHOWN", "CAP_KILL"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.KnownCaps = tt.known
			in.security().Capabilities = tt.caps
			if tt.privileged {
				in.privileged()
			}
			if tt.field != "" {
				_, err := validateAndBuild(in)
				wantField(t, err, tt.kind, tt.field)
				return
			}
			r := build(t, in)
			if len(r.Warnings) > 0 {
				t.Errorf("warnings %q", r.Warnings)
			}
			c := r.Spec.Process.Capabilities
			same := func(set string, got, want []string) {
				got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
				if !slices.Equal(got, want) {
					t.Errorf("%s %v, want %v", set, got, want)
				}
			}
			same("bounding", c.Bounding, tt.want)
			same("permitted", c.Permitted, tt.want)
			same("effective", c.Effective, tt.want)
			same("inheritable", c.Inheritable, tt.ambient)
			same("ambient", c.Ambient, tt.ambient)
		})
	}
}

func TestNamespaces(t *testing.T) {
	type ns = map[specs.LinuxNamespaceType]string
	paths := Namespaces{Net: "/net", IPC: "/ipc", UTS: "/uts", PID: "/pid"}
	for _, tt := range []struct {
		name     string
		pod, own *runtimeapi.NamespaceOption
		paths    Namespaces
		hostname string // empty: a name of its own
		want     ns
		field    string
	}{
		{
			name:  "kubelet",
			pod:   &runtimeapi.NamespaceOption{Pid: modeContainer},
			own:   &runtimeapi.NamespaceOption{Pid: modeContainer},
			paths: paths,
			want:  ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "", "mount": "", "cgroup": ""}},
		{name: "shared pid", pod: &runtimeapi.NamespaceOption{}, own: &runtimeapi.NamespaceOption{}, paths: paths,
			want: ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "/pid", "mount": "", "cgroup": ""}},
		{name: "container names no mode", pod: &runtimeapi.NamespaceOption{Pid: modeContainer}, paths: paths,
			want: ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "", "mount": "", "cgroup": ""}},
		{name: "no modes at all", paths: paths,
			want: ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "", "mount": "", "cgroup": ""}},
		{name: "target", pod: &runtimeapi.NamespaceOption{Pid: modeContainer}, own: &runtimeapi.NamespaceOption{
			Pid:      modeTarget,
			TargetId: "x",
		}, paths: paths,
			want: ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "/pid", "mount": "", "cgroup": ""}},
		{
			name:  "target gone",
			own:   &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "x"},
			field: fieldContext + "namespace_options.target_id",
		},
		{name: "node", pod: &runtimeapi.NamespaceOption{Network: modeNode, Pid: modeNode, Ipc: modeNode}, paths: paths,
			hostname: "node-1",
			want:     ns{"mount": "", "cgroup": ""}},
		{name: "own name on the node", pod: &runtimeapi.NamespaceOption{Network: modeNode, Pid: modeNode}, paths: paths,
			want: ns{"ipc": "/ipc", "uts": "/uts", "mount": "", "cgroup": ""}},
		{
			name:  "node pid only",
			pod:   &runtimeapi.NamespaceOption{Pid: modeNode},
			own:   &runtimeapi.NamespaceOption{Pid: modeNode},
			paths: paths,
			want:  ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "mount": "", "cgroup": ""}},
		{
			name:  "own pid in a node pod",
			pod:   &runtimeapi.NamespaceOption{Pid: modeNode},
			own:   &runtimeapi.NamespaceOption{Pid: modeContainer},
			paths: paths,
			want:  ns{"network": "/net", "ipc": "/ipc", "uts": "/uts", "pid": "", "mount": "", "cgroup": ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.pod().NamespaceOptions = tt.pod
			in.security().NamespaceOptions = tt.own
			in.Namespaces = tt.paths
			in.NodeName = "node-1"
			in.Sandbox.Hostname = cmp.Or(tt.hostname, in.Sandbox.Hostname)
			if tt.field != "" {
				_, err := validateAndBuild(in)
				wantField(t, err, kind.Invalid, tt.field)
				return
			}
			s := build(t, in).Spec
			got := ns{}
			for _, n := range s.Linux.Namespaces {
				got[n.Type] = n.Path
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("namespaces %v, want %v", got, tt.want)
			}
			if s.Hostname != "" {
				t.Errorf("hostname %q is set in a namespace that is not the container's", s.Hostname)
			}
		})
	}
	in := input()
	in.Namespaces.UTS = ""
	if h := build(t, in).Spec.Hostname; h != "pod-1" {
		t.Errorf("hostname %q in a new UTS namespace", h)
	}
}

func TestSeccomp(t *testing.T) {
	type profile = runtimeapi.SecurityProfile
	const localhost = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}`
	const refField = fieldSeccomp + ".localhost_ref"
	for _, tt := range []struct {
		name    string
		profile *profile
		path    string
		body    string
		weak    bool
		priv    bool
		want    specs.LinuxSeccompAction // the default one; empty: no filter
		kind    error
		field   string
	}{
		{name: "nothing"},
		{name: "default", profile: &profile{}, want: specs.ActErrno},
		{name: "unconfined", profile: &profile{ProfileType: profileUnconfined}},
		{
			name:    "localhost",
			profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "/p.json"},
			body:    localhost,
			want:    specs.ActAllow,
		},
		{
			name:    "missing file",
			profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "/p.json"},
			kind:    kind.Invalid,
			field:   refField,
		},
		{
			name:    "no JSON",
			profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "/p.json"},
			body:    "{",
			kind:    kind.Invalid,
			field:   refField,
		},
		{
			name:    "no rules",
			profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "/p.json"},
			body:    "{}",
			kind:    kind.Invalid,
			field:   refField,
		},
		{
			name:    "relative path",
			profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "p.json"},
			body:    localhost,
			kind:    kind.Invalid,
			field:   refField,
		},
		{name: "path without localhost", profile: &profile{LocalhostRef: "/p.json"}, kind: kind.Invalid,
			field: refField},
		{name: "unknown type", profile: &profile{ProfileType: 7}, kind: kind.Invalid,
			field: fieldSeccomp + ".profile_type"},
		{name: "old default", path: "runtime/default", want: specs.ActErrno},
		{name: "old unconfined", path: "unconfined"},
		{name: "old localhost", path: "localhost//p.json", body: localhost, want: specs.ActAllow},
		{name: "old nonsense", path: "docker", kind: kind.Invalid, field: fieldContext + "seccomp_profile_path"},
		{name: "new wins", profile: &profile{ProfileType: profileUnconfined}, path: "runtime/default"},
		{name: "privileged", priv: true, profile: &profile{ProfileType: profileLocalhost, LocalhostRef: "/p.json"}},
		{name: "kernel without", weak: true, profile: &profile{}, kind: kind.Unsupported, field: fieldSeccomp},
		{name: "kernel without, unconfined", weak: true, profile: &profile{ProfileType: profileUnconfined}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.SeccompSupported = !tt.weak
			in.security().Seccomp = tt.profile
			in.security().SeccompProfilePath = tt.path //nolint:staticcheck // still supported
			in.SeccompProfile = []byte(tt.body)
			if tt.priv {
				in.privileged()
			}
			if tt.field != "" {
				_, err := validateAndBuild(in)
				wantField(t, err, tt.kind, tt.field)
				return
			}
			if _, err := ReadSeccompProfile(in.Container); (err != nil) != (tt.body != "") { // it is not there
				t.Errorf("reading the profile: %v", err)
			}
			f := build(t, in).Spec.Linux.Seccomp
			if tt.want == "" {
				if f != nil {
					t.Error("there is a filter")
				}
				return
			}
			if f == nil || f.DefaultAction != tt.want {
				t.Fatalf("filter %+v, want the default action %s", f, tt.want)
			}
		})
	}
}

// TestSeccompDefault looks at what the library's profile promises: rules that
// follow the capabilities.
func TestSeccompDefault(t *testing.T) {
	rules := func(caps ...string) func(name string) []specs.LinuxSyscall {
		in := input()
		in.security().Seccomp = &runtimeapi.SecurityProfile{}
		in.security().Capabilities = &runtimeapi.Capability{AddCapabilities: caps}
		list := build(t, in).Spec.Linux.Seccomp.Syscalls
		return func(name string) []specs.LinuxSyscall {
			return slices.DeleteFunc(
				slices.Clone(list),
				func(r specs.LinuxSyscall) bool { return !slices.Contains(r.Names, name) },
			)
		}
	}
	plain, admin := rules(), rules("SYS_ADMIN")
	if r := plain("mount"); len(r) != 0 {
		t.Errorf("mount is allowed without CAP_SYS_ADMIN: %v", r)
	}
	if r := admin("mount"); len(r) != 1 || r[0].Action != specs.ActAllow {
		t.Errorf("mount with CAP_SYS_ADMIN: %v", r)
	}
	if r := plain("clone3"); len(r) != 1 || r[0].Action != specs.ActErrno || r[0].ErrnoRet == nil ||
		*r[0].ErrnoRet != 38 {
		t.Errorf("clone3 must fail with ENOSYS, so that C libraries fall back to clone: %+v", r)
	}
	if r := plain("clone"); len(r) != 1 || len(r[0].Args) == 0 {
		t.Errorf("clone must not make namespaces: %+v", r)
	}
	for capability, call := range map[string]string{
		"SYS_TIME":   "settimeofday",
		"SYS_PTRACE": "kcmp",
		"BPF":        "bpf",
		"PERFMON":    "perf_event_open",
		"SYS_MODULE": "init_module",
	} {
		if len(plain(call)) != 0 || len(rules(capability)(call)) == 0 {
			t.Errorf("%s must be allowed with CAP_%s only", call, capability)
		}
	}
	if len(plain("read")) == 0 || len(plain("personality")) == 0 {
		t.Error("ordinary system calls are not allowed")
	}
}

func TestAppArmor(t *testing.T) {
	type profile = runtimeapi.SecurityProfile
	local := &profile{ProfileType: profileLocalhost, LocalhostRef: "mine"}
	prefixed := &profile{ProfileType: profileLocalhost, LocalhostRef: "localhost/mine"}
	for _, tt := range []struct {
		name          string
		profile       *profile
		old           string
		enabled, priv bool
		deflt, want   string
		kind          error
	}{
		{name: "nothing", enabled: true, deflt: "d", want: "d"},
		{name: "nothing where there is no default", enabled: true},
		{name: "default", profile: &profile{}, enabled: true, deflt: "d", want: "d"},
		{name: "default where there is none", profile: &profile{}, enabled: true, kind: kind.Unsupported},
		{name: "default, disabled", profile: &profile{}},
		{name: "localhost", profile: local, enabled: true, want: "mine"},
		{name: "localhost with a prefix", profile: prefixed, enabled: true, want: "mine"},
		{name: "localhost, disabled", profile: local, kind: kind.Unsupported},
		{name: "old localhost", old: "localhost/mine", enabled: true, want: "mine"},
		{name: "unconfined", profile: &profile{ProfileType: profileUnconfined}, enabled: true, deflt: "d"},
		{name: "privileged", profile: local, priv: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.AppArmorEnabled, in.AppArmorDefault = tt.enabled, tt.deflt
			in.security().Apparmor = tt.profile
			in.security().ApparmorProfile = tt.old //nolint:staticcheck // still supported
			if tt.priv {
				in.privileged()
			}
			r, err := validateAndBuild(in)
			if tt.kind != nil {
				wantField(t, err, tt.kind, fieldApparmor)
				return
			}
			check(t, err)
			if got := r.Spec.Process.ApparmorProfile; got != tt.want {
				t.Errorf("profile %q, want %q", got, tt.want)
			}
		})
	}
}

func TestSELinux(t *testing.T) {
	in := input()
	in.security().SelinuxOptions = &runtimeapi.SELinuxOption{Type: "my_t", Level: "s0:c1,c2"}
	r := build(t, in)
	if s := r.Spec; s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" ||
		!slices.Contains(r.Warnings, SELinuxIgnored) {
		t.Errorf("without SELinux: labels %q and %q, warnings %q", s.Process.SelinuxLabel, s.Linux.MountLabel,
			r.Warnings)
	}
	in.SELinuxEnabled = true
	s := build(t, in).Spec
	if s.Process.SelinuxLabel != "system_u:system_r:my_t:s0:c1,c2" ||
		s.Linux.MountLabel != "system_u:object_r:container_file_t:s0:c1,c2" {
		t.Errorf("labels %q and %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
	}
	in.security().SelinuxOptions = nil
	in.pod().SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c3"}
	if s := build(t, in).Spec; s.Process.SelinuxLabel != "system_u:system_r:container_t:s0:c3" {
		t.Errorf("label %q is not the pod's", s.Process.SelinuxLabel)
	}
}

// What a machine cannot do is refused without a look at the image, and by Build as well.
func TestCheck(t *testing.T) {
	type (
		host = func(*Host)
		res  = runtimeapi.LinuxContainerResources
	)
	level := &runtimeapi.SELinuxOption{Level: "s0:c1"}
	label := &runtimeapi.SELinuxOption{Type: "my_t", Level: "s0:c1"}
	relabel := []*runtimeapi.Mount{{HostPath: "/a", ContainerPath: "/a"}, {HostPath: "/b", SelinuxRelabel: true}}
	with := func(h *Host) { h.SELinuxEnabled = true }
	resources := func(r *res) func(*Input) { return func(in *Input) { in.Container.Linux.Resources = r } }
	unified := func(name string) func(*Input) { return resources(&res{Unified: map[string]string{name: "1"}}) }
	pages := func(size string) func(*Input) {
		return resources(&res{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: size}}})
	}
	const unifiedField = fieldResources + ".unified"
	for name, tt := range map[string]struct {
		host  host
		edit  func(in *Input)
		kind  error  // nil: allowed
		field string // of the error
	}{
		"nothing asked": {nil, nil, nil, ""},

		"empty label":      {nil, func(in *Input) { in.security().SelinuxOptions = &runtimeapi.SELinuxOption{} }, nil, ""},
		"label":            {nil, func(in *Input) { in.security().SelinuxOptions = label }, nil, ""},
		"label of the pod": {nil, func(in *Input) { in.pod().SelinuxOptions = label }, nil, ""},
		"level":            {nil, func(in *Input) { in.security().SelinuxOptions = level }, nil, ""},
		"level, relabel, no kernel": {nil, func(in *Input) {
			in.Container.Mounts, in.security().SelinuxOptions = relabel, level
		}, nil, ""},
		"label, privileged": {nil, func(in *Input) {
			in.security().SelinuxOptions, in.security().Privileged = label, true
		}, nil, ""},
		"label that confines nothing": {nil, func(in *Input) {
			in.security().SelinuxOptions = &runtimeapi.SELinuxOption{Type: "spc_t", Level: "s0"}
		}, nil, ""},
		"label with SELinux": {with, func(in *Input) { in.security().SelinuxOptions = level }, nil, ""},
		"relabel, no label":  {with, func(in *Input) { in.Container.Mounts = relabel }, nil, ""},
		"relabel, no kernel": {nil, func(in *Input) { in.Container.Mounts = relabel }, nil, ""},
		"relabel": {with, func(in *Input) {
			in.Container.Mounts, in.security().SelinuxOptions = relabel, level
		}, nil, ""},

		"AppArmor": {nil, func(in *Input) {
			in.security().Apparmor = &runtimeapi.SecurityProfile{ProfileType: profileLocalhost, LocalhostRef: "a"}
		}, kind.Unsupported, fieldApparmor},
		"seccomp": {func(h *Host) { h.SeccompSupported = false }, func(in *Input) {
			in.security().Seccomp = &runtimeapi.SecurityProfile{ProfileType: profileDefault}
		}, kind.Unsupported, fieldSeccomp},
		"capability": {func(h *Host) { h.KnownCaps = []string{"CAP_KILL"} }, func(in *Input) {
			in.security().Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"BPF"}}
		}, kind.Unsupported, fieldAmbient},
		"recursive read-only": {func(h *Host) { h.RecursiveReadOnly = false }, func(in *Input) {
			in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/a"},
				{ContainerPath: "/b", RecursiveReadOnly: true}}
		}, kind.Unsupported, "config.mounts[1].recursive_read_only"},
		"mapped mount": {func(h *Host) { h.MappedMounts = false }, func(in *Input) {
			in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/a", UidMappings: []*runtimeapi.IDMapping{{}}}}
		}, kind.Unsupported, "config.mounts[0].uidMappings"},

		"processor": {func(h *Host) { h.CPUs = "0-3" }, resources(&res{CpusetCpus: "1-4"}),
			kind.Invalid, fieldResources + ".cpuset_cpus"},
		"memory node": {func(h *Host) { h.Mems = "0" }, resources(&res{CpusetMems: "1"}),
			kind.Invalid, fieldResources + ".cpuset_mems"},
		"page size":   {nil, pages("64KB"), kind.Invalid, fieldResources + ".hugepage_limits[1].page_size"},
		"page sizes":  {nil, pages("1GB"), nil, ""},
		"not counted": {func(h *Host) { h.HugetlbSupported = false }, pages("1GB"), nil, ""},

		"unified on v1": {func(h *Host) { h.CgroupV2 = false }, unified("memory.high"),
			kind.Unsupported, unifiedField},
		"unified, no controller":   {nil, unified("io.max"), kind.Unsupported, unifiedField},
		"unified, no such file":    {nil, unified("memory.most"), kind.Invalid, unifiedField},
		"unified, files not known": {nil, unified("pids.max"), nil, ""},
		"unified, an action":       {nil, unified("cgroup.procs"), kind.Invalid, unifiedField},
		"unified, of all cgroups":  {nil, unified("cgroup.max.depth"), nil, ""},
		"unified":                  {nil, unified("memory.high"), nil, ""},
	} {
		in := input()
		in.PageSizes, in.Controllers = []string{"2MB", "1GB"}, []string{"memory", "pids"}
		in.CgroupFiles = []string{"cgroup.max.depth", "cgroup.procs", "memory.high", "memory.low"}
		if tt.host != nil {
			tt.host(&in.Host)
		}
		if tt.edit != nil {
			tt.edit(&in)
		}
		err := Check(in)
		if tt.kind == nil {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantField(t, err, tt.kind, tt.field)
		if _, berr := Build(in); berr == nil {
			t.Errorf("%s: Build takes it", name)
		}
	}
}

// What the kernel refuses is the fault of a field, by the texts of runc.
func TestBlame(t *testing.T) {
	r := &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "banana"}}
	const write = "OCI runtime cannot create c: failed to write \"7\": write "
	for text, field := range map[string]string{
		write + "/sys/fs/cgroup/cpuset/a/cpuset.cpus: invalid argument":              "f.cpuset_cpus",
		write + "/sys/fs/cgroup/cpuset/a/cpuset.mems: numerical result out of range": "f.cpuset_mems",
		write + "/sys/fs/cgroup/cpuset/a/b/cpuset.cpus: permission denied":           "f.cpuset_cpus",
		write + "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us: invalid argument":            "f.cpu_quota",
		write + "/sys/fs/cgroup/a/cpu.max: invalid argument":                         "f.cpu_quota",
		write + "/sys/fs/cgroup/a/memory.high: invalid argument":                     "f.unified",
		write + "/sys/fs/cgroup/a/memory.low: invalid argument":                      "",
		write + "/sys/fs/cgroup/a/memory.max: device or resource busy":               "",
		"something else: invalid argument":                                           "",
	} {
		err := Blame("f", r, errors.New(text))
		blamed := errors.Is(err, kind.Invalid)
		if blamed != (field != "") || blamed && err.Error() != field+": "+text || !blamed && err.Error() != text {
			t.Errorf("%s: %v", text, err)
		}
	}
	if Blame("f", r, nil) != nil {
		t.Error("nothing is a fault")
	}
}

func TestMounts(t *testing.T) {
	find := func(s *specs.Spec, dst string) []specs.Mount {
		return slices.DeleteFunc(slices.Clone(s.Mounts), func(m specs.Mount) bool { return m.Destination != dst })
	}
	t.Run("CRI mounts take the place of others", func(t *testing.T) {
		in := input()
		for _, dst := range []string{"/sys", "/dev/shm", "/etc/resolv.conf/", "/vol"} {
			in.Container.Mounts = append(in.Container.Mounts, &runtimeapi.Mount{HostPath: "/h", ContainerPath: dst})
		}
		in.ImageVolumes = map[string]string{"/vol": "/volumes/1"}
		s := build(t, in).Spec
		for _, dst := range []string{"/sys", "/dev/shm", "/etc/resolv.conf", "/vol"} {
			if m := find(s, dst); len(m) != 1 || m[0].Source != "/h" {
				t.Errorf("%s: %v", dst, m)
			}
		}
		if m := find(s, "/sys/fs/cgroup"); len(m) != 0 {
			t.Errorf("a default mount lies below a given /sys: %v", m)
		}
	})
	t.Run("a given /dev", func(t *testing.T) {
		in := input()
		in.Container.Mounts = []*runtimeapi.Mount{{HostPath: "/dev", ContainerPath: "/dev"}}
		s := build(t, in).Spec
		if len(find(s, "/dev/pts")) != 0 || len(find(s, "/dev/mqueue")) != 0 || len(find(s, "/dev")) != 1 {
			t.Errorf("mounts %v", s.Mounts)
		}
		if m := find(s, "/dev/shm"); len(m) != 1 || m[0].Source != "/pod/shm" {
			t.Errorf("/dev/shm is not the pod's: %v", m)
		}
	})
	t.Run("parents first", func(t *testing.T) {
		in := input()
		for _, dst := range []string{"/a/b/c", "/a/b", "/z", "/a"} {
			in.Container.Mounts = append(in.Container.Mounts, &runtimeapi.Mount{HostPath: "/h", ContainerPath: dst})
		}
		var order []string
		for _, m := range build(t, in).Spec.Mounts {
			if m.Source == "/h" {
				order = append(order, m.Destination)
			}
		}
		if want := []string{"/z", "/a", "/a/b", "/a/b/c"}; !slices.Equal(order, want) {
			t.Errorf("order %v, want %v", order, want)
		}
	})
	t.Run("propagation of the root", func(t *testing.T) {
		const slave = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		const shared = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
		for want, list := range map[string][]runtimeapi.MountPropagation{
			"": {0}, "rslave": {0, slave}, "rshared": {slave, shared, slave},
		} {
			in := input()
			for _, p := range list {
				in.Container.Mounts = append(
					in.Container.Mounts,
					&runtimeapi.Mount{HostPath: "/h", ContainerPath: "/m", Propagation: p},
				)
			}
			if got := build(t, in).Spec.Linux.RootfsPropagation; got != want {
				t.Errorf("%v: root propagation %q, want %q", list, got, want)
			}
		}
	})
	t.Run("read-only root", func(t *testing.T) {
		in := input()
		in.security().ReadonlyRootfs = true
		s := build(t, in).Spec
		if !s.Root.Readonly || !slices.Contains(
			find(s, "/etc/hosts")[0].Options,
			"ro",
		) || !slices.Contains(find(s, "/dev/shm")[0].Options, "rw") {
			t.Errorf("root %v, mounts %v", s.Root, s.Mounts)
		}
	})
	t.Run("no pod files", func(t *testing.T) {
		in := input()
		in.Shm, in.Hosts, in.ResolvConf, in.Hostname = "", "", "", ""
		s := build(t, in).Spec
		if m := find(s, "/dev/shm"); len(m) != 1 || m[0].Type != "tmpfs" {
			t.Errorf("/dev/shm %v", m)
		}
		if len(find(s, "/etc/hosts")) != 0 {
			t.Error("/etc/hosts is bound to nothing")
		}
	})
	t.Run("cannot", func(t *testing.T) {
		in := input()
		in.Container.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/i", Image: &runtimeapi.ImageSpec{Image: "x"}, Readonly: true},
		}
		_, err := validateAndBuild(in)
		wantField(t, err, kind.Unsupported, "config.mounts[0].image")
		in = input()
		in.RecursiveReadOnly = false
		in.Container.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/i", HostPath: "/h", Readonly: true, RecursiveReadOnly: true},
		}
		_, err = validateAndBuild(in)
		wantField(t, err, kind.Unsupported, "config.mounts[0].recursive_read_only")
	})
}

func TestResources(t *testing.T) {
	type res = runtimeapi.LinuxContainerResources
	host := Host{CgroupV2: true, SwapSupported: true, HugetlbSupported: true}
	for _, tt := range []struct {
		name string
		in   *res
		host Host
		want string
	}{
		{"nothing", nil, host, `{}`},
		{
			"cpu",
			&res{CpuShares: 2, CpuQuota: -1, CpuPeriod: 100000, CpusetMems: "0"},
			host,
			`{"cpu":{"shares":2,"quota":-1,"period":100000,"mems":"0"}}`,
		},
		{"memory", &res{MemoryLimitInBytes: 100}, host, `{"memory":{"limit":100,"swap":100}}`},
		{"swap", &res{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 150}, host,
			`{"memory":{"limit":100,"swap":150}}`},
		{
			"no swap controller",
			&res{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 150},
			Host{},
			`{"memory":{"limit":100}}`,
		},
		{
			"hugepages",
			&res{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB", Limit: 5}}},
			host,
			`{"hugepageLimits":[{"pageSize":"1GB","limit":5}]}`,
		},
		{
			"no hugetlb controller",
			&res{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB", Limit: 5}}},
			Host{},
			`{}`,
		},
		{"unified", &res{Unified: map[string]string{"memory.high": "7"}}, host, `{"unified":{"memory.high":"7"}}`},
		{"oom_score_adj is not the cgroup's", &res{OomScoreAdj: 5}, host, `{}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input()
			in.Host, in.Container.Linux.Resources = tt.host, tt.in
			r := build(t, in).Spec.Linux.Resources
			r.Devices = nil // see TestDevices
			if got, _ := json.Marshal(r); string(got) != tt.want {
				t.Errorf("resources %s, want %s", got, tt.want)
			}
		})
	}
	in := input()
	in.Host, in.Container.Linux.Resources = Host{}, &res{Unified: map[string]string{"memory.high": "7"}}
	_, err := validateAndBuild(in)
	wantField(t, err, kind.Unsupported, "config.linux.resources.unified")
	in.Container.Linux.Resources = &res{CpuShares: -1}
	_, err = validateAndBuild(in)
	wantField(t, err, kind.Invalid, "config.linux.resources.cpu_shares")
}

func TestStopSignal(t *testing.T) {
	for _, tt := range []struct {
		image  string
		cri    runtimeapi.Signal
		number int
		signal runtimeapi.Signal
	}{
		{"", 0, 15, runtimeapi.Signal_SIGNAL_SIGTERM},
		{"SIGQUIT", 0, 3, runtimeapi.Signal_SIGNAL_SIGQUIT},
		{"quit", 0, 3, runtimeapi.Signal_SIGNAL_SIGQUIT},
		{"9", 0, 9, runtimeapi.Signal_SIGNAL_SIGKILL},
		{"37", 0, 37, runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3},
		{"SIGRTMIN+3", 0, 37, runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3},
		{"RTMIN", 0, 34, runtimeapi.Signal_SIGNAL_SIGRTMIN},
		{"SIGRTMAX-14", 0, 50, runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS14},
		{"SIGRTMAX", 0, 64, runtimeapi.Signal_SIGNAL_SIGRTMAX},
		{"SIGIOT", 0, 6, runtimeapi.Signal_SIGNAL_SIGABRT},
		{"SIGCLD", 0, 17, runtimeapi.Signal_SIGNAL_SIGCHLD},
		{"SIGPOLL", 0, 29, runtimeapi.Signal_SIGNAL_SIGIO},
		{"SIGQUIT", runtimeapi.Signal_SIGNAL_SIGINT, 2, runtimeapi.Signal_SIGNAL_SIGINT},
		{"nonsense", runtimeapi.Signal_SIGNAL_SIGPOLL, 29, runtimeapi.Signal_SIGNAL_SIGPOLL},
	} {
		c := container()
		c.StopSignal = tt.cri
		n, s, err := StopSignal(c, ocispec.ImageConfig{StopSignal: tt.image})
		if err != nil || int(n) != tt.number || s != tt.signal {
			t.Errorf("image %q, config %s: %d, %s, %v; want %d, %s", tt.image, tt.cri, n, s, err, tt.number, tt.signal)
		}
	}
	for _, bad := range []string{"SIG", "0", "65", "-1", "SIGRTMIN-1", "SIGRTMAX+1", "SIGRTMIN+31", "SIGRTMIN+",
		"TERM "} {
		_, _, err := StopSignal(container(), ocispec.ImageConfig{StopSignal: bad})
		if err == nil {
			t.Errorf("%q passes for a signal", bad)
			continue
		}
		wantField(t, err, kind.Invalid, "image config: StopSignal")
	}
	_, _, err := StopSignal(&runtimeapi.ContainerConfig{StopSignal: 66}, ocispec.ImageConfig{})
	wantField(t, err, kind.Invalid, fieldStopSignal)
	// Each name of the CRI has a number, the same on the way back, unless it is
	// one of two names.
	for v, name := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(v)
		n, got, err := StopSignal(&runtimeapi.ContainerConfig{StopSignal: s}, ocispec.ImageConfig{})
		if err != nil || v != 0 && got != s {
			t.Errorf("%s: %d, %s, %v", name, n, got, err)
		}
		alias := slices.Contains([]string{"SIGNAL_SIGCLD", "SIGNAL_SIGIOT", "SIGNAL_SIGPOLL"}, name)
		if back := criSignal(n); v != 0 && !alias && back != s {
			t.Errorf("%s is %d, which is %s", name, n, back)
		}
	}
}

func TestImageVolumes(t *testing.T) {
	c := container()
	c.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/data/"},
		{ContainerPath: "/a/b"},
		{ContainerPath: "/a/b/ro", Readonly: true},
		{ContainerPath: "/dev/given"},
	}
	const none, made, madeIfReadOnly = "false false", "true true", "true false"
	volume := ImageVolumes(c)
	for path, want := range map[string]string{
		"/":              none,
		"/proc":          none,
		"/proc/sys":      none,
		"/sys/fs/cgroup": none,
		"/dev/shm":       none,
		"/dev/given/x":   made,
		"/etc/hosts":     none,
		"/etc":           madeIfReadOnly,
		"/data":          none,
		"/data/sub":      made,
		"/database":      madeIfReadOnly,
		"/processes":     madeIfReadOnly,
		"/a":             madeIfReadOnly,
		"/a/b/c":         made,
		"/a/b/ro/c":      none,
	} {
		c.Linux.SecurityContext.ReadonlyRootfs = false
		if got := fmt.Sprint(volume(path)); got != want {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
	c.Linux.SecurityContext.ReadonlyRootfs = true
	if got := fmt.Sprint(ImageVolumes(c)("/database")); got != made {
		t.Errorf("on a read-only root: %v", got)
	}
}

// What the kernel takes is let through to the byte, and what it does not is told of
// when the container is made: of the config and of the image.
func TestExecLimit(t *testing.T) {
	env := func(n int) (all []*runtimeapi.KeyValue) {
		for i := range n {
			all = append(all, &runtimeapi.KeyValue{Key: fmt.Sprintf("K%06d", i), Value: []byte(strings.Repeat("<",
				1000))})
		}
		return all
	}
	const each = 7 + 1 + 1000 + 1 + 8
	for name, c := range map[string]struct {
		change func(in *Input)
		field  string
	}{
		"as much as is usual": {change: func(in *Input) { in.Container.Envs = env((execDefault - 2*execRest) / each) }},
		"more":                {func(in *Input) { in.Container.Envs = env(execDefault/each + 1) }, "config.envs"},
		"a larger stack": {change: func(in *Input) {
			in.ExecLimit = 2 * execDefault
			in.Container.Envs = env(execDefault/each + 1)
		}},
		"of the image": {func(in *Input) { in.Image.Env = []string{"A=" + strings.Repeat("x", maxString)} },
			"config.envs"},
		"command of the image": {func(in *Input) {
			in.Container.Command = nil
			in.Container.Args = nil
			in.Image.Cmd = []string{strings.Repeat("x", maxString)}
		}, "config.command"},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			c.change(&in)
			if _, err := validateAndBuild(in); c.field != "" {
				wantField(t, err, kind.Invalid, c.field)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

var check = must.Succeed
