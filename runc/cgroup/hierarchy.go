package cgroup

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// hierarchy is one tree of cgroups: v2, or one or more v1 controllers, or a
// named one of v1 without any.
type hierarchy struct {
	dir   string   // where it is mounted
	root  string   // which part of it is mounted there, mostly "/"
	names []string // as in /proc/PID/cgroup: "" is v2, a named one is "name=..."
}

func (h hierarchy) has(name string) bool { return slices.Contains(h.names, name) }

// at is the directory of a cgroup of the hierarchy. It is never the root.
func (h hierarchy) at(path string) (string, bool) {
	if !safe(path) {
		return "", false
	}
	if h.root != "/" {
		below, ok := strings.CutPrefix(path, h.root)
		if !ok || !safe(below) {
			return "", false
		}
		path = below
	}
	return h.dir + path, true // both are clean: Join would make two more strings
}

// safe guards against the root, and against a path that leads out of its mount.
func safe(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/"
}

// hierarchies are all that are mounted, each once. They do not change during
// the life of a process that runs containers.
var hierarchies = sync.OnceValue(func() []hierarchy {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseMountinfo(f)
})

// maxMountLine is far above what the options of any mount take. The buffer grows to what
// is needed.
const maxMountLine = 64 << 20

// parseMountinfo takes one mount of each hierarchy: of the whole tree, and
// writable, if there is such a one. The device number tells hierarchies apart,
// because any may be mounted several times. The fields are those of
// proc_pid_mountinfo(5).
func parseMountinfo(table io.Reader) []hierarchy {
	type choice struct {
		hierarchy
		device string
		worth  int
	}
	var found []choice
	lines := bufio.NewScanner(table)
	lines.Buffer(make([]byte, 512), maxMountLine)
	for lines.Scan() {
		if !bytes.Contains(lines.Bytes(), []byte(" - cgroup")) {
			continue // most lines, and a shim keeps what they would take
		}
		before, after, _ := strings.Cut(lines.Text(), " - ")
		mount, super := strings.Fields(before), strings.Fields(after)
		if len(mount) < 6 || len(super) < 3 || super[0] != "cgroup" && super[0] != "cgroup2" {
			continue
		}
		c := choice{
			hierarchy: hierarchy{
				root:  unescape(mount[3]),
				dir:   unescape(mount[4]),
				names: []string{""},
			},
			device: mount[2],
		}
		if super[0] == "cgroup" {
			c.names = namesOf(super[2])
		}
		if c.root == "/" {
			c.worth += 2
		}
		if slices.Contains(strings.Split(mount[5], ","), "rw") {
			c.worth++
		}
		i := slices.IndexFunc(found, func(o choice) bool { return o.device == c.device })
		if i < 0 {
			found = append(found, c)
		} else if c.worth > found[i].worth {
			found[i] = c
		}
	}
	var hs []hierarchy
	for _, c := range found {
		hs = append(hs, c.hierarchy)
	}
	return hs
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// notNames are the other options that a v1 superblock shows (cgroups(7) and
// cgroup-v1/cgroups.rst of the kernel).
var notNames = []string{
	"rw", "ro", "none", "noprefix", "clone_children", "xattr", "cpuset_v2_mode", "favordynmods", "seclabel",
}

func namesOf(options string) []string {
	var names []string
	for o := range strings.SplitSeq(options, ",") {
		if strings.HasPrefix(o, "name=") || !strings.Contains(o, "=") && !slices.Contains(notNames, o) {
			names = append(names, o)
		}
	}
	return names
}

// Features is what the cgroups of this machine can do.
type Features struct {
	Mounted bool // there are any
	Unified bool // v2 has all controllers; false where some are on v1, as in a hybrid
	Hugetlb bool // huge pages can be limited
	Swap    bool // swap can be limited
	// PageSizes are those of the huge pages of this kernel, such as 2MB.
	PageSizes []string
	// Controllers, on v2, are those that cgroups can have. Files are what can be written to
	// in a cgroup, of the controllers that a cgroup below the root has.
	Controllers, Files []string
}

// Probe looks at the cgroups that are mounted.
func Probe() Features {
	hs := hierarchies()
	f := Features{Mounted: len(hs) > 0, Unified: unified(hs), PageSizes: hugePageSizes()}
	for _, h := range hs {
		switch {
		case h.has("") && f.Unified:
			controllers, _ := os.ReadFile(filepath.Join(h.dir, "cgroup.controllers"))
			f.Controllers = strings.Fields(string(controllers))
			f.Hugetlb = slices.Contains(f.Controllers, "hugetlb")
			// The root of the hierarchy has no limits; any cgroup below tells.
			f.Files = writable(filepath.Join(h.dir, "*", "*"))
			f.Swap = slices.Contains(f.Files, "memory.swap.max")
		case h.has("hugetlb"):
			f.Hugetlb = true
		case h.has("memory"):
			_, err := os.Stat(filepath.Join(h.dir, "memory.memsw.limit_in_bytes"))
			f.Swap = err == nil
		}
	}
	return f
}

// writable gives the names, each once, of the files of a pattern that have the right to be
// written to.
func writable(pattern string) (names []string) {
	found, _ := filepath.Glob(pattern)
	for _, path := range found {
		st, err := os.Lstat(path)
		if err == nil && st.Mode().IsRegular() && st.Mode()&0o200 != 0 {
			names = append(names, filepath.Base(path))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Sets are the processors and memory nodes that a cgroup can have now, as cpusets list
// them; empty: not known. Those that are turned off are not among them.
func Sets() (cpus, mems string) {
	for _, h := range hierarchies() {
		suffix := ""
		switch {
		case h.has("cpuset"):
		case h.has(""):
			suffix = ".effective"
		default:
			continue
		}
		for name, list := range map[string]*string{"cpuset.cpus": &cpus, "cpuset.mems": &mems} {
			if b, err := os.ReadFile(filepath.Join(h.dir, name+suffix)); err == nil && !blank(b) {
				*list = strings.TrimSpace(string(b))
			}
		}
	}
	return cpus, mems
}

// unified allows for named v1 hierarchies, which old containers may still mount.
func unified(hs []hierarchy) bool {
	v2 := false
	for _, h := range hs {
		v2 = v2 || h.has("")
		if slices.ContainsFunc(h.names, func(n string) bool { return n != "" && !strings.HasPrefix(n, "name=") }) {
			return false
		}
	}
	return v2
}

// blank says whether a file of the kernel holds nothing.
func blank(b []byte) bool { return len(bytes.TrimSpace(b)) == 0 }

// hugePageSizes are the sizes of huge pages that this kernel has, as the files of cgroups
// name them.
var hugePageSizes = sync.OnceValue(func() (sizes []string) {
	dirs, _ := os.ReadDir("/sys/kernel/mm/hugepages")
	for _, d := range dirs {
		number, ok := strings.CutPrefix(d.Name(), "hugepages-")
		kB, err := strconv.ParseUint(strings.TrimSuffix(number, "kB"), 10, 64)
		switch {
		case !ok || err != nil:
		case kB >= 1<<20:
			sizes = append(sizes, strconv.FormatUint(kB>>20, 10)+"GB")
		case kB >= 1<<10:
			sizes = append(sizes, strconv.FormatUint(kB>>10, 10)+"MB")
		default:
			sizes = append(sizes, strconv.FormatUint(kB, 10)+"KB")
		}
	}
	return sizes
})
