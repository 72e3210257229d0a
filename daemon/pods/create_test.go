package pods

import (
	"maps"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

func mappings(length uint32) []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{HostId: 1 << 16, ContainerId: 0, Length: length}}
}

// What images rely on is set where the network is the pod's, unless the config or
// the pod says otherwise; and no group that the pod's user namespace does not have.
func TestDefaultSysctls(t *testing.T) {
	const port, ping = "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"
	userns := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: mappings(65536),
		Gids: mappings(65536)}
	for name, c := range map[string]struct {
		options  *runtimeapi.NamespaceOption
		sysctls  map[string]string
		portsOff bool
		icmpOff  bool
		want     map[string]string
	}{
		"by default": {want: map[string]string{port: "0", ping: "0 2147483647"}},
		"ports off":  {portsOff: true, want: map[string]string{ping: "0 2147483647"}},
		"ping off":   {icmpOff: true, want: map[string]string{port: "0"}},
		"the pod says otherwise": {
			sysctls: map[string]string{port: "81", "net/ipv4/ping_group_range": "1 0", "kernel.shmmni": "7"},
			want:    map[string]string{port: "81", "net/ipv4/ping_group_range": "1 0", "kernel.shmmni": "7"},
		},
		"user namespace": {
			options: &runtimeapi.NamespaceOption{UsernsOptions: userns},
			want:    map[string]string{port: "0", ping: "0 65535"},
		},
		"the node's network": {
			options: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
			sysctls: map[string]string{"kernel.shmmni": "7"},
			want:    map[string]string{"kernel.shmmni": "7"},
		},
	} {
		m := New(Options{UnprivilegedPorts: !c.portsOff, UnprivilegedICMP: !c.icmpOff})
		cfg := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
			Sysctls:         c.sysctls,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: c.options},
		}}
		rec := &records.Pod{Config: records.Message[*runtimeapi.PodSandboxConfig]{M: cfg}}
		if got := m.wanted(rec).Sysctls; !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// A name of its own is the pod's also in the node's network, and takes a namespace.
func TestHostnameNeedsANamespace(t *testing.T) {
	node := nodeName()
	for hostname, want := range map[string]records.Want{
		"":      {Hostname: node},
		node:    {Hostname: node},
		"other": {Hostname: "other", UTS: true},
	} {
		cfg := &runtimeapi.PodSandboxConfig{Hostname: hostname, Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
			},
		}}
		got := New(Options{}).wanted(&records.Pod{Config: records.Message[*runtimeapi.PodSandboxConfig]{M: cfg}})
		if got.Hostname != want.Hostname || got.UTS != want.UTS || got.Net {
			t.Errorf("hostname %q: %+v", hostname, got)
		}
	}
}
