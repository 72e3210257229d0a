package machine

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// KubeletConfig is the configuration of a kubelet on a node. It differs from the
// defaults in what the machine does not allow, and in that nothing takes longer than it
// has to. The caller's own settings and feature gates follow.
func KubeletConfig(n *harness.Node, settings string, gates ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
podLogsDir: %s
cgroupRoot: %s
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
enforceNodeAllocatable: [pods]
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
syncFrequency: 2s
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
logging: {verbosity: 2}
%sfeatureGates:
  KubeletCrashLoopBackOffMax: true
`, n.Socket, n.LogDir, Cgroup(n), settings)
	for _, gate := range gates {
		fmt.Fprintf(&b, "  %s: true\n", gate)
	}
	return b.String()
}

// Cgroup is the kubelet's. It is below what the node removes in the end, so that
// kubelets of several nodes of one machine don't meet.
func Cgroup(n *harness.Node) string { return n.PodConfig("any").Linux.CgroupParent }

// hierarchies are the cgroup hierarchies of the machine, or the one of cgroup v2.
func hierarchies() []string {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*/tasks")
	if len(v1) == 0 {
		return []string{"/sys/fs/cgroup"}
	}
	dirs := []string{"/sys/fs/cgroup/unified"}
	for _, path := range v1 {
		dirs = append(dirs, filepath.Dir(path))
	}
	return dirs
}

// MakeCgroups makes the kubelet's cgroups. It makes those below them.
func MakeCgroups(n *harness.Node) error {
	for _, dir := range hierarchies() {
		if err := os.MkdirAll(filepath.Join(dir, Cgroup(n)), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroups removes the cgroups that a kubelet leaves. Nothing runs in them.
func RemoveCgroups(n *harness.Node) {
	for _, dir := range hierarchies() {
		var paths []string
		filepath.WalkDir(filepath.Join(dir, Cgroup(n)), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				paths = append([]string{path}, paths...) // children first
			}
			return nil
		})
		for _, path := range paths {
			unix.Rmdir(path) // the node tells what is left
		}
	}
}

// Killer kills the runtime once in a while, until it is stopped.
type Killer struct {
	quit, done chan struct{}
	kills      atomic.Int32
}

// KillRuntime has the runtime of a node killed and started again, each time after a
// while. Whoever calls it also calls Stop, before the test ends.
func KillRuntime(t harness.T, n *harness.Node, every time.Duration) *Killer {
	k := &Killer{quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(k.done)
		for {
			select {
			case <-k.quit:
				return
			case <-time.After(every):
			}
			if err := n.Bounce(); err != nil {
				t.Errorf("cannot restart the runtime: %v", err)
				return
			}
			k.kills.Add(1)
		}
	}()
	return k
}

// Kills is how often the runtime was killed.
func (k *Killer) Kills() int { return int(k.kills.Load()) }

// Stop returns when the runtime runs and is left alone. It may be called once.
func (k *Killer) Stop() {
	close(k.quit)
	<-k.done
}
