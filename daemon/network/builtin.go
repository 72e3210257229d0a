package network

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// SetPodCIDR takes the CIDR that the kubelet sends with UpdateRuntimeConfig,
// "a,b" for two families. It concerns the built-in network, for pods that come later,
// and the template of a config; otherwise it is ignored. The kubelet sends it once, so
// it is stored and found again by New. A range that is none is kind.Invalid.
func (n *Network) SetPodCIDR(cidr string) error {
	if cidr == "" {
		return nil // CRI: nothing to change
	}
	subnets, err := parseSubnets(cidr)
	if err != nil {
		return kind.Errorf(kind.Invalid, "runtime_config.network_config.pod_cidr: %w", err)
	}
	if n.opts.ConfTemplate != "" {
		return kind.As(kind.Unavailable, n.writeFromTemplate(subnets))
	}
	if !n.opts.DefaultNetwork {
		n.log.Debug("pod CIDR ignored, no built-in network", "cidr", cidr)
		return nil
	}
	// Not synced: after a power cut the kubelet starts anew and sends it again.
	err = os.MkdirAll(n.opts.CacheDir, 0o700)
	if err == nil {
		err = record.ReplaceFile(n.podCIDRFile(), []byte(cidr+"\n"), 0o600, false)
	}
	if err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot store the pod CIDR: %w", err))
	}
	n.mu.Lock()
	n.subnets = subnets
	n.mu.Unlock()
	return nil
}

func (n *Network) podCIDRFile() string { return filepath.Join(n.opts.CacheDir, "pod-cidr") }

// storedPodCIDR returns what SetPodCIDR stored, or fallback. A damaged file is
// reported and passed over: it must not keep the daemon from starting.
func (n *Network) storedPodCIDR(fallback []netip.Prefix) []netip.Prefix {
	b, err := os.ReadFile(n.podCIDRFile())
	if errors.Is(err, fs.ErrNotExist) {
		return fallback
	}
	if err == nil {
		var subnets []netip.Prefix
		if subnets, err = parseSubnets(string(bytes.TrimSpace(b))); err == nil {
			return subnets
		}
	}
	n.log.Warn("stored pod CIDR cannot be used, taking the configured subnet", "file", n.podCIDRFile(), "error", err)
	return fallback
}

func parseSubnets(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for part := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("subnet %q: %w", part, err)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// builtinLocked returns the network for a node without a CNI of its own: a bridge,
// leases below CacheDir, host ports. n.mu is held.
func (n *Network) builtinLocked() (conf, error) {
	masquerade := hasCommand("iptables") || hasCommand("nft")
	if !masquerade {
		n.noFilter.Do(func() {
			n.log.Warn("built-in network without masquerading and host ports: neither iptables nor nft is in PATH")
		})
	}
	var ranges [][]map[string]string
	var routes []map[string]string
	for _, p := range n.subnets {
		ranges = append(ranges, []map[string]string{{"subnet": p.String()}})
		dst := "0.0.0.0/0"
		if p.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, map[string]string{"dst": dst})
	}
	plugins := []any{map[string]any{
		"type":        "bridge",
		"bridge":      netns.BuiltinBridge,
		"isGateway":   true,
		"ipMasq":      masquerade,
		"hairpinMode": true,
		"ipam": map[string]any{
			"type":    "host-local",
			"dataDir": filepath.Join(n.opts.CacheDir, netns.LeasesName),
			"ranges":  ranges,
			"routes":  routes,
		},
	}}
	if masquerade {
		plugins = append(plugins, map[string]any{
			"type":         "portmap",
			"capabilities": map[string]bool{"portMappings": true},
		})
	}
	data, err := json.Marshal(map[string]any{
		"cniVersion":             "1.0.0",
		"name":                   netns.BuiltinNetwork,
		"loadOnlyInlinedPlugins": true,
		"plugins":                plugins,
	})
	if err != nil {
		return conf{}, err
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return conf{}, fmt.Errorf("%w: built-in network: %w", ErrNoNetwork, err)
	}
	return conf{source: "the built-in network", list: list}, nil
}

func hasCommand(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}
