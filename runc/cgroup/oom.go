package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// OOMKills counts the processes that the OOM killer has killed, whichever limit
// made it: v2 memory.events, v1 memory.oom_control. Once the cgroup is removed
// it is an error.
//
// v2 keeps the sum for what is below, v1 does not: there it may fall when a
// cgroup below is removed.
func (c Set) OOMKills() (sum uint64, err error) {
	dir, file, ok := c.oomFile()
	if !ok {
		return 0, fmt.Errorf("cannot count OOM kills: %w", ErrNone)
	}
	if sum, err = oomKills(os.ReadFile(filepath.Join(dir, file))); err != nil {
		return 0, fmt.Errorf("cannot count OOM kills in %s: %w", dir, err)
	}
	if file == eventsName {
		return sum, nil
	}
	sum = 0
	err = walk(dir, func(f *os.File) error {
		n, err := oomKills(read(f, file))
		sum += n
		return err
	}, nil)
	if err != nil {
		return 0, fmt.Errorf("cannot count OOM kills below %s: %w", dir, err)
	}
	return sum, nil
}

func oomKills(file []byte, err error) (uint64, error) {
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(file)) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == "oom_kill" {
			return strconv.ParseUint(v, 10, 64)
		}
	}
	return 0, errors.New("the kernel does not tell oom_kill")
}

func (c Set) oomFile() (dir, file string, ok bool) {
	if dir, ok := c.dir("memory"); ok {
		return dir, "memory.oom_control", true
	}
	dir, ok = c.dir("")
	return dir, eventsName, ok
}

// OOMParent is the cgroup above, if its counter includes this one's: on v2,
// below the root. It tells of a kill in a cgroup that systemd removed before
// its own counter could be read.
func (c Set) OOMParent() (Set, bool) {
	_, file, ok := c.oomFile()
	if !ok || file != eventsName {
		return nil, false
	}
	parent := Set{"": filepath.Dir(c[""])}
	_, _, ok = parent.oomFile()
	return parent, ok
}

const eventsName = "memory.events"

// WatchOOM gives a file whose Read returns each time when the OOM counter may
// have risen. Closing it ends a Read. early: it may also be just about to rise,
// because v1 tells that memory is short before it picks a victim.
func (c Set) WatchOOM() (f *os.File, early bool, err error) {
	dir, file, ok := c.oomFile()
	if !ok {
		return nil, false, fmt.Errorf("cannot watch for OOM: %w", ErrNone)
	}
	path := filepath.Join(dir, file)
	early = file != eventsName
	var fd int
	if !early {
		if fd, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err == nil {
			_, err = unix.InotifyAddWatch(fd, path, unix.IN_MODIFY)
		}
		if parent, ok := c.OOMParent(); ok && err == nil {
			dir, file, _ := parent.oomFile()
			// Where it fails, the cgroup's own file still tells.
			unix.InotifyAddWatch(fd, filepath.Join(dir, file), unix.IN_MODIFY)
		}
	} else if fd, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err == nil {
		err = registerEventfd(dir, path, fd)
	}
	if err != nil {
		if fd > 0 {
			unix.Close(fd)
		}
		return nil, early, fmt.Errorf("cannot watch %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), early, nil
}

// registerEventfd: see "event_control" in the kernel's cgroup-v1/memory.rst.
func registerEventfd(dir, path string, eventfd int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return descriptor.Lend(f, func(fd int) error {
		line := fmt.Appendf(nil, "%d %d", eventfd, fd)
		return os.WriteFile(filepath.Join(dir, "cgroup.event_control"), line, 0)
	})
}
