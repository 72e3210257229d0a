package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// ifName is the pod's interface; Kubernetes' tools expect this name.
const ifName = "eth0"

// undoTimeout bounds the DEL after a failed ADD, whose own deadline may have
// passed by then.
const undoTimeout = 30 * time.Second

// What a record of a pod holds of its network.
type (
	Attachment  = records.Attachment
	PortMapping = records.PortMapping
	Result      = records.Result
	Interface   = records.Interface
	Namespaces  = records.Namespaces
	Want        = records.Want
	Userns      = records.Userns
	IDMap       = records.IDMap
)

// Add attaches a pod. When ctx ends, running plugins are killed. If it fails it
// has run DEL already, detached from ctx; where that failed too, the error also
// wraps ErrNotReleased. A pod that an earlier Add may have reached, before a
// crash, needs Del first.
func (n *Network) Add(ctx context.Context, a Attachment) (Result, error) {
	r, err := n.add(ctx, &a)
	if err == nil {
		return r, nil
	}
	err = fmt.Errorf("cannot set up the network of pod %s/%s: %w", a.Namespace, a.Name, err)
	if len(a.Config) == 0 {
		return Result{}, err // no plugin was called
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	return Result{}, errors.Join(err, n.Del(undo, a))
}

// add sets a.Config once plugins may have been called, to what they were given.
func (n *Network) add(ctx context.Context, a *Attachment) (Result, error) {
	if err := checkID(a.ID); err != nil {
		return Result{}, err
	}
	config := a.Config
	a.Config = nil
	if len(config) == 0 {
		var err error
		if config, err = n.Config(); err != nil {
			return Result{}, err
		}
	}
	list, err := libcni.NetworkConfFromBytes(config)
	if err != nil {
		return Result{}, fmt.Errorf("recorded CNI config: %w", err)
	}
	rt, err := runtimeConf(*a, list)
	if err != nil {
		return Result{}, err
	}
	if !netns.IsPinned(a.Netns) {
		return Result{}, fmt.Errorf("no network namespace is mounted at %q", a.Netns)
	}
	if len(portMappings(a.PortMappings)) > 0 && !hasCapability(list, "portMappings") {
		// Some networks have host ports without a plugin for them.
		n.log.Info("no plugin takes the host ports of a pod: they are left to what else the network has",
			"pod", a.Namespace+"/"+a.Name,
			"network", list.Name)
	}
	run, err := n.startRun(ctx, a.ID)
	if err != nil {
		return Result{}, err
	}
	defer run.end()
	a.Config = config
	res, err := n.cni(run).AddNetworkList(ctx, list, rt)
	if err != nil {
		return Result{}, err
	}
	return parseResult(res)
}

// Del detaches a pod: all that Add made, or a part of it made before a crash,
// is given back. It works from a.Config, or from libcni's cache, never from the
// config directory, also when the namespace is gone, and where Add refused what
// the pod asks for. It succeeds when nothing is attached. Errors wrap
// ErrNotReleased: something may be left, and Del has to be called again. None is
// for ever, not even that of a plugin that is missing.
func (n *Network) Del(ctx context.Context, a Attachment) error {
	if err := n.del(ctx, a); err != nil {
		return fmt.Errorf("%w: pod %s/%s (%s): %w", ErrNotReleased, a.Namespace, a.Name, a.ID, err)
	}
	return nil
}

func (n *Network) del(ctx context.Context, a Attachment) error {
	if err := checkID(a.ID); err != nil {
		return err
	}
	run, err := n.startRun(ctx, a.ID)
	if err != nil {
		return err
	}
	defer run.end()
	list, rt, err := n.recorded(run, a)
	if err != nil {
		return err
	}
	if list != nil {
		if !netns.IsPinned(rt.NetNS) {
			// Some plugins fail on a path that is there but no namespace;
			// the specification has the empty one for a namespace that is gone.
			rt.NetNS = ""
		}
		if err := n.cni(run).DelNetworkList(ctx, list, rt); err != nil {
			return err
		}
		n.freeNameless(ctx, list)
		if err := n.forget(list.Name, rt); err != nil {
			return err
		}
	}
	return run.remove()
}

// forget removes libcni's record of an attachment. The library does so as well, and does
// not tell where it cannot.
func (n *Network) forget(network string, rt *libcni.RuntimeConf) error {
	name := fmt.Sprintf("%s-%s-%s", network, rt.ContainerID, rt.IfName)
	return removeIfThere(filepath.Join(n.opts.CacheDir, "results", name))
}

// recorded returns what a was added with; a nil list if it never was.
func (n *Network) recorded(run *run, a Attachment) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	if list, err := libcni.NetworkConfFromBytes(a.Config); err == nil {
		// What Add refuses never reached a plugin: without it DEL asks for less.
		rt, _ := runtimeConf(a, list)
		return list, rt, nil
	} else if len(a.Config) > 0 {
		n.log.Warn("recorded CNI config cannot be read, taking the cached one", "pod", a.ID, "error", err)
	}
	cached, err := n.cni(run).GetCachedAttachments(a.ID)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the CNI cache: %w", err)
	}
	i := slices.IndexFunc(cached, func(c *libcni.NetworkAttachment) bool {
		return c.ContainerID == a.ID && c.IfName == ifName
	})
	if i < 0 {
		return nil, nil, nil
	}
	c := cached[i]
	list, err := libcni.NetworkConfFromBytes(c.Config)
	if err != nil {
		return nil, nil, fmt.Errorf("cached CNI config of network %q: %w", c.Network, err)
	}
	return list, &libcni.RuntimeConf{
		ContainerID: a.ID, NetNS: c.NetNS, IfName: ifName,
		Args: c.CniArgs, CapabilityArgs: c.CapabilityArgs,
	}, nil
}

func (n *Network) cni(r *run) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.opts.BinDirs, n.opts.CacheDir, r)
}

// runtimeConf translates a for libcni. With an error, which is kind.Invalid, it
// gives what there is without the part that plugins do not take.
func runtimeConf(a Attachment, list *libcni.NetworkConfigList) (*libcni.RuntimeConf, error) {
	args, argsErr := arguments(a)
	capabilities, err := capabilities(a, list)
	return &libcni.RuntimeConf{
		ContainerID:    a.ID,
		NetNS:          a.Netns,
		IfName:         ifName,
		Args:           args,
		CapabilityArgs: capabilities,
	}, errors.Join(argsErr, err)
}

// arguments are those that Kubernetes' plugins know. CNI_ARGS joins them by ";"
// and "=", and has no way to quote those.
func arguments(a Attachment) (args [][2]string, err error) {
	for _, arg := range [][3]string{
		{"IgnoreUnknown", "1", ""},
		{"K8S_POD_NAMESPACE", a.Namespace, "config.metadata.namespace"},
		{"K8S_POD_NAME", a.Name, "config.metadata.name"},
		{"K8S_POD_INFRA_CONTAINER_ID", a.ID, ""},
		{"K8S_POD_UID", a.UID, "config.metadata.uid"},
	} {
		if strings.ContainsAny(arg[1], ";=") {
			err = errors.Join(err, kind.Errorf(kind.Invalid, "%s: network plugins take no \";\" or \"=\" in %s: %q",
				arg[2], arg[0], arg[1]))
			continue
		}
		args = append(args, [2]string{arg[0], arg[1]})
	}
	return args, err
}

// capabilities are those of CNI's CONVENTIONS.md that a pod has something for,
// and the pod's annotations under the name that CRI runtimes use, as far as a
// plugin of the list declares them. The CRI has nothing for ips, mac, ipRanges,
// infinibandGUID and deviceID: a plugin that takes them from annotations gets
// those.
func capabilities(a Attachment, list *libcni.NetworkConfigList) (map[string]any, error) {
	all := map[string]any{}
	if ports := portMappings(a.PortMappings); len(ports) > 0 {
		all["portMappings"] = ports
	}
	if a.DNS != nil {
		all["dns"] = a.DNS
	}
	if a.CgroupParent != "" {
		all["cgroupPath"] = a.CgroupParent
	}
	if len(a.Annotations) > 0 {
		all["io.kubernetes.cri.pod-annotations"] = a.Annotations
	}
	var err error
	if hasCapability(list, "bandwidth") {
		var limits map[string]any
		if limits, err = bandwidth(a.Annotations); err == nil && len(limits) > 0 {
			all["bandwidth"] = limits
		}
	}
	maps.DeleteFunc(all, func(name string, _ any) bool { return !hasCapability(list, name) })
	return all, err
}

func hasCapability(list *libcni.NetworkConfigList, name string) bool {
	return slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool {
		return p.Network.Capabilities[name]
	})
}

func portMappings(in []PortMapping) []PortMapping {
	var out []PortMapping
	for _, p := range in {
		if p.HostPort <= 0 {
			continue
		}
		p.Protocol = cmp.Or(strings.ToLower(p.Protocol), "tcp")
		out = append(out, p)
	}
	return out
}

// bandwidth reads the pod's limits in bits per second. The burst is what the
// plugin takes for unlimited; it accepts no rate without one.
func bandwidth(annotations map[string]string) (map[string]any, error) {
	bw := map[string]any{}
	for _, dir := range []string{"ingress", "egress"} {
		key := "kubernetes.io/" + dir + "-bandwidth"
		s, ok := annotations[key]
		if !ok {
			continue
		}
		rate, err := parseQuantity(s)
		if err != nil {
			return nil, kind.Errorf(kind.Invalid, "config.annotations[%s]: %w", key, err)
		}
		bw[dir+"Rate"] = rate
		bw[dir+"Burst"] = math.MaxInt32
	}
	return bw, nil
}

func parseResult(res types.Result) (Result, error) {
	raw, err := json.Marshal(res)
	if err != nil {
		return Result{}, fmt.Errorf("cannot encode the CNI result: %w", err)
	}
	r, err := types100.NewResultFromResult(res)
	if err != nil {
		return Result{}, fmt.Errorf("cannot read the CNI result: %w", err)
	}
	out := Result{Raw: raw}
	for _, i := range r.Interfaces {
		out.Interfaces = append(out.Interfaces, Interface{Name: i.Name, MAC: i.Mac, Sandbox: i.Sandbox})
	}
	for _, ip := range r.IPs {
		// An address that names no interface is the pod's: plugins before
		// CNI 0.3.0 had only that.
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) &&
			(r.Interfaces[*i].Name != ifName || r.Interfaces[*i].Sandbox == "") {
			continue
		}
		out.IPs = append(out.IPs, ip.Address.IP.String())
	}
	if len(out.IPs) == 0 {
		return Result{}, fmt.Errorf("the CNI plugins gave %s no address: %s", ifName, words(raw))
	}
	return out, nil
}

func (n *Network) lockFile(id string) string {
	return filepath.Join(n.opts.CacheDir, "running", id)
}
