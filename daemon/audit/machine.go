package audit

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/placement"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// machine is what the kernel says, before any record is read.
type machine struct {
	daemonRuns bool // somebody has the lock of STATE
	processes  map[int]*process
	mounts     []mounts.Mount
	pins       []string // files in netns.Dir that are called as ours are
	cgroups    []group
	trees      []entry
}

// process is one that runs. Zombies hold nothing, and are left out.
type process struct {
	rundir.Process
	parent  int
	exe     string // base name of its program
	cgroups []string
	root    bool // it is root's, and not that of a user namespace
	// trusted says that it is root's and in this mount namespace: it is what it is called, and paths that it names are
	// those that they seem to be. Of others neither arguments nor descriptors are looked at.
	trusted bool
	args    []string
	third   string     // what its descriptor 3 is: CNI plugins have a lock there
	keeps   rundir.Dir // of a shim
}

func (p *process) text() string {
	line := p.exe
	if p.trusted {
		line = strings.Join(p.args, " ")
	}
	if len(line) > 200 {
		line = line[:200] + "…"
	}
	return fmt.Sprintf("%d %s", p.PID, line)
}

// is says whether a process runs one of our programs, of whatever version.
func (p *process) is(program string) bool { return p.trusted && strings.HasPrefix(p.exe, program) }

// group is a cgroup of one hierarchy.
type group struct{ dir, path string }

// entry is a file or a directory of one of the trees.
type entry struct {
	path string
	mode fs.FileMode
	ino  uint64
	at   syscall.Timespec // of its last change
}

func newEntry(path string, st fs.FileInfo) entry {
	sys := st.Sys().(*syscall.Stat_t)
	return entry{path, st.Mode(), sys.Ino, sys.Ctim}
}

func (e entry) same() string { return fmt.Sprintf("%d %d", e.ino, e.at.Nano()) }

func (l *look) lookAtMachine() (m machine) {
	m.daemonRuns = l.locked()
	m.processes = l.listProcesses()
	var err error
	if m.mounts, err = mounts.Read(mounts.Self); err != nil {
		l.miss("cannot list the mounts: %w", err)
	}
	for _, name := range l.names(netns.Dir) {
		if id, ok := strings.CutPrefix(name, netns.PinPrefix); ok && idForm.MatchString(id) {
			m.pins = append(m.pins, filepath.Join(netns.Dir, name))
		}
	}
	err = cgroup.Visit(func(dir, name string) bool {
		ours := oursByName(name)
		if ours {
			m.cgroups = append(m.cgroups, group{dir, name})
		}
		return len(name) < 3000 && (!ours || path.Dir(name) == placement.PodsPath)
	})
	if err != nil {
		l.miss("cannot list the cgroups: %w", err)
	}
	for dir, depth := range map[string]int{
		l.Root:                   1,
		l.Root + "/pods":         1,
		l.Root + "/containers":   1,
		l.Root + "/cni":          2,
		l.Root + "/images":       3,
		l.Root + "/layers":       2,
		l.Root + "/quarantine":   1,
		l.Root + "/journal":      1,
		l.State:                  1,
		l.State + "/pods":        1,
		l.State + "/containers":  3,
		l.State + "/runc":        2,
		l.State + "/stream":      2,
		l.State + "/pulls":       1,
		l.State + userWaysSuffix: 1,
	} {
		m.trees = append(m.trees, l.listTree(dir, depth)...)
	}
	return m
}

// oursByName says whether a cgroup may be that of one of our shims, containers or pods. What is below one of a
// container is the container's, which may make as many there as it likes.
func oursByName(cgroup string) bool {
	name := path.Base(cgroup)
	_, shim := placement.ShimOfScope(name)
	_, container := placement.ContainerOfScope(name)
	parent := path.Dir(cgroup)
	return shim || container || idForm.MatchString(name) || placement.IsStreamScope(name) ||
		parent == placement.PodsPath || parent == placement.ShimsPath || cgroup == placement.StreamPath
}

// locked says whether a daemon has the lock of STATE.
func (l *look) locked() bool {
	f, err := os.Open(l.State)
	if err != nil {
		l.miss("cannot look whether a daemon runs: %w", err)
		return true
	}
	defer f.Close() // and with it the lock
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	return errors.Is(err, unix.EWOULDBLOCK)
}

func (l *look) listProcesses() map[int]*process {
	all := map[int]*process{}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		l.miss("cannot look at processes: %w", err)
	}
	for _, name := range l.names("/proc") {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		p, err := readProcess(pid, own)
		switch {
		case err == nil:
			all[pid] = p
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH), errors.Is(err, rundir.ErrNoProcess):
		default:
			l.miss("cannot look at process %d: %w", pid, err)
		}
	}
	return all
}

// readProcess reads what is known of a process. fs.ErrNotExist, ESRCH, rundir.ErrNoProcess: it has ended, or is one of
// the kernel's. One that this process may not look into is an error if it is called as ours are.
func readProcess(pid int, own string) (*process, error) {
	proc := fmt.Sprintf("/proc/%d/", pid)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return nil, err
	}
	groups, err := os.ReadFile(proc + "cgroup")
	if err != nil {
		return nil, err
	}
	p := &process{}
	exe, err := os.Readlink(proc + "exe")
	theirs, nserr := os.Readlink(proc + "ns/mnt")
	err = cmp.Or(err, nserr)
	if errors.Is(err, fs.ErrPermission) && !bytes.HasPrefix(status, []byte("Name:\tholdfast")) {
		exe, err = "(hidden)", nil
	}
	if err != nil {
		if _, gone := rundir.FindProcess(pid); gone != nil {
			err = gone
		}
		return nil, err
	}
	p.exe = filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	p.root = bytes.Contains(status, []byte("\nUid:\t0\t0\t"))
	p.trusted = p.root && theirs == own
	if _, after, ok := bytes.Cut(status, []byte("\nPPid:\t")); ok {
		fmt.Sscan(string(after[:min(len(after), 20)]), &p.parent)
	}
	for line := range strings.Lines(string(groups)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 && f[2] != "/" {
			p.cgroups = append(p.cgroups, f[2])
		}
	}
	p.cgroups = slices.Compact(p.cgroups)
	if p.trusted {
		p.args = rundir.CommandLine(pid)
		p.third, _ = os.Readlink(proc + "fd/3")
		p.keeps, _ = rundir.KeptBy(pid)
	}
	// Last: all of it is that process's, or it is gone.
	p.Process, err = rundir.FindProcess(pid)
	return p, err
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

// hasChildren says whether a process has any.
func (m *machine) hasChildren(pid int) bool {
	for _, p := range m.processes {
		if p.parent == pid {
			return true
		}
	}
	return false
}

// names lists a directory. One that is not there has none.
func (l *look) names(dir string) (all []string) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		l.miss("cannot list %s: %w", dir, err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// listTree lists what is below a directory, as deep as it says something by itself, and not what is mounted there. What
// goes meanwhile is left out.
func (l *look) listTree(dir string, depth int) (all []entry) {
	top, err := os.Lstat(dir)
	if depth == 0 || err != nil {
		return nil
	}
	for _, name := range l.names(dir) {
		path := filepath.Join(dir, name)
		st, err := os.Lstat(path)
		if err != nil {
			continue
		}
		all = append(all, newEntry(path, st))
		if st.IsDir() && st.Sys().(*syscall.Stat_t).Dev == top.Sys().(*syscall.Stat_t).Dev {
			all = append(all, l.listTree(path, depth-1)...)
		}
	}
	return all
}
