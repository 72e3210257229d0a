package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// useTree has the package see one hierarchy, which is a directory, for the time of a test.
func useTree(t *testing.T, names ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	real := hierarchies
	hierarchies = func() []hierarchy { return []hierarchy{{dir: dir, root: "/", names: names}} }
	t.Cleanup(func() { hierarchies = real })
	return dir
}

func put(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	for name, value := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o644))
	}
}

// What was changed after Limits is as before after Restore, what else is in the cgroup is
// left alone. Some OCI runtimes have the processes one cgroup below the limits.
func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		set    Set
		before map[string]string // files
		others []string
	}{
		"v2": {
			set: Set{"": "/pod/box"},
			before: map[string]string{
				"cpu.weight": "39", "cpu.max": "max 100000", "cpuset.cpus": "", "memory.max": "max",
				"memory.swap.max": "0", "memory.high": "8192", "hugetlb.2MB.max": "max", "memory.oom.group": "0",
			},
			others: []string{"memory.oom.group", "../x", "missing"},
		},
		"v2, one below": {
			set:    Set{"": "/pod/box/container"},
			before: map[string]string{"cpu.weight": "39", "memory.max": "4096"},
		},
		"memory of v1": {
			set:    Set{"memory": "/pod/box"},
			before: map[string]string{"memory.limit_in_bytes": "4096", "memory.memsw.limit_in_bytes": "4096"},
			others: []string{"memory.max"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			controller := ""
			for controller = range c.set {
			}
			dir := filepath.Join(useTree(t, controller), "pod/box")
			put(t, dir, c.before)
			put(t, dir, map[string]string{"cgroup.procs": "1"})
			limits, err := c.set.Limits(c.others...)
			check(t, err)
			for file := range c.before {
				put(t, dir, map[string]string{file: "7"})
			}
			put(t, dir, map[string]string{"cgroup.procs": "2"})
			check(t, limits.Restore())
			for file, want := range c.before {
				if b, err := os.ReadFile(filepath.Join(dir, file)); err != nil || strings.TrimSpace(string(b)) != want {
					t.Errorf("%s is %q, %v; want %q", file, b, err, want)
				}
			}
			if b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")); err != nil || string(b) != "2\n" {
				t.Errorf("cgroup.procs is %q, %v", b, err)
			}
		})
	}
}

// The kernel takes values in one order only, and refuses what does not fit.
func TestLimitsOfTheKernel(t *testing.T) {
	c := newCgroup(t)
	limit, both, controller := "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory"
	if _, v1 := c[controller]; !v1 { // where the order is no matter
		limit, both, controller = "memory.max", "memory.high", ""
	}
	dir, ok := c.dir(controller)
	if !ok {
		t.Fatal("no memory controller")
	}
	write := func(name, value string) {
		t.Helper()
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(value), 0))
	}
	write(limit, "8388608")
	write(both, "8388608")
	limits, err := c.Limits()
	check(t, err)
	for _, mib := range []string{"16", "4"} { // up: both together first; down: the limit first
		bytes := mib + "M"
		if mib == "16" {
			write(both, bytes)
			write(limit, bytes)
		} else {
			write(limit, bytes)
			write(both, bytes)
		}
		check(t, limits.Restore())
		for _, name := range []string{limit, both} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != "8388608\n" {
				t.Errorf("after %s, %s is %q, %v", bytes, name, b, err)
			}
		}
	}
	write(both, "16M")
	path := filepath.Join(dir, both)
	for i := range limits {
		if limits[i].path == path {
			limits[i].value = "nonsense"
		}
	}
	if err := limits.Restore(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a value that the kernel refuses: %v", err)
	}
}

func TestLimitHugePages(t *testing.T) {
	for controller, suffix := range map[string]string{"hugetlb": "limit_in_bytes", "": "max"} {
		dir := filepath.Join(useTree(t, controller), "box")
		both, one := "hugetlb.2MB."+suffix, "hugetlb.1GB."+suffix
		put(t, dir, map[string]string{both: "max", "hugetlb.2MB.rsvd." + suffix: "max", one: "max"})
		c := Set{controller: "/box"}
		check(t, c.LimitHugePages("2MB", 4096))
		check(t, c.LimitHugePages("1GB", 8192))
		for name, want := range map[string]string{both: "4096", "hugetlb.2MB.rsvd." + suffix: "4096", one: "8192"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
				t.Errorf("%s is %q, %v", name, b, err)
			}
		}
		check(t, os.Remove(filepath.Join(dir, one)))
		check(t, os.Remove(filepath.Join(dir, "hugetlb.2MB.rsvd."+suffix)))
		check(t, c.LimitHugePages("2MB", 1))
		check(t, c.LimitHugePages("1GB", 0))
		for _, size := range []string{"1GB", "../2MB"} {
			if err := c.LimitHugePages(size, 1); err == nil {
				t.Errorf("pages of %s are limited", size)
			}
		}
	}
	if err := (Set{}).LimitHugePages("2MB", 1); err == nil {
		t.Error("pages of nothing are limited")
	}
}

func TestMemoryUsed(t *testing.T) {
	for controller, file := range map[string]string{"memory": "memory.usage_in_bytes", "": "memory.current"} {
		put(t, filepath.Join(useTree(t, controller), "box"), map[string]string{file: "12345"})
		if n, err := (Set{controller: "/box"}).MemoryUsed(); err != nil || n != 12345 {
			t.Errorf("%q: %d, %v", controller, n, err)
		}
	}
	if n, err := (Set{"": "/gone"}).MemoryUsed(); err != nil || n != 0 {
		t.Errorf("without a file: %d, %v", n, err)
	}
}

// Only those that have the value get the other one, those below as well.
func TestAdjustOOMScore(t *testing.T) {
	c := newCgroup(t)
	script := `echo 600 > /proc/self/oom_score_adj; sleep 1000 & echo 700 > /proc/self/oom_score_adj; echo; read x`
	cmd := exec.Command("sh", "-c", script)
	in, err := cmd.StdinPipe()
	check(t, err)
	defer in.Close()
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	check(t, c.Enter(cmd.Process.Pid))
	_, err = out.Read(make([]byte, 1))
	check(t, err)
	children, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) +
		"/children")
	check(t, err)
	child := strings.TrimSpace(string(children))
	// The child was forked before its parent entered, or after it.
	check(t, os.WriteFile(filepath.Join(tracked(t, c), "cgroup.procs"), []byte(child), 0))
	for _, step := range []struct {
		from, to      int
		parent, child string
	}{{700, 650, "650", "600"}, {600, 610, "650", "610"}, {1, 2, "650", "610"}, {650, 650, "650", "610"}} {
		check(t, c.AdjustOOMScore(step.from, step.to))
		for pid, want := range map[string]string{strconv.Itoa(cmd.Process.Pid): step.parent, child: step.child} {
			b, err := os.ReadFile("/proc/" + pid + "/oom_score_adj")
			if err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%d to %d: a process has %q, %v; want %s", step.from, step.to, b, err, want)
			}
		}
	}
}

// tracked is the directory by which the processes of a set are known.
func tracked(t *testing.T, c Set) string {
	t.Helper()
	dir, ok := c.tracker()
	if !ok {
		t.Fatal("no cgroup")
	}
	return dir
}
