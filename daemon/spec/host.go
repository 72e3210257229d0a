package spec

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// ProbeHost looks at the machine as this process sees it. What depends on the OCI runtime
// is the caller's to set: RecursiveReadOnly, MappedMounts, and SeccompSupported, which says
// here that the kernel has it.
func ProbeHost() (Host, error) {
	cg := cgroup.Probe()
	h := Host{
		CgroupV2:         cg.Unified,
		HugetlbSupported: cg.Hugetlb,
		SwapSupported:    cg.Swap,
		PageSizes:        cg.PageSizes,
		Controllers:      cg.Controllers,
		CgroupFiles:      cg.Files,
	}
	status, err := procStatus()
	if err != nil {
		return h, err
	}
	bounding, err := strconv.ParseUint(status["CapBnd"], 16, 64)
	if err != nil {
		return h, fmt.Errorf("cannot read CapBnd of /proc/self/status: %w", err)
	}
	permitted, err := strconv.ParseUint(status["CapPrm"], 16, 64)
	if err != nil {
		return h, fmt.Errorf("cannot read CapPrm of /proc/self/status: %w", err)
	}
	h.KnownCaps = capNames(bounding & permitted)
	_, h.SeccompSupported = status["Seccomp"]
	h.NoX32 = kernelLacksX32()

	if h.MinOOMScoreAdj, err = minOOMScoreAdj(permitted); err != nil {
		return h, err
	}
	if h.NodeName, err = os.Hostname(); err != nil {
		return h, fmt.Errorf("cannot learn the node's name: %w", err)
	}
	h.ExecLimit = execLimit()
	enabled, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	h.AppArmorEnabled = bytes.HasPrefix(enabled, []byte("Y")) && exists("/sys/kernel/security/apparmor")
	h.SELinuxEnabled = selinuxEnabled("/sys/fs/selinux/enforce", "/proc/self/attr/current")
	return h, nil
}

// The bounds of what execve(2) takes as arguments and environment: a quarter of the
// stack, as containers inherit its limit, but not below ARG_MAX, nor above three
// quarters of the usual stack.
const (
	execMin     = 128 << 10
	execDefault = 2 << 20 // of the usual stack of 8 MiB
	execMax     = 6 << 20
)

func execLimit() int {
	var stack unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_STACK, &stack); err != nil {
		return execDefault
	}
	return int(max(execMin, min(stack.Cur/4, execMax)))
}

// Now is h with what a machine may turn on and off while it runs.
func (h Host) Now() Host {
	h.CPUs, h.Mems = cgroup.Sets()
	return h
}

// appArmorProfiles lists the profiles that the kernel has. Tests have another one.
var appArmorProfiles = "/sys/kernel/security/apparmor/profiles"

// AppArmorLoaded says whether the kernel has an AppArmor profile of this name.
func AppArmorLoaded(name string) (bool, error) {
	b, err := os.ReadFile(appArmorProfiles)
	if err != nil {
		return false, fmt.Errorf("cannot learn which AppArmor profiles are loaded: %w", err)
	}
	// Each line is NAME (MODE).
	for line := range strings.Lines(string(b)) {
		if i := strings.LastIndex(line, " ("); i >= 0 && line[:i] == name {
			return true, nil
		}
	}
	return false, nil
}

// selinuxContext is where the kernel says whether its policy has a label: what is written is
// refused if not. Tests have another one.
var selinuxContext = "/sys/fs/selinux/context"

// CheckLabels refuses an AppArmor profile that is not loaded, and SELinux labels of which
// the policy of this node knows nothing.
func CheckLabels(in Input) error {
	b := &builder{Input: in, sc: in.Container.GetLinux().GetSecurityContext()}
	if b.sc.GetPrivileged() {
		return nil
	}
	if p := apparmorProfile(b.sc); in.AppArmorEnabled && p.GetProfileType() == profileLocalhost {
		loaded, err := AppArmorLoaded(p.GetLocalhostRef())
		if err != nil {
			return err
		}
		if !loaded {
			return invalid(fieldApparmor+".localhost_ref", "the profile %q is not loaded on this node",
				p.GetLocalhostRef())
		}
	}
	if !in.SELinuxEnabled {
		return nil
	}
	process, files := b.labelPair()
	for _, label := range []string{process, files} {
		if label == "" {
			continue
		}
		if err := os.WriteFile(selinuxContext, []byte(label), 0); errors.Is(err, unix.EINVAL) {
			return invalid(fieldContext+"selinux_options", "the policy of this node has no label %q", label)
		}
	}
	return nil
}

// selinuxEnabled says whether labels mean something. A kernel that no policy was given to
// labels everything with its own name, and OCI runtimes refuse labels there.
func selinuxEnabled(enforce, current string) bool {
	label, err := os.ReadFile(current)
	label = bytes.Trim(label, "\x00\n")
	return err == nil && exists(enforce) && len(label) > 0 && string(label) != "kernel"
}

func exists(p string) bool { _, err := os.Stat(p); return err == nil }

func procStatus() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, fmt.Errorf("cannot learn the capabilities of this process: %w", err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		fields[key] = strings.TrimSpace(value)
	}
	return fields, nil
}

func capNames(mask uint64) []string {
	names := []string{}
	for i, c := range allCaps {
		if mask&(1<<i) != 0 {
			names = append(names, c)
		}
	}
	return names
}

// minOOMScoreAdj follows proc(5): without CAP_SYS_RESOURCE a process may not go
// below what it has. The kernel's own floor for it is often lower and cannot
// be read.
func minOOMScoreAdj(permitted uint64) (int, error) {
	if permitted&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return -1000, nil
	}
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, fmt.Errorf("cannot learn the oom_score_adj of this process: %w", err)
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// kernelLacksX32 looks into the configuration that the kernel was built with; where it
// cannot be read the answer is no. A system call of that ABI would tell, too, but it ends
// a daemon that may only make native ones.
func kernelLacksX32() bool {
	var name unix.Utsname
	commandLine, err := os.ReadFile("/proc/cmdline")
	if err != nil || unix.Uname(&name) != nil {
		return false
	}
	release := unix.ByteSliceToString(name.Release[:])
	for _, file := range []string{"/proc/config.gz", "/boot/config-" + release, "/lib/modules/" + release + "/config"} {
		if config, err := readKernelConfig(file); err == nil {
			return lacksX32(config, commandLine)
		}
	}
	return false
}

// lacksX32 reads a kernel's configuration. Before Linux 5.18 the option had a shorter
// name. Debian's kernels have the ABI, but only with a parameter.
func lacksX32(config, commandLine []byte) bool {
	set := func(option string) bool { return bytes.Contains(config, []byte("\n"+option+"=y\n")) }
	switch {
	case !set("CONFIG_X86_64"):
		return false
	case set("CONFIG_X86_X32_DISABLED"):
		return !bytes.Contains(commandLine, []byte("syscall.x32"))
	}
	return !set("CONFIG_X86_X32_ABI") && !set("CONFIG_X86_X32")
}

// maxKernelConfig bounds the configuration of a kernel, in bytes. Usual ones have 300 KB.
const maxKernelConfig = 4 << 20

func readKernelConfig(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = f
	if path.Ext(file) == ".gz" {
		if r, err = gzip.NewReader(f); err != nil {
			return nil, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(r, maxKernelConfig+1))
	if err == nil && len(b) > maxKernelConfig {
		err = fmt.Errorf("%s is larger than %d bytes", file, maxKernelConfig)
	}
	return b, err
}

// ResolveDevices looks up the devices that the config asks for. A directory
// stands for all devices in it.
func ResolveDevices(c *runtimeapi.ContainerConfig) ([]Device, error) {
	var list []Device
	for i, d := range c.GetDevices() {
		field := fmt.Sprintf("config.devices[%d].host_path", i)
		access := cmp.Or(d.GetPermissions(), "rwm")
		dst := cmp.Or(d.GetContainerPath(), d.GetHostPath())
		src, err := filepath.EvalSymlinks(d.GetHostPath())
		if err != nil {
			return nil, invalid(field, "cannot find the device: %v", err)
		}
		found, err := devicesBelow(src, path.Clean(dst), access)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		if len(found) == 0 {
			return nil, invalid(field, "%s is no device and holds none", src)
		}
		list = append(list, found...)
	}
	return list, nil
}

// notDevices are directories of /dev that a container has of its own.
var notDevices = map[string]bool{"/dev/pts": true, "/dev/shm": true, "/dev/fd": true, "/dev/mqueue": true}

// HostDevices lists the devices in /dev, but for pseudo terminals and the
// console: a container has its own.
func HostDevices() ([]Device, error) { return devicesBelow("/dev", "/dev", "rwm") }

func devicesBelow(src, dst, access string) ([]Device, error) {
	var list []Device
	err := filepath.WalkDir(src, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && p != src {
				return nil // unplugged meanwhile
			}
			return err
		}
		if e.IsDir() && notDevices[p] {
			return fs.SkipDir
		}
		if e.Type()&fs.ModeDevice == 0 || p == "/dev/console" {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			if errors.Is(err, fs.ErrNotExist) && p != src {
				return nil
			}
			return fmt.Errorf("cannot look at the device %s: %w", p, err)
		}
		kind := "c"
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			kind = "b"
		}
		list = append(list, Device{
			LinuxDevice: specs.LinuxDevice{
				Path:     dst + strings.TrimPrefix(p, src),
				Type:     kind,
				Major:    int64(unix.Major(st.Rdev)),
				Minor:    int64(unix.Minor(st.Rdev)),
				FileMode: new(os.FileMode(st.Mode & 0o777)),
				UID:      new(st.Uid),
				GID:      new(st.Gid),
			},
			Access: access,
			Source: p,
		})
		return nil
	})
	return list, err
}

// CheckMount looks whether the host path of a mount exists, and whether what shall be
// propagated lies on a mount that can be. field is that of the mount, with a dot behind it.
func CheckMount(field string, m *runtimeapi.Mount) error {
	src := m.GetHostPath()
	if _, err := os.Stat(src); err != nil {
		if to, lerr := os.Readlink(path.Clean(src)); lerr == nil {
			return invalid(field+"host_path", "cannot mount %q: it is a link to %q, which leads nowhere: %v", src,
				to, err)
		}
		return invalid(field+"host_path", "cannot mount it: %v", err)
	}
	var accepted []string
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		accepted = []string{"shared:", "master:"}
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		accepted = []string{"shared:"}
	default:
		return nil
	}
	on, ok, err := propagates(src, accepted)
	if err != nil {
		return fmt.Errorf("%spropagation: cannot look up the mount of %s: %w", field, src, err)
	}
	if !ok {
		return invalid(field+"propagation",
			"%s needs a host mount that is shared: %s lies on %s, which is not (mount --make-rshared %s)",
			m.GetPropagation(), src, on, on)
	}
	return nil
}

// propagates gives the mount point that src lies on and whether one of its
// optional fields (proc_pid_mountinfo(5)) starts with what is accepted.
func propagates(src string, accepted []string) (on string, ok bool, err error) {
	if src, err = filepath.EvalSymlinks(src); err != nil {
		return "", false, err
	}
	table, err := mounts.Read(mounts.Self)
	if err != nil {
		return "", false, err
	}
	var best mounts.Mount
	for _, m := range table {
		// Of two on the same point the later one is on top.
		if m.Holds(src) && len(m.Point) >= len(best.Point) {
			best = m
		}
	}
	if best.Point == "" {
		return "", false, fmt.Errorf("no mount holds %s", src)
	}
	for f := range strings.FieldsSeq(best.Peers) {
		for _, a := range accepted {
			ok = ok || strings.HasPrefix(f, a)
		}
	}
	return best.Point, ok, nil
}
