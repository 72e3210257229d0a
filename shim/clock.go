package shim

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
)

// deadline is a timer on CLOCK_BOOTTIME that can be set again until it fires.
type deadline struct{ timer *os.File }

// newDeadline calls fire once, in a goroutine that close ends.
func newDeadline(fire func()) (*deadline, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a timer: %w", err)
	}
	d := &deadline{timer: os.NewFile(uintptr(fd), "stop deadline")}
	go func() {
		var b [8]byte
		if _, err := d.timer.Read(b[:]); err == nil {
			fire()
		}
	}()
	return d, nil
}

// set moves the deadline to a time on CLOCK_BOOTTIME. One that has passed fires at once.
func (d *deadline) set(at time.Duration) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(1, int64(at)))}
	err := descriptor.Lend(d.timer, func(fd int) error {
		return unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME, &spec, nil)
	})
	if err != nil {
		return fmt.Errorf("cannot set the stop deadline: %w", err)
	}
	return nil
}

func (d *deadline) close() { d.timer.Close() }
