// Package network gives a pod its namespaces and its network.
//
// Namespaces are pinned by bind mounts and need no process to live. The network
// inside comes from CNI plugins through libcni. The package keeps nothing in
// memory that matters: every path derives from the pod's id, and what a DEL
// needs is in the caller's record or in libcni's cache.
package network

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

var (
	// ErrNoNetwork is wrapped by every reason why no pod can get a network:
	// no config, none that parses, a plugin that is missing.
	ErrNoNetwork = errors.New("no usable pod network")

	// ErrNotReleased is wrapped when a DEL did not finish, be it asked for or
	// part of undoing an ADD: addresses or interfaces may be left, and Del has
	// to be called again.
	ErrNotReleased = errors.New("pod network not released")

	// ErrSysctl is wrapped when a pod asks for a sysctl it cannot have.
	ErrSysctl = errors.New("sysctl not allowed")
)

const (
	// maxPlugins bounds the pods whose plugins run at once. Plugins are short
	// and mostly wait (iptables lock, a cloud's API), so this is far above the
	// number of CPUs; it only keeps a node that restarts all its pods from
	// holding hundreds of processes.
	maxPlugins = 32
)

// Options configures a Network.
type Options struct {
	ConfDir string   // CNI configs, read again whenever they change
	BinDirs []string // where plugins are looked for, first match wins

	// CacheDir holds libcni's cache, the locks of running plugins and the
	// built-in network's leases. It has to survive a reboot: leases do.
	CacheDir string

	PinDir   string // ipc, uts and user are pinned in PinDir/<id>/ns
	NetnsDir string // net is pinned at NetnsDir/holdfast-<id>; default /run/netns

	// Keeper is a static program that does nothing until it is killed. New user
	// namespaces are made with a process of it inside.
	Keeper string

	DefaultNetwork bool   // with no file in ConfDir: a built-in bridge
	Subnet         string // of the built-in bridge; "a,b" for two families

	// ConfTemplate is a file that SetPodCIDR makes a config in ConfDir of, unless there is
	// one; empty: none.
	ConfTemplate string

	Log *slog.Logger // default slog.Default()
}

// Network makes pod namespaces and attaches them to the pod network. Its
// methods may be called from any goroutine; calls for one pod have to be
// serialised by the caller.
type Network struct {
	opts Options
	log  *slog.Logger
	runs chan struct{} // one token per pod whose plugins run

	grace time.Duration // orphanGrace, shorter in tests

	mu       sync.Mutex
	conf     conf              // as of confSeen
	confErr  error             // why there is none
	confSeen string            // what ConfDir held when conf was loaded
	skipped  map[string]string // file -> why it was skipped, logged once each
	subnets  []netip.Prefix    // of the built-in network
	noFilter sync.Once         // says once that masquerading is missing
}

// New checks the options. It touches the disk only to read back the pod CIDR
// that SetPodCIDR stored.
func New(o Options) (*Network, error) {
	for name, dir := range map[string]string{"CacheDir": o.CacheDir, "PinDir": o.PinDir} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("cannot set up pod networking: %s %q is not an absolute path", name, dir)
		}
	}
	o.NetnsDir = cmp.Or(o.NetnsDir, netns.Dir)
	n := &Network{
		opts:    o,
		log:     cmp.Or(o.Log, slog.Default()),
		runs:    make(chan struct{}, maxPlugins),
		grace:   orphanGrace,
		skipped: map[string]string{},
	}
	if o.DefaultNetwork {
		subnets, err := parseSubnets(o.Subnet)
		if err != nil {
			return nil, fmt.Errorf("cannot set up the built-in network: %w", err)
		}
		n.subnets = n.storedPodCIDR(subnets)
	}
	return n, nil
}

var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// checkID keeps an id from leaving the directories that paths are built in.
// The pattern is the one CNI demands of a container id.
func checkID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("invalid pod id %q", id)
	}
	return nil
}
