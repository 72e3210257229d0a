package spec

import (
	"strconv"
	"strings"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The bounds of real-time signals as glibc and musl have them; the kernel's
// first two belong to the C library.
const (
	sigRTMin = 34
	sigRTMax = 64
)

const fieldStopSignal = "config.stop_signal"

// StopSignal says what stops the container: the config's signal, else the
// image's, else SIGTERM.
func StopSignal(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) (syscall.Signal, runtimeapi.Signal, error) {
	if s := c.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		name, ok := runtimeapi.Signal_name[int32(s)]
		n, err := parseSignal(strings.TrimPrefix(name, "SIGNAL_"))
		if !ok || err != nil {
			return 0, 0, invalid(fieldStopSignal, "%d is not a signal", s)
		}
		return n, s, nil
	}
	if image.StopSignal == "" {
		return syscall.SIGTERM, runtimeapi.Signal_SIGNAL_SIGTERM, nil
	}
	n, err := parseSignal(image.StopSignal)
	if err != nil {
		return 0, 0, invalid("image config: StopSignal", "%q is not a signal", image.StopSignal)
	}
	return n, criSignal(n), nil
}

// parseSignal reads "15", "TERM", "SIGTERM", "SIGRTMIN+3" (images) and
// "SIGRTMINPLUS3" (CRI), in any case.
func parseSignal(name string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, strconv.ErrRange
		}
		return syscall.Signal(n), nil
	}
	s := strings.TrimPrefix(strings.ToUpper(name), "SIG")
	s = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(s)
	if tail, ok := strings.CutPrefix(s, "RTMIN"); ok {
		return realtime(sigRTMin, tail, '+')
	}
	if tail, ok := strings.CutPrefix(s, "RTMAX"); ok {
		return realtime(sigRTMax, tail, '-')
	}
	if n := unix.SignalNum("SIG" + s); n != 0 {
		return n, nil
	}
	switch s { // other names of the same signals
	case "CLD":
		return unix.SIGCHLD, nil
	case "IOT":
		return unix.SIGABRT, nil
	case "POLL":
		return unix.SIGIO, nil
	}
	return 0, strconv.ErrSyntax
}

func realtime(base int, tail string, sign byte) (syscall.Signal, error) {
	if tail == "" {
		return syscall.Signal(base), nil
	}
	if tail[0] != sign {
		return 0, strconv.ErrSyntax
	}
	n, err := strconv.ParseUint(tail[1:], 10, 8)
	if err != nil || n > sigRTMax-sigRTMin {
		return 0, strconv.ErrSyntax
	}
	if sign == '-' {
		return syscall.Signal(base - int(n)), nil
	}
	return syscall.Signal(base + int(n)), nil
}

// criSignal gives the CRI's name for a number. Where there are two, it is the
// one that signal(7) lists first.
func criSignal(n syscall.Signal) runtimeapi.Signal {
	switch {
	case n == unix.SIGABRT:
		return runtimeapi.Signal_SIGNAL_SIGABRT
	case n == unix.SIGCHLD:
		return runtimeapi.Signal_SIGNAL_SIGCHLD
	case n == unix.SIGIO:
		return runtimeapi.Signal_SIGNAL_SIGIO
	case n >= sigRTMin && n <= sigRTMin+15:
		return runtimeapi.Signal_SIGNAL_SIGRTMIN + runtimeapi.Signal(n-sigRTMin)
	case n > sigRTMin+15 && n <= sigRTMax:
		return runtimeapi.Signal_SIGNAL_SIGRTMAX - runtimeapi.Signal(sigRTMax-n)
	}
	return runtimeapi.Signal(runtimeapi.Signal_value["SIGNAL_"+unix.SignalName(n)])
}
