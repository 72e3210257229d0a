// Package machine runs tests on a machine of their own, as far as namespaces can make
// one, with programs of a Kubernetes release. These are built from a module of their
// own, programs, so that they have exactly the dependencies of their release.
package machine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

const (
	stageVariable   = "HOLDFAST_KUBELET_STAGE"
	programVariable = "HOLDFAST_KUBELET" // the program's path
)

// The node's name and address. The kubelet refuses an address of 127.0.0.0/8, not one of lo.
const (
	NodeName = "node"
	NodeIP   = "192.0.2.10"
)

// Program is the path of the program that the tests run.
func Program() string { return os.Getenv(programVariable) }

// Main is TestMain of tests that run a program of the module programs. It does not return.
//
// A kubelet writes settings of the whole machine and has fixed paths, so the tests
// run on a machine of their own as far as namespaces can make one. It takes three
// processes: the one that go test starts builds the programs and makes the
// namespaces; the first process in these sets them up and reaps orphans, as the
// shims of a killed daemon are; its child runs the tests.
func Main(m *testing.M, program string) {
	var code int
	var err error
	switch os.Getenv(stageVariable) {
	case "":
		code, err = outside(m, program)
	case "init":
		code, err = reap()
	default:
		code = m.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func outside(m *testing.M, program string) (int, error) {
	if os.Geteuid() != 0 {
		return m.Run(), nil // they say that they need root
	}
	path := Program()
	if path == "" {
		var err error
		if path, err = build(program); err != nil {
			return 1, err
		}
	}
	bin, err := harness.Binaries()
	if err != nil {
		return 1, err
	}
	defer harness.RemoveBinaries()
	// Its death is the end of all processes there. The parent of the signal is a thread.
	runtime.LockOSThread()
	cmd := again("init", programVariable+"="+path, "HOLDFAST_BIN="+bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
	}
	signal.Ignore(unix.SIGINT) // the tests end by it, and clean up
	return exitCode(cmd.Run())
}

// again is this program once more, as a later stage.
func again(stage string, env ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(append(os.Environ(), env...), stageVariable+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// reap is process 1 of the namespaces. With its end the kernel kills all others.
func reap() (int, error) {
	if err := makeMachine(); err != nil {
		return 1, err
	}
	cmd := again("tests")
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 1, fmt.Errorf("cannot wait for the tests: %w", err)
		case pid == cmd.Process.Pid && status.Signaled():
			return 1, fmt.Errorf("the tests were killed: %s", status.Signal())
		case pid == cmd.Process.Pid:
			return status.ExitStatus(), nil
		}
	}
}

// makeMachine gives the namespaces a network and the paths that the kubelet writes.
func makeMachine() error {
	// Nothing that is mounted from here on gets out. Within, mounts propagate as on a node.
	for _, flag := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|flag, ""); err != nil {
			return fmt.Errorf("cannot change the propagation of mounts: %w", err)
		}
	}
	if err := mountNew("proc", "/proc", ""); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/var/log", "/var/lib/kubelet"} {
		if err := mountNew("tmpfs", dir, "mode=755"); err != nil {
			return err
		}
	}
	if err := keepSysctls(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(NodeName)); err != nil {
		return fmt.Errorf("cannot set the hostname: %w", err)
	}
	return makeNetwork()
}

func mountNew(kind, dir, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, dir, kind, 0, data); err != nil {
		return fmt.Errorf("cannot mount a %s on %s: %w", kind, dir, err)
	}
	return nil
}

// keepSysctls mounts files over the settings of the machine that a kubelet writes.
// The kernel then refuses a proc to user namespaces, unless there is a whole one, too.
func keepSysctls() error {
	if err := mountNew("proc", "/run/proc", ""); err != nil {
		return err
	}
	for _, name := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"} {
		path := filepath.Join("/proc/sys", name)
		value, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		copied := filepath.Join("/run", strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(copied, value, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(copied, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot mount %s on %s: %w", copied, path, err)
		}
	}
	return nil
}

func makeNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find lo: %w", err)
	}
	address, err := netlink.ParseAddr(NodeIP + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(lo, address); err != nil {
		return fmt.Errorf("cannot give lo the address %s: %w", NodeIP, err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("cannot bring lo up: %w", err)
	}
	return nil
}
