package shim

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// FilesVariable holds the numbers of the descriptors that Reopening hands over.
const FilesVariable = "HOLDFAST_TEST_FILES"

// Reopening is Run of a shim that at SIGUSR2 executes its program anew: nothing is
// left of it then but files and descriptors.
func Reopening(cfg Config) error {
	cfg.Files = inherited()
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGUSR2)
	s, err := open(cfg)
	if err != nil {
		return err
	}
	go func() {
		for range again {
			// A container that has just ended is not handed over.
			if err := s.execute(); !errors.Is(err, kind.State) {
				cfg.Log.Error("not executed", "error", err)
				os.Exit(3)
			}
		}
	}()
	return s.run()
}

func (f *Files) list() []**os.File {
	return []**os.File{&f.Outputs[0], &f.Outputs[1], &f.Input, &f.Memory, &f.Log, &f.Lock}
}

func (s *shim) execute() error {
	files, err := s.task.handOver()
	if err != nil {
		return err
	}
	files.Lock = s.presence.lock
	var numbers []string
	for _, f := range files.list() {
		number := -1
		if *f != nil {
			err := descriptor.Lend(*f, func(fd int) error {
				number = fd
				_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
				return err
			})
			if err != nil {
				return err
			}
		}
		numbers = append(numbers, fmt.Sprint(number))
	}
	env := append(os.Environ(), FilesVariable+"="+strings.Join(numbers, " "))
	return syscall.Exec("/proc/self/exe", os.Args, env)
}

func inherited() *Files {
	numbers := strings.Fields(os.Getenv(FilesVariable))
	os.Unsetenv(FilesVariable)
	if len(numbers) == 0 {
		return nil
	}
	files := new(Files)
	for i, f := range files.list() {
		fd := -1
		fmt.Sscan(numbers[i], &fd)
		if fd >= 0 {
			unix.CloseOnExec(fd)
			*f = os.NewFile(uintptr(fd), "inherited")
		}
	}
	return files
}
