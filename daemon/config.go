package daemon

import (
	"time"

	"github.com/holdfast-cri/holdfast/daemon/metrics"
	"github.com/holdfast-cri/holdfast/daemon/nri"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/streams"
)

// LockSuffix is what the file beside the socket of the CRI is called by that the
// daemon locks which serves it.
const LockSuffix = ".lock"

// Config is what cmd/holdfastd read from its file and flags. Paths are absolute.
type Config struct {
	Root, State    string // without symbolic links, as Address
	Address        string // of the CRI; LockSuffix names the lock beside it
	DefaultRuntime string
	Runtimes       map[string]string // the binary of each OCI runtime, by handler
	Shim           string            // binary of the shim
	Pause          string            // static binary of a pod's init, and of what keeps a namespace until it is pinned
	LogLevel       string            // for shims

	CNIConfDir     string
	CNIBinDirs     []string
	DefaultNetwork bool
	Subnet         string
	// CNIConfTemplate is a text/template of a CNI config, for the pod range that the
	// kubelet sends; empty: none.
	CNIConfTemplate string
	// CNIGC has plugins give back, at the start, what belongs to no pod of this
	// daemon.
	CNIGC bool

	RegistryConfigDir string
	PinnedImages      []string // references
	// DropLayerBlobs does not keep layers as they were downloaded.
	DropLayerBlobs bool
	// ImageVerifierDir has programs that decide which images may be pulled;
	// empty: all may. Each has ImageVerifierTimeout to answer; 0: the default.
	ImageVerifierDir     string
	ImageVerifierTimeout time.Duration

	Stream    string           // binary of holdfast-stream
	Streaming streams.Settings // of exec, attach and port-forward

	NRI nri.Config // plugins of pods and containers

	CgroupDriver string // auto, cgroupfs, systemd
	// PauseMode gives every pod an init process; otherwise only a pod that
	// shares its pid namespace has one.
	PauseMode bool
	// RejectAbsentMounts makes a mount source that does not exist an error.
	// Otherwise it is created as a directory, as pods with an untyped hostPath
	// rely on.
	RejectAbsentMounts bool

	// RestoreImages lets a container be made of an image that is a checkpoint. Whoever can
	// name an image is root of the node then.
	RestoreImages bool

	// CDIDirs have the files of CDI devices, a later one before an earlier one; none:
	// there are no such devices.
	CDIDirs []string

	// UnprivilegedPorts lets everybody in a pod's own network listen on ports below
	// 1024, UnprivilegedICMP lets everybody there ping.
	UnprivilegedPorts, UnprivilegedICMP bool

	Metrics *metrics.Metrics // nil: nobody asks for them
}

// Config is what the daemon was started with.
func (d *Daemon) Config() Config { return d.cfg }

// ownPaths are where nothing is made as what a pod mounts: a pod may mount a socket, and be
// created at a moment when there is none.
func (c Config) ownPaths(ways rootfs.Ways) []string {
	own := []string{c.Root, c.State, string(ways), c.Address, c.Address + LockSuffix}
	if !c.NRI.Disable && c.NRI.Socket != "" {
		own = append(own, c.NRI.Socket)
	}
	return own
}
