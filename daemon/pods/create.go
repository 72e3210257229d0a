package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/claims"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/runtimes"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// networkLimit bounds ADD and DEL, which are detached from the caller: half an ADD
// is worse than a late one.
const networkLimit = 2 * time.Minute

// NameOf is the name that a pod takes in the table of claims.
func NameOf(rec *records.Pod) claims.Name {
	m := rec.Config.M.GetMetadata()
	return claims.Name{
		Name: fmt.Sprintf("pod %q/%q uid %q attempt %d",
			m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt()),
		Fingerprint: rec.Fingerprint,
	}
}

// Run makes a pod and gives its id.
func (m *Manager) Run(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	if err := spec.ValidateSandbox(cfg); err != nil {
		return "", err
	}
	h, err := m.Runtimes.For(handler)
	if err != nil {
		return "", err
	}
	fingerprint, err := records.Fingerprint(cfg, handler)
	if err != nil {
		return "", err
	}
	config, err := records.Encoded(cfg)
	if err != nil {
		return "", err
	}
	rec := &records.Pod{
		Config:      config,
		Handler:     handler,
		Fingerprint: fingerprint,
		BootID:      rundir.BootID(),
		Phase:       records.PodCreating,
		Debts:       []records.Debt{records.DebtNamespaces, records.DebtMounts, records.DebtCgroup, records.DebtFiles},
	}
	if err := m.checkUserns(rec, h); err != nil {
		return "", err
	}
	// Before anything is made for a pod that could never have a container.
	const anID = "0"
	if _, err := m.Cgroups.ContainerPath(cfg.GetLinux().GetCgroupParent(), anID, anID); err != nil {
		return "", kind.As(kind.Invalid, fmt.Errorf("config.linux.cgroup_parent: %w", err))
	}
	name := NameOf(rec)
	id, err := m.Claims.Once(ctx, name, claims.Creation{
		Make: func(ctx context.Context, cl *claims.Claim) error {
			rec.ID, rec.CreatedAt = cl.ID, time.Now()
			return m.create(ctx, cl, rec)
		},
		Give:   func(ctx context.Context) error { return m.give(ctx, rec.ID) },
		Remove: func(ctx context.Context) error { return m.Remove(ctx, rec.ID) },
	})
	if err != nil {
		return "", err
	}
	if p, err := m.Find(id); err != nil || p.Ready() != nil {
		return "", kind.Errorf(kind.Exists,
			"metadata: %s exists already, as %s, and is not ready any more: remove it, or ask for another attempt",
			name.Name, id)
	}
	return id, nil
}

// checkUserns refuses a pod with a user namespace where there can be none.
func (m *Manager) checkUserns(rec *records.Pod, h runtimes.Handler) error {
	if rec.Userns() == nil {
		return nil
	}
	why := m.NoUserns
	if !h.Userns {
		why = errors.Join(errors.New("the OCI runtime does not know user namespaces or idmapped mounts"), why)
	}
	if why != nil {
		return kind.Errorf(kind.Unsupported, "config.linux.security_context.namespace_options.userns_options: %w", why)
	}
	return nil
}

// create makes the pod that a claim is for. Undoing it is removing it: the same
// steps, each of which finds out what there is to do.
func (m *Manager) create(ctx context.Context, cl *claims.Claim, rec *records.Pod) error {
	want := m.wanted(rec)
	if want.Net {
		if _, err := m.Network.Config(); err != nil {
			return kind.As(kind.Unavailable, err)
		}
	}
	p := m.Adopt(rec)
	p.journal(records.Asked, rec.CreatedAt, "RunPodSandbox")
	if err := p.make(ctx, cl, want); err != nil {
		p.journal(records.Failed, time.Now(), "%v", err)
		ctx, cancel := context.WithTimeout(context.Background(), networkLimit)
		defer cancel()
		m.Plugins.RemovePodSandbox(ctx, p)
		if uerr := p.erase(ctx); uerr != nil {
			p.eraseLater(uerr)
		}
		return err
	}
	m.Add(p)
	meta := rec.Config.M.GetMetadata()
	m.Log.Info("pod ready",
		"pod", rec.ID,
		"namespace", meta.GetNamespace(),
		"name", meta.GetName(),
		"ips", p.Record().IPs(),
		"took", time.Since(rec.CreatedAt).Round(time.Millisecond))
	return nil
}

// make goes through the steps of a creation.
func (p *Pod) make(ctx context.Context, cl *claims.Claim, want records.Want) error {
	for _, s := range []struct {
		reached step.Step
		do      func(context.Context) error
	}{
		{step.PodRecord, p.makeRecord},
		{step.PodNamespaces, func(context.Context) error { return p.makeNamespaces(want) }},
		{step.PodAttached, func(ctx context.Context) error { return p.attach(ctx, cl, want) }},
	} {
		if err := s.do(ctx); err != nil {
			return err
		}
		if err := cl.Reach(s.reached); err != nil {
			return err
		}
	}
	if p.m.AlwaysInit {
		if err := p.startInitLocked(ctx); err != nil { // nobody else knows the pod yet
			return err
		}
	}
	if err := p.m.Plugins.RunPodSandbox(ctx, p); err != nil {
		return err
	}
	return cl.Reach(step.PodPlugins)
}

// give makes a pod known: it is listed, takes containers, and a restart keeps it.
func (m *Manager) give(ctx context.Context, id string) error {
	p, err := m.Find(id)
	if err != nil {
		return nil //nolint:nilerr // removed meanwhile; the caller finds out as well
	}
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return err
	}
	defer p.op.Unlock()
	if p.Record().Phase != records.PodCreating {
		return nil
	}
	if err := p.save(false, func(r *records.Pod) { r.Phase = records.PodReady }); err != nil {
		return err
	}
	p.announce(stopped - 1)
	return step.Reach(step.PodReady)
}

func (p *Pod) makeRecord(context.Context) error {
	if err := p.m.State.Create(state.Pods, p.ID()); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	if err := os.MkdirAll(p.dir(), 0o700); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot make the directory of the pod: %w", err))
	}
	return p.save(false, func(*records.Pod) {})
}

func (p *Pod) makeNamespaces(want records.Want) error {
	ns, err := p.m.Network.CreateNamespaces(p.ID(), want)
	if err != nil {
		return err
	}
	if err := p.makeFiles(want); err != nil {
		return kind.As(kind.Unavailable, err)
	}
	return p.save(false, func(r *records.Pod) { r.Namespaces, r.FilesDir = ns, p.filesDir() })
}

// attach runs ADD between its two records, and writes /etc/hosts, which has the
// addresses. The first record is synced: after a power cut it is all that tells of
// an address that was taken.
func (p *Pod) attach(ctx context.Context, cl *claims.Claim, want records.Want) error {
	if !want.Net {
		return p.hostsFile(want.Hostname)
	}
	conf, err := p.m.Network.Config()
	if err != nil {
		return kind.As(kind.Unavailable, err)
	}
	a := attachment(p.Record(), conf)
	err = p.save(true, func(r *records.Pod) {
		r.Network = &records.Network{Phase: records.NetworkAdding, Attachment: a}
		r.Debts = append([]records.Debt{records.DebtNetwork}, r.Debts...)
	})
	if err != nil {
		return err
	}
	if err := cl.Reach(step.PodIntent); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	result, err := p.m.Network.Add(ctx, a)
	if err != nil {
		return kind.As(kind.Unavailable, err)
	}
	if err := p.m.Network.SetInterfaceSysctls(a.Netns, want); err != nil {
		return err
	}
	if err := cl.Reach(step.PodNetwork); err != nil {
		return err
	}
	err = p.save(false, func(r *records.Pod) {
		r.Network = &records.Network{Phase: records.NetworkAdded, Attachment: a, Result: result}
	})
	if err != nil {
		return err
	}
	return p.hostsFile(want.Hostname)
}

// attachment is what the plugins are told of a pod.
func attachment(rec *records.Pod, conf []byte) records.Attachment {
	cfg := rec.Config.M
	a := records.Attachment{
		ID:          rec.ID,
		Netns:       rec.Namespaces.Net,
		Name:        cfg.GetMetadata().GetName(),
		Namespace:   cfg.GetMetadata().GetNamespace(),
		UID:         cfg.GetMetadata().GetUid(),
		Annotations: cfg.GetAnnotations(),

		CgroupParent: cfg.GetLinux().GetCgroupParent(),
		Config:       conf,
	}
	if dns := cfg.GetDnsConfig(); dns != nil {
		a.DNS = &records.DNS{Servers: dns.GetServers(), Searches: dns.GetSearches(), Options: dns.GetOptions()}
	}
	for _, m := range cfg.GetPortMappings() {
		a.PortMappings = append(a.PortMappings, records.PortMapping{
			HostPort:      m.GetHostPort(),
			ContainerPort: m.GetContainerPort(),
			Protocol:      m.GetProtocol().String(),
			HostIP:        m.GetHostIp(),
		})
	}
	return a
}

// wanted says which namespaces of its own the pod has. UTS follows the network, as
// the CRI has no mode for it; a pod in the node's network has one if it has a name
// of its own.
func (m *Manager) wanted(rec *records.Pod) records.Want {
	cfg := rec.Config.M
	o := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	network := o.GetNetwork() != runtimeapi.NamespaceMode_NODE
	node := nodeName()
	w := records.Want{
		Net:      network,
		IPC:      o.GetIpc() != runtimeapi.NamespaceMode_NODE,
		UTS:      network || cfg.GetHostname() != "" && cfg.GetHostname() != node,
		User:     rec.Userns(),
		Hostname: cmp.Or(cfg.GetHostname(), node),
		Sysctls:  cfg.GetLinux().GetSysctls(),
	}
	if network {
		w.Sysctls = m.withDefaults(w)
	}
	return w
}

// withDefaults adds the sysctls that images rely on, as other runtimes set them, to
// those that were asked for. The kernel refuses a group that is not mapped.
func (m *Manager) withDefaults(w records.Want) map[string]string {
	lastGroup := uint32(math.MaxInt32)
	if w.User != nil {
		lastGroup = min(lastGroup, w.User.GIDs.Length-1)
	}
	all := map[string]string{}
	if m.UnprivilegedPorts {
		all["net.ipv4.ip_unprivileged_port_start"] = "0"
	}
	if m.UnprivilegedICMP {
		all["net.ipv4.ping_group_range"] = fmt.Sprintf("0 %d", lastGroup)
	}
	for name, value := range w.Sysctls {
		delete(all, strings.ReplaceAll(name, "/", "."))
		all[name] = value
	}
	return all
}

// nodeName is the name of the machine.
func nodeName() string {
	h, err := os.Hostname()
	if err != nil {
		return "localhost"
	}
	return h
}
