package audit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
)

// networks is what CNI configs tell of where plugins leave something: those of the pods and those in the directory of
// configs.
type networks struct {
	leases []lease
	ports  []port
}

// lease is a file of host-local, and who has the address, as the file says.
type lease struct {
	entry
	holder string
}

// port is a link on a bridge.
type port struct {
	name, bridge string
	index        int
	netns        int // id of the namespace of its other end; negative: this one
}

const (
	defaultBridge  = "cni0"
	defaultDataDir = "/var/lib/cni/networks"

	maxConfig = 1 << 20 // bytes of a CNI config
	maxLease  = 4 << 10
)

// cniConfig is the part of a config, or of a list, that says so.
type cniConfig struct {
	Name string `json:"name"`
	cniPlugin
	Plugins []cniPlugin `json:"plugins"`
}

type cniPlugin struct {
	Type   string `json:"type"`
	Bridge string `json:"bridge"`
	IPAM   struct {
		Type    string `json:"type"`
		DataDir string `json:"dataDir"`
	} `json:"ipam"`
}

// lookAtNetworks lists leases and ports. Which pods there are is read before, for the sake of their configs only: what
// is judged is read again.
func (l *look) lookAtNetworks() (n networks) {
	dirs := map[string]bool{filepath.Join(l.Root, "cni", netns.LeasesName, netns.BuiltinNetwork): true}
	bridges := map[string]bool{netns.BuiltinBridge: true}
	for _, raw := range l.cniConfigs() {
		var c cniConfig
		if json.Unmarshal(raw, &c) != nil {
			continue // what does not read makes no network
		}
		for _, p := range append(c.Plugins, c.cniPlugin) {
			if p.Type == "bridge" {
				bridges[cmp.Or(p.Bridge, defaultBridge)] = true
			}
			if dir := cmp.Or(p.IPAM.DataDir, defaultDataDir); p.IPAM.Type == "host-local" && filepath.IsAbs(dir) {
				dirs[filepath.Join(dir, c.Name)] = true
			}
		}
	}
	for dir := range dirs {
		for _, e := range l.listTree(dir, 1) {
			// The others are a lock, and the last address that was given out.
			if _, err := netip.ParseAddr(filepath.Base(e.path)); err != nil {
				continue
			}
			if holder, err := leaseHolder(e.path); err == nil {
				n.leases = append(n.leases, lease{e, holder})
			}
		}
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		l.miss("cannot list the network interfaces: %w", err)
	}
	names := map[int]string{}
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	for _, link := range links {
		if a := link.Attrs(); link.Type() == "veth" && bridges[names[a.MasterIndex]] {
			n.ports = append(n.ports, port{a.Name, names[a.MasterIndex], a.Index, a.NetNsID})
		}
	}
	return n
}

// cniConfigs are those in the directory of configs, and those that pods were given.
func (l *look) cniConfigs() (all [][]byte) {
	if l.CNIConfDir != "" {
		for _, name := range l.names(l.CNIConfDir) {
			if slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name)) {
				// What does not read makes no network.
				b, _ := beneath.HostFile(filepath.Join(l.CNIConfDir, name), maxConfig)
				all = append(all, b)
			}
		}
	}
	for _, id := range l.names(filepath.Join(l.Root, string(state.Pods))) {
		rec := new(records.Pod)
		if state.Read(l.Root, state.Pods, id, rec) == nil && rec.Network != nil {
			all = append(all, rec.Network.Attachment.Config)
		}
	}
	return all
}

// leaseHolder is who has a lease: the first line of the file.
func leaseHolder(path string) (string, error) {
	b, err := beneath.HostFile(path, maxLease)
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(first), err
}

func (l *look) judgeNetworks() {
	var inUse map[string]bool // addresses, read when they are needed
	for _, e := range l.leases {
		v := l.ofPod(e.holder, records.DebtNetwork)
		// Other container runtimes have theirs in the same directory.
		if v.none() && !strings.HasPrefix(e.path, l.Root+"/") && !l.known[e.holder] {
			if inUse == nil {
				inUse = l.addresses()
			}
			v = doubtful("another container runtime may have it: %s, and none was known", v.why)
			if inUse[filepath.Base(e.path)] {
				v = of("not Holdfast", "an interface on this machine has the address")
			}
		}
		l.add(Lease, e.path, e.same(), v, freeLease(l, e))
	}
	if len(l.ports) == 0 {
		return
	}
	ids := l.namespaceIDs()
	for _, p := range l.ports {
		l.add(Veth, p.name, fmt.Sprint(p.index), l.ofPort(p, ids[p.netns]), removePort(p))
	}
}

// eachNetwork calls f with the path of each network namespace that has a pin or a process, and a name for it. The pins
// of pods come first.
func (l *look) eachNetwork(f func(path, name string)) {
	for _, path := range l.pins {
		f(path, path)
	}
	for _, name := range l.names(netns.Dir) {
		f(filepath.Join(netns.Dir, name), filepath.Join(netns.Dir, name))
	}
	seen := map[string]bool{}
	for pid := range l.processes {
		path := fmt.Sprintf("/proc/%d/ns/net", pid)
		if link, err := os.Readlink(path); err == nil && !seen[link] {
			seen[link] = true
			f(path, fmt.Sprintf("process %d", pid))
		}
	}
}

// namespaceIDs gives what has a network namespace by the id that the kernel has for it: the path of a pin, or a
// process.
func (l *look) namespaceIDs() map[int]string {
	ids := map[int]string{}
	l.eachNetwork(func(path, name string) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		if id, err := netlink.GetNetNsIdByFd(fd); err == nil && id >= 0 && ids[id] == "" {
			ids[id] = name
		}
	})
	return ids
}

// ofPort is the verdict on a link on a bridge, by what has the namespace of its other end, and by its name. Other
// programs may use the bridge.
func (l *look) ofPort(p port, holder string) verdict {
	id, pinned := strings.CutPrefix(holder, filepath.Join(netns.Dir, netns.PinPrefix))
	if pinned && idForm.MatchString(id) {
		return l.unlessForeign(id, l.ofPod(id, records.DebtNetwork))
	}
	v := doubtful("it is on the bridge %s and leads to a namespace of which nothing is known", p.bridge)
	switch {
	case p.netns < 0:
		v = of("not Holdfast", "both its ends are on this machine")
	case holder != "":
		v = of("not Holdfast", "it leads to the namespace of "+holder)
	}
	for _, id := range slices.Sorted(maps.Keys(l.pods)) {
		network := l.pods[id].Network
		if network == nil || !slices.ContainsFunc(network.Result.Interfaces, func(i records.Interface) bool {
			return i.Sandbox == "" && i.Name == p.name
		}) {
			continue
		}
		if v = l.ofPod(id, records.DebtNetwork); v.owner != "" {
			return v
		}
	}
	return v
}

// addresses are those that interfaces in any network namespace have.
func (l *look) addresses() map[string]bool {
	all := map[string]bool{}
	l.eachNetwork(func(path, _ string) {
		err := netns.OnThread(func() error {
			if err := netns.Enter(path); err != nil {
				return err
			}
			list, err := net.InterfaceAddrs()
			for _, a := range list {
				if prefix, err := netip.ParsePrefix(a.String()); err == nil {
					all[prefix.Addr().String()] = true
				}
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
			l.miss("cannot learn which addresses are in use in %s: %w", path, err)
		}
	})
	return all
}

// freeLease gives an address back that no interface has, under the lock of host-local.
func freeLease(l *look, e lease) *fix {
	address := filepath.Base(e.path)
	return &fix{text: "free the address, if no interface has it", do: func(context.Context) error {
		const flags = os.O_RDONLY | os.O_CREATE | unix.O_NONBLOCK | unix.O_NOFOLLOW
		lock, err := os.OpenFile(filepath.Join(filepath.Dir(e.path), "lock"), flags, 0o600)
		if err != nil {
			return err
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("cannot free %s: a plugin is at work: %w", address, err)
		}
		if now, err := leaseHolder(e.path); err != nil || now != e.holder {
			return errors.Join(err, ErrOwned)
		}
		if l.addresses()[address] || l.blind {
			return fmt.Errorf("cannot free %s: an interface has it, or not all could be asked", address)
		}
		return os.Remove(e.path)
	}}
}

// removePort removes a link.
func removePort(p port) *fix {
	return &fix{text: "remove the interface", do: func(context.Context) error {
		link, err := netlink.LinkByIndex(p.index)
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		if err == nil && link.Attrs().Name != p.name {
			return ErrOwned
		}
		if err == nil {
			err = netlink.LinkDel(link)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("cannot remove %s: %w", p.name, err)
		}
		return nil
	}}
}
