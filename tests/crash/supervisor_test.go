package crash

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// supervisor stops the daemon before each system call that changes a name, or
// makes something durable, below its root, and decides what becomes of it; see
// seccomp_unotify(2). One daemon at a time has it.
type supervisor struct {
	n      *harness.Node
	listen *net.UnixListener
	work   sync.WaitGroup

	mu   sync.Mutex
	log  []string // each of the calls since expect
	at   int      // the one that is not made, from 1 on; 0: none
	fate syscall.Errno
}

// die is the fate of a call that has the daemon killed in its place; any other is
// what it fails with.
const die = syscall.Errno(0xffff)

// superviseArg makes this test binary the launcher: it takes the filter upon
// itself, hands the listener to the test, and becomes the daemon.
const superviseArg = "-supervise="

// Once a call is received it waits for its answer, whatever signals come: else
// Go's own would have it made, and counted, twice.
const superviseFlags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

// supervise has all daemons from now on supervised until end is called.
func supervise(t *testing.T, n *harness.Node) (s *supervisor, end func()) {
	t.Helper()
	// A kernel that knows the flags goes on to the filter, and finds none.
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, superviseFlags, 0); errno != unix.EFAULT {
		t.Skipf("the kernel cannot have system calls supervised: %v; it needs Linux 5.19", errno)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatalf("%v", err)
	}
	s = &supervisor{n: n}
	path := n.Path("supervisor.sock")
	if s.listen, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		t.Fatalf("%v", err)
	}
	s.work.Go(s.accept)
	n.Launcher = []string{self, superviseArg + path}
	return s, func() {
		n.Launcher = nil
		s.listen.Close()
		s.work.Wait() // each follower ends with its daemon
	}
}

// expect starts the count again, for one call that is not made. It gives the calls
// of the count before.
func (s *supervisor) expect(at int, fate syscall.Errno) (calls []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls = s.log
	s.log, s.at, s.fate = nil, at, fate
	return calls
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
	call, ours := s.describe(n)
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", daemon, n.pid)); err != nil || !ours {
		return 0 // of a child, or somewhere else
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, call)
	if len(s.log) != s.at {
		return 0
	}
	if s.fate == die {
		unix.Kill(daemon, unix.SIGKILL)
	}
	return s.fate
}

// describe says what a call is about, and whether that lies in the stores.
func (s *supervisor) describe(n *notification) (string, bool) {
	path := func(dir, name int) string {
		p := readString(n.pid, n.args[name])
		if !filepath.IsAbs(p) {
			base, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", n.pid, int32(n.args[dir])))
			p = filepath.Join(base, p)
		}
		return p
	}
	var what []string
	switch n.nr {
	case unix.SYS_FSYNC, unix.SYS_SYNCFS:
		p, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", n.pid, int32(n.args[0])))
		what = []string{p}
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		what = []string{path(0, 1), path(2, 3)}
	default:
		what = []string{path(0, 1)}
	}
	ours := false
	for i, p := range what {
		for _, dir := range []string{"images", "layers"} {
			ours = ours || strings.HasPrefix(p, filepath.Join(s.n.Root, dir)+"/")
		}
		what[i] = strings.TrimPrefix(p, s.n.Root+"/")
		// One file of a tree that has no name yet, or no more, is as good as another.
		if strings.HasPrefix(what[i], "layers/tmp/") && strings.Count(what[i], "/") > 4 {
			return "", false
		}
	}
	return supervised[int(n.nr)] + " " + strings.Join(what, " "), ours
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

// supervised are the system calls by which the stores change, but for writes.
var supervised = map[int]string{
	unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename", unix.SYS_UNLINKAT: "unlink", unix.SYS_MKDIRAT: "mkdir",
	unix.SYS_FSYNC: "fsync", unix.SYS_SYNCFS: "syncfs", unix.SYS_OPENAT: "create",
}

// becomeSupervised is the launcher's main. It returns if it is not meant.
func becomeSupervised() {
	if len(os.Args) < 3 || !strings.HasPrefix(os.Args[1], superviseArg) {
		return
	}
	err := launchSupervised(strings.TrimPrefix(os.Args[1], superviseArg), os.Args[2:])
	fmt.Fprintln(os.Stderr, "cannot run the daemon supervised:", err)
	os.Exit(1)
}

func launchSupervised(socket string, args []string) error {
	runtime.LockOSThread() // the filter is of this thread, and of what it becomes
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	const nr, arg2 = 0, 16 + 2*8 // offsets in struct seccomp_data
	prog := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr}}
	for call := range supervised {
		n := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF}}
		if call == unix.SYS_OPENAT { // only those that create
			n = []unix.SockFilter{
				{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg2},
				{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.O_CREAT, Jf: 1},
				n[0],
				{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
			}
		}
		prog = append(prog, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(call),
			Jf: uint8(len(n))})
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
