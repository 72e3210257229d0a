package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/spec"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// pod is a sandbox: pinned namespaces, one /dev/shm, a few files and a network
// attachment. Nothing has to run for it to exist.
type pod struct {
	op  oplock
	rec atomic.Pointer[podRecord] // never changed in place; savePod replaces it
}

func newPod(rec *podRecord) *pod {
	p := &pod{op: newOplock()}
	p.rec.Store(rec)
	return p
}

// savePod is the one place where a pod changes: first on disk, then in memory.
// sync is for what must survive a power cut.
func (d *Daemon) savePod(p *pod, sync bool, change func(*podRecord)) error {
	rec := *p.rec.Load()
	change(&rec)
	if err := d.state.Put(state.Pods, rec.ID, &rec, sync); err != nil {
		return as(ErrUnavailable, err)
	}
	// The copy stands in for a damaged record; without one nothing is lost yet.
	if err := d.state.PutCopy(state.Pods, rec.ID, &rec); err != nil && rec.Phase == podReady {
		return as(ErrUnavailable, err)
	}
	p.rec.Store(&rec)
	return nil
}

// notePod is savePod on the way down, where a full disk must keep nothing
// running: what cannot be written is kept in memory, and is done again after a
// restart.
func (d *Daemon) notePod(p *pod, change func(*podRecord)) {
	if err := d.savePod(p, false, change); err != nil {
		rec := *p.rec.Load()
		d.log.Warn("cannot write down the state of a pod", "pod", rec.ID, "error", err)
		change(&rec)
		p.rec.Store(&rec)
	}
}

// networkLimit bounds ADD and DEL, which are detached from the caller: half an
// ADD is worse than a late one.
const networkLimit = 2 * time.Minute

// RunPod makes a pod and gives its id.
func (d *Daemon) RunPod(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	if err := spec.ValidateSandbox(cfg); err != nil {
		return "", err
	}
	h, err := d.handlerFor(handler)
	if err != nil {
		return "", err
	}
	if err := d.checkUserns(cfg, h); err != nil {
		return "", err
	}
	print, err := fingerprint(cfg, handler)
	if err != nil {
		return "", as(ErrInvalid, err)
	}
	id, err := d.once(ctx, podName(cfg.GetMetadata()), "", print, func(ctx context.Context, c *claim) error {
		return d.makePod(ctx, c, cfg, handler)
	})
	if err != nil {
		return "", err
	}
	if p, err := d.pod(id); err != nil || podIsReady(p.rec.Load()) != nil {
		return "", errorf(ErrExists, "metadata: %s exists already, as %s, and is not ready any more: remove it, or ask for another attempt",
			podName(cfg.GetMetadata()), id)
	}
	return id, nil
}

func (d *Daemon) makePod(ctx context.Context, c *claim, cfg *runtimeapi.PodSandboxConfig, handler string) (err error) {
	own := ownNamespaces(cfg)
	if own.Net {
		if _, err := d.net.Config(); err != nil {
			return as(ErrUnavailable, err)
		}
	}
	rec := &podRecord{ID: c.id, Config: message[*runtimeapi.PodSandboxConfig]{cfg}, Handler: handler, Fingerprint: c.fingerprint,
		CreatedAt: time.Now(), BootID: rundir.BootID(), Phase: podCreating}
	p := newPod(rec)

	d.enter(c, "record")
	defer func() {
		if err == nil {
			return
		}
		// Undoing is removing: the same steps, each of which finds out what
		// there is to do. If one fails, the pod stays, NOTREADY, with the
		// record of what is left, and the kubelet's own removal tries again.
		ctx, cancel := context.WithTimeout(context.Background(), networkLimit)
		defer cancel()
		if uerr := d.erasePod(ctx, p); uerr != nil {
			d.log.Error("cannot undo a pod; it stays until it is removed", "pod", c.id, "error", uerr)
			d.mu.Lock()
			d.pods[c.id] = p
			d.mu.Unlock()
		}
	}()
	if err := d.state.Create(state.Pods, c.id); err != nil {
		return as(ErrUnavailable, err)
	}
	dir := d.state.RunDir(state.Pods, c.id)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return as(ErrUnavailable, fmt.Errorf("cannot make the directory of the pod: %w", err))
	}
	if err := d.savePod(p, false, func(*podRecord) {}); err != nil {
		return err
	}

	d.enter(c, "namespaces")
	hostname := podHostname(cfg)
	own.Hostname, own.Sysctls = hostname, cfg.GetLinux().GetSysctls()
	ns, err := d.net.CreateNamespaces(c.id, own)
	if err != nil {
		return d.networkError(err)
	}
	if err := podFiles(dir, cfg, hostname); err != nil {
		return as(ErrUnavailable, err)
	}
	if own.IPC {
		if err := mountShm(filepath.Join(dir, "shm"), rootOf(cfg)); err != nil {
			return as(ErrUnavailable, err)
		}
	}
	if err := d.savePod(p, false, func(r *podRecord) { r.Namespaces = ns }); err != nil {
		return err
	}

	if own.Net {
		d.enter(c, "network")
		if err := d.attach(ctx, p); err != nil {
			return err
		}
	}
	if err := hostsFile(dir, hostname, p.rec.Load().ips()); err != nil {
		return as(ErrUnavailable, err)
	}
	if err := rootOf(cfg).take(filepath.Join(dir, "hostname"), filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "hosts")); err != nil {
		return as(ErrUnavailable, err)
	}
	if d.cfg.PauseMode {
		d.enter(c, "init")
		if err := d.startInit(ctx, p); err != nil {
			return err
		}
	}
	if err := d.savePod(p, false, func(r *podRecord) { r.Phase = podReady }); err != nil {
		return err
	}
	d.mu.Lock()
	d.pods[c.id] = p
	d.mu.Unlock()
	d.log.Info("pod ready", "pod", c.id, "namespace", cfg.GetMetadata().GetNamespace(), "name", cfg.GetMetadata().GetName(),
		"ips", p.rec.Load().ips(), "took", time.Since(rec.CreatedAt).Round(time.Millisecond))
	return nil
}

// attach runs ADD between its two records. The first is synced: after a power
// cut it is all that tells of an address that was taken.
func (d *Daemon) attach(ctx context.Context, p *pod) error {
	conf, err := d.net.Config()
	if err != nil {
		return as(ErrUnavailable, err)
	}
	rec := p.rec.Load()
	cfg := rec.Config.M
	a := network.Attachment{
		ID:           rec.ID,
		Netns:        rec.Namespaces.Net,
		Name:         cfg.GetMetadata().GetName(),
		Namespace:    cfg.GetMetadata().GetNamespace(),
		UID:          cfg.GetMetadata().GetUid(),
		Annotations:  cfg.GetAnnotations(),
		CgroupParent: cfg.GetLinux().GetCgroupParent(),
		Config:       conf,
	}
	if dns := cfg.GetDnsConfig(); dns != nil {
		a.DNS = &records.DNS{Servers: dns.GetServers(), Searches: dns.GetSearches(), Options: dns.GetOptions()}
	}
	for _, m := range cfg.GetPortMappings() {
		if m.GetHostPort() > 0 {
			a.PortMappings = append(a.PortMappings, network.PortMapping{HostPort: m.GetHostPort(), ContainerPort: m.GetContainerPort(),
				Protocol: strings.ToLower(m.GetProtocol().String()), HostIP: m.GetHostIp()})
		}
	}
	if err := d.savePod(p, true, func(r *podRecord) { r.Network = &podNetwork{Phase: netAdding, Attachment: a} }); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	result, err := d.net.Add(ctx, a)
	if err == nil {
		own := ownNamespaces(cfg)
		own.Sysctls = cfg.GetLinux().GetSysctls()
		err = d.net.SetInterfaceSysctls(a.Netns, own)
	}
	if err != nil {
		return d.networkError(err)
	}
	return d.savePod(p, false, func(r *podRecord) {
		r.Network = &podNetwork{Phase: netAdded, Attachment: a, Result: result}
	})
}

// networkError sorts the errors of package network.
func (d *Daemon) networkError(err error) error {
	if errors.Is(err, network.ErrSysctl) {
		return as(ErrInvalid, fmt.Errorf("config.linux.sysctls: %w", err))
	}
	return as(ErrUnavailable, err)
}

// StopPod kills the pod's containers and gives back what the pod holds, its
// addresses first of all. It may be called again after any failure, and for a
// pod that is gone.
func (d *Daemon) StopPod(ctx context.Context, id string) error {
	p, err := d.pod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err := p.op.lock(ctx, "pod "+shortID(id)); err != nil {
		return err
	}
	defer p.op.unlock()
	return d.stopPod(ctx, p)
}

// stopPod is StopPod for the holder of the oplock.
func (d *Daemon) stopPod(ctx context.Context, p *pod) error {
	rec := p.rec.Load()
	if rec.Phase == podStopped {
		return nil
	}
	if rec.Phase != podStopping {
		d.notePod(p, func(r *podRecord) { r.Phase = podStopping })
	}
	// From here on no creation of a container in this pod succeeds: each looks
	// at the phase before it ends. Those under way are not waited for.
	kerr := d.killContainers(ctx, rec.ID)
	// The addresses are given back even if a container would not die.
	if err := errors.Join(kerr, d.releasePod(ctx, p)); err != nil {
		return as(ErrUnavailable, fmt.Errorf("cannot stop pod %s: %w", shortID(rec.ID), err))
	}
	d.notePod(p, func(r *podRecord) { r.Phase = podStopped })
	d.log.Info("pod stopped", "pod", rec.ID, "namespace", rec.Config.M.GetMetadata().GetNamespace(), "name", rec.Config.M.GetMetadata().GetName())
	return nil
}

// killContainers kills all containers of a pod at once and waits for their
// ends, for the init's last.
func (d *Daemon) killContainers(ctx context.Context, podID string) error {
	list := d.containersOf(podID)
	var wg sync.WaitGroup
	errs := make([]error, len(list))
	for i, c := range list {
		if c.rec.Load().Init {
			wg.Wait()
		}
		wg.Go(func() { errs[i] = d.killContainer(ctx, c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// killContainer kills a container and waits for its end. A shim that does not
// answer has no say in it: it is killed as well, and the record says so.
func (d *Daemon) killContainer(ctx context.Context, c *container) error {
	if c.rec.Load().Phase == containerRemoving {
		return d.removeContainer(ctx, c) // or waits for whoever does
	}
	err := d.stopContainer(ctx, c, 0)
	if !errors.Is(err, client.ErrUnreachable) {
		return err
	}
	if err := d.endShim(ctx, c, "its shim did not answer and was killed"); err != nil {
		return err
	}
	if !d.settled(c) {
		return err
	}
	return nil
}

// releasePod gives back what a pod holds. Each step looks whether it is due.
func (d *Daemon) releasePod(ctx context.Context, p *pod) error {
	rec := p.rec.Load()
	if n := rec.Network; n != nil && n.Phase != netGone {
		a := n.Attachment
		if !thisBoot(rec.BootID) {
			a.Netns = "" // of another boot: DEL frees the address all the same
		}
		// A plugin that is cut short leaves rules that its next DEL doesn't find.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), networkLimit)
		defer cancel()
		if err := d.net.Del(ctx, a); err != nil {
			return fmt.Errorf("cannot detach pod %s from its network: %w", shortID(rec.ID), err)
		}
		d.notePod(p, func(r *podRecord) {
			gone := *r.Network
			gone.Phase = netGone
			r.Network = &gone
		})
	}
	if err := d.net.RemoveNamespaces(rec.ID); err != nil {
		return err
	}
	dir := d.state.RunDir(state.Pods, rec.ID)
	for _, name := range []string{"shm", pidName} {
		if err := rootfs.Unmount(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// RemovePod removes a pod and all its containers, running or not.
func (d *Daemon) RemovePod(ctx context.Context, id string) error {
	if err := d.StopPod(ctx, id); err != nil {
		return err
	}
	// Not under the lock: a creation may be waiting for it.
	if err := d.awaitCreations(ctx, id); err != nil {
		return err
	}
	p, err := d.pod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err := p.op.lock(ctx, "pod "+shortID(id)); err != nil {
		return err
	}
	defer p.op.unlock()
	if _, err := d.pod(id); err != nil {
		return nil // another call has removed it
	}
	for _, c := range d.containersOf(id) {
		if err := d.removeContainer(ctx, c); err != nil {
			return err
		}
	}
	if err := d.erasePod(ctx, p); err != nil {
		return as(ErrUnavailable, err)
	}
	rec := p.rec.Load()
	d.mu.Lock()
	delete(d.pods, id)
	d.mu.Unlock()
	d.releaseName(podName(rec.Config.M.GetMetadata()), id)
	d.log.Info("pod removed", "pod", id)
	return nil
}

// awaitCreations waits until no container is being made in a pod that has been
// stopped: each attempt ends by finding that out.
func (d *Daemon) awaitCreations(ctx context.Context, podID string) error {
	for {
		d.mu.Lock()
		var busy *claim
		for _, c := range d.claims {
			if c.podID != podID {
				continue
			}
			select {
			case <-c.done:
			default:
				busy = c
			}
		}
		d.mu.Unlock()
		if busy == nil {
			return nil
		}
		select {
		case <-busy.done:
		case <-ctx.Done():
			return errorf(ErrUnavailable, "%s is still being created: %w", busy.name, ctx.Err())
		}
	}
}

// erasePod removes all trace of a pod, its record last. Containers other than
// the init are gone already.
func (d *Daemon) erasePod(ctx context.Context, p *pod) error {
	rec := p.rec.Load()
	if c := d.initOf(rec.ID); c != nil {
		if err := d.removeContainer(ctx, c); err != nil {
			return err
		}
	}
	if err := d.releasePod(ctx, p); err != nil {
		return err
	}
	if err := d.cgroups.RemovePod(ctx, rec.Config.M.GetLinux().GetCgroupParent(), rec.ID); err != nil {
		return err
	}
	if err := d.state.RemoveRunDir(state.Pods, rec.ID); err != nil {
		return err
	}
	return d.state.Remove(state.Pods, rec.ID)
}

// ownNamespaces says which namespaces of its own the pod has. UTS follows the
// network: the CRI has no mode for it.
func ownNamespaces(cfg *runtimeapi.PodSandboxConfig) network.Want {
	o := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	return network.Want{Net: o.GetNetwork() != runtimeapi.NamespaceMode_NODE, IPC: o.GetIpc() != runtimeapi.NamespaceMode_NODE,
		UTS: o.GetNetwork() != runtimeapi.NamespaceMode_NODE, User: ownUserns(cfg)}
}

// podHostname is the name that the pod goes by.
func podHostname(cfg *runtimeapi.PodSandboxConfig) string {
	if h := cfg.GetHostname(); h != "" {
		return h
	}
	h, err := os.Hostname()
	if err != nil {
		return "localhost"
	}
	return h
}

// podFiles writes the files that containers see below /etc unless the kubelet
// mounts its own.
func podFiles(dir string, cfg *runtimeapi.PodSandboxConfig, hostname string) error {
	if err := os.WriteFile(filepath.Join(dir, "hostname"), []byte(hostname+"\n"), 0o644); err != nil {
		return err
	}
	var resolv strings.Builder
	dns := cfg.GetDnsConfig()
	for _, s := range dns.GetServers() {
		fmt.Fprintf(&resolv, "nameserver %s\n", s)
	}
	if s := dns.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&resolv, "search %s\n", strings.Join(s, " "))
	}
	if o := dns.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&resolv, "options %s\n", strings.Join(o, " "))
	}
	if resolv.Len() == 0 {
		host, err := os.ReadFile("/etc/resolv.conf")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		resolv.Write(host)
	}
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(resolv.String()), 0o644)
}

// hostsFile writes /etc/hosts: the host's for a pod in its network.
func hostsFile(dir, hostname string, ips []string) error {
	var b strings.Builder
	if len(ips) == 0 {
		host, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		b.Write(host)
	} else {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
		for _, ip := range ips {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}
	return os.WriteFile(filepath.Join(dir, "hosts"), []byte(b.String()), 0o644)
}

// mountShm makes the /dev/shm that the containers of a pod share.
func mountShm(path string, root owner) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	options := fmt.Sprintf("mode=1777,size=67108864,uid=%d,gid=%d", root.uid, root.gid)
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("cannot mount a tmpfs on %s: %w", path, err)
	}
	return nil
}
