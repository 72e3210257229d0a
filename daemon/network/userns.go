package network

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

// A process of more than one thread cannot enter a user namespace, and the other
// namespaces of a pod have to be made from within its own: their owner decides
// who may mount a sysfs or a mqueue of them. So a child is cloned into all of
// them at once. It is a program that does nothing; it goes when they are pinned.
//
// It cannot outlive this process: until its execve(2) it reads a pipe from here,
// and afterwards the kernel kills it with the thread that started it.
type keeper struct{ cmd *exec.Cmd }

// startKeeper starts a keeper of new namespaces, a user namespace among them, that
// are to be pinned in dir: so that ps shows what it is for. The calling thread has
// to live until release.
func (n *Network) startKeeper(dir string, flags int, u Userns) (*keeper, error) {
	sys := func(m IDMap) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(m.HostID), Size: int(m.Length)}}
	}
	cmd := exec.Command(n.opts.Keeper, dir)
	cmd.Env = []string{} // not ours
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 uintptr(flags),
		UidMappings:                sys(u.UIDs),
		GidMappings:                sys(u.GIDs),
		GidMappingsEnableSetgroups: true, // containers choose their supplemental groups
		Pdeathsig:                  unix.SIGKILL,
	}
	err := cmd.Start()
	switch {
	case errors.Is(err, unix.ENOSPC):
		return nil, fmt.Errorf("cannot make a user namespace: %w: the limit is reached,"+
			" see sysctl user.max_user_namespaces", err)
	case err != nil:
		return nil, fmt.Errorf("cannot make a user namespace with a process in it: %w", err)
	}
	return &keeper{cmd}, nil
}

// ns is the file of a namespace, for as long as the keeper lives.
func (k *keeper) ns(kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", k.cmd.Process.Pid, kind)
}

// enter takes the calling thread into a namespace of the keeper. It stays a
// thread of this process's user namespace, with all rights over the other.
func (k *keeper) enter(kind string) error {
	fd, err := unix.Open(k.ns(kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the new %s namespace: %w", kind, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, 0); err != nil {
		return fmt.Errorf("cannot enter the new %s namespace: %w", kind, err)
	}
	return nil
}

// release ends the keeper. What is pinned or open stays.
func (k *keeper) release() {
	k.cmd.Process.Kill()
	k.cmd.Wait() // not for long: it was killed
}

// OpenUserns makes a user namespace that lasts as long as the file is open, or
// something else refers to it.
func (n *Network) OpenUserns(u Userns) (f *os.File, err error) {
	err = netns.OnThread(func() error {
		k, err := n.startKeeper(n.opts.PinDir, unix.CLONE_NEWUSER, u)
		if err != nil {
			return err
		}
		defer k.release()
		f, err = os.Open(k.ns("user"))
		return err
	})
	return f, err
}

// asRoot runs f with the calling thread's effective ids set to those of root in
// the user namespace. The kernel has sysctls that only he may write, even where
// this process has all rights over the namespace. The thread must not be used
// for anything else if this fails.
func asRoot(u *Userns, f func() error) error {
	const same = ^uintptr(0)
	// Not those of package syscall: they change the ids of all threads.
	set := func(trap uintptr, id uint32) error {
		if _, _, errno := unix.RawSyscall(trap, same, uintptr(id), same); errno != 0 {
			return errno
		}
		return nil
	}
	if err := set(unix.SYS_SETRESGID, u.GIDs.HostID); err != nil {
		return fmt.Errorf("cannot become group 0 of the user namespace: %w", err)
	}
	if err := set(unix.SYS_SETRESUID, u.UIDs.HostID); err != nil {
		return fmt.Errorf("cannot become user 0 of the user namespace: %w", err)
	}
	err := f()
	return errors.Join(err, set(unix.SYS_SETRESUID, 0), set(unix.SYS_SETRESGID, 0))
}
