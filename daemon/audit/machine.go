package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// netnsDir is where the network namespaces of pods are pinned.
const (
	netnsDir  = "/run/netns"
	pinPrefix = "holdfast-"
)

// machine is what the kernel says, before any record is read.
type machine struct {
	daemonRuns bool // somebody has the lock of STATE
	processes  map[int]*process
	mounts     []mounts.Mount
	pins       []string // files in netnsDir that are called as ours are
	cgroups    []group
	trees      []entry
}

// process is one that runs. Zombies hold nothing, and are left out.
type process struct {
	rundir.Process
	parent  int
	args    []string
	exe     string // base name of its program
	cgroups []string
	third   string     // what its descriptor 3 is: CNI plugins have a lock there
	keeps   rundir.Dir // of a shim
	// elsewhere says that it is in another mount namespace: paths that it names may be
	// others than ours.
	elsewhere bool
}

func (p *process) text() string {
	line := strings.Join(p.args, " ")
	if len(line) > 200 {
		line = line[:200] + "…"
	}
	return fmt.Sprintf("%d %s", p.PID, line)
}

func (p *process) same() string { return fmt.Sprint(p.StartTime) }

// group is a cgroup of one hierarchy.
type group struct{ dir, path string }

// entry is a file or a directory of one of the trees.
type entry struct {
	path string
	mode fs.FileMode
	ino  uint64
	at   syscall.Timespec // of its last change
}

func (e entry) same() string { return fmt.Sprintf("%d %d", e.ino, e.at.Nano()) }

func (l *look) lookAtMachine() (m machine) {
	m.daemonRuns = l.locked()
	m.processes = l.listProcesses()
	m.mounts = l.listMounts()
	m.pins, _ = filepath.Glob(netnsDir + "/" + pinPrefix + "*")
	err := cgroup.Visit(func(dir, path string) bool {
		m.cgroups = append(m.cgroups, group{dir, path})
		return len(path) < 3000 // deeper ones are a container's own
	})
	if err != nil {
		l.fail("cannot list the cgroups: %w", err)
	}
	m.trees = l.listTrees()
	return m
}

// locked says whether a daemon has the lock of STATE.
func (l *look) locked() bool {
	f, err := os.Open(l.State)
	if err != nil {
		l.fail("cannot look whether a daemon runs: %w", err)
		return true
	}
	defer f.Close() // and with it the lock
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	return errors.Is(err, unix.EWOULDBLOCK)
}

func (l *look) listProcesses() map[int]*process {
	all := map[int]*process{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		l.fail("cannot list the processes: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, ok := readProcess(pid); ok {
			all[pid] = p
		}
	}
	return all
}

// readProcess reads what is known of a process; not ok: it has ended, or is one of the
// kernel's.
func readProcess(pid int) (*process, bool) {
	proc := fmt.Sprintf("/proc/%d/", pid)
	exe, err := os.Readlink(proc + "exe")
	if err != nil {
		return nil, false
	}
	p := &process{
		parent: parentOf(pid),
		args:   rundir.CommandLine(pid),
		exe:    filepath.Base(strings.TrimSuffix(exe, " (deleted)")),
	}
	p.third, _ = os.Readlink(proc + "fd/3")
	mnt, _ := os.Readlink(proc + "ns/mnt")
	p.elsewhere = mnt != ownMounts()
	groups, _ := os.ReadFile(proc + "cgroup")
	for line := range strings.Lines(string(groups)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 && f[2] != "/" {
			p.cgroups = append(p.cgroups, f[2])
		}
	}
	p.cgroups = slices.Compact(p.cgroups)
	if strings.HasPrefix(p.exe, "holdfast-shim") {
		p.keeps, _ = rundir.KeptBy(pid)
	}
	// Last: all of it is that process's, or it is gone.
	p.Process, err = rundir.FindProcess(pid)
	return p, err == nil
}

// ownMounts is the mount namespace of this process.
var ownMounts = sync.OnceValue(func() string {
	mnt, _ := os.Readlink("/proc/self/ns/mnt")
	return mnt
})

func parentOf(pid int) (parent int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if i := bytes.LastIndexByte(b, ')'); i >= 0 { // the name may have anything in it
		var state string
		fmt.Sscan(string(b[i+1:]), &state, &parent)
	}
	return parent
}

// descends says whether a process comes from another one.
func (m *machine) descends(p *process, from int) bool {
	for n := 0; p != nil && n < 1000; n++ {
		if p.parent == from {
			return true
		}
		p = m.processes[p.parent]
	}
	return false
}

func (l *look) listMounts() []mounts.Mount {
	list, err := mounts.Read(mounts.Self)
	if err != nil {
		l.fail("cannot list the mounts: %w", err)
	}
	return list
}

// listTrees lists what lies in the trees, as deep as it says something by itself: what is
// in an object's own directory is that object's.
func (l *look) listTrees() (all []entry) {
	for dir, depth := range map[string]int{
		l.Root:                   1,
		l.Root + "/pods":         1,
		l.Root + "/containers":   1,
		l.Root + "/cni":          3,
		l.Root + "/images":       3,
		l.Root + "/layers":       2,
		l.Root + "/quarantine":   1,
		l.State:                  1,
		l.State + "/pods":        1,
		l.State + "/containers":  3,
		l.State + "/runc":        2,
		l.State + "/stream":      2,
		l.State + "/pulls":       1,
		l.State + userWaysSuffix: 1,
	} {
		all = append(all, l.listTree(dir, depth)...)
	}
	return all
}

// listTree lists what is below a directory, and not what is mounted there. What goes
// meanwhile is left out.
func (l *look) listTree(dir string, depth int) (all []entry) {
	if depth == 0 {
		return nil
	}
	var top unix.Stat_t
	names, err := os.ReadDir(dir)
	if err == nil {
		err = unix.Lstat(dir, &top)
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			l.fail("cannot list %s: %w", dir, err)
		}
		return nil
	}
	for _, name := range names {
		path := filepath.Join(dir, name.Name())
		st, err := os.Lstat(path)
		if err != nil {
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		all = append(all, entry{path, st.Mode(), sys.Ino, sys.Ctim})
		if st.IsDir() && sys.Dev == top.Dev {
			all = append(all, l.listTree(path, depth-1)...)
		}
	}
	return all
}
