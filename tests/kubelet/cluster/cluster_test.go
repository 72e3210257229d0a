package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

// What users do, with a runtime that nobody disturbs: and then nothing has gone wrong.
func TestCluster(t *testing.T) {
	c := startCluster(t, harness.New(t))
	c.runRows()
	c.drain()
	c.removeSpaces()
	c.finish()
}

// The same with a runtime that is killed every ten seconds: nothing of it is to be seen.
func TestClusterWhileTheRuntimeIsKilled(t *testing.T) {
	n := harness.New(t)
	drill := harness.Drill(t, "cluster")
	c := startCluster(t, n)
	c.killing = true
	killer := machine.KillRuntime(t, n, 10*time.Second)
	stop := sync.OnceFunc(func() {
		killer.Stop()
		drill.Kills(killer.Kills())
	})
	t.Cleanup(stop)
	c.runRows()
	c.drain()
	c.removeSpaces()
	stop()
	c.finish()
}

// runRows does all rows at a time.
func (c *cluster) runRows() {
	c.t.Helper()
	layer, err := harness.BoxLayer()
	if err == nil {
		config := ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}
		_, err = c.n.Registry.Push(newImage, config, layer)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.startMetrics()
	c.t.Run("rows", func(t *testing.T) {
		for _, r := range rows {
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				begin := time.Now()
				c := c.with(t)
				c.space = r.name
				c.makeSpace()
				c.apply(r.manifests)
				r.check(c)
				t.Logf("%s after %v", r.name, time.Since(begin).Round(time.Second))
			})
		}
	})
}

// drain takes all pods off the node, but for those of a DaemonSet, and lets them come
// again.
func (c *cluster) drain() {
	c.t.Helper()
	begin := time.Now()
	c.kubectl("drain", machine.NodeName, "--ignore-daemonsets", "--delete-emptydir-data", "--force",
		fmt.Sprintf("--timeout=%v", patience))
	var list core.PodList
	if err := c.get("/api/v1/pods", &list); err != nil {
		c.t.Fatal(err)
	}
	for _, p := range list.Items {
		if p.Spec.NodeName != "" && p.Namespace != "daemonset" && p.Status.Phase == core.PodRunning {
			c.t.Errorf("%s/%s still runs on the node", p.Namespace, p.Name)
		}
	}
	c.kubectl("uncordon", machine.NodeName)
	for space, object := range map[string]string{
		"deployment": "deployment/web", "statefulset": "statefulset/db", "daemonset": "daemonset/agent",
	} {
		c := c.with(c.t)
		c.space = space
		c.rollout(object)
	}
	c.t.Logf("drained and back again after %v", time.Since(begin).Round(time.Second))
}

// removeSpaces removes the namespaces of all rows, and with them all pods.
func (c *cluster) removeSpaces() {
	c.t.Helper()
	args := []string{"delete", "namespace", "--ignore-not-found", fmt.Sprintf("--timeout=%v", patience)}
	for _, r := range rows {
		args = append(args, r.name)
	}
	c.kubectl(args...)
	c.until("the runtime has no pods", func() bool {
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := c.n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		return err == nil && len(r.Items) == 0
	})
}

// finish looks at what has happened, and at what is left on the machine: nothing.
func (c *cluster) finish() {
	c.t.Helper()
	if faults := c.seen.faults(); len(faults) > 0 {
		c.t.Errorf("%d faults:\n%s", len(faults), strings.Join(faults, "\n"))
	}
	lines, transient := c.seen.complaints(c.killing)
	if len(lines) > 0 {
		c.t.Errorf("%d complaints in the events:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	if len(transient) > 0 {
		c.t.Logf("%d warnings while the runtime was gone:\n%s", len(transient), strings.Join(transient, "\n"))
	}
	c.stop()
	ctx, cancel := harness.Deadline()
	defer cancel()
	image := &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: newImage}}
	if _, err := c.n.Images.RemoveImage(ctx, image); err != nil {
		c.t.Errorf("RemoveImage: %v", err)
	}
	machine.RemoveCgroups(c.n)
	if c.killing { // a token whose request died with the runtime stays until a later one finds it expired
		if err := os.RemoveAll(filepath.Join(c.n.State, "stream/tokens")); err != nil {
			c.t.Error(err)
		}
	}
	c.n.CheckClean()
}
