package network

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

// Paths returns where the namespaces of a pod are pinned, if it has them. It
// derives from the id alone, so that a pin can be found without a record.
func (n *Network) Paths(id string) Namespaces {
	ns := n.pinDir(id)
	return Namespaces{
		Net:  filepath.Join(n.opts.NetnsDir, netns.PinPrefix+id),
		IPC:  filepath.Join(ns, "ipc"),
		UTS:  filepath.Join(ns, "uts"),
		User: filepath.Join(ns, "user"),
	}
}

func (n *Network) pinDir(id string) string { return filepath.Join(n.opts.PinDir, id, "ns") }

// Pinned returns the paths at which a namespace is really mounted. After a
// reboot there is none, even where the files are left.
func (n *Network) Pinned(id string) Namespaces {
	p := n.Paths(id)
	for _, path := range []*string{&p.Net, &p.IPC, &p.UTS, &p.User} {
		if !netns.IsPinned(*path) {
			*path = ""
		}
	}
	return p
}

// CreateNamespaces makes the wanted namespaces and pins them at Paths(id). They
// are always new ones: what an earlier attempt left at those paths is removed
// first. On an error nothing is left.
func (n *Network) CreateNamespaces(id string, w Want) (Namespaces, error) {
	if err := checkID(id); err != nil {
		return Namespaces{}, err
	}
	settings, err := resolveSysctls(w)
	if err != nil {
		return Namespaces{}, err
	}
	if err := n.RemoveNamespaces(id); err != nil {
		return Namespaces{}, err
	}

	flags, pins := n.pins(id, w)
	if flags == 0 {
		return Namespaces{}, nil
	}
	err = n.createPinFiles(id, pins)
	if err == nil {
		err = netns.OnThread(func() error { return n.makeNamespaces(id, flags, w, settings, pins) })
	}
	if err != nil {
		err = fmt.Errorf("cannot create namespaces of pod %s: %w", id, err)
		return Namespaces{}, errors.Join(err, n.RemoveNamespaces(id))
	}
	return pins, nil
}

// pins returns the flags for unshare or clone and the paths for what it makes.
func (n *Network) pins(id string, w Want) (flags int, pins Namespaces) {
	pins = n.Paths(id)
	for _, c := range []struct {
		wanted bool
		flag   int
		path   *string
	}{
		{w.Net, unix.CLONE_NEWNET, &pins.Net},
		{w.IPC, unix.CLONE_NEWIPC, &pins.IPC},
		{w.UTS, unix.CLONE_NEWUTS, &pins.UTS},
		{w.User != nil, unix.CLONE_NEWUSER, &pins.User},
	} {
		if c.wanted {
			flags |= c.flag
		} else {
			*c.path = ""
		}
	}
	return flags, pins
}

func (n *Network) createPinFiles(id string, pins Namespaces) error {
	if pins.Net != "" {
		if err := shareDir(n.opts.NetnsDir); err != nil {
			return err
		}
	}
	if pins.IPC != "" || pins.UTS != "" || pins.User != "" {
		if err := os.MkdirAll(n.pinDir(id), 0o700); err != nil {
			return fmt.Errorf("cannot create their directory: %w", err)
		}
	}
	for _, path := range pins.List() {
		if path == "" {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot create a file to pin a namespace at: %w", err)
		}
		f.Close()
	}
	return nil
}

// makeNamespaces runs on a thread that ends afterwards, so it leaves the thread
// in the new namespaces. Mounting happens in the mount namespace that all
// threads share.
func (n *Network) makeNamespaces(id string, flags int, w Want, settings []setting, pins Namespaces) error {
	if w.User == nil {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
	} else {
		k, err := n.startKeeper(n.pinDir(id), flags, *w.User)
		if err != nil {
			return err
		}
		defer k.release()
		for kind := range threads(pins) {
			if err := k.enter(kind); err != nil {
				return err
			}
		}
		if err := pin("user", k.ns("user"), pins.User); err != nil {
			return err
		}
	}
	if pins.UTS != "" && w.Hostname != "" {
		if err := unix.Sethostname([]byte(w.Hostname)); err != nil {
			return fmt.Errorf("cannot set hostname %q: %w", w.Hostname, err)
		}
	}
	for _, s := range settings {
		if s.late {
			continue
		}
		if err := s.write(w.User); err != nil {
			return err
		}
	}
	if pins.Net != "" {
		if err := loopbackUp(); err != nil {
			return err
		}
	}
	for kind, path := range threads(pins) {
		if err := pin(kind, "/proc/thread-self/ns/"+kind, path); err != nil {
			return err
		}
	}
	return nil
}

// threads are those of s that a thread can be in alone, by their names in /proc.
func threads(s Namespaces) map[string]string {
	m := map[string]string{"net": s.Net, "ipc": s.IPC, "uts": s.UTS}
	maps.DeleteFunc(m, func(_, path string) bool { return path == "" })
	return m
}

func pin(kind, ns, path string) error {
	if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot pin the %s namespace at %s: %w", kind, path, err)
	}
	return nil
}

// loopbackUp sets lo up in the calling thread's namespace; the kernel then adds
// 127.0.0.1 and ::1 itself.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot bring loopback up: socket: %w", err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("cannot bring loopback up: %w", err)
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil {
		return fmt.Errorf("cannot bring loopback up: SIOCGIFFLAGS: %w", err)
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("cannot bring loopback up: SIOCSIFFLAGS: %w", err)
	}
	return nil
}

// RemoveNamespaces undoes CreateNamespaces, however far it came. It succeeds
// when there is nothing to remove. PinDir/<id> itself stays: it is the caller's.
func (n *Network) RemoveNamespaces(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	var errs []error
	for _, path := range n.Paths(id).List() {
		if err := unpin(path); err != nil {
			errs = append(errs, err)
		}
	}
	if err := removeIfThere(n.pinDir(id)); err != nil {
		errs = append(errs, fmt.Errorf("cannot remove the directory for namespaces of pod %s: %w", id, err))
	}
	return errors.Join(errs...)
}

// unpin takes away every mount at path, for a crash between two attempts can
// have stacked them, and then the file.
func unpin(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // no mount (any more), or no file
		}
		if err != nil {
			return fmt.Errorf("cannot unmount namespace %s: %w", path, err)
		}
	}
	if err := removeIfThere(path); err != nil {
		return fmt.Errorf("cannot remove namespace file %s: %w", path, err)
	}
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// shareDir makes dir a shared mount of its own, as `ip netns` does: an unmount
// then also reaches mount namespaces that were made from ours in between, which
// would otherwise keep a removed pod's namespace alive.
func shareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cannot create the directory for network namespaces: %w", err)
	}
	// ip-netns(8) takes the same lock for the same steps, so that two do not
	// both mount. Holders do two system calls and let go.
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot open the directory for network namespaces: %w", err)
	}
	defer f.Close()
	err = unix.EINTR
	for errors.Is(err, unix.EINTR) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount yet
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("cannot bind %s on itself: %w", dir, err)
		}
		err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return fmt.Errorf("cannot make %s a shared mount: %w", dir, err)
	}
	return nil
}
