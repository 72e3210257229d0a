package rundir

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memoryMap is struct prctl_mm_map of prctl(2).
type memoryMap struct {
	code, data, brk [2]uint64
	stack           uint64
	arg, env        [2]uint64
	auxv            uint64
	auxvSize        uint32
	exe             int32
}

func (m memoryMap) set() error {
	_, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP, uintptr(unsafe.Pointer(&m)),
		unsafe.Sizeof(m), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ownMap is that of this process: see proc_pid_stat(5).
func ownMap(t *testing.T) memoryMap {
	t.Helper()
	b, err := os.ReadFile("/proc/self/stat")
	check(t, err)
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')'):]))
	n := func(field int) uint64 {
		v, err := strconv.ParseUint(fields[field-2], 10, 64)
		check(t, err)
		return v
	}
	end, _, _ := unix.Syscall(unix.SYS_BRK, 0, 0, 0)
	return memoryMap{
		code:  [2]uint64{n(26), n(27)},
		data:  [2]uint64{n(45), n(46)},
		brk:   [2]uint64{n(47), uint64(end)},
		stack: n(28),
		arg:   [2]uint64{n(48), n(49)},
		env:   [2]uint64{n(50), n(51)},
		exe:   -1,
	}
}

// Any process can make its command line as large as all memory that it can address. Who reads it takes a part.
func TestEndlessCommandLine(t *testing.T) {
	const size = 16 * maxCommandLine
	own := ownMap(t)
	huge, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	check(t, err)
	defer unix.Munmap(huge)
	for i := range huge {
		huge[i] = 'x'
	}
	huge[size-1] = 0 // without it the kernel gives one page
	faked := own
	faked.arg[0] = uint64(uintptr(unsafe.Pointer(&huge[0])))
	faked.arg[1] = faked.arg[0] + size
	if err := faked.set(); err != nil {
		t.Skipf("the kernel does not let a process do that: %v", err)
	}
	defer own.set()
	if got := CommandLine(os.Getpid()); len(got) != 1 || len(got[0]) != maxCommandLine {
		t.Errorf("%d arguments are read, the first of %d bytes", len(got), len(got[0]))
	}
	check(t, own.set())
	if got := CommandLine(os.Getpid()); len(got) != len(os.Args) || got[0] != os.Args[0] {
		t.Errorf("%q, want %q", got, os.Args)
	}
}
