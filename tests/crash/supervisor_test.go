package crash

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// supervisor stops the daemon, or a shim, before each system call that changes what
// lies in a place, and decides what becomes of it; see seccomp_unotify(2). One daemon
// at a time has it, and all that it has started.
type supervisor struct {
	scope  scope
	listen *net.UnixListener
	work   sync.WaitGroup

	mu   sync.Mutex
	disk *disk    // told of each call that is made
	log  []string // each of the calls since expect
	at   int      // the one that is not made, from 1 on; 0: none
	fate syscall.Errno
	met  string // that call, once it has come
	// victim is the run directory of the shim that was killed, and whether it had an exit
	// record then.
	victim   rundir.Dir
	recorded bool
	dead     chan struct{} // closed when recorded is set and the victim was killed
}

// scope is which system calls are stopped.
type scope struct {
	ofShim bool            // those of shims, not those of the daemon
	kinds  map[string]bool // names of theirs; nil: all
	// place gives a path as it is to be called, and "" for one that lies elsewhere.
	place func(path string) string
}

// die is the fate of a call that has the daemon killed in its place; any other is
// what it fails with.
const die = syscall.Errno(0xffff)

// superviseArg makes this test binary the launcher: it takes the filter upon
// itself, hands the listener to the test, and becomes the daemon.
const superviseArg, superviseSep = "-supervise=", "="

// Once a call is received it waits for its answer, whatever signals come: else
// Go's own would have it made, and counted, twice.
const superviseFlags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

// supervise has all daemons from now on supervised until end is called.
func supervise(t *testing.T, n *harness.Node, what scope) (s *supervisor, end func()) {
	t.Helper()
	// A kernel that knows the flags goes on to the filter, and finds none.
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, superviseFlags, 0)
	if errno != unix.EFAULT {
		t.Skipf("the kernel cannot have system calls supervised: %v; it needs Linux 5.19", errno)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatalf("%v", err)
	}
	s = &supervisor{scope: what, disk: newDisk(n)}
	path := n.Path("supervisor.sock")
	if s.listen, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		t.Fatalf("%v", err)
	}
	s.work.Go(s.accept)
	kinds := strings.Join(slices.Sorted(maps.Keys(what.kinds)), ",")
	n.Launcher = []string{self, superviseArg + path + superviseSep + kinds}
	return s, func() {
		n.Launcher = nil
		s.listen.Close()
		s.work.Wait() // each follower ends with its daemon
		for _, fault := range s.disk.faults[:min(len(s.disk.faults), 10)] {
			t.Errorf("a power cut would tell: %s", fault)
		}
	}
}

// expect starts the count again, for one call that is not made. It gives the calls
// of the count before.
func (s *supervisor) expect(at int, fate syscall.Errno) (calls []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls = s.log
	s.log, s.at, s.fate, s.met, s.victim, s.recorded = nil, at, fate, "", "", false
	return calls
}

// happened is the call that is not made, empty until it has come.
func (s *supervisor) happened() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.met
}

// allow is expect with all calls made.
func (s *supervisor) allow() (calls []string) { return s.expect(0, 0) }

func (s *supervisor) accept() {
	for {
		c, err := s.listen.AcceptUnix()
		if err != nil {
			return
		}
		oob := make([]byte, unix.CmsgSpace(4))
		b := make([]byte, 1)
		_, n, _, _, err := c.ReadMsgUnix(b, oob)
		if err == nil {
			var m []unix.SocketControlMessage
			if m, err = unix.ParseSocketControlMessage(oob[:n]); err == nil && len(m) == 1 {
				var fds []int
				if fds, err = unix.ParseUnixRights(&m[0]); err == nil {
					unix.CloseOnExec(fds[0])
					// It becomes the daemon, by execve(2), under the same pid.
					pid := peer(c)
					s.work.Go(func() { s.follow(fds[0], pid) })
					c.Write(b)
				}
			}
		}
		c.Close()
	}
}

// The kernel's struct seccomp_notif and seccomp_notif_resp.
type notification struct {
	id    uint64
	pid   uint32 // of the thread
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

func peer(c *net.UnixConn) (pid int) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				pid = int(cred.Pid)
			}
		})
	}
	return pid
}

// follow answers until nobody has the filter any more.
func (s *supervisor) follow(fd, daemon int) {
	defer unix.Close(fd)
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if p[0].Revents&unix.POLLIN == 0 {
			if p[0].Revents != 0 {
				return // the last task has ended
			}
			continue
		}
		var n notification
		if err := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
			continue // it was killed meanwhile
		}
		r := response{id: n.id}
		switch errno := s.answer(&n, daemon); errno {
		case 0:
			r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
		case die:
			continue
		default:
			r.err = -int32(errno)
		}
		ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r)) // an error: it was killed
	}
}

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func (s *supervisor) answer(n *notification, daemon int) syscall.Errno {
	pid := s.caller(n, daemon)
	if pid == 0 {
		return 0
	}
	call, paths := s.describe(n)
	if call == "" {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fate := s.fateLocked(call, pid)
	if fate == 0 {
		s.disk.note(supervised[int(n.nr)].name, paths)
	}
	return fate
}

// fateLocked counts a call and decides what becomes of it.
func (s *supervisor) fateLocked(call string, pid int) syscall.Errno {
	// What is written piece by piece is one call.
	if strings.HasPrefix(call, "write ") && len(s.log) > 0 && s.log[len(s.log)-1] == call {
		return 0
	}
	s.log = append(s.log, call)
	if len(s.log) != s.at {
		return 0
	}
	s.met = call
	if s.fate == die && s.scope.ofShim {
		s.victim, s.dead = runDirOf(pid), make(chan struct{})
	}
	if s.fate == die {
		s.killLocked(pid)
	}
	return s.fate
}

// answerTime is how long a process lives on that is killed at a call, which is not made. An answer
// that does not wait for the call is given meanwhile, and holds.
const answerTime = 20 * time.Millisecond

// killLocked kills a process in a moment, in a goroutine that ends with that.
func (s *supervisor) killLocked(pid int) {
	victim, dead := s.victim, s.dead
	over := func() {
		if victim != "" {
			close(dead)
		}
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		over() // it was killed already
		return
	}
	s.work.Go(func() {
		defer unix.Close(fd)
		defer over()
		time.Sleep(answerTime)
		s.mu.Lock()
		defer s.mu.Unlock()
		if victim != "" && victim == s.victim {
			_, err := os.Stat(victim.Path(rundir.ExitName))
			s.recorded = err == nil
		}
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // an error: it was killed meanwhile
	})
}

// killed says whether the shim of a container was killed in place of a call, and whether
// there was an exit record by then.
func (s *supervisor) killed(id string) (was, recorded bool) {
	s.mu.Lock()
	victim, dead := s.victim, s.dead
	s.mu.Unlock()
	if victim == "" || victim.ID() != id {
		return false, false
	}
	<-dead
	s.mu.Lock()
	defer s.mu.Unlock()
	return true, s.recorded
}

// runDirOf is the run directory of a shim, by its command line.
func runDirOf(pid int) rundir.Dir {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(b), "\x00")
	if i := slices.Index(args, "--dir"); i >= 0 && i+1 < len(args) {
		return rundir.Dir(args[i+1])
	}
	return ""
}

// caller is the process that makes a call, 0 for one that is not supervised.
func (s *supervisor) caller(n *notification, daemon int) (pid int) {
	if !s.scope.ofShim {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", daemon, n.pid)); err != nil {
			return 0 // of a child
		}
		return daemon
	}
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", n.pid))
	if filepath.Base(exe) != "holdfast-shim" {
		return 0
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.pid))
	if _, after, ok := bytes.Cut(status, []byte("\nTgid:")); ok {
		fmt.Sscan(string(after), &pid)
	}
	return pid
}

// describe says what a call is about, "" if that lies outside of the scope, and its paths.
func (s *supervisor) describe(n *notification) (call string, paths []string) {
	c := supervised[int(n.nr)]
	words := []string{c.name}
	ours := false
	for i := 0; i < len(c.args); i += 2 {
		path := pathOf(n, c.args[i], c.args[i+1])
		paths = append(paths, path)
		if p := s.scope.place(path); p != "" {
			path, ours = p, true
		}
		words = append(words, path)
	}
	if !ours {
		return "", nil
	}
	return strings.Join(words, " "), paths
}

// Places of a path among the arguments of a call, instead of a number.
const (
	here = -1 // of a descriptor: there is none, the path is absolute or of the working directory
	none = -2 // of a path: the descriptor is it
	sock = -3 // of a path: it is in a socket's address, at the argument of the descriptor plus 1
)

// pathOf is a path that a call names by a descriptor and a string.
func pathOf(n *notification, dir, name int) string {
	link := func(fd string) string {
		p, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", n.pid, fd))
		return strings.TrimSuffix(p, " (deleted)")
	}
	base := ""
	if dir != here {
		base = link(fmt.Sprint(int32(n.args[dir])))
	}
	var p string
	switch name {
	case none:
		return base
	case sock:
		const family = 2 // bytes
		p = readString(n.pid, n.args[dir+1]+family)
	default:
		p = readString(n.pid, n.args[name])
	}
	if rest, ok := strings.CutPrefix(p, "/proc/self/fd/"); ok {
		fd, rest, _ := strings.Cut(rest, "/")
		return filepath.Join(link(fd), rest)
	}
	if p == "" || filepath.IsAbs(p) {
		return cmp.Or(p, base)
	}
	return filepath.Join(base, p)
}

func readString(pid uint32, addr uint64) string {
	b := make([]byte, unix.PathMax)
	local := []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}
	// Up to the end of a page, as the next one may not be there.
	remote := []unix.RemoteIovec{{Base: uintptr(addr), Len: int(4096 - addr%4096)},
		{Base: uintptr(addr + 4096 - addr%4096), Len: 4096}}
	n, err := unix.ProcessVMReadv(int(pid), local, remote, 0)
	if err != nil {
		return ""
	}
	s, _, _ := strings.Cut(string(b[:n]), "\x00")
	return s
}

// call is a system call that can change what lies in a place.
type call struct {
	name string
	args []int // pairs: where the descriptor is and where the string, of each path
}

var supervised = map[int]call{
	unix.SYS_OPENAT:        {"create", []int{0, 1}}, // with O_CREAT or O_TRUNC only
	unix.SYS_MKDIRAT:       {"mkdir", []int{0, 1}},
	unix.SYS_MKNODAT:       {"mknod", []int{0, 1}},
	unix.SYS_SYMLINKAT:     {"symlink", []int{1, 2}},
	unix.SYS_LINKAT:        {"link", []int{0, 1, 2, 3}},
	unix.SYS_RENAMEAT:      {"rename", []int{0, 1, 2, 3}},
	unix.SYS_RENAMEAT2:     {"rename", []int{0, 1, 2, 3}},
	unix.SYS_UNLINKAT:      {"unlink", []int{0, 1}},
	unix.SYS_BIND:          {"bind", []int{0, sock}},
	unix.SYS_WRITE:         {"write", []int{0, none}},
	unix.SYS_PWRITE64:      {"write", []int{0, none}},
	unix.SYS_FTRUNCATE:     {"truncate", []int{0, none}},
	unix.SYS_FALLOCATE:     {"allocate", []int{0, none}},
	unix.SYS_FSYNC:         {"fsync", []int{0, none}},
	unix.SYS_FDATASYNC:     {"fsync", []int{0, none}},
	unix.SYS_SYNCFS:        {"syncfs", []int{0, none}},
	unix.SYS_FCHMOD:        {"chmod", []int{0, none}},
	unix.SYS_FCHMODAT:      {"chmod", []int{0, 1}},
	unix.SYS_FCHMODAT2:     {"chmod", []int{0, 1}},
	unix.SYS_FCHOWN:        {"chown", []int{0, none}},
	unix.SYS_FCHOWNAT:      {"chown", []int{0, 1}},
	unix.SYS_FSETXATTR:     {"setxattr", []int{0, none}},
	unix.SYS_SETXATTR:      {"setxattr", []int{here, 0}},
	unix.SYS_LSETXATTR:     {"setxattr", []int{here, 0}},
	unix.SYS_UTIMENSAT:     {"utimes", []int{0, 1}},
	unix.SYS_MOUNT:         {"mount", []int{here, 1}},
	unix.SYS_MOVE_MOUNT:    {"mount", []int{2, 3}},
	unix.SYS_MOUNT_SETATTR: {"remount", []int{0, 1}},
	unix.SYS_UMOUNT2:       {"umount", []int{here, 0}},
}

// becomeSupervised is the launcher's main. It returns if it is not meant.
func becomeSupervised() {
	if len(os.Args) < 3 || !strings.HasPrefix(os.Args[1], superviseArg) {
		return
	}
	socket, kinds, _ := strings.Cut(strings.TrimPrefix(os.Args[1], superviseArg), superviseSep)
	err := launchSupervised(socket, kinds, os.Args[2:])
	fmt.Fprintln(os.Stderr, "cannot run the daemon supervised:", err)
	os.Exit(1)
}

// launchSupervised takes the filter for the named kinds of calls, or all, and becomes args.
func launchSupervised(socket, kinds string, args []string) error {
	runtime.LockOSThread() // the filter is of this thread, and of what it becomes
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	const nr, arg2 = 0, 16 + 2*8 // offsets in struct seccomp_data
	prog := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr}}
	for number, call := range supervised {
		if kinds != "" && !slices.Contains(strings.Split(kinds, ","), call.name) {
			continue
		}
		n := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF}}
		if number == unix.SYS_OPENAT { // only those that create or empty a file
			n = []unix.SockFilter{
				{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg2},
				{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.O_CREAT | unix.O_TRUNC, Jf: 1},
				n[0],
				{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
			}
		}
		prog = append(prog, unix.SockFilter{
			Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K,
			K:    uint32(number),
			Jf:   uint8(len(n)),
		})
		prog = append(prog, n...)
	}
	prog = append(prog, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, superviseFlags,
		uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("cannot set the filter: %w", errno)
	}
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return err
	}
	return syscall.Exec(args[0], args, os.Environ()) // closes both: they are close-on-exec
}
