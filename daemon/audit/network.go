package audit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// networks is what CNI configs tell of where plugins leave something: those of the pods and
// those in the directory of configs.
type networks struct {
	leases  []entry           // files of host-local
	holders map[string]string // of a lease: what the file says, by its path
	ports   []port
}

// port is a link on a bridge.
type port struct {
	name, bridge string
	index        int
	netns        int // id of the namespace of its other end; negative: this one
}

const (
	builtinBridge  = "holdfast0"
	defaultBridge  = "cni0"
	defaultDataDir = "/var/lib/cni/networks"
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

// lookAtNetworks lists leases and ports. Which pods there are is read before, for the sake
// of their configs only: what is judged is read again.
func (l *look) lookAtNetworks() (n networks) {
	n.holders = map[string]string{}
	dirs, bridges := map[string]bool{l.Root + "/cni/networks/holdfast": true}, map[string]bool{builtinBridge: true}
	for _, raw := range l.cniConfigs() {
		var c cniConfig
		if json.Unmarshal(raw, &c) != nil {
			continue // what does not read makes no network
		}
		for _, p := range append(c.Plugins, c.cniPlugin) {
			if p.Type == "bridge" {
				bridges[cmp.Or(p.Bridge, defaultBridge)] = true
			}
			if p.IPAM.Type == "host-local" {
				dirs[filepath.Join(cmp.Or(p.IPAM.DataDir, defaultDataDir), c.Name)] = true
			}
		}
	}
	for dir := range dirs {
		n.leases = append(n.leases, l.listLeases(dir, n.holders)...)
	}
	for bridge := range bridges {
		n.ports = append(n.ports, l.listPorts(bridge)...)
	}
	return n
}

// cniConfigs are those in the directory of configs, and those that pods were given.
func (l *look) cniConfigs() (all [][]byte) {
	for _, pattern := range []string{"*.conf", "*.conflist", "*.json"} {
		files, _ := filepath.Glob(filepath.Join(l.CNIConfDir, pattern))
		for _, path := range files {
			if b, err := os.ReadFile(path); err == nil {
				all = append(all, b)
			}
		}
	}
	dirs, _ := filepath.Glob(filepath.Join(l.Root, "pods", "*"))
	for _, dir := range dirs {
		rec := new(records.Pod)
		if l.readPodRecord(filepath.Base(dir), rec) == nil && rec.Network != nil {
			all = append(all, rec.Network.Attachment.Config)
		}
	}
	return all
}

func (l *look) listLeases(dir string, holders map[string]string) (all []entry) {
	for _, e := range l.listTree(dir, 1) {
		if _, err := netip.ParseAddr(filepath.Base(e.path)); err != nil {
			continue // a lock, or the last address that was given out
		}
		if holder, err := leaseHolder(e.path); err == nil {
			all = append(all, e)
			holders[e.path] = holder
		}
	}
	return all
}

// leaseHolder is who has a lease: the first line of the file.
func leaseHolder(path string) (string, error) {
	b, err := os.ReadFile(path)
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(first), err
}

func (l *look) listPorts(bridge string) (all []port) {
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return nil // it is made with the first pod
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		l.fail("cannot list the network interfaces: %w", err)
	}
	for _, link := range links {
		if a := link.Attrs(); link.Type() == "veth" && a.MasterIndex == br.Attrs().Index {
			all = append(all, port{a.Name, bridge, a.Index, a.NetNsID})
		}
	}
	return all
}

func (l *look) judgeNetworks() {
	var inUse map[string]bool // addresses, read when they are needed
	for _, e := range l.leases {
		id := l.holders[e.path]
		v := l.ofPod(id, records.DebtNetwork)
		if v.owner == "" && !v.doubt && !l.ourLease(e.path, id) {
			if inUse == nil {
				inUse = l.addresses()
			}
			if inUse[filepath.Base(e.path)] {
				v = verdict{owner: "not Holdfast", why: "an interface on this machine has the address"}
			}
		}
		l.add(Lease, e.path, e.same(), v, freeLease(l, e, id))
	}
	if len(l.ports) == 0 {
		return
	}
	ids := l.namespaceIDs()
	for _, p := range l.ports {
		l.add(Veth, p.name, fmt.Sprint(p.index), l.ofPort(p, ids), removePort(p))
	}
}

// ourLease says whether a lease was certainly given to a pod of ours.
func (l *look) ourLease(path, id string) bool {
	return strings.HasPrefix(path, l.Root+"/") || l.known[id]
}

// namespaceIDs gives what has a network namespace by the id that the kernel has for it: the
// path of a pin, or a process.
func (l *look) namespaceIDs() map[int]string {
	ids := map[int]string{}
	note := func(path, name string) {
		f, err := os.Open(path)
		if err != nil {
			return
		}
		defer f.Close()
		if id, err := netlink.GetNetNsIdByFd(int(f.Fd())); err == nil && id >= 0 && ids[id] == "" {
			ids[id] = name
		}
	}
	for _, path := range l.pins {
		note(path, path)
	}
	others, _ := filepath.Glob(netnsDir + "/*")
	for _, path := range others {
		note(path, path)
	}
	seen := map[string]bool{}
	for pid := range l.processes {
		path := fmt.Sprintf("/proc/%d/ns/net", pid)
		if link, err := os.Readlink(path); err == nil && !seen[link] {
			seen[link] = true
			note(path, fmt.Sprintf("process %d", pid))
		}
	}
	return ids
}

// ofPort is the verdict on a link on a bridge, by its other end.
func (l *look) ofPort(p port, ids map[int]string) verdict {
	holder := ids[p.netns]
	for id, pod := range l.pods {
		if pod.Network == nil {
			continue
		}
		ours := func(i records.Interface) bool { return i.Sandbox == "" && i.Name == p.name }
		if holder == netnsDir+"/"+pinPrefix+id || slices.ContainsFunc(pod.Network.Result.Interfaces, ours) {
			return l.ofPod(id, records.DebtNetwork)
		}
	}
	id, pinned := strings.CutPrefix(holder, netnsDir+"/"+pinPrefix)
	switch {
	case p.netns < 0:
		return none("it is on the bridge %s and leads to no pod: its other end is on this machine", p.bridge)
	case holder == "":
		return none("it is on the bridge %s and leads to a namespace that nothing has", p.bridge)
	case pinned && !l.foreign(id):
		return none("it leads to %s, which has no owner", holder)
	}
	return verdict{owner: "not Holdfast", why: "it leads to the namespace of " + holder}
}

// addresses are those that interfaces in any network namespace have.
func (l *look) addresses() map[string]bool {
	paths, _ := filepath.Glob(netnsDir + "/*")
	seen := map[string]bool{}
	for pid := range l.processes {
		path := fmt.Sprintf("/proc/%d/ns/net", pid)
		if link, err := os.Readlink(path); err == nil && !seen[link] {
			seen[link] = true
			paths = append(paths, path)
		}
	}
	all := map[string]bool{}
	for _, path := range paths {
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
			l.fail("cannot learn which addresses are in use in %s: %w", path, err)
		}
	}
	return all
}

// freeLease gives an address back that no interface has, under the lock of host-local.
func freeLease(l *look, e entry, id string) *fix {
	address := filepath.Base(e.path)
	return &fix{text: "free the address, if no interface has it", do: func(context.Context) error {
		lock, err := os.OpenFile(filepath.Join(filepath.Dir(e.path), "lock"), os.O_RDONLY|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("cannot free %s: a plugin is at work: %w", address, err)
		}
		if now, err := leaseHolder(e.path); err != nil || now != id {
			return errors.Join(err, ErrOwned)
		}
		failed := len(l.unknown)
		if l.addresses()[address] || len(l.unknown) > failed {
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
		if err != nil && !errors.Is(err, syscall.ENODEV) {
			return fmt.Errorf("cannot remove %s: %w", p.name, err)
		}
		return nil
	}}
}
