package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/spec"
)

// A pod may have a user namespace: root in it is a user without rights on the
// host. The kubelet picks the ids, a range of its own for each pod. The kernel
// maps the owners of all that the pod's containers see: their roots and images
// (rootfs), the kubelet's volumes (the OCI runtime, as the mounts say), and what
// the pod itself brings belongs to its root on the host.

// probeUserns says why no pod can have a user namespace here, nil if one can.
func (d *Daemon) probeUserns() error {
	some := network.IDMap{HostID: 1 << 16, Length: 1 << 16}
	ns, err := d.net.OpenUserns(network.Userns{UIDs: some, GIDs: some})
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := d.layers.CheckMapped(ns); err != nil {
		return err
	}
	return othersMayPass(d.cfg.State)
}

// othersMayPass: the OCI runtime walks to a container's root as root of the user
// namespace, who is anybody on the host.
func othersMayPass(dir string) error {
	for ; dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if st.Mode()&0o001 == 0 {
			return fmt.Errorf("cannot reach root file systems from a user namespace: the mode of %s is %#o (chmod o+x %s)", dir, st.Mode().Perm(), dir)
		}
	}
	return nil
}

// checkUserns refuses a pod with a user namespace where there can be none.
func (d *Daemon) checkUserns(cfg *runtimeapi.PodSandboxConfig, h handler) error {
	if spec.Userns(cfg) == nil {
		return nil
	}
	why := d.noUserns
	if !h.userns {
		why = errors.Join(errors.New("the OCI runtime does not know user namespaces or idmapped mounts"), why)
	}
	if why != nil {
		return errorf(ErrUnsupported, "config.linux.security_context.namespace_options.userns_options: %w", why)
	}
	return nil
}

// ownUserns is the user namespace that a pod wants, nil if it is the host's.
func ownUserns(cfg *runtimeapi.PodSandboxConfig) *network.Userns {
	u := spec.Userns(cfg)
	if u == nil {
		return nil
	}
	one := func(m *runtimeapi.IDMapping) network.IDMap {
		return network.IDMap{HostID: m.GetHostId(), Length: m.GetLength()}
	}
	return &network.Userns{UIDs: one(u.GetUids()[0]), GIDs: one(u.GetGids()[0])}
}

// mappedOwners says how the files of images look in the pod, nil if as they are.
func (r *podRecord) mappedOwners() *rootfs.IDMap {
	u := ownUserns(r.Config.M)
	if u == nil {
		return nil
	}
	return &rootfs.IDMap{Userns: r.Namespaces.User, HostUID: u.UIDs.HostID, UIDs: u.UIDs.Length, HostGID: u.GIDs.HostID, GIDs: u.GIDs.Length}
}

func (r *podRecord) specNamespaces() spec.Namespaces {
	n := r.Namespaces
	return spec.Namespaces{Net: n.Net, IPC: n.IPC, UTS: n.UTS, User: n.User}
}

// owner is who owns a file, as the host sees it.
type owner struct{ uid, gid int }

// rootOf is root of a pod: the host's, or who that is in the user namespace.
func rootOf(cfg *runtimeapi.PodSandboxConfig) owner {
	if u := ownUserns(cfg); u != nil {
		return owner{int(u.UIDs.HostID), int(u.GIDs.HostID)}
	}
	return owner{}
}

// take makes o the owner of files.
func (o owner) take(paths ...string) error {
	for _, p := range paths {
		if err := os.Lchown(p, o.uid, o.gid); err != nil {
			return err
		}
	}
	return nil
}

// mkdirAll makes a directory and those above it that are missing.
func (o owner) mkdirAll(path string) error {
	if exists(path) {
		return os.MkdirAll(path, 0o755) // for its error, should it be something else
	}
	if err := o.mkdirAll(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	return o.take(path)
}
