package network

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

// setting is one sysctl that has been found to belong to a namespace of the pod.
type setting struct {
	name, path, value string

	late bool // of an interface that the network plugins make
}

// write sets it for the namespaces of the calling thread, which may belong to
// a user namespace: the kernel picks them when the file is opened.
func (s setting) write(user *Userns) error {
	err := writeSysctl(s.path, s.value)
	if user != nil && errors.Is(err, unix.EACCES) {
		err = asRoot(user, func() error { return writeSysctl(s.path, s.value) })
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) {
		err = fmt.Errorf("%w: %w", ErrSysctl, err) // the kernel does not take it
	}
	if err != nil {
		return fmt.Errorf("cannot set sysctl %s to %q: %w", s.name, s.value, err)
	}
	return nil
}

func writeSysctl(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// resolveSysctls returns the settings in the order of their names, so that a
// pod always comes out the same, or says which one a pod with these namespaces
// may not set. The namespaced ones are net.*, kernel.shm*, kernel.msg*,
// kernel.sem, fs.mqueue.* and kernel.domainname (sysctl(7), namespaces(7)); any
// other is the whole node's. kernel.hostname has a field of its own in the CRI. Those of a
// user namespace are left to the OCI runtime.
func resolveSysctls(w Want) ([]setting, error) {
	var out []setting
	for _, name := range slices.Sorted(maps.Keys(w.Sysctls)) {
		rel, err := sysctlPath(name)
		if err != nil {
			return nil, err
		}
		own, kind := false, ""
		switch {
		case strings.HasPrefix(rel, "net/"):
			own, kind = w.Net, "network"
		case strings.HasPrefix(rel, "kernel/shm"), strings.HasPrefix(rel, "kernel/msg"),
			rel == "kernel/sem", strings.HasPrefix(rel, "fs/mqueue/"):
			own, kind = w.IPC, "IPC"
		case rel == "kernel/domainname":
			own, kind = w.UTS, "UTS"
		case strings.HasPrefix(rel, "user/") && w.User != nil:
			continue // the OCI runtime sets it, as it enters the namespace
		default:
			return nil, fmt.Errorf("%w: %s is not namespaced, it would change the whole node; set it there", ErrSysctl,
				name)
		}
		if !own {
			return nil, fmt.Errorf("%w: %s belongs to the %s namespace, and this pod uses the node's", ErrSysctl, name,
				kind)
		}
		out = append(out, setting{
			name:  name,
			path:  "/proc/sys/" + rel,
			value: w.Sysctls[name],
			late:  interfaceOf(rel) != "",
		})
	}
	return out, nil
}

// interfaceOf is the interface that a path below /proc/sys is about, "" if none
// that only comes with the pod's network: net/ipv4/conf/eth0/forwarding.
func interfaceOf(rel string) string {
	parts := strings.Split(rel, "/")
	if len(parts) < 5 || parts[0] != "net" || parts[2] != "conf" && parts[2] != "neigh" {
		return ""
	}
	if slices.Contains([]string{"all", "default", "lo"}, parts[3]) {
		return ""
	}
	return parts[3]
}

// SetInterfaceSysctls sets those sysctls of a pod that CreateNamespaces could
// not, because they are of interfaces that Add has made. path is that of the
// network namespace. Errors are those of CreateNamespaces.
func (n *Network) SetInterfaceSysctls(path string, w Want) error {
	settings, err := resolveSysctls(w)
	if err != nil {
		return err
	}
	settings = slices.DeleteFunc(settings, func(s setting) bool { return !s.late })
	if len(settings) == 0 {
		return nil
	}
	return netns.OnThread(func() error {
		if err := netns.Enter(path); err != nil {
			return err
		}
		for _, s := range settings {
			if err := s.write(w.User); err != nil {
				return err
			}
		}
		return nil
	})
}

// sysctlPath turns a name in either notation of sysctl(8) into a path below
// /proc/sys. The first separator decides: after a dot, a slash stands for a dot
// within a part (net.ipv4.conf.eth0/100.forwarding).
func sysctlPath(name string) (string, error) {
	rel := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		rel = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	if rel == "" || path.IsAbs(rel) || path.Clean(rel) != rel || strings.HasPrefix(rel, "..") {
		return "", fmt.Errorf("%w: %q is not the name of a sysctl", ErrSysctl, name)
	}
	return rel, nil
}
