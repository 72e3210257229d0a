package rundir

import (
	"time"

	"golang.org/x/sys/unix"
)

// BootTime is the time on CLOCK_BOOTTIME: since the boot, with the time that the
// machine was suspended.
func BootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // every Linux since 2.6.39 has it
	}
	return time.Duration(ts.Nano())
}

// WallTime is what a time on CLOCK_BOOTTIME is on the wall clock, as far as that
// is known now.
func WallTime(at time.Duration) time.Time { return time.Now().Add(at - BootTime()) }
