package stats

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDescriptors bounds the descriptors that one call looks at, of all containers.
const maxDescriptors = 1 << 17

// descriptors counts what processes have open, and the sockets among that, from a budget
// of descriptors to look at. It says false when that is used up. A process that ends
// meanwhile has none.
func descriptors(pids []int, budget *int) (open, sockets uint64, ok bool) {
	for _, pid := range pids {
		dir, err := os.Open("/proc/" + strconv.Itoa(pid) + "/fd")
		if err != nil {
			continue
		}
		names, _ := dir.Readdirnames(*budget + 1)
		if *budget -= len(names); *budget < 0 {
			dir.Close()
			*budget = 0
			return 0, 0, false
		}
		open += uint64(len(names))
		target := make([]byte, len("socket:"))
		for _, name := range names {
			n, _ := unix.Readlinkat(int(dir.Fd()), name, target)
			if n == len(target) && string(target) == "socket:" {
				sockets++
			}
		}
		dir.Close()
	}
	return open, sockets, true
}

// openFilesLimit is how many descriptors a process may have, unless there is no limit.
func openFilesLimit(pid int) (uint64, bool) {
	var limit unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit)
	return limit.Cur, err == nil && limit.Cur != unix.RLIM_INFINITY
}

// deviceOf is the path of a block device by its number, MAJOR:MINOR. The number stands
// for one without a path, as file systems without a disk have.
func deviceOf(id string) string {
	link, err := os.Readlink("/sys/dev/block/" + id)
	if err != nil {
		return id
	}
	// The kernel writes "!" for "/" in the name of a device.
	return "/dev/" + strings.ReplaceAll(filepath.Base(link), "!", "/")
}
