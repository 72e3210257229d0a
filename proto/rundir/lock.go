package rundir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked says that another process holds the lock.
var ErrLocked = errors.New("the lock is held")

// Lock takes the lock that is the file at path for as long as the returned file is
// open. It is an open file description lock (fcntl(2), F_OFD_SETLK): no child
// inherits it, because the descriptor is close-on-exec, and a probe does not disturb it.
func Lock(path string) (*os.File, error) {
	f, err := openLock(path, os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("cannot lock %s: %w", path, err)
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = ErrLocked
		}
		return nil, fmt.Errorf("cannot lock %s: %w", path, err)
	}
	return f, nil
}

// Held says whether somebody holds the lock at path, without taking it. A missing file
// is not held; that alone does not prove that its holder has ended, because anybody
// may have removed it.
func Held(path string) (bool, error) {
	f, err := openLock(path, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot probe the lock %s: %w", path, err)
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return false, fmt.Errorf("cannot probe the lock %s: %w", path, err)
	}
	return lk.Type != unix.F_UNLCK, nil
}

// openLock opens the file of a lock. What somebody has put in its place is an error.
func openLock(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0o600)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s is not a regular file", path))
	}
	return f, nil
}
