package harness

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// machine is what a node may have left on the machine, by kind: "mount /x",
// "process 12 holdfast-shim ...". Two of them are compared as sets.
type machine map[string]bool

// look collects what belongs to a node: by its scratch directory, its bridge, its
// cgroup parent and the ids that its objects had.
func look(n *shared) machine {
	m := machine{}
	add := func(kind, what string) { m[kind+" "+what] = true }
	for pid, cmdline := range processes() {
		// What serves sessions stays until it was idle for some minutes.
		if strings.Contains(cmdline, n.State+"/") && pid != os.Getpid() && !n.servesSessions(cmdline) {
			add("process", fmt.Sprintf("%d %s", pid, cmdline))
		}
	}
	for _, path := range mounts() {
		if strings.HasPrefix(path, n.Dir+"/") && path != n.Root || n.owns(path) {
			add("mount", path)
		}
	}
	for _, path := range glob("/run/netns/*") {
		if n.owns(path) {
			add("netns", path)
		}
	}
	for _, name := range ports(n.Bridge) {
		add("veth", name)
	}
	for _, path := range glob(n.Dir + "/ipam/*/*") {
		if base := filepath.Base(path); base != "lock" && !strings.HasPrefix(base, "last_reserved_ip") {
			owner, _ := os.ReadFile(path)
			add("lease", fmt.Sprintf("%s of %q", path, owner))
		}
	}
	for _, path := range cgroups() {
		if strings.Contains(path, n.cgroupParent+"/") || n.owns(path) {
			add("cgroup", path)
			for _, pid := range procs(path) {
				add("process", fmt.Sprintf("%d in %s", pid, path))
			}
		}
	}
	for _, tree := range []string{n.Root, n.State, n.State + "-userns"} {
		filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
			case d.IsDir() && !strings.ContainsAny(d.Name(), "0123456789"):
				// No object and nothing temporary has such a name: it is one of
				// the fixed directories, made when first needed.
			case keptOnPurpose(path):
			default:
				add("path", path)
			}
			return nil
		})
	}
	return m
}

// keptOnPurpose are files that belong to no object.
func keptOnPurpose(path string) bool {
	return filepath.Base(path) == "synced" || // the mark of a layer, made in the background
		strings.Contains(path, "/journal/") || // of all objects, also of those that are gone
		strings.Contains(path, "/images/ingest/") || // a download that broke off, for the next pull to resume
		strings.Contains(path, "/images/pending/") || // the note of it
		strings.Contains(path, "/stream/") && !strings.Contains(path, "/stream/tokens/") // of whoever serves sessions
}

func (n *shared) servesSessions(cmdline string) bool {
	return strings.Contains(cmdline, "holdfast-stream --dir "+n.State+"/stream ")
}

// StreamPID is the process that serves sessions, 0 if there is none.
func (n *Node) StreamPID() int {
	for pid, cmdline := range processes() {
		if n.servesSessions(cmdline) {
			return pid
		}
	}
	return 0
}

// Mark makes the machine as it is now the one to which Leftovers compares.
func (n *Node) Mark() { n.before = look(n.shared) }

// Leftovers is what is there now and was not at the last Mark.
func (n *Node) Leftovers() []string {
	now := look(n.shared)
	maps.DeleteFunc(now, func(what string, _ bool) bool { return n.before[what] })
	return slices.Sorted(maps.Keys(now))
}

// CheckClean fails the test if anything is left, or has no owner. It waits a moment for what goes
// away by itself: the end of a shim that was told to, the kernel's veths.
func (n *Node) CheckClean() {
	n.T.Helper()
	if left := n.AwaitClean(func() {}); left != "" {
		n.T.Errorf("%s", left)
	}
}

// AwaitClean is CheckClean without a verdict: it says what is left, and calls a function
// each time before it looks.
func (n *Node) AwaitClean(before func()) string {
	var left []string
	// A token that nobody has used goes after a minute, with the next sweep.
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * Tick) {
		before()
		if left = n.Leftovers(); len(left) == 0 {
			return ""
		}
	}
	return fmt.Sprintf("%d things are left behind:\n  %s", len(left), strings.Join(left[:min(len(left), 40)], "\n  "))
}

// sweep removes by force what is left of the node. The daemon has ended.
func (n *Node) sweep() {
	// Until nothing is left: a process that is about to fork may need a second look.
	for range 50 {
		victims := 0
		for pid, cmdline := range processes() {
			if strings.Contains(cmdline, n.State+"/") && pid != os.Getpid() {
				unix.Kill(pid, unix.SIGKILL)
				victims++
			}
		}
		for _, path := range cgroups() {
			if strings.Contains(path, n.cgroupParent) {
				// A killed shim or daemon may have left it frozen, and what is
				// frozen does not die. One of the files is there, on v1 or v2.
				os.WriteFile(filepath.Join(path, "freezer.state"), []byte("THAWED"), 0)
				os.WriteFile(filepath.Join(path, "cgroup.freeze"), []byte("0"), 0)
				for _, pid := range procs(path) {
					unix.Kill(pid, unix.SIGKILL)
					victims++
				}
			}
		}
		if victims == 0 {
			break
		}
		time.Sleep(2 * Tick)
	}
	for _, path := range slices.Backward(mounts()) {
		if strings.HasPrefix(path, n.Dir+"/") {
			unix.Unmount(path, unix.MNT_DETACH)
		}
	}
	for _, path := range glob("/run/netns/*") {
		if n.owns(path) {
			unix.Unmount(path, unix.MNT_DETACH)
			os.Remove(path)
		}
	}
	for _, path := range slices.Backward(cgroups()) { // children first
		if strings.Contains(path, n.cgroupParent) || n.owns(path) {
			os.Remove(path)
		}
	}
	if l, err := netlink.LinkByName(n.Bridge); err == nil {
		netlink.LinkDel(l)
	}
}

func glob(pattern string) []string {
	paths, _ := filepath.Glob(pattern) // the only error is of the pattern
	return paths
}

// processes are the command lines of all that run, zombies left out.
func processes() map[int]string {
	m := map[int]string{}
	for _, dir := range glob("/proc/[0-9]*") {
		b, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(b) == 0 {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		m[pid] = string(bytes.TrimSpace(bytes.ReplaceAll(b, []byte{0}, []byte(" "))))
	}
	return m
}

// parent is that of a process, 0 if it is gone.
func parent(pid int) (ppid int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if i := bytes.LastIndexByte(b, ')'); i >= 0 { // the name may have anything in it
		var state string
		fmt.Sscan(string(b[i+1:]), &state, &ppid)
	}
	return ppid
}

// mounts are the mount points, in the order of mounting.
func mounts() []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var paths []string
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 4 {
			paths = append(paths, f[4])
		}
	}
	return paths
}

// ports are the names of the links on a bridge.
func ports(bridge string) []string {
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return nil
	}
	links, _ := netlink.LinkList()
	var names []string
	for _, l := range links {
		if l.Attrs().MasterIndex == br.Attrs().Index {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// cgroups are the directories of all hierarchies, parents first.
func cgroups() []string {
	var paths []string
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // what vanished meanwhile is no error
		}
		paths = append(paths, path)
		// The links of a directory are its own two, and one of each directory in it. Most
		// have none, and dozens of files.
		var st unix.Stat_t
		if unix.Lstat(path, &st) == nil && st.Nlink == 2 {
			return fs.SkipDir
		}
		return nil
	})
	return paths
}

// CgroupFile reads a file in the cgroup of a process: v1 is its name where the controller is
// on cgroup v1, v2 where it is not.
func CgroupFile(pid int, controller, v1, v2 string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	path := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) == 3 && slices.Contains(strings.Split(f[1], ","), controller):
			path = filepath.Join("/sys/fs/cgroup", controller, f[2], v1)
		case len(f) == 3 && f[1] == "" && path == "":
			path = filepath.Join("/sys/fs/cgroup", f[2], v2)
		}
	}
	b, err = os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

func procs(cgroup string) []int {
	b, _ := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// IsProcess says whether there is a process of a pid.
func IsProcess(pid int) bool { return unix.Kill(pid, 0) == nil }

// ShimPID is the shim of a container.
func (c *Container) ShimPID() int {
	c.N.T.Helper()
	pid := c.N.ShimPIDs()[c.ID]
	if pid == 0 { // that would be all processes of this group
		c.N.T.Fatalf("cannot find the shim of %s", c.Config.Metadata.Name)
	}
	return pid
}

// ShimPIDs are the shims of this node, by container id.
func (n *Node) ShimPIDs() map[string]int {
	m := map[string]int{}
	all := processes()
	for pid, cmdline := range all {
		// A child has its parent's command line until it runs a program.
		if !strings.Contains(cmdline, "holdfast-shim") || all[parent(pid)] == cmdline {
			continue
		}
		for _, arg := range strings.Fields(cmdline) {
			if i := strings.LastIndex(arg, n.State+"/"); i >= 0 {
				m[filepath.Base(arg)] = pid
			}
		}
	}
	return m
}
