package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

func TestPodsReachEachOther(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.conf("hf-reach", "10.230.10.0/24", portmap)

	server, client := w.pod("server"), w.pod("client")
	server.PortMappings = []PortMapping{
		{HostPort: 18080, ContainerPort: 80, Protocol: "TCP"},
		{ContainerPort: 81}, // no host port, none to be made
	}
	sr, cr := w.add(server), w.add(client)
	for _, r := range []Result{sr, cr} {
		if len(r.IPs) != 1 || !strings.HasPrefix(r.IPs[0], "10.230.10.") {
			t.Fatalf("addresses %v", r.IPs)
		}
		if !json.Valid(r.Raw) || !strings.Contains(string(r.Raw), r.IPs[0]) {
			t.Errorf("raw result %s", r.Raw)
		}
		if !slices.ContainsFunc(r.Interfaces, func(i Interface) bool {
			return i.Name == "eth0" && i.Sandbox != "" && i.MAC != ""
		}) {
			t.Errorf("no eth0 in %+v", r.Interfaces)
		}
	}
	if sr.IPs[0] == cr.IPs[0] {
		t.Fatalf("both pods have %s", sr.IPs[0])
	}
	for _, id := range []string{"client", "server"} {
		cached := filepath.Join(w.opts.CacheDir, "results", "net-hf-reach-"+id+"-eth0")
		if _, err := os.Stat(cached); err != nil {
			t.Errorf("not in the cache: %v", err)
		}
	}

	serve(t, server.Netns, "0.0.0.0:80", "hello")
	for _, c := range []struct{ what, netns, addr string }{
		{"pod to pod", client.Netns, sr.IPs[0] + ":80"},
		{"pod to itself", server.Netns, sr.IPs[0] + ":80"},
		{"node to pod", "", sr.IPs[0] + ":80"},
		{"host port on the bridge, from a pod", client.Netns, "10.230.10.1:18080"},
		{"host port on the bridge, from the pod itself", server.Netns, "10.230.10.1:18080"},
		{"host port on the node's loopback", "", "127.0.0.1:18080"},
		{"loopback of the pod", server.Netns, "localhost:80"},
	} {
		if got, err := w.ask(c.netns, c.addr); got != "hello" || err != nil {
			t.Errorf("%s: %q, %v", c.what, got, err)
		}
	}

	w.del(server)
	if _, err := w.ask("", "127.0.0.1:18080"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("host port after Del: %v, want connection refused", err)
	}
	w.del(server) // idempotent
	w.del(client)
	w.removeNamespaces("server")
	w.removeNamespaces("client")
	w.unchanged(before)
}

func TestBuiltinNetworkWorks(t *testing.T) {
	needRoot(t)
	subnets, families := "10.230.11.0/24,fd00:230:11::/64", 2
	if !hasIPv6() {
		subnets, families = "10.230.11.0/24", 1
	}
	w := newWorld(t, func(o *Options) { o.DefaultNetwork, o.Subnet = true, subnets })
	before := w.traces()
	defer ipLinkDel(t, netns.BuiltinBridge)
	a, b := w.pod("a"), w.pod("b")
	a.PortMappings = []PortMapping{{HostPort: 18081, ContainerPort: 80, Protocol: "tcp"}}
	ra := w.add(a)
	w.add(b)
	if len(ra.IPs) != families {
		t.Fatalf("addresses %v, want one of each family", ra.IPs)
	}
	serve(t, a.Netns, ":80", "hello")
	addrs := []string{"10.230.11.1:18081"}
	for _, ip := range ra.IPs {
		addrs = append(addrs, net.JoinHostPort(ip, "80"))
	}
	for _, addr := range addrs {
		// An IPv6 address is tentative at first.
		waitFor(t, addr, func() error {
			got, err := w.ask(b.Netns, addr)
			if err == nil && got != "hello" {
				err = fmt.Errorf("heard %q", got)
			}
			return err
		})
	}
	for _, p := range []Attachment{a, b} {
		w.del(p)
		w.removeNamespaces(p.ID)
	}
	w.unchanged(before)
}

func TestDelWhenTheNamespaceIsGone(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name   string
		path   func(*world, Attachment) string
		config bool
	}{
		{"path gone, from the record", func(w *world, a Attachment) string { return a.Netns }, true},
		{"path empty, from the record", func(w *world, a Attachment) string { return "" }, true},
		{"path gone, from the cache", func(w *world, a Attachment) string { return a.Netns }, false},
		{"path is a stale file", func(w *world, a Attachment) string {
			if err := os.WriteFile(a.Netns, nil, 0o600); err != nil {
				w.t.Error(err)
			}
			return a.Netns
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			before := w.traces()
			// Without ipMasq: bridge takes its rules away only while the
			// interface is there.
			w.write("10.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "gone", "plugins": [
				{"type": "bridge", "bridge": "hf-gone", "isGateway": true,
				 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.230.12.0/24"}]]}}, %s]}`,
				filepath.Join(w.dir, "leases"), portmap))
			defer ipLinkDel(t, "hf-gone")
			a := w.pod("a")
			a.PortMappings = []PortMapping{{HostPort: 18082, ContainerPort: 80, Protocol: "UDP"}}
			w.add(a)
			w.removeNamespaces("a")
			if err := os.RemoveAll(w.opts.ConfDir); err != nil {
				t.Fatal(err) // Del needs none of it
			}
			a.Netns = c.path(w, a)
			if !c.config {
				a.Config = nil
			}
			w.del(a)
			w.del(a)
			w.removeNamespaces("a")
			w.unchanged(before)
		})
	}
}

func TestDelOfWhatWasNeverAdded(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.del(Attachment{ID: "nothing"})
	w.conf("hf-never", "10.230.13.0/24", portmap)
	a := w.pod("recorded") // as if killed between the record and ADD
	a.PortMappings = []PortMapping{{HostPort: 18083, ContainerPort: 80}}
	w.del(a)
	w.removeNamespaces("recorded")
	w.unchanged(before)
}

func TestDelSaysWhatIsMissing(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	w.conf("hf-miss", "10.230.14.0/24")
	a := w.pod("a")
	w.add(a)
	dirs := w.opts.BinDirs
	w.opts.BinDirs = []string{w.scripts}
	err := w.Del(t.Context(), a)
	if !errors.Is(err, ErrNotReleased) || !strings.Contains(err.Error(), "bridge") ||
		!strings.Contains(err.Error(), w.scripts) {
		t.Errorf("Del without the plugin: %v", err)
	}
	w.opts.BinDirs = dirs
	w.del(a)
	w.removeNamespaces("a")
}

// libcni does not tell that its record of a pod is left. The next Del removes it.
func TestDelSaysThatARecordIsLeft(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	w.conf("hf-left", "10.230.20.0/24")
	a := w.pod("a")
	w.add(a)
	records, err := filepath.Glob(filepath.Join(w.opts.CacheDir, "results", "*-a-*"))
	if err != nil || len(records) != 1 {
		t.Fatalf("the records are %v, %v", records, err)
	}
	inTheWay := filepath.Join(records[0], "x")
	check(t, errors.Join(os.Remove(records[0]), os.MkdirAll(inTheWay, 0o700)))
	if err := w.Del(t.Context(), a); !errors.Is(err, ErrNotReleased) {
		t.Errorf("Del with a record that cannot be removed: %v", err)
	}
	check(t, os.Remove(inTheWay))
	w.del(a)
	if _, err := os.Stat(records[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record is left: %v", err)
	}
	w.removeNamespaces("a")
}

func TestAddFailureLeavesNothing(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.conf("hf-fail", "10.230.15.0/24", portmap, `{"type": "boom"}`)
	w.script("boom", `
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0", "code": 117, "msg": "out of paint", "details": "the can is empty"}'
exit 1
`)
	a := w.pod("a")
	a.PortMappings = []PortMapping{{HostPort: 18084, ContainerPort: 80}}
	_, err := w.Add(t.Context(), a)
	if err == nil || !strings.Contains(err.Error(), "boom") ||
		!strings.Contains(err.Error(), "out of paint; the can is empty") {
		t.Errorf("error %v", err)
	}
	if errors.Is(err, ErrNotReleased) {
		t.Errorf("undone, but says it is not: %v", err)
	}
	w.removeNamespaces("a")
	w.unchanged(before)

	// DEL fails too: both are told, and a later DEL finishes.
	w.script("boom", "echo no paint >&2; exit 1")
	a = w.pod("a")
	_, err = w.Add(t.Context(), a)
	if !errors.Is(err, ErrNotReleased) || strings.Count(err.Error(), "no paint") != 2 {
		t.Errorf("error %v, want ErrNotReleased and both failures", err)
	}
	w.script("boom", "exit 0")
	w.del(a)
	w.removeNamespaces("a")
	w.unchanged(before)

	// Without a namespace no plugin is called.
	_, err = w.Add(t.Context(), a)
	if err == nil || errors.Is(err, ErrNotReleased) {
		t.Errorf("Add without a namespace: %v", err)
	}
	w.unchanged(before)
}

func TestAddWithoutAddressIsAnError(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "l2", "plugins": [{"type": "bridge", "bridge": "hf-l2"}]}`)
	defer ipLinkDel(t, "hf-l2")
	a := w.pod("a")
	if r, err := w.Add(t.Context(), a); err == nil || errors.Is(err, ErrNotReleased) {
		t.Errorf("got %+v, %v", r, err)
	}
	w.removeNamespaces("a")
	w.unchanged(before)
}

// Host ports that no plugin takes are no error, and the log tells of them.
func TestHostPortsWithoutPlugin(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		plugins []string
		ports   []PortMapping
		told    bool
	}{
		"no plugin for them": {nil, []PortMapping{{HostPort: 18086, ContainerPort: 80, Protocol: "TCP"}}, true},
		"no host port":       {nil, []PortMapping{{ContainerPort: 80, Protocol: "TCP"}}, false},
		"a plugin": {[]string{portmap}, []PortMapping{{HostPort: 18086, ContainerPort: 80, Protocol: "TCP"}},
			false},
	} {
		w := newWorld(t)
		w.conf("hf-ports", "10.230.29.0/24", c.plugins...)
		a := w.pod("a")
		a.PortMappings = c.ports
		w.add(a)
		if told := strings.Contains(w.log.String(), "host ports"); told != c.told {
			t.Errorf("%s: the log tells of it: %v", name, told)
		}
		w.del(a)
		w.removeNamespaces("a")
	}
}

// What plugins are told, taken down by one.
func TestPluginsAreTold(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	told := filepath.Join(w.dir, "told")
	w.script("give", `
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0",
 "interfaces": [{"name": "br9"}, {"name": "eth0", "sandbox": "/x", "mac": "02:00:00:00:00:01"}, {"name": "net1",
	"sandbox": "/x"}],
 "ips": [{"address": "10.230.16.9/24", "interface": 0}, {"address": "fd00::9/64", "interface": 1},
         {"address": "10.230.16.8/24", "interface": 1}, {"address": "10.230.17.8/24", "interface": 2}]}'
`)
	w.write("10.conflist", `{"cniVersion": "1.0.0", "name": "told", "plugins": [
		{"type": "note", "capabilities": {"portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true,
			"io.kubernetes.cri.pod-annotations": true, "ips": true}}, {"type": "give"}]}`)
	a := w.pod("a")
	a.PortMappings = []PortMapping{
		{HostPort: 53, ContainerPort: 5353, Protocol: "UDP", HostIP: "127.0.0.1"},
		{HostPort: 0, ContainerPort: 7},
		{HostPort: 80, ContainerPort: 8080},
	}
	a.Annotations = map[string]string{
		"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1Gi", "other": "x",
	}
	a.CgroupParent = "/kubepods/podX"
	a.DNS = &records.DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"a.b"}, Options: []string{"ndots:5"}}
	w.script("note", fmt.Sprintf(`
{ echo "$CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS"; echo "$CNI_ARGS"; cat; } >>%s.$CNI_COMMAND
echo '{}'
`, told))
	r := w.add(a)
	if want := []string{"fd00::9", "10.230.16.8"}; !slices.Equal(r.IPs, want) {
		t.Errorf("addresses %v, want %v", r.IPs, want)
	}
	w.del(a)
	for _, verb := range []string{"ADD", "DEL"} {
		b, err := os.ReadFile(told + "." + verb)
		check(t, err)
		lines := strings.SplitN(string(b), "\n", 3)
		if want := "a eth0 " + a.Netns; lines[0] != want {
			t.Errorf("%s: %q, want %q", verb, lines[0], want)
		}
		const want = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;K8S_POD_INFRA_CONTAINER_ID=a;" +
			"K8S_POD_UID=uid-a"
		if lines[1] != want {
			t.Errorf("%s: %q, want %q", verb, lines[1], want)
		}
		var conf struct {
			RuntimeConfig struct {
				PortMappings []PortMapping
				Bandwidth    map[string]uint64
				DNS          *records.DNS
				CgroupPath   string
				Annotations  map[string]string `json:"io.kubernetes.cri.pod-annotations"`
			}
		}
		check(t, json.Unmarshal([]byte(lines[2]), &conf))
		ports := []PortMapping{
			{HostPort: 53, ContainerPort: 5353, Protocol: "udp", HostIP: "127.0.0.1"},
			{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"},
		}
		if got := conf.RuntimeConfig.PortMappings; !slices.Equal(got, ports) {
			t.Errorf("%s: ports %+v, want %+v", verb, got, ports)
		}
		if bw := conf.RuntimeConfig.Bandwidth; bw["ingressRate"] != 10_000_000 || bw["egressRate"] != 1<<30 ||
			bw["ingressBurst"] == 0 || bw["egressBurst"] == 0 {
			t.Errorf("%s: bandwidth %v", verb, bw)
		}
		if got := conf.RuntimeConfig; !reflect.DeepEqual(got.DNS, a.DNS) || got.CgroupPath != a.CgroupParent {
			t.Errorf("%s: dns %+v, cgroup %q", verb, got.DNS, got.CgroupPath)
		}
		if got := conf.RuntimeConfig.Annotations; !maps.Equal(got, a.Annotations) {
			t.Errorf("%s: annotations %v, want %v", verb, got, a.Annotations)
		}
	}
	a.Annotations["kubernetes.io/egress-bandwidth"] = "lots"
	if _, err := w.Add(t.Context(), a); err == nil || !strings.Contains(err.Error(), "kubernetes.io/egress-bandwidth") {
		t.Errorf("bad bandwidth: %v", err)
	}
	w.removeNamespaces("a")
}

// What Add refuses reaches no plugin, and keeps no pod from its removal.
func TestDelOfWhatAddRefuses(t *testing.T) {
	needRoot(t)
	for name, change := range map[string]func(*Attachment){
		"config.metadata.name":      func(a *Attachment) { a.Name = "a=b" },
		"config.metadata.uid":       func(a *Attachment) { a.UID = "u;K8S_POD_NAME=other" },
		"config.metadata.namespace": func(a *Attachment) { a.Namespace = "=" },
		"config.annotations[kubernetes.io/egress-bandwidth]": func(a *Attachment) {
			a.Annotations = map[string]string{"kubernetes.io/egress-bandwidth": "lots"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			before := w.traces()
			w.conf("hf-refuse", "10.230.23.0/24",
				`{"type": "note", "capabilities": {"bandwidth": true}}`)
			called := filepath.Join(w.dir, "called")
			w.script("note", `echo "$CNI_ARGS" >>`+called+`.$CNI_COMMAND; cat | sed 's/.*"prevResult"://; s/}$//'`)
			a := w.pod("a")
			change(&a)
			_, err := w.Add(t.Context(), a)
			if !errors.Is(err, kind.Invalid) || errors.Is(err, ErrNotReleased) ||
				!strings.Contains(err.Error(), name+": ") {
				t.Errorf("Add: %v, want kind.Invalid with the field, and nothing left", err)
			}
			if _, err := os.Stat(called + ".ADD"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a plugin was called: %v", err)
			}
			w.del(a)
			b, err := os.ReadFile(called + ".DEL")
			if args := string(b); err != nil || !strings.Contains(args, "K8S_POD_INFRA_CONTAINER_ID=a") {
				t.Errorf("DEL with %q, %v", args, err)
			}
			args := strings.TrimSpace(string(b))
			if strings.Count(args, "=") != strings.Count(args, ";")+1 || strings.Contains(args, "other") {
				t.Errorf("DEL with %q, which a plugin does not take", args)
			}
			w.removeNamespaces("a")
			w.unchanged(before)
		})
	}
}

// A sysctl of an interface is set when the plugins have made that.
func TestSysctlsOfInterfaces(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.conf("hf-sysctl", "10.230.24.0/24")
	want := Want{Net: true, Sysctls: map[string]string{
		"net.ipv4.conf.eth0.arp_ignore":     "1",
		"net/ipv4/neigh/eth0/mcast_solicit": "7",
		"net.ipv4.conf.all.arp_announce":    "2",
		"net.ipv4.conf.lo.arp_announce":     "1",
	}}
	ns, err := w.CreateNamespaces("a", want)
	check(t, err)
	a := Attachment{ID: "a", Netns: ns.Net, Name: "a", Namespace: "default"}
	w.add(a)
	check(t, w.SetInterfaceSysctls(ns.Net, want))
	err = netns.OnThread(func() error {
		if err := netns.Enter(ns.Net); err != nil {
			return err
		}
		for name, value := range want.Sysctls {
			rel, err := sysctlPath(name)
			if err != nil {
				return err
			}
			got, err := os.ReadFile("/proc/sys/" + rel)
			if err != nil || strings.TrimSpace(string(got)) != value {
				t.Errorf("%s is %q, %v; want %s", name, got, err, value)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	want.Sysctls = map[string]string{"net.ipv4.conf.eth7.arp_ignore": "1"}
	if err := w.SetInterfaceSysctls(ns.Net, want); !errors.Is(err, ErrSysctl) ||
		!strings.Contains(err.Error(), "eth7") {
		t.Errorf("an interface that is not there: %v", err)
	}
	w.del(a)
	w.removeNamespaces("a")
	w.unchanged(before)
}

func TestManyPodsAtOnce(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	before := w.traces()
	w.conf("hf-many", "10.230.18.0/24", portmap)
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		ips = map[string]string{}
	)
	for i := range 12 {
		id := fmt.Sprintf("pod-%d", i)
		wg.Go(func() {
			ns, err := w.CreateNamespaces(id, Want{Net: true})
			if err != nil {
				t.Error(err)
				return
			}
			a := Attachment{ID: id, Netns: ns.Net, Name: id, Namespace: "default"}
			if i%4 == 0 {
				a.PortMappings = []PortMapping{{HostPort: int32(18100 + i), ContainerPort: 80}}
			}
			r, err := w.Add(t.Context(), a)
			if err != nil {
				t.Error(err)
			} else {
				mu.Lock()
				if other, ok := ips[r.IPs[0]]; ok {
					t.Errorf("%s and %s both have %s", id, other, r.IPs[0])
				}
				ips[r.IPs[0]] = id
				mu.Unlock()
			}
			if err := errors.Join(w.Del(context.WithoutCancel(t.Context()), a), w.RemoveNamespaces(id)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	w.unchanged(before)
}

func TestDialEndsWithItsContext(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	a := w.pod("a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if c, err := netns.Dial(ctx, a.Netns, "127.0.0.1:80"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v, want canceled", c, err)
	}
	if _, err := netns.Dial(t.Context(), a.Netns+"-gone", "127.0.0.1:80"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace gone: %v", err)
	}
	var op *net.OpError
	if _, err := netns.Dial(t.Context(), a.Netns, "127.0.0.1:80"); !errors.As(err, &op) {
		t.Errorf("nobody listens: %v", err)
	}
}
