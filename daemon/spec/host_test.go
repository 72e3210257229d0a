package spec

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

func TestProbeHost(t *testing.T) {
	h, err := ProbeHost()
	check(t, err)
	if h.KnownCaps == nil {
		t.Error("KnownCaps is nil, which would stand for all")
	}
	if h.NodeName == "" || h.MinOOMScoreAdj < -1000 || h.MinOOMScoreAdj > 1000 {
		t.Errorf("host %+v", h)
	}
	var st unix.Statfs_t
	err = unix.Statfs("/sys/fs/cgroup", &st)
	if want := err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC; h.CgroupV2 != want {
		t.Errorf("CgroupV2 %v, want %v", h.CgroupV2, want)
	}
	if h.SELinuxEnabled && h.AppArmorEnabled {
		t.Error("both AppArmor and SELinux are said to be on")
	}
}

func TestCapNames(t *testing.T) {
	got := capNames(1<<unix.CAP_CHOWN | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_CHECKPOINT_RESTORE)
	if want := []string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"}; !slices.Equal(got, want) {
		t.Errorf("names %v, want %v", got, want)
	}
	if got := capNames(0); got == nil || len(got) != 0 {
		t.Errorf("no capability at all gives %v", got)
	}
}

func TestResolveDevices(t *testing.T) {
	resolve := func(d *runtimeapi.Device) ([]Device, error) {
		return ResolveDevices(&runtimeapi.ContainerConfig{Devices: []*runtimeapi.Device{d}})
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	check(t, os.Symlink("/dev/null", link))
	for _, host := range []string{"/dev/null", link} {
		list, err := resolve(&runtimeapi.Device{HostPath: host, ContainerPath: "/dev/mine", Permissions: "r"})
		check(t, err)
		d := list[0]
		if len(list) != 1 || d.Path != "/dev/mine" || d.Type != "c" || d.Major != 1 || d.Minor != 3 ||
			d.Access != "r" || d.FileMode.Perm() == 0 {
			t.Errorf("%s is %+v", host, list)
		}
	}
	if list, err := resolve(
		&runtimeapi.Device{HostPath: "/dev/null"},
	); err != nil || list[0].Path != "/dev/null" || list[0].Access != "rwm" {
		t.Errorf("defaults: %+v, %v", list, err)
	}
	list, err := resolve(&runtimeapi.Device{HostPath: "/dev", ContainerPath: "/all/"})
	check(t, err)
	if !slices.ContainsFunc(list, func(d Device) bool { return d.Path == "/all/null" && d.Minor == 3 }) {
		t.Errorf("the devices of a directory lack null: %+v", list)
	}
	for _, bad := range []string{filepath.Join(dir, "none"), dir} {
		_, err := resolve(&runtimeapi.Device{HostPath: bad})
		wantField(t, err, kind.Invalid, "config.devices[0].host_path")
	}
}

func TestHostDevices(t *testing.T) {
	list, err := HostDevices()
	check(t, err)
	if !slices.ContainsFunc(list, func(d Device) bool { return d.Path == "/dev/null" }) {
		t.Error("/dev/null is missing")
	}
	for _, d := range list {
		if strings.HasPrefix(d.Path, "/dev/pts/") || strings.HasPrefix(d.Path, "/dev/shm/") ||
			d.Path == "/dev/console" {
			t.Errorf("%s belongs to the node", d.Path)
		}
	}
}

func TestCheckMount(t *testing.T) {
	mounts := func(src string, p runtimeapi.MountPropagation) error {
		return CheckMount("config.mounts[0].", &runtimeapi.Mount{HostPath: src, ContainerPath: "/x", Propagation: p})
	}
	const (
		private = runtimeapi.MountPropagation_PROPAGATION_PRIVATE
		slave   = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		shared  = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	)
	dir := t.TempDir()
	if err := mounts(dir, private); err != nil {
		t.Error(err)
	}
	wantField(t, mounts(filepath.Join(dir, "none"), private), kind.Invalid, "config.mounts[0].host_path")
	link := filepath.Join(dir, "link")
	check(t, os.Symlink("nowhere", link))
	for _, src := range []string{link, link + "/"} {
		err := mounts(src, private)
		wantField(t, err, kind.Invalid, "config.mounts[0].host_path")
		if !strings.Contains(err.Error(), `link to "nowhere"`) {
			t.Errorf("the error does not tell of the link: %v", err)
		}
	}

	if os.Geteuid() != 0 {
		t.Skip("the rest makes mounts")
	}
	check(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	defer unix.Unmount(dir, unix.MNT_DETACH)
	sub := filepath.Join(dir, "sub")
	check(t, os.Mkdir(sub, 0o755))
	for _, tt := range []struct {
		name            string
		kind            uintptr
		toSlave, toBoth bool
	}{
		{"private", unix.MS_PRIVATE, false, false},
		{"shared", unix.MS_SHARED, true, true},
		{"slave", unix.MS_SLAVE, true, false}, // of the shared one before
	} {
		if tt.kind == unix.MS_SLAVE {
			// A mount alone in its group would become private: give it a peer.
			peer := filepath.Join(t.TempDir(), "peer")
			check(t, os.Mkdir(peer, 0o755))
			check(t, unix.Mount(dir, peer, "", unix.MS_BIND, ""))
			defer unix.Unmount(peer, unix.MNT_DETACH)
		}
		check(t, unix.Mount("", dir, "", tt.kind, ""))
		for p, want := range map[runtimeapi.MountPropagation]bool{slave: tt.toSlave, shared: tt.toBoth} {
			err := mounts(sub, p)
			if want && err != nil {
				t.Errorf("%s mount, %s: %v", tt.name, p, err)
			}
			if !want {
				wantField(t, err, kind.Invalid, "config.mounts[0].propagation")
			}
		}
	}
}

// A kernel with SELinux and no policy confines nothing.
func TestSELinuxEnabled(t *testing.T) {
	dir := t.TempDir()
	enforce, current := filepath.Join(dir, "enforce"), filepath.Join(dir, "current")
	if selinuxEnabled(enforce, current) {
		t.Error("without any file")
	}
	check(t, os.WriteFile(enforce, []byte("0"), 0o600))
	for label, want := range map[string]bool{
		"kernel\x00": false, "": false, "\x00": false, "system_u:system_r:init_t:s0\x00": true,
	} {
		check(t, os.WriteFile(current, []byte(label), 0o600))
		if selinuxEnabled(enforce, current) != want {
			t.Errorf("label %q: want %v", label, want)
		}
	}
	check(t, os.Remove(enforce))
	if selinuxEnabled(enforce, current) {
		t.Error("a label of another kind")
	}
}

func TestCheckLabels(t *testing.T) {
	defer func(path string) { appArmorProfiles = path }(appArmorProfiles)
	appArmorProfiles = filepath.Join(t.TempDir(), "profiles")
	check(t, os.WriteFile(appArmorProfiles, []byte("docker-default (enforce)\nmy (own) one (complain)\n"), 0o600))
	in := input()
	in.AppArmorEnabled = true
	for name, want := range map[string]bool{
		"docker-default":           true,
		"localhost/docker-default": true,
		"my (own) one":             true,
		"docker":                   false,
		"localhost/docker":         false,
		"":                         false,
	} {
		in.security().Apparmor = &runtimeapi.SecurityProfile{ProfileType: profileLocalhost, LocalhostRef: name}
		if err := CheckLabels(in); !want {
			wantField(t, err, kind.Invalid, fieldApparmor+".localhost_ref")
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	in.security().Apparmor = nil
	check(t, CheckLabels(in))
	in.security().Apparmor = &runtimeapi.SecurityProfile{ProfileType: profileLocalhost, LocalhostRef: "x"}
	in.privileged()
	check(t, CheckLabels(in))

	defer func(path string) { selinuxContext = path }(selinuxContext)
	selinuxContext = filepath.Join(t.TempDir(), "context")
	in = input()
	in.SELinuxEnabled = true
	in.pod().SelinuxOptions = &runtimeapi.SELinuxOption{Type: "mine_t"}
	check(t, os.WriteFile(selinuxContext, nil, 0o600))
	check(t, CheckLabels(in))
	selinuxContext = "/proc/self/oom_score_adj" // takes nothing that is no number
	wantField(t, CheckLabels(in), kind.Invalid, fieldContext+"selinux_options")
	in.SELinuxEnabled = false
	check(t, CheckLabels(in))
}
